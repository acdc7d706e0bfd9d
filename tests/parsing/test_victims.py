"""Victims: their convolutions, their pruning and their training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.parsing.victims import Convolution, Victim, pruned, train_victims, weight_sparsities


@pytest.mark.parametrize("size", [3, 5])
def test_convolutions(size):
    convolution = Convolution(size, 2, 3, rngs=nnx.Rngs(0))
    convolution.bias[...] = jnp.array([1.0, 2.0, 3.0])
    x = jax.random.normal(jax.random.key(1), (2, 6, 8, 2))
    # Patches have columns before rows.
    kernel = convolution.weight[...].reshape(size, size, 2, 3).swapaxes(0, 1)
    names = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names)
    np.testing.assert_allclose(convolution(x), expected + convolution.bias[...], atol=1e-5)


def test_the_smallest_weights_of_each_map_are_pruned():
    maps = {"a": jnp.asarray([[4.0, -1.0], [-3.0, 2.0]]), "b": {"c": jnp.arange(1.0, 9.0).reshape(2, 4) / 100}}
    params = {**maps, "bias": jnp.asarray([0.001, 0.002])}
    found = pruned(params, 0.375)
    np.testing.assert_array_equal(found["a"], [[4, 0], [-3, 0]])  # 1.5 are two
    np.testing.assert_array_equal(found["b"]["c"].reshape(-1), np.r_[[0] * 3, maps["b"]["c"].reshape(-1)[3:]])
    np.testing.assert_array_equal(found["bias"], params["bias"])
    for left, right in zip(jax.tree.leaves(pruned(params, 0.0)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_training():
    draw = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = draw.uniform(0.4, 0.6, (60, 8, 8, 1)).astype(np.float32)
    images[np.arange(60), 2 * labels + 1] += 0.2  # a bright row
    sizes = {"steps": 60, "tuning_steps": 20, "batch_size": 16}
    victims = train_victims(3, "relu", (0.0, 0.625), (5, 6), images, labels, **sizes)
    np.testing.assert_allclose(weight_sparsities(victims), [[0, 0.625]] * 2, atol=1e-3)
    at = [[jax.tree.map(lambda v, s=s, p=p: v[s, p], victims.params) for p in range(2)] for s in range(2)]
    for params in (at[0][0], at[1][1]):
        assert np.mean(np.argmax(victims.scores(params, images), 1) == labels) > 0.9
    # A victim does not depend on who is trained beside it; pruned ones are trained on, and dense ones are too.
    assert not np.array_equal(at[0][0]["out"]["kernel"], at[1][0]["out"]["kernel"])
    left = np.asarray(at[0][1]["out"]["kernel"])
    assert not np.any((left != 0) & (left == np.asarray(at[0][0]["out"]["kernel"])))


def test_what_is_no_victim():
    with pytest.raises(ConfigError, match=r"kernel_size=4: must be one of \(3, 5, 7\)"):
        Victim(4, "relu", (8, 8, 1), 2, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="activation=gelu: must be one of relu, tanh, elu"):
        Victim(3, "gelu", (8, 8, 1), 2, rngs=nnx.Rngs(0))
    images, labels = np.zeros((2, 8, 8, 1), np.float32), np.array([0, 1])
    with pytest.raises(ConfigError, match="sparsity=1: must be from 0 to below 1"):
        train_victims(3, "relu", (0, 1), (0,), images, labels, steps=1, tuning_steps=1)
