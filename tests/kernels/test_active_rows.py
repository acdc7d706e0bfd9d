"""The product that reads rows of active units against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.active_rows import active_rows, reference
from tests.kernels.few_rows import STORAGE, Draw, close, compiled, implementation


@pytest.fixture(params=["xla", "native", "pallas_tpu_interpret"])
def apply(request):
    return compiled(active_rows, implementation(request.param))


@pytest.mark.parametrize(
    ("storage", "m", "sizes"), zip(STORAGE, (1, 3, 8), ((101, 37), (160, 24), (64, 24)), strict=True)
)
def test_is_the_definition(apply, storage, m, sizes):
    draw = Draw(storage)
    hidden, (w, scale) = draw.tokens(m, sizes[0]), draw.weights(*sizes)
    hidden = jnp.where(hidden > 0.8, hidden, 0).at[:, 7].set(-1.0)  # units may be below 0
    assert (hidden != 0).sum(-1).min() > 5
    close(apply(hidden, w, scale), jax.jit(reference)(hidden, w, scale))


def test_rows_of_inactive_units_do_not_matter(apply):
    draw = Draw("float32")
    w, _ = draw.weights(64, 24)
    hidden = jnp.zeros((2, 64)).at[0, 40].set(2.0).at[1, 63].set(-1.0)
    # Of a TPU's tile of eight rows all are multiplied.
    lost = w.at[:32].set(jnp.nan)
    np.testing.assert_allclose(apply(hidden, lost), jnp.stack([2 * w[40], -w[63]]), rtol=1e-6)
    np.testing.assert_array_equal(apply(0 * hidden, jnp.full_like(w, jnp.nan)), 0)


def test_a_token_has_the_same_alone_as_among_others():
    """Natively to the bit: how sums are cut does not depend on which units are active."""
    implementation("native")
    draw = Draw("bfloat16")
    hidden, (w, _) = draw.tokens(5, 640), draw.weights(640, 48)
    hidden = jnp.where(hidden > 1, hidden, 0)
    together = active_rows(hidden, w, implementation="native")
    for row, expected in zip(hidden, together, strict=True):
        np.testing.assert_array_equal(active_rows(row[None], w, implementation="native")[0], expected)


def test_wrong_shapes():
    with pytest.raises(ConfigError, match=r"active_rows.w=\(9, 4\): must be \(8, 4\)"):
        active_rows(jnp.zeros((2, 8)), jnp.zeros((9, 4)))
    with pytest.raises(ConfigError, match=r"active_rows.w's scale=None: must be \(8,\) for int8"):
        active_rows(jnp.zeros((2, 8)), jnp.zeros((8, 4), jnp.int8))
