"""Which product weights laid out for decoding are multiplied by, and that all give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import native
from sparsezoo_jax.inference import matrices
from sparsezoo_jax.inference.generation import padded_length
from sparsezoo_jax.inference.matrices import Rows
from tests.kernels.few_rows import STORAGE, implementation

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def close(ours, expected, tolerance=1e-5):
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("form", STORAGE)
@pytest.mark.parametrize("shape", [(2, 5), (17, 1), (3, 40)])
def test_products_are_those_of_the_restored_weights(form, shape):
    implementation("native")
    tolerance = 3e-4 if form == "int8" else 1e-5  # for tokens that are rounded to 16 bits
    one = Rows(draw(30, 20), form, jnp.dtype(jnp.float32))
    close(one.product(x := draw(*shape, 20)), x @ one.restored().T, tolerance)
    close(one.combination(x := draw(*shape, 30)), x @ one.restored(), tolerance)
    two = Rows((draw(30, 12), draw(30, 7)), form, jnp.dtype(jnp.float32))
    first, second = two.parts()
    close(two.first_product(x := draw(*shape, 12)), x @ first.T, tolerance)
    close(two.second_combination(x := draw(*shape, 30)), x @ second, tolerance)


def used(rows, *shape, dtype=jnp.float32):
    text = jax.jit(rows.product).lower(jnp.ones(shape, dtype)).as_text()
    return next((name for name in ("gemm", "linear") if f"sparsezoo_{name}" in text), "xla")


def test_one_sequence_is_decoded_by_rows_and_a_prompt_or_a_batch_by_tiles(monkeypatch):
    implementation("native")
    rows = Rows(draw(30, 20), "model", jnp.dtype(jnp.float32))
    assert used(rows, 1, 1, 20) == used(rows, 12, 1, 20) == "linear"
    assert used(rows, 1, 16, 20) == "linear", "drafts are judged by the numbers of single tokens"
    assert used(rows, 1, 17, 20) == used(rows, 13, 1, 20) == "gemm"
    monkeypatch.setattr(native, "level", lambda: "v4_bf16")
    assert used(rows, 13, 1, 20) == "gemm"
    assert used(rows, 16, 1, 20, dtype=jnp.bfloat16) == "linear", "pairs are multiplied as they are"
    assert used(rows, 17, 1, 20, dtype=jnp.bfloat16) == "gemm"


def test_bfloat16_is_left_to_xla_where_it_has_units_for_it(monkeypatch):
    implementation("native")
    monkeypatch.setattr(native, "matrix_units", lambda: True)
    rows = Rows(draw(30, 20), "bfloat16", jnp.dtype(jnp.bfloat16))
    assert used(rows, 1, 17, 20, dtype=jnp.bfloat16) == "xla"
    assert used(rows, 1, 17, 20) == "gemm"


def test_without_the_library_a_batch_is_multiplied_by_xla(monkeypatch):
    library = native._Library()
    library.missing = "it was not built"
    monkeypatch.setattr(native, "_library", lambda: library)
    rows = Rows(draw(30, 20), "int8", jnp.dtype(jnp.float32))
    assert not matrices.many_sequences(jnp.ones((64, 1, 20)))
    assert used(rows, 13, 1, 20) == used(rows, 1, 17, 20) == "xla"
    close(rows.product(x := draw(1, 40, 20)), x @ rows.restored().T)


def test_prompts_are_padded_by_at_most_a_ninth_on_a_cpu():
    lengths = range(1, 4100)
    padded = [padded_length(length, "cpu") for length in lengths]
    for length, found in zip(lengths, padded, strict=True):
        assert length <= found <= max(16 * -(-length // 16), length * 9 / 8)
    assert len(set(padded[1024:2048])) == 8, "programs from one power of two to the next"
    assert padded[128:131] == [144, 144, 144]
    assert [padded_length(length, "tpu") for length in (1, 17, 129, 256)] == [2, 32, 256, 256]
