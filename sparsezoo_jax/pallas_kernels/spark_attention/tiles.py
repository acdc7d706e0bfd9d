"""Which tiles of the scores a kernel visits, and the walk over them that its grid takes.

Shapes: B batch, T query position, S key position, P steps of the walk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility

#: Position of keys that fill up the last tile: behind every query.
BEHIND = int(jnp.iinfo(jnp.int32).max)
FIRST, LAST = 1, 2


class Tiles(NamedTuple):
    """Sizes of a tile of scores, multiples of 128."""

    queries: int
    keys: int


class Walk(NamedTuple):
    """The tiles of scores in the order of a kernel's grid: by queries, and within them by keys."""

    query_P: np.ndarray
    """Tile of queries of each step."""
    key_P: np.ndarray
    """Tile of keys of each step."""
    ends_P: np.ndarray
    """FIRST in the first step of a tile of queries, LAST in the last, both in an only one."""


def walk(tiles: Tiles, queries: int, keys: range, visibility: Visibility) -> Walk:
    """The tiles that may be visible as far as shapes tell, of `queries` tiles of queries and the tiles `keys`.

    Every tile of queries is visited at least once: something must write its results.
    """
    steps = []
    for i in range(queries):
        start, stop = keys.start, keys.stop
        if visibility.ordered:
            stop = min(stop, ((i + 1) * tiles.queries - 1) // tiles.keys + 1)
            if visibility.window is not None:
                start = max(start, (i * tiles.queries - visibility.window + 1) // tiles.keys)
        row = list(range(start, stop)) or [keys.start]
        for place, j in enumerate(row):
            steps.append((i, j, FIRST * (place == 0) + LAST * (place == len(row) - 1)))
    return Walk(*np.array(steps, np.int32).T)


def reads(walk: Walk, tiles: Tiles, visibility: Visibility) -> jax.Array:
    """The tile of keys to read in every step, int32 [B * P]; `-1 - tile` where nothing of the step's tile is visible.

    Such a step names the tile that is there already, for which nothing is read. Arguments: a visibility padded to whole
    tiles.
    """

    def extremes(x_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        x_BJI = x_BT.reshape(x_BT.shape[0], -1, size)
        return x_BJI.min(-1), x_BJI.max(-1)

    def of_queries(x_BI: jax.Array) -> jax.Array:
        return x_BI[:, walk.query_P]

    def of_keys(x_BJ: jax.Array) -> jax.Array:
        return x_BJ[:, walk.key_P]

    q_low, q_high = map(of_queries, extremes(visibility.query_positions_BT, tiles.queries))
    k_low, k_high = map(of_keys, extremes(visibility.key_positions_BS, tiles.keys))
    q_first, q_last = map(of_queries, extremes(visibility.query_segments_BT, tiles.queries))
    k_first, k_last = map(of_keys, extremes(visibility.key_segments_BS, tiles.keys))
    visible_BP = (q_high >= k_low) & (q_last >= k_first) & (q_first <= k_last)
    if visibility.window is not None:
        visible_BP &= q_low - k_high < visibility.window
    steps_P = jnp.arange(len(walk.key_P))
    last_BP = jax.lax.cummax(jnp.where(visible_BP, steps_P, 0), axis=1)
    tile_BP = jnp.asarray(walk.key_P)[last_BP]
    return jnp.where(visible_BP, tile_BP, -1 - tile_BP).astype(jnp.int32).reshape(-1)


def padded(x: jax.Array, size: int, axis: int, value: int | None = 0) -> jax.Array:
    """`x` filled up along `axis` to a multiple of `size`, with `value` or (None) its last entry."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, mode="edge") if value is None else jnp.pad(x, widths, constant_values=value)


def padded_visibility(v: Visibility, tiles: Tiles) -> Visibility:
    """The visibility in whole tiles: queries that are added see what the last one sees, keys are seen by none."""
    return Visibility(
        query_positions_BT=padded(v.query_positions_BT.astype(jnp.int32), tiles.queries, 1, None),
        key_positions_BS=padded(v.key_positions_BS.astype(jnp.int32), tiles.keys, 1, BEHIND),
        query_segments_BT=padded(v.query_segments_BT.astype(jnp.int32), tiles.queries, 1, None),
        key_segments_BS=padded(v.key_segments_BS.astype(jnp.int32), tiles.keys, 1, None),
        window=v.window,
        ordered=v.ordered,
    )
