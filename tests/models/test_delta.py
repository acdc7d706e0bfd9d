"""Delta activations: rounding with its gradients, changes, levels, and the loss of a feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.common import BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.delta import DeltaActivation, DeltaConfig, change, round_to_steps, spike_loss, spikes
from sparsezoo_jax.models.delta_ffn import CHANGED, CHANGED_INPUTS, DELTA_SPIKES, DeltaFFNConfig


def test_rounding_and_its_gradients():
    x = jnp.array([[0.2, -0.9], [1.3, 0.26]])
    step = jnp.array([0.1, 0.5])
    upstream = jnp.array([[1.0, 2.0], [-3.0, 5.0]])
    y, back = jax.vjp(round_to_steps, x, step)
    np.testing.assert_allclose(y, [[0.2, -1.0], [1.3, 0.5]], rtol=1e-6)  # 2 and -2 steps, 13 and 1
    to_x, to_step = back(upstream)
    np.testing.assert_array_equal(to_x, upstream)
    np.testing.assert_allclose(to_step, [-(2 * 1 + 13 * -3), -(-2 * 2 + 1 * 5)])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1)], ids=str)
def test_gradients_of_steps_that_are_shared(shape):
    x = jax.random.normal(jax.random.key(0), (4, 5, 2, 3))
    step = 0.1 + jax.random.uniform(jax.random.key(1), shape)
    found = jax.grad(lambda step: jnp.sum(round_to_steps(x, step)))(step)
    counts = jnp.round(x / step)
    expected = -jax.grad(lambda step: jnp.sum(counts * step))(step)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_step_of_zero_is_no_division_by_it():
    y, back = jax.vjp(round_to_steps, jnp.array([0.5, -0.25]), jnp.float32(0.0))
    np.testing.assert_allclose(y, [0.5, -0.25], rtol=1e-5)
    assert all(np.isfinite(part).all() for part in back(jnp.ones(2)))


def test_the_loss_of_changes_makes_steps_longer_and_a_task_shorter():
    """By descent: gradients to the step are below 0 where anything changes, and above 0 for too small an output."""
    x = jnp.array([[[0.34], [0.71], [0.12]]])

    def loss(step):
        return spikes(round_to_steps(x, step)).size

    assert float(jax.grad(loss)(jnp.float32(0.1))) == pytest.approx(-(4 + 6) / 2)  # counts 3, 7, 1
    shrinks = jax.grad(lambda step: -jnp.sum(round_to_steps(x, step)))(jnp.float32(0.1))
    assert float(shrinks) == pytest.approx(11)


def test_spikes_leave_out_first_times_and_other_documents():
    x = jnp.array([[[1.0, 0.0], [1.0, 2.0], [5.0, 2.0], [5.0, 3.0]]])
    whole = spikes(x)
    assert (float(whole.size), float(whole.density)) == pytest.approx((7 / 6, 3 / 6))
    pairs = jnp.array([[False, True, False, True]])  # a new document begins at the third
    apart = spikes(x, pairs)
    assert (float(apart.size), float(apart.density)) == pytest.approx((3 / 4, 2 / 4))
    np.testing.assert_array_equal(change(x, pairs)[0], [[0, 0], [0, 2], [0, 0], [0, 1]])
    alone = spikes(x[:, :1])
    assert (float(alone.size), float(alone.density)) == (0, 0)
    assert float(spike_loss(whole, 10)) == pytest.approx(10 * 7 / 6)


def test_what_stays_the_same_is_no_change_when_compiled():
    """A fused multiply-subtract would leave of equal products what rounding cut off."""
    still = jnp.repeat(jax.random.uniform(jax.random.key(0), (4, 5, 64)), 5, axis=1)
    step = 0.1 * (1 + jax.random.uniform(jax.random.key(1), (64,)))
    counts = jnp.round(still / step)
    expected = jnp.mean(counts[:, 1:] != counts[:, :-1])
    found, density = jax.jit(lambda x: (change(round_to_steps(x, step)), spikes(round_to_steps(x, step)).density))(
        still
    )
    assert np.mean(np.asarray(found)[:, 1:] != 0) == pytest.approx(float(expected))
    assert float(density) == pytest.approx(float(expected))


CLIP = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 6, 3)), jnp.float32)


def layer(**config):
    return DeltaActivation((4, 6, 3), DeltaConfig(**config))


def test_levels_of_a_clip():
    states = layer(step_init=0.25).__call__(CLIP).x
    np.testing.assert_allclose(states, jnp.round(jax.nn.relu(CLIP) / 0.25) * 0.25)
    changes = layer(step_init=0.25, level=1)(CLIP).x
    np.testing.assert_allclose(jnp.cumsum(changes, axis=1), states, atol=1e-6)
    blind = layer(step_init=0.25, level=2)(CLIP).x
    np.testing.assert_allclose(blind[:, 1:], changes[:, 1:])
    np.testing.assert_allclose(blind[:, 0], changes[:, 1])


def test_changes_summed_up_are_the_clip():
    """A layer that gives out changes, a linear map without bias, and one that sums up compute what states would."""
    first = DeltaActivation((3,), DeltaConfig(level=1))
    w = jax.random.normal(jax.random.key(0), (3, 5))
    second = DeltaActivation((5,), DeltaConfig(cumulative=True, bias=True))
    plain = DeltaActivation((5,), DeltaConfig(bias=True))
    for each in (second, plain):
        assert each.bias is not None
        each.bias[...] = jnp.linspace(-1, 1, 5) + 0.03  # off the half steps, where sums round either way
    x = jnp.round(16 * CLIP[:, :, 0, 0]) / 16
    states = DeltaActivation((3,), DeltaConfig())(x).x
    np.testing.assert_allclose(second(first(x).x @ w).x, plain(states @ w).x, atol=1e-5)


def test_pooling_and_its_spikes():
    found = layer(pool=2)(CLIP)
    rounded = layer()(CLIP).x
    expected = rounded.reshape(2, 4, 2, 2, 3, 2, 3).max(axis=(3, 5))
    np.testing.assert_array_equal(found.x, expected)
    assert float(found.spikes.density) == pytest.approx(float(jnp.mean(expected[:, 1:] != expected[:, :-1])))


@pytest.mark.parametrize(("per", "shape"), [("channel", (3,)), ("neuron", (4, 6, 3)), ("layer", ())])
def test_what_has_a_step(per, shape):
    assert layer(step_per=per).step.shape == shape
    assert layer(step_per=per)(CLIP).x.shape == CLIP.shape


def test_refused():
    with pytest.raises(ConfigError, match="pool=1: must be above 1, or None"):
        DeltaConfig(pool=1)
    with pytest.raises(ConfigError, match=r"model\.ffn\.step_init=0\.0: must be above 0"):
        DeltaFFNConfig(d_ff=8, step_init=0.0)


def ffn(**config) -> Any:
    ctx = BuildContext(6, 3, InitConfig(), jnp.dtype("float32"), jnp.dtype("float32"), first_layers=1)
    return DeltaFFNConfig(d_ff=8, **config).build(ctx, nnx.Rngs(0))


SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
TOKENS = jax.random.normal(jax.random.key(3), (2, 6, 6))


def call(module, x=TOKENS):
    return module(x, CallContext(jnp.zeros(SEGMENTS.shape, jnp.int32), SEGMENTS))


@pytest.mark.parametrize("gated", [False, True])
def test_the_loss_and_statistics_of_a_feed_forward_layer(gated):
    module = ffn(gated=gated, rounded="both", step_init=0.4)
    y, aux = call(module)
    x = jnp.round(TOKENS / 0.4) * 0.4
    up = x @ module.up_DF[...]
    units = jax.nn.relu(x @ module.gate_DF[...]) * up if gated else jax.nn.relu(up)
    hidden = jnp.round(units / 0.4) * 0.4
    np.testing.assert_allclose(y, hidden @ module.down_FD[...], atol=1e-5)
    pairs = [(0, 1), (0, 2), (0, 4), *((1, t) for t in range(1, 6))]  # of one document, padding aside
    sizes = {"hidden": hidden, "inputs": x}
    means = {name: np.mean([np.abs(v[b, t] - v[b, t - 1]) for b, t in pairs]) for name, v in sizes.items()}
    shares = {name: np.mean([(v[b, t] - v[b, t - 1]) != 0 for b, t in pairs]) for name, v in sizes.items()}
    # Two layers have the loss: fan-outs are the width of the stream, and of the units, of the gate's too.
    expected = 2 * (6 * means["hidden"] + (16 if gated else 8) * means["inputs"])
    assert float(aux.losses[DELTA_SPIKES]) == pytest.approx(float(expected), rel=1e-5)
    assert float(aux.stats[CHANGED]) == pytest.approx(float(shares["hidden"]))
    assert float(aux.stats[CHANGED_INPUTS]) == pytest.approx(float(shares["inputs"]))


def test_only_what_is_asked_for_is_rounded():
    y, aux = call(ffn(rounded="input", step_init=0.4))
    module = ffn(rounded="input", step_init=0.4)
    assert module.hidden_step is None
    assert CHANGED_INPUTS in aux.stats
    assert CHANGED_INPUTS not in call(ffn())[1].stats
    x = jnp.round(TOKENS / 0.4) * 0.4
    np.testing.assert_allclose(y, jax.nn.relu(x @ module.up_DF[...]) @ module.down_FD[...], atol=1e-5)
