"""The dense gated layer of a few tokens against its definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import gated_ffn_rows
from sparsezoo_jax.pallas_kernels.gated_ffn import reference
from tests.kernels.few_rows import STORAGE, Draw, close, implementation, rounds


@pytest.fixture(params=["xla", "native"])
def apply(request):
    form = implementation(request.param)
    return lambda *arrays, **kwargs: jax.jit(partial(gated_ffn_rows, implementation=form, **kwargs))(*arrays)


def layer(draw, neurons, d):
    return zip(*(draw.weights(neurons, d) for _ in range(3)), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize(("d", "neurons"), [(37, 101), (64, 1)])
def test_is_the_definition(request, apply, storage, m, d, neurons):
    draw = Draw(storage)
    x = draw.tokens(m, d)
    weights, scales = layer(draw, neurons, d)
    close(apply(x, *weights, scales=scales), reference(x, *weights, scales=scales), rounds(request, storage))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu", "relu2"])
def test_activations_over_their_whole_range(apply, activation):
    # Neuron f's gate is x_f itself; up and down pass it on.
    x = jnp.array([[-jnp.inf, -1e30, -200.0, -90.0, -20, -3, -0.7, -1e-3, 0, 1e-3, 0.7, 3, 20, 90, 200, 1e15, jnp.nan]])
    for value in x[0]:
        one = jnp.ones((1, 2)).at[0, 0].set(value)
        gate, up, down = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 2.0]])
        if jnp.isinf(value):
            gate, one = gate.at[0, 1].set(-jnp.inf), one.at[0, 0].set(0.0)
        ours = apply(one, gate, up, down, activation=activation)
        expected = reference(one, gate, up, down, activation=activation)
        # The definition's 1 + tanh loses digits where the tanh is near -1.
        np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=4e-7)


@pytest.mark.parametrize("storage", STORAGE)
def test_a_row_does_not_depend_on_the_others(storage):
    draw = Draw(storage)
    x = draw.tokens(7, 45)
    weights, scales = layer(draw, 130, 45)
    apply = jax.jit(partial(gated_ffn_rows, scales=tuple(scales), implementation=implementation("native")))
    together = apply(x, *weights)
    for i in range(7):
        np.testing.assert_array_equal(apply(x[i : i + 1], *weights)[0], together[i])


def test_bad_input():
    x, w = jnp.ones((2, 3)), jnp.ones((4, 3))
    with pytest.raises(ConfigError, match=r"gated_ffn_rows.down=\(3, 4\): must be \(4, 3\)"):
        gated_ffn_rows(x, w, w, w.T)
    with pytest.raises(ConfigError, match=r"gated_ffn_rows.activation=tanh: must be one of gelu_tanh, gelu, silu"):
        gated_ffn_rows(x, w, w, w, activation="tanh")
