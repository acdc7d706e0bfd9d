"""Rows of active neurons for many tokens, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.token_rows import MOST_DENSITY, most_density, reference, token_rows
from tests.kernels.few_rows import STORAGE, Draw, close, compiled, implementation, rounds

#: Tokens, neurons, width of what is gated, model width: groups and blocks that end in a part, and one of each.
SHAPES = [(1, 1, 1, 1), (37, 150, 25, 41), (67, 64, 16, 33), (300, 70, 8, 16)]


def arrays(storage, shape, gated, density=0.1):
    tokens, neurons, width, d = shape
    draw = Draw(storage)
    active = draw.rng.random((tokens, neurons)) < density
    active[::5] = False  # tokens without any active neuron
    gates = jnp.where(active, draw.tokens(tokens, neurons), 0).astype(draw.tokens_dtype)
    last, scale = draw.weights(neurons, d)
    if not gated:
        return None, gates, last, scale
    first, first_scale = draw.weights(neurons, width)
    scales = None if scale is None else jnp.stack([first_scale, scale], axis=-1)
    return draw.tokens(tokens, width), gates, jnp.concatenate([first, last], axis=1), scales


@pytest.mark.parametrize("form", ["xla", "native"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("storage", STORAGE)
def test_all_forms_agree(request, form, storage, gated):
    for shape in SHAPES:
        given = arrays(storage, shape, gated)
        close(
            compiled(token_rows, implementation(form))(*given, density=0.1), reference(*given), rounds(request, storage)
        )


@pytest.mark.parametrize("density", [MOST_DENSITY / 2, 2 * MOST_DENSITY])
def test_density_that_is_counted(density):
    """Few active neurons and many: both branches are one operation."""
    given = arrays("float32", SHAPES[1], True, density)
    text = compiled(token_rows, implementation("native")).lower(*given).as_text()
    assert "sparsezoo_token_rows" in text
    assert "sparsezoo_gemm" in text
    close(compiled(token_rows, "native")(*given), reference(*given))


@pytest.mark.parametrize(("density", "operation"), [(MOST_DENSITY, "token_rows"), (MOST_DENSITY + 0.01, "gemm")])
def test_density_that_is_known(density, operation):
    given = arrays("float32", SHAPES[1], True)
    text = compiled(token_rows, implementation("native")).lower(*given, density=density).as_text()
    assert [name for name in ("token_rows", "gemm") if f"sparsezoo_{name}" in text] == [operation]


def test_a_token_has_the_same_result_in_any_company():
    """Sums are made in the order of the neurons, whatever group a token is in."""
    x, gates, rows, scale = arrays("float32", SHAPES[3], True)
    form = jax.jit(lambda *a: token_rows(*a, density=0.1, implementation=implementation("native")))
    together = np.asarray(form(x, gates, rows, scale))
    for n in (1, 7, 33):
        np.testing.assert_array_equal(np.asarray(form(x[-n:], gates[-n:], rows, scale)), together[-n:])


def test_the_limit_follows_the_processor(monkeypatch):
    monkeypatch.setattr("sparsezoo_jax.native.level", lambda: "v4_bf16")
    monkeypatch.setattr("sparsezoo_jax.native.available", lambda: True)
    assert most_density(jnp.bfloat16) < most_density(jnp.float32) == MOST_DENSITY


def test_bad_input():
    x, gates, rows, _ = arrays("float32", SHAPES[1], True)
    with pytest.raises(ConfigError, match=r"token_rows.x=\(36, 25\): must be \(37, 25\)"):
        token_rows(x[1:], gates, rows)
    with pytest.raises(ConfigError, match=r"token_rows.rows=\(149, 66\): must be \[F, U \+ D\] for 150 neurons"):
        token_rows(x, gates, rows[1:])
    with pytest.raises(ConfigError, match=r"token_rows.implementation=native: gates is int32"):
        token_rows(x, gates.astype(jnp.int32), rows, implementation="native")
