"""The sparse ReLU layer of a few tokens against its definition, and against the form that is trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.relu_ffn import relu_ffn
from sparsezoo_jax.pallas_kernels.relu_ffn.rows import reference, relu_ffn_rows
from tests.kernels.few_rows import Draw, close, compiled, implementation, rounds

FORMS = [
    (name, gated)
    for name in ("xla", "native", "pallas_gpu_interpret", "pallas_tpu_interpret")
    for gated in (True, False)
    if gated or "gpu" not in name
]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{'gated' if form[1] else 'plain'}")
def form(request):
    name, gated = request.param
    return compiled(relu_ffn_rows, implementation(name)), gated


def layer(draw, d, neurons, gated):
    """The map before the ReLU, the other rows, and their factors."""
    (first, first_scale), (down, down_scale) = draw.weights(neurons, d), draw.weights(neurons, d)
    if not gated:
        return (first, down), (first_scale, down_scale)
    up, up_scale = draw.weights(neurons, d)
    scale = None if up_scale is None else jnp.stack([up_scale, down_scale], axis=1)
    return (first, jnp.concatenate([up, down], axis=1)), (first_scale, scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "m", "sizes", "threshold"), [("bfloat16", 3, (37, 101), 0.0), ("int8", 8, (24, 64), 0.5)]
)
def test_is_the_definition(request, form, storage, m, sizes, threshold):
    (apply, gated), draw = form, Draw(storage)
    x, (weights, scales) = draw.tokens(m, sizes[0]), layer(draw, *sizes, gated)
    y, active = apply(x, *weights, scales=scales, threshold=threshold)
    expected, expected_active = jax.jit(partial(reference, threshold=threshold))(x, *weights, scales=scales)
    close(y, expected, rounds(request, storage))
    np.testing.assert_array_equal(active, expected_active)


def test_is_the_form_that_is_trained(form):
    (apply, gated), draw = form, Draw("float32")
    x, ((first, rows), _) = draw.tokens(2, 24), layer(draw, 24, 60, gated)
    first = first.at[:50].set(-jnp.abs(first[:50]))
    x = jnp.abs(x).at[0].multiply(-1)  # the first token fires, the second has 10 neurons at most
    y, active = apply(x, first, rows)
    gate, up = (first.T, rows[:, :24].T) if gated else (None, first.T)
    expected = jax.jit(relu_ffn)(x[None], gate, up, rows[:, -24:], jnp.ones((1, 2), bool))
    close(y, expected.y[0])
    np.testing.assert_array_equal(active, expected.active[0])
    assert active[0] >= 50
    assert active[1] <= 10
    y, active = apply(jnp.abs(x), -jnp.abs(first), rows)  # no neuron of any token fires
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(active, 0)


def test_a_gate_at_its_threshold_counts(form):
    (apply, gated), first = form, jnp.asarray([[0.1], [np.nextafter(np.float32(0.1), 0)], [-0.1], [0.3]], jnp.float32)
    rows = jnp.ones((4, 2 if gated else 1))
    y, active = apply(jnp.ones((1, 1)), first, rows, threshold=0.1)
    np.testing.assert_allclose(y, [[0.4]], rtol=1e-6)
    assert active.tolist() == [2]


def test_wrong_shapes():
    x, first = jnp.zeros((2, 8)), jnp.zeros((16, 8))
    with pytest.raises(ConfigError, match=r"relu_ffn_rows.rows=\(16, 9\): must be \(16, 8\) or \(16, 16\)"):
        relu_ffn_rows(x, first, jnp.zeros((16, 9)))
    with pytest.raises(ConfigError, match=r"relu_ffn_rows.first=\(16, 9\): must be \[F, 8\] for x"):
        relu_ffn_rows(x, jnp.zeros((16, 9)), jnp.zeros((16, 8)))
    with pytest.raises(ConfigError, match=r"relu_ffn_rows.threshold=-1: must be at least 0"):
        relu_ffn_rows(x, first, jnp.zeros((16, 8)), threshold=-1)
    with pytest.raises(ConfigError, match='takes layers with a gate only; use "xla"'):
        relu_ffn_rows(x, first, jnp.zeros((16, 8)), implementation="pallas_gpu_interpret")
