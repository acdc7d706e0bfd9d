"""What operations on a few rows of tokens share: weights laid out for inference, and their plain JAX products.

Weights lie neuron by neuron: a row holds everything of a neuron that is read together. They are float32, bfloat16, or
int8 with a float32 factor for each row. Shapes: M tokens, N rows, K their length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require

#: Most rows for which native operations are the default: with more, weights are reused, and XLA's products are faster.
MOST_ROWS = 16

TOKENS = (jnp.float32, jnp.bfloat16)
WEIGHTS = (*TOKENS, jnp.int8)


def check_shapes(operation: str, arrays: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Raise `ConfigError` unless the shape found of each array, by name, is the one wanted."""
    for name, (found, wanted) in arrays.items():
        require(found == wanted, f"{operation}.{name}", found, f"must be {wanted} for the other arguments")


def check_weights(
    operation: str, name: str, w: jax.Array, scale: jax.Array | None, scale_shape: tuple[int, ...]
) -> None:
    """Raise `ConfigError` unless `w` has one of the storage types, with a `scale` of that shape if and only if int8."""
    allowed = ", ".join(jnp.dtype(dtype).name for dtype in WEIGHTS)
    require(w.dtype in WEIGHTS, f"{operation}.{name}", w.dtype, f"must be one of {allowed}")
    if w.dtype == jnp.int8:
        found = None if scale is None else scale.shape
        require(found == scale_shape, f"{operation}.{name}'s scale", found, f"must be {scale_shape} for int8 weights")
    else:
        require(scale is None, f"{operation}.{name}'s scale", scale is None or scale.shape, "is for int8 weights only")


def native_refusal(**tokens: jax.Array) -> str | None:
    """Why native operations can't take these arrays of tokens, or None if they can: float32 or bfloat16, not empty."""
    for name, x in tokens.items():
        if x.dtype not in TOKENS:
            return f"{name} is {x.dtype}, not float32 or bfloat16"
        if x.size == 0:
            return f"{name} is empty"
    return None


def or_empty(scale: jax.Array | None) -> jax.Array:
    """`scale` as native operations take it: an empty array stands for None."""
    return jnp.zeros(0, jnp.float32) if scale is None else scale.astype(jnp.float32)


def dequantised(w: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Rows [..., K] in float32, times their factors [...]."""
    w_float32 = w.astype(jnp.float32)
    return w_float32 if scale is None else w_float32 * scale[..., None]


def product(x_MK: jax.Array, w_NK: jax.Array, scale_N: jax.Array | None) -> jax.Array:
    """`x W^T`, [M, N] in float32, written in the form that XLA for CPU runs fastest for each dtype of w."""
    rows = x_MK.shape[0]
    if w_NK.dtype == jnp.int8:
        # XLA for CPU has no fast matrix product of int8, but a fast sum of elementwise products, provided that nothing
        # which follows is fused into it.
        w_float32 = w_NK.astype(jnp.float32)
        if rows == 1:
            y_MN = jnp.sum(w_float32 * x_MK[0].astype(jnp.float32), axis=-1)[None]
        else:
            y_MN = jnp.sum(w_float32[None] * x_MK.astype(jnp.float32)[:, None], axis=-1)
        y_MN = jax.lax.optimization_barrier(y_MN)
        return y_MN if scale_N is None else y_MN * scale_N
    if w_NK.dtype == jnp.bfloat16:
        # XLA's products of one or two rows of bfloat16 take a path that is ten times slower than that of four rows.
        x_MK = jnp.pad(x_MK.astype(w_NK.dtype), ((0, max(0, 4 - rows)), (0, 0)))
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_MK.astype(w_NK.dtype), w_NK, contract, preferred_element_type=jnp.float32)[:rows]


def combination(h_MN: jax.Array, w_NK: jax.Array, scale_N: jax.Array | None) -> jax.Array:
    """`h W`, [M, K] in float32, for h in float32."""
    rows = h_MN.shape[0]
    h_MN = h_MN if scale_N is None else h_MN * scale_N
    if w_NK.dtype == jnp.int8:
        w_NK = w_NK.astype(jnp.float32)
    elif w_NK.dtype == jnp.bfloat16:
        h_MN = jnp.pad(h_MN.astype(w_NK.dtype), ((0, max(0, 4 - rows)), (0, 0)))
    contract = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(h_MN, w_NK, contract, preferred_element_type=jnp.float32)[:rows]


def sum_over_active(
    active_N: jax.Array, group: int, total: Any, add: Callable[[Any, jax.Array, jax.Array, Any], Any], read: Any
) -> Any:
    """Loop over the true places of `active_N`, `group` of them in a turn, and add up what they contribute.

    Args:
      active_N: booleans.
      group: how many places a turn has.
      total: what the sum starts from, a pytree of arrays.
      add: `add(total, places, valid, read)` returns the total with the contribution of `places` [group]. Where the last
        group is not full it repeats its last place, and `valid` [group] is false.
      read: a pytree of the arrays of which `add` takes parts. The loop has no more turns than there are groups, so that
        only the parts of active places are read.
    """
    count_N = jnp.cumsum(active_N)
    count = count_N[-1]

    def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        turn, total = state
        turn, parts = reread_each_turn(turn, read)
        wanted = turn * group + jnp.arange(group)
        # The i-th true place is where the running count reaches i + 1. A CPU finds it with the least work by bisection;
        # on other devices that would be a dozen programs one after the other.
        ranks = jnp.minimum(wanted + 1, count)
        places = jax.lax.platform_dependent(
            cpu=lambda: jnp.searchsorted(count_N, ranks, method="scan"),
            default=lambda: jnp.searchsorted(count_N, ranks, method="compare_all"),
        )
        return turn + 1, add(total, places, wanted < count, parts)

    return jax.lax.while_loop(lambda state: state[0] * group < count, body, (jnp.int32(0), total))[1]


def sum_over_devices(y_MD: jax.Array, count_M: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Sums of float32 results and int32 counts over mesh axes, within a `sharding.shard_map`.

    They travel together, for of so few bytes it is the number of messages that takes time. Counts below 2^24 are exact.
    """
    if not axes:
        return y_MD, count_M
    both = jax.lax.psum(jnp.concatenate([y_MD, count_M[:, None].astype(jnp.float32)], axis=1), axes)
    return both[:, :-1], both[:, -1].astype(jnp.int32)


def reread_each_turn(turn: jax.Array, read: Any) -> tuple[jax.Array, Any]:
    """The same values, in a way that keeps the compiler from moving work on `read` out of the loop.

    XLA for CPU converts bfloat16 to float32 to take parts of it, and would convert all of `read` ahead of the loop.
    """
    return jax.lax.optimization_barrier((turn, read))


def result_shapes(*shapes: tuple[tuple[int, ...], Any]) -> list[jax.ShapeDtypeStruct]:
    """The results of a native operation, each given by its shape and dtype."""
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
