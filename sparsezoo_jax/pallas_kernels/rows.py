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

#: Most rows for which the native form is the default: beyond, weights are reused and XLA's matrix products are faster.
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
    """Why the native form can't take these arrays of tokens (float32 or bfloat16 it must be); None if it can."""
    for name, x in tokens.items():
        if x.dtype not in TOKENS:
            return f"{name} is {x.dtype}, not float32 or bfloat16"
        if x.size == 0:
            return f"{name} is empty"
    return None


def or_none(scale: jax.Array | None) -> jax.Array:
    """What a native operation takes for `scale`: an empty array says that there is none."""
    return jnp.zeros(0, jnp.float32) if scale is None else scale.astype(jnp.float32)


def dequantised(w: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Rows [..., K] in float32, times their factors [...]."""
    wide = w.astype(jnp.float32)
    return wide if scale is None else wide * scale[..., None]


def product(x_MK: jax.Array, w_NK: jax.Array, scale_N: jax.Array | None) -> jax.Array:
    """`x W^T`, [M, N] in float32: the spelling that XLA for CPU runs fastest."""
    rows = x_MK.shape[0]
    if w_NK.dtype == jnp.int8:
        # A product of int8 has no fast form; a sum has, if nothing that follows is fused with it.
        wide = w_NK.astype(jnp.float32)
        if rows == 1:
            y_MN = jnp.sum(wide * x_MK[0].astype(jnp.float32), axis=-1)[None]
        else:
            y_MN = jnp.sum(wide[None] * x_MK.astype(jnp.float32)[:, None], axis=-1)
        y_MN = jax.lax.optimization_barrier(y_MN)
        return y_MN if scale_N is None else y_MN * scale_N
    if w_NK.dtype == jnp.bfloat16:
        # One or two rows take a path that is ten times slower than four.
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
    """`total` after `add(total, places, valid, read)` for the true places of `active_N`, `group` of them at a time.

    `total` is an array or several; `read` are the arrays of which `add` takes parts. The loop has as many turns as
    there are groups, so that what `add` gathers is read for active places only. The last group repeats its last place
    where it is not full: `valid` [group] is false there.
    """
    count_N = jnp.cumsum(active_N)
    count = count_N[-1]

    def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        turn, total = state
        turn, parts = fresh(turn, read)
        wanted = turn * group + jnp.arange(group)
        # The i-th true place is where the running count reaches i + 1. Looking for it in halves takes a CPU the least
        # work, but other devices a dozen programs one after the other.
        ranks = jnp.minimum(wanted + 1, count)
        places = jax.lax.platform_dependent(
            cpu=lambda: jnp.searchsorted(count_N, ranks, method="scan"),
            default=lambda: jnp.searchsorted(count_N, ranks, method="compare_all"),
        )
        return turn + 1, add(total, places, wanted < count, parts)

    return jax.lax.while_loop(lambda state: state[0] * group < count, body, (jnp.int32(0), total))[1]


def fresh(turn: jax.Array, read: Any) -> tuple[jax.Array, Any]:
    """The same values, which a compiler must take for others in every turn of a loop.

    XLA for CPU converts bfloat16 to float32 to take parts of it, and would convert all of `read` ahead of the loop.
    """
    return jax.lax.optimization_barrier((turn, read))


def result(*shapes: tuple[tuple[int, ...], Any]) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of results."""
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
