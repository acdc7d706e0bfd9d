"""The gated layer of a few tokens without the neurons of small gates, against its definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.thresholded_ffn import reference, thresholded_ffn_rows
from tests.kernels.few_rows import Draw, close, compiled, implementation, rounds


@pytest.fixture(params=["xla", "native"])
def apply(request):
    return compiled(thresholded_ffn_rows, implementation(request.param))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "m", "sizes", "activation"), [("bfloat16", 3, (37, 101), "silu"), ("int8", 8, (24, 64), "gelu_tanh")]
)
def test_is_the_definition(request, apply, storage, m, sizes, activation):
    (d, neurons), draw = sizes, Draw(storage)
    x, (gate, s1), (up, s2), (down, s3) = draw.tokens(m, d), *(draw.weights(neurons, d) for _ in range(3))
    rows, scale = jnp.concatenate([up, down], axis=1), None if s2 is None else jnp.stack([s2, s3], axis=1)
    form = {"activation": activation, "scales": (s1, scale)}
    # No gate is so near the threshold that rounding decides on it.
    y, active = apply(x, gate, rows, jnp.float32(0.1), **form)
    expected, expected_active = jax.jit(partial(reference, activation=activation))(
        x, gate, rows, jnp.float32(0.1), scales=(s1, scale)
    )
    close(y, expected, rounds(request, storage))
    np.testing.assert_array_equal(active, expected_active)
    assert active.min() > 0
    assert active.max() < neurons


def test_negative_gates_count_by_their_magnitude_and_equal_ones_do_not(apply):
    """SiLU has gates from -0.28 on."""
    gate = jnp.asarray([[2.0], [-1.0], [0.1], [0.0]])
    values = np.asarray(jax.nn.silu(gate[:, 0]))
    y, active = apply(jnp.ones((1, 1)), gate, jnp.ones((4, 2)), jnp.float32(0.2), activation="silu")
    assert active.tolist() == [2]
    np.testing.assert_allclose(y, [[values[0] + values[1]]], rtol=1e-5)
    relu = jnp.asarray([[0.5], [-0.5], [0.25], [0.125]])
    y, active = apply(jnp.ones((1, 1)), relu, jnp.ones((4, 2)), jnp.float32(0.25), activation="relu")
    assert active.tolist() == [1]
    np.testing.assert_allclose(y, [[0.5]], rtol=1e-6)


def test_wrong_arguments():
    x, gate = jnp.zeros((2, 8)), jnp.zeros((16, 8))
    with pytest.raises(ConfigError, match=r"thresholded_ffn_rows.rows=\(16, 8\): must be \(16, 16\)"):
        thresholded_ffn_rows(x, gate, gate, jnp.float32(0), activation="silu")
    with pytest.raises(ConfigError, match=r"thresholded_ffn_rows.activation=tanh: must be one of"):
        thresholded_ffn_rows(x, gate, jnp.zeros((16, 16)), jnp.float32(0), activation="tanh")
