"""The sparse feed-forward layer by unions of blocks, and token by token: the same as the definition."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import native
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.relu_ffn import Storage, by_token, relu_ffn, union
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
def test_unions_give_the_definition_s_values_and_gradients(gated, storage):
    for bias in (FEW, MANY):
        with trying(**SMALL):
            found = gradient("pallas_gpu_interpret", storage, gated)(*arrays(jnp.float32, bias))
        by_union = found[0][1]
        assert (float(by_union.union) <= union.LARGEST) == (bias == FEW)
        if storage is not None:
            assert float(by_union.stored) == (bias == FEW and storage.neurons == 8)
        as_defined(found, bias, gated)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_tokens_give_the_definition_s_values_and_gradients(gated):
    if (missing := native.why_missing()) is not None:
        pytest.skip(missing)
    for bias in (FEW, MANY):
        given = arrays(jnp.float32, bias)
        found = gradient(None, None, gated)(*given)
        few = by_token.few(given[0] @ given[1 if gated else 2])
        assert few == (bias == FEW)
        as_defined(found, bias, gated)
        if few:  # whatever else computed it would read the other rows
            apply = gradient("native", None, gated)
            np.testing.assert_array_equal(apply(*poisoned(given, gated))[0][1].y, found[0][1].y)


def as_defined(found, bias, gated):
    (value, out), grads = gradient("xla", None, gated)(*arrays(jnp.float32, bias))
    (found_value, found_out), found_grads = found
    np.testing.assert_allclose(found_value, value, rtol=1e-5)
    for name in ("y", "l1", "active", "fired"):
        a, b = getattr(found_out, name), getattr(out, name)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=name)
    for name, a, b in zip(("x", "gate", "up", "down"), found_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1), err_msg=f"{name}, {bias}")


def poisoned(given, gated):
    """The arguments with NaN in the weights of neurons that no token uses, but for the map before the ReLU."""
    x, gate, up, down, *rest = given
    used = np.asarray(jnp.any(x @ (gate if gated else up) > 0, axis=(0, 1)))
    assert not used.all()
    return x, gate, jnp.where(used, up, jnp.nan) if gated else up, jnp.where(used[:, None], down, jnp.nan), *rest


def test_bfloat16_with_the_table_s_tiles():
    given = arrays(jnp.bfloat16, FEW)
    expected, found = (gradient(form, None, True)(*given) for form in ("xla", "pallas_gpu_interpret"))
    assert float(found[0][1].union) < 1
    for a, b in zip((found[0][1].y, *found[1]), (expected[0][1].y, *expected[1]), strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        assert np.sqrt(np.mean((a - b) ** 2)) < 0.01 * np.sqrt(np.mean(b**2)), "roundings of sums and of products"


def test_neurons_outside_the_union_are_not_read():
    given = arrays(jnp.float32, FEW)
    with trying(**SMALL):
        apply = gradient("pallas_gpu_interpret", None, True)
        (value, out), grads = apply(*given)
        (again, _), again_grads = apply(*poisoned(given, gated=True))
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
    with pytest.raises(ConfigError, match=r"relu_ffn\.implementation=mosaic: must be one of native, pallas_gpu, "):
        relu_ffn(x, gate, up, down, where, implementation="mosaic")
