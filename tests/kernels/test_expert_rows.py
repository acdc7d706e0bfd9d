"""Maps of experts by the rows that masks leave, against their definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.expert_rows import expert_products, expert_rows
from tests.kernels.few_rows import STORAGE, Draw, close, compiled, implementation, rounds

SIZES = [(1, 3, 101, 37), (2, 3, 150, 1300), (3, 4, 160, 24)]
"""Inputs, results of each, channels and outputs; of the second the outputs are cut into pieces."""
OUT_OF = 6
"""Experts."""


def drawn(draw, m, each, channels):
    """Inputs with zeros, and experts: one that several inputs take, one that is taken twice, and numbers of none."""
    x = draw.tokens(m, channels)
    experts = np.asarray(draw.rng.integers(0, OUT_OF, m * each), np.int32)
    experts[: min(m * each, 3)] = [4, -1, 4]
    return jnp.where(x > 0.5, x, 0).at[:, 7].set(-1.0), jnp.asarray(experts)


def definition(x, experts, w, scale, products):
    """In NumPy, [P, O] in float64."""
    w = np.asarray(w.astype(jnp.float32), np.float64)
    w = w if scale is None else w * np.asarray(scale, np.float64)[..., None]
    x, form = np.asarray(x.astype(jnp.float32), np.float64), "i,oi->o" if products else "i,io->o"
    each = len(experts) // len(x)
    outputs = w.shape[1] if products else w.shape[2]
    return np.stack(
        [np.einsum(form, x[p // each], w[e]) if 0 <= e < len(w) else np.zeros(outputs) for p, e in enumerate(experts)]
    )


@pytest.fixture(params=["xla", "native"])
def form(request):
    return implementation(request.param)


@pytest.mark.parametrize(("storage", "size"), [(storage, size) for storage in STORAGE for size in SIZES])
def test_sums_are_those_of_each_experts_rows(request, form, storage, size):
    m, each, channels, outputs = size
    draw = Draw(storage)
    x, experts = drawn(draw, m, each, channels)
    w, scale = draw.weights(OUT_OF, channels, outputs)
    expected = definition(x, experts, w, scale, False)
    close(compiled(expert_rows, form)(x, experts, w, scale), jnp.asarray(expected, x.dtype), rounds(request, storage))


@pytest.mark.parametrize(("storage", "size"), [(storage, size) for storage in STORAGE for size in SIZES])
def test_products_are_those_that_are_needed(request, form, storage, size):
    m, each, channels, outputs = size
    draw = Draw(storage)
    x, experts = drawn(draw, m, each, channels)
    w, scale = draw.weights(OUT_OF, outputs, channels)
    needed = draw.tokens(m * each, outputs)
    needed = jnp.where(needed > 0.3, needed, 0)
    expected = np.where(np.asarray(needed) != 0, definition(x, experts, w, scale, True), 0)
    found = compiled(expert_products, form)(x, experts, needed, w, scale)
    close(found, jnp.asarray(expected, x.dtype), rounds(request, storage))


def test_no_other_rows_are_read():
    """Natively: rows that are lost are those of other experts, of channels that are 0 and of outputs not needed."""
    implementation("native")
    draw = Draw("float32")
    w, _ = draw.weights(3, 8, 70)
    lost = jnp.full_like(w, jnp.nan).at[1, 2].set(w[1, 2]).at[1, 5].set(w[1, 5])
    x = jnp.zeros((2, 8)).at[0, 2].set(2.0).at[1, 5].set(-1.0)
    found = expert_rows(x, jnp.array([1, 1], jnp.int32), lost, implementation="native")
    np.testing.assert_allclose(found, jnp.stack([2 * w[1, 2], -w[1, 5]]), rtol=1e-6)
    tokens, needed = draw.tokens(2, 70), x
    found = expert_products(tokens, jnp.array([1, 1], jnp.int32), needed, lost, implementation="native")
    expected = jnp.zeros((2, 8)).at[0, 2].set(tokens[0] @ w[1, 2]).at[1, 5].set(tokens[1] @ w[1, 5])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("storage", STORAGE)
def test_an_input_has_the_same_alone_as_among_others(storage):
    """Natively to the bit: neither other inputs of its expert nor the pieces of a matrix change a sum."""
    implementation("native")
    draw = Draw(storage)
    x, experts = drawn(draw, 5, 1, 640)
    experts = experts.at[3].set(4)
    for operation, shape in ((expert_rows, (640, 1100)), (expert_products, (1100, 640))):
        w, scale = draw.weights(OUT_OF, *shape)
        needed = () if operation is expert_rows else (jnp.asarray(draw.rng.integers(0, 2, (5, 1100)), x.dtype),)
        together = operation(x, experts, *needed, w, scale, implementation="native")
        for p in range(5):
            one = [array[p : p + 1] for array in (x, experts, *needed)]
            np.testing.assert_array_equal(operation(*one, w, scale, implementation="native")[0], together[p])


def test_what_does_not_fit_is_named():
    x, experts, w = jnp.zeros((2, 8)), jnp.zeros(4, jnp.int32), jnp.zeros((3, 8, 5))
    with pytest.raises(ConfigError, match=r"expert_rows.experts=\(3,\): must be some for each of the inputs \(2, 8\)"):
        expert_rows(x, experts[:3], w)
    with pytest.raises(ConfigError, match=r"expert_rows.w=\(3, 7, 5\): must be \(3, 8, 5\)"):
        expert_rows(x, experts, w[:, 1:])
    with pytest.raises(ConfigError, match=r"expert_rows.experts=int16: must be int32"):
        expert_rows(x, experts.astype(jnp.int16), w)
    with pytest.raises(ConfigError, match=r"expert_products.needed=\(4, 5\): must be \(4, 7\)"):
        expert_products(x, experts, jnp.zeros((4, 5)), jnp.zeros((3, 7, 8)))
