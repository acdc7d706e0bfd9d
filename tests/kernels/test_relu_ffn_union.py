"""The sparse feed-forward layer computed by unions: the same as the definition, whatever the unions are."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.relu_ffn import Storage, relu_ffn, union
from sparsezoo_jax.pallas_kernels.tuning import Launch, trying

NAMES = ("relu_ffn_hidden", "relu_ffn_sum", "relu_ffn_gradients", "relu_ffn_weights")
#: Tiles that small arrays have several of, in every direction.
SMALL = dict.fromkeys(NAMES, Launch((16, 16, 16)))
SHAPE, NEURONS = (2, 21, 24), 50


def arrays(dtype, bias):
    """Inputs of which the first column is 1, so that `bias` sets how many scores are above 0; and cotangents of y."""
    rng = np.random.default_rng(0)
    d = SHAPE[-1]
    shapes = {"x": SHAPE, "gate": (d, NEURONS), "up": (d, NEURONS), "down": (NEURONS, d), "cotangent": SHAPE}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    drawn["x"][..., 0] = 1
    for name in ("gate", "up"):
        drawn[name] /= d**0.5
        drawn[name][0] = bias
    drawn["gate"][0, 7] = drawn["up"][0, 7] = -100  # a neuron that nothing uses
    where = jnp.asarray(rng.random(SHAPE[:2]) < 0.9)
    return *(jnp.asarray(a, dtype) for a in drawn.values()), where


@cache
def gradient(implementation, storage, gated):
    def loss(x, gate, up, down, cotangent, where):
        gate = gate if gated else None
        out = relu_ffn(x, gate, up, down, where, storage=storage, implementation=implementation)
        return jnp.sum((out.y * cotangent).astype(jnp.float32)) + 0.3 * jnp.sum(out.l1), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


#: What the input's first column adds to scores of deviation 1: few are above 0; about half are, and all is computed.
FEW, MANY = -1.8, 0.0


@pytest.mark.parametrize("storage", [None, Storage(8, 0.3), Storage(1, 0.1)], ids=["all", "stored", "too many"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_values_and_gradients_are_the_definition_s(gated, storage):
    for bias in (FEW, MANY):
        given = arrays(jnp.float32, bias)
        (value, out), grads = gradient(None, None, gated)(*given)
        with trying(**SMALL):
            (found, by_union), found_grads = gradient("pallas_gpu_interpret", storage, gated)(*given)
        assert (float(by_union.union) <= union.LARGEST) == (bias == FEW)
        if storage is not None:
            assert float(by_union.stored) == (bias == FEW and storage.neurons == 8)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        for name in ("y", "l1", "active", "fired"):
            a, b = getattr(by_union, name), getattr(out, name)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=name)
        for name, a, b in zip(("x", "gate", "up", "down"), found_grads, grads, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1), err_msg=f"{name}, {bias}")


def test_bfloat16_with_the_table_s_tiles():
    given = arrays(jnp.bfloat16, FEW)
    expected, found = (gradient(form, None, True)(*given) for form in (None, "pallas_gpu_interpret"))
    assert float(found[0][1].union) < 1
    for a, b in zip((found[0][1].y, *found[1]), (expected[0][1].y, *expected[1]), strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        assert np.sqrt(np.mean((a - b) ** 2)) < 0.01 * np.sqrt(np.mean(b**2)), "roundings of sums and of products"


def test_neurons_outside_the_union_are_not_read():
    x, gate, up, down, cotangent, where = arrays(jnp.float32, FEW)
    used = np.asarray(jnp.any(x @ gate > 0, axis=(0, 1)))
    assert not used.all()
    poisoned = jnp.where(used, up, jnp.nan), jnp.where(used[:, None], down, jnp.nan)
    with trying(**SMALL):
        apply = gradient("pallas_gpu_interpret", None, True)
        (value, out), grads = apply(x, gate, up, down, cotangent, where)
        (again, _), again_grads = apply(x, gate, *poisoned, cotangent, where)
    assert np.isfinite(out.y).all()
    np.testing.assert_array_equal(again, value)
    for a, b in zip(again_grads, grads, strict=True):
        np.testing.assert_array_equal(a, b)


def test_lists_of_blocks():
    used = np.zeros((5, 4), bool)
    used[0, 3] = used[1, 1] = used[4, 2] = True
    lists = union.lists_of(jnp.asarray(used), 2)
    assert lists.count.tolist() == [2, 0, 1]
    assert lists.places[0, :2].tolist() == [1, 3]
    assert lists.places[2, 0] == 2
    assert float(union.share(lists)) == pytest.approx(3 / 12)


def test_what_the_kernels_do_not_take():
    x, gate, up, down, _, where = arrays(jnp.float32, FEW)
    with pytest.raises(ConfigError, match=r"relu_ffn\.implementation=pallas_gpu: takes bfloat16 or float32 through"):
        relu_ffn(x.astype(jnp.bfloat16), gate, up, down, where, implementation="pallas_gpu")
    with pytest.raises(ConfigError, match=r"relu_ffn\.implementation=native: must be one of pallas_gpu, "):
        relu_ffn(x, gate, up, down, where, implementation="native")
