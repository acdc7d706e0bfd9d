"""Delta feed-forward networks that decode by what changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.inference import Engine, Sampling, packed
from sparsezoo_jax.inference.delta import READ, READ_INPUTS, Reference, product_by_changes
from sparsezoo_jax.inference.matrices import Rows
from sparsezoo_jax.models.delta_ffn import CHANGED
from tests.models.conftest import CONFIGS, build

CHANNELS, OUTPUTS = 40, 24
STEPS = 0.1 * (1 + jax.random.uniform(jax.random.key(0), (CHANNELS,)))
W = jax.random.normal(jax.random.key(1), (CHANNELS, OUTPUTS))


def walk(length, rows=1, share=0.2):
    """Rounded activations [rows, length, C] of which a share is drawn anew at each time."""
    rng = np.random.default_rng(0)
    counts = np.zeros((rows, length, CHANNELS), np.int32)
    for t in range(length):
        moves = rng.random((rows, CHANNELS)) < (1 if t == 0 else share)
        counts[:, t] = np.where(moves, rng.integers(1, 9, (rows, CHANNELS)), counts[:, t - 1])
    return counts, jnp.asarray(counts) * STEPS


@jax.jit
def step(counts, kept, valid):
    """Rounded in the same program, as in a layer: the compiler may fuse the product with what follows."""
    return product_by_changes(counts * STEPS, Rows(W, "float32", jnp.dtype("float32")), kept, valid)


def start(rows=1):
    return Reference.empty(rows, Rows(W, "float32", jnp.dtype("float32")))


def test_products_are_those_of_the_whole_input_and_read_what_changed():
    counts, x = walk(30, rows=2)

    def each(kept, counts_RC):
        y, kept, read = step(counts_RC[:, None], kept, jnp.ones((2, 1), bool))
        return kept, (y, read)

    # In one program, where the compiler is freest to fuse one with the other.
    kept, found = jax.lax.scan(each, start(2), jnp.asarray(counts).swapaxes(0, 1))
    for t, (y, read) in enumerate(zip(*found, strict=True)):
        # 25 sums of 40 products of about 0.5 lie within a few units in the last place of values of about 10.
        np.testing.assert_allclose(y[:, 0], x[:, t] @ W, atol=1e-5)
        changed = np.any(counts[:, t] != counts[:, t - 1], axis=0) if t else np.ones(CHANNELS, bool)
        assert float(read) == pytest.approx(changed.mean())
    np.testing.assert_array_equal(kept.sums_B1, [[29], [29]])


def test_a_chunk_and_its_padding():
    """Tokens of a chunk are found from what was kept before it; then the last one that is no padding is kept."""
    counts, x = walk(6)
    _, kept, _ = step(counts[:, :1], start(), jnp.ones((1, 1), bool))
    y, kept, _ = step(counts[:, 1:5], kept, jnp.array([[True, True, True, False]]))
    np.testing.assert_allclose(y[0], x[0, 1:5] @ W, atol=1e-5)
    np.testing.assert_array_equal(kept.input_BC[0], x[0, 3])
    y, _, _ = step(counts[:, 5:], kept, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(y[0], x[0, 5:] @ W, atol=1e-5)


def test_what_is_0_is_not_subtracted():
    """Where fewer channels are not 0 than changed, the product is made anew."""
    counts, _ = walk(1)
    few = np.where(np.arange(CHANNELS) < 3, 2, 0)[None, None]
    _, kept, _ = step(counts, start(), jnp.ones((1, 1), bool))
    y, kept, read = step(few, kept, jnp.ones((1, 1), bool))
    assert float(read) == pytest.approx(3 / CHANNELS)
    assert int(kept.sums_B1[0, 0]) == 0
    np.testing.assert_allclose(y[0, 0], few[0, 0] * STEPS @ W, atol=1e-6)


def test_products_are_made_anew_after_so_many_sums():
    _, x = walk(8)
    kept, sums, reads = start(), [], []
    anew = jax.jit(lambda x, *args: product_by_changes(x, Rows(W, "float32", jnp.dtype("float32")), *args, refresh=3))
    for t in range(8):
        _, kept, read = anew(x[:, t : t + 1], kept, jnp.ones((1, 1), bool))
        sums.append(int(kept.sums_B1[0, 0]))
        reads.append(float(read))
    assert sums == [0, 1, 2, 3, 0, 1, 2, 3]
    assert reads[0] == reads[4] == 1


def test_many_tokens_keep_nothing():
    counts, x = walk(40)
    y, kept, read = step(counts, start(), jnp.ones((1, 40), bool))
    np.testing.assert_allclose(y[0], x[0] @ W, atol=1e-5)
    assert float(read) == 1
    assert not any(np.any(part) for part in kept)


@pytest.fixture(scope="module")
def engine():
    return Engine(packed(build(CONFIGS["delta"])))


PROMPT = [5, 17, 3, 3, 44, 17, 3]


def text(engine, prompts=(PROMPT,), **options):
    generation = engine.generate(list(prompts), max_new_tokens=12, sampling=Sampling(temperature=0), **options)
    for _ in generation:
        pass
    return generation


def test_what_is_kept_may_be_of_a_rejected_draft(engine):
    assert text(engine, drafts=4).rows == text(engine).rows


def test_generation_counts_the_rows_it_reads(engine):
    means = text(engine).stats.layer_means()
    assert set(means) >= {READ, READ_INPUTS, "ffn_density"}
    for name in (READ, READ_INPUTS):
        assert ((means[name] > 0) & (means[name] < 1)).all()
    block = engine.model.segments[0].blocks[0].ffn
    whole, read = block.bytes_read(1.0), block.bytes_of({READ: 0.25, READ_INPUTS: 0.5, "ffn_density": 1.0})
    # Rows of 2 x 32 and of 24 numbers; steps of 24 and 32 channels.
    assert whole - read == 4 * (24 * 64 / 2 + 32 * 24 * 3 / 4)
    assert whole == 4 * (24 * 64 + 32 * 24 + 24 + 32)
    assert block.bytes_of({"ffn_density": 0.5, CHANGED: 0.1}) == whole - 4 * 32 * 12
