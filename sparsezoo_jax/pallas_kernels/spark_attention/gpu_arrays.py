"""Arrays as attention's kernels for GPUs read and write them: heads side by side, as the model has them.

Nothing is copied, unless a length is no multiple of a tile or a width no power of two.

Shapes as in `gpu`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.spark_attention.common import joined
from sparsezoo_jax.pallas_kernels.spark_attention.reference import Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, padded
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility

#: What arrays are filled up to multiples of: the largest tiles of any kernel.
TILES = Tiles(128, 128)
#: The narrowest operand of a matrix product.
NARROWEST = 16


class Arrays(NamedTuple):
    """Heads of queries or of keys as kernels read them, arrays [B, T, N or K, width] or references to them.

    Results, which are gradients, have the same form.
    """

    heads: Any
    """The dimensions that select, and behind them the others where there is a softplus."""
    values: Any
    """Of keys their values; of queries the gradient of y, which meets the values in products (None in the forward pass
    and in the queries' gradient)."""


class Parts(NamedTuple):
    """A tile [I or J, width] of each part of `Arrays`, or what belongs to it."""

    predictor: Any
    """The dimensions that select."""
    rest: Any
    """The other dimensions; None where there is no softplus."""
    values: Any
    """As in `Arrays`."""


class Head(NamedTuple):
    """Which head of queries or of keys."""

    sequence: Any
    number: Any
    """Among the heads of its sequence."""


class Places(NamedTuple):
    """Positions and segments of queries or of keys, arrays [B, T] or references to them, or those of a tile."""

    positions: Any
    segments: Any


def tile_ref(ref, head: Head, tile, size: int, first: int = 0, width: int | None = None) -> Any:
    """The reference to a tile [size, width] of `ref` [B, T, N, H], to load or store: of columns from `first` on."""
    columns = pl.ds(jnp.int32(first), ref.shape[-1] - first if width is None else width)
    return ref.at[head.sequence, pl.ds(tile * size, size), head.number, columns]


def parts_of(refs: Arrays, head: Head, tile, size: int, widths: Sequence[int]) -> Parts:
    """The references to a tile of each part; `widths` are those of the heads' two, the second 0 if there is one."""
    first, second = widths
    predictor = tile_ref(refs.heads, head, tile, size, 0, first)
    rest = tile_ref(refs.heads, head, tile, size, first, second) if second else None
    return Parts(predictor, rest, None if refs.values is None else tile_ref(refs.values, head, tile, size))


def numbers_ref(ref, row: Sequence[Any], tile, size: int) -> Any:
    """The reference to a tile [size] of `ref` [..., T], of the row that the other indices say."""
    return ref.at[(*row, pl.ds(tile * size, size))]


def load_numbers(refs: Any, row: Sequence[Any], tile, size: int) -> Any:
    """A tile [size] of each of `refs` [..., T]."""
    return jax.tree.map(lambda ref: plgpu.load(numbers_ref(ref, row, tile, size)), refs)


def columns(numbers: Any) -> Any:
    """Arrays [I] as columns [I, 1]."""
    return jax.tree.map(lambda x: x[:, None], numbers)


def lines(numbers: Any) -> Any:
    """Arrays [J] as lines [1, J]."""
    return jax.tree.map(lambda x: x[None, :], numbers)


def places_of(v: Visibility) -> tuple[Places, Places]:
    """Places of queries and of keys."""
    return Places(v.query_positions_BT, v.query_segments_BT), Places(v.key_positions_BS, v.key_segments_BS)


def factors(scale: float) -> tuple[float, float]:
    """What queries are multiplied by before the kernels, and what their products with keys are within, for a `scale`.

    The queries, in their dtype, as the definition does it: else bfloat16 selects other keys. Times a power of two both
    are the same, bit for bit, and queries are not written again.
    """
    return (1.0, scale) if abs(math.frexp(scale)[0]) == 0.5 else (scale, 1.0)


def scaled(q: jax.Array, p: Problem) -> jax.Array:
    """The queries [B, T, N, H] that `forward` and `backward` take."""
    (first, _), (second, _) = factors(p.predictor_scale), factors(p.value_scale)
    if p.weighting == "none" or first == second:
        return q if first == 1 else first * q
    return q * jnp.where(jnp.arange(q.shape[-1]) < p.r, first, second).astype(q.dtype)


def widths_of(width: int, p: Problem) -> tuple[int, int]:
    """Columns of a head's two parts as kernels read them, the second 0 where there is no softplus."""
    return filled(p.r), filled(width - p.r) if p.weighting == "softplus" else 0


def filled(width: int) -> int:
    """The width that `width` columns are filled up to, which matrix products take."""
    return max(NARROWEST, pl.next_power_of_2(width))


def whole_tiles(x_BTNH: jax.Array, size: int) -> jax.Array:
    """[B, T, N, H] with T filled up to whole tiles, and H to a width that matrix products take."""
    return padded(padded(x_BTNH, size, 1), filled(x_BTNH.shape[-1]), 3)


def split_heads(x_BTNH: jax.Array, p: Problem, size: int) -> jax.Array:
    """[B, T, N, H] in whole tiles, with each of a head's two parts filled up, or without the second."""
    if p.weighting == "none":
        return whole_tiles(x_BTNH[..., : p.r], size)
    parts = jnp.split(x_BTNH, [p.r], axis=-1)
    if all(part.shape[-1] == filled(part.shape[-1]) for part in parts):
        return padded(x_BTNH, size, 1)
    return jnp.concatenate([whole_tiles(part, size) for part in parts], axis=-1)


def joined_heads(x_BTNW: jax.Array, like: jax.Array, p: Problem) -> jax.Array:
    """The inverse of `split_heads`, for a gradient of `like`: zeros where it has columns that nothing reads."""
    x_BTNW, (first, second) = x_BTNW[:, : like.shape[1]], widths_of(like.shape[-1], p)
    if x_BTNW.shape == like.shape:
        return x_BTNW.astype(like.dtype)
    parts = [x_BTNW[..., : p.r], *[x_BTNW[..., first:][..., : like.shape[-1] - p.r]] * bool(second)]
    return joined(parts, like)


def arrange(q, k, v, p: Problem) -> tuple[Arrays, Arrays]:
    """Queries and keys with their values as kernels read them."""
    keys = Arrays(split_heads(k, p, TILES.keys), whole_tiles(v, TILES.keys))
    return Arrays(split_heads(q, p, TILES.queries), None), keys
