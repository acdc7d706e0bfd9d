"""The contract of the maps from and to active blocks, for every implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks, active_blocks, from_blocks, to_blocks
from sparsezoo_jax.pallas_kernels.tiles import TILE
from tests.kernels.few_rows import implementation as built

BLOCKS = Blocks(count=6, shared=2)
SIZE, OTHER = 3, 5


@pytest.fixture(params=["dense", "ragged", "loop"])
def plain(request):
    """Forms in plain JAX, which take every dtype."""
    return request.param


@pytest.fixture(params=["dense", "ragged", "loop", "native"])
def implementation(request):
    return built(request.param)


@pytest.fixture(params=["from", "to"])
def side(request):
    return request.param


def arrays(side, tokens=23, routed=2, blocks=BLOCKS, dtype=jnp.float32, size=SIZE, other=OTHER):
    keys = jax.random.split(jax.random.key(0), 3)
    width = blocks.count * size
    shape = (width, other) if side == "from" else (other, width)
    x = jax.random.normal(keys[0], (tokens, shape[0]), dtype)
    order = jnp.argsort(jax.random.normal(keys[1], (tokens, blocks.count - blocks.shared)), axis=-1)
    return x, order[:, :routed] + blocks.shared, jax.random.normal(keys[2], shape, dtype)


def by_hand(side, x, routed, w, blocks=BLOCKS):
    """Token by token and block by block, as the definition reads."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    width = w.shape[0 if side == "from" else 1]
    size = width // blocks.count
    y = np.zeros((len(x), w.shape[1]))
    for n in range(len(x)):
        for b in [*range(blocks.shared), *np.asarray(routed)[n]]:
            part = slice(b * size, (b + 1) * size)
            if side == "from":
                y[n] += x[n, part] @ w[part]
            else:
                y[n, part] = x[n] @ w[:, part]
    return y


def apply(side, implementation, x, routed, w, blocks=BLOCKS, **kwargs):
    function = from_blocks if side == "from" else to_blocks
    return function(x, routed, w, blocks, implementation=implementation, **kwargs)


def gradients(side, implementation, x, routed, w, blocks=BLOCKS):
    def total(x, w):
        y = apply(side, implementation, x, routed, w, blocks)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, w)


def test_values_and_gradients_in_float64(side, plain):
    with jax.enable_x64(True):
        x, routed, w = arrays(side, dtype=jnp.float64)
        (_, y), (dx, dw) = gradients(side, plain, x, routed, w)
        expected = by_hand(side, x, routed, w)
        np.testing.assert_allclose(y, expected, atol=1e-12)
        g = np.cos(expected)
        mask = np.repeat(np.asarray(active_blocks(routed, BLOCKS)), SIZE, axis=-1)
        if side == "from":
            np.testing.assert_allclose(dx, (g @ np.asarray(w).T) * mask, atol=1e-12)
            np.testing.assert_allclose(dw, (np.asarray(x) * mask).T @ g, atol=1e-12)
        else:
            np.testing.assert_allclose(dx, (g * mask) @ np.asarray(w).T, atol=1e-12)
            np.testing.assert_allclose(dw, np.asarray(x).T @ (g * mask), atol=1e-12)


# One token; more tokens of a block than a tile holds; nothing shared; nothing routed; all active.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "routed", "shared"), [(1, 1, 2), (TILE + 9, 2, 4), (7, 3, 0), (7, 0, 2), (7, 4, 2), (5, 0, 6)]
)
def test_odd_sizes(side, tokens, routed, shared):
    blocks = Blocks(6, shared)
    given = arrays(side, tokens=tokens, routed=routed, blocks=blocks)
    expected = by_hand(side, *given, blocks)
    dense = gradients(side, "dense", *given, blocks)[1]
    for implementation in ("ragged", "loop", built("native")):
        (_, y), grads = gradients(side, implementation, *given, blocks)
        np.testing.assert_allclose(y, expected, atol=1e-4)
        for a, b in zip(grads, dense, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)  # sums over 265 tokens in another order


@pytest.mark.parametrize("form", ["loop", "native"])
def test_active_blocks_only_are_read(side, form):
    """Weights of a block that no token has may be anything: 0 * nan would show (as it does for ragged_dot on a CPU)."""
    x, _, w = arrays(side, tokens=4, routed=1)
    routed = jnp.full((4, 1), 4)
    part = slice(3 * SIZE, 4 * SIZE)
    broken = w.at[part].set(jnp.nan) if side == "from" else w.at[:, part].set(jnp.nan)
    form = built(form)
    y = jax.jit(partial(apply, side, form))(x, routed, broken)
    np.testing.assert_allclose(y, by_hand(side, x, routed, w), atol=1e-5)
    assert jnp.isnan(jax.jit(partial(apply, side, form))(x, routed.at[0].set(3), broken)).any()


def test_inactive_blocks_of_the_input_are_not_read(implementation):
    x, routed, w = arrays("from", tokens=4)
    mask = jnp.repeat(active_blocks(routed, BLOCKS), SIZE, axis=-1)
    y = jax.jit(partial(apply, "from", implementation))(jnp.where(mask, x, jnp.inf), routed, w)
    np.testing.assert_allclose(y, by_hand("from", x, routed, w), atol=1e-5)


def test_leading_axes_and_dtype(side, plain):
    x, routed, w = arrays(side, tokens=12, dtype=jnp.bfloat16)
    call = jax.jit(partial(apply, side, plain, dtype=jnp.float32))
    flat = call(x, routed, w)
    shaped = call(x.reshape(3, 4, -1), routed.reshape(3, 4, -1), w)
    assert flat.dtype == jnp.float32
    np.testing.assert_allclose(shaped.reshape(12, -1), flat, atol=1e-5)
    np.testing.assert_allclose(flat, by_hand(side, x, routed, w), atol=1e-4)  # products of bfloat16 are exact


def test_bfloat16(side, plain):
    given = arrays(side, dtype=jnp.bfloat16, size=16, other=24)
    (_, y), grads = gradients(side, plain, *given)
    assert {a.dtype for a in (y, *grads)} == {jnp.dtype(jnp.bfloat16)}
    expected = by_hand(side, *given)
    # Roundings of 2^-9 of each part's sum and of the total.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.01 * np.abs(expected).max())


def test_shapes_are_checked(side):
    x, routed, w = arrays(side)
    name = "from_blocks" if side == "from" else "to_blocks"
    with pytest.raises(ConfigError, match=rf"{name}.w"):
        apply(side, None, x[:, 1:], routed, w)
    with pytest.raises(ConfigError, match=rf"{name}.blocks=4: must divide the width of 18"):
        apply(side, None, x, routed, w, Blocks(4, 2))
    with pytest.raises(ConfigError, match=rf"{name}.routed"):
        apply(side, None, x, routed[1:], w)
    with pytest.raises(ConfigError, match=rf"{name}.shared=7"):
        apply(side, None, x, routed, w, Blocks(6, 7))
    with pytest.raises(ConfigError, match=rf"{name}.implementation=fast: must be one of dense, loop, native, ragged"):
        apply(side, "fast", x, routed, w)
