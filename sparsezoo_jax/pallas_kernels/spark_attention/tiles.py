"""Which tiles of the scores a kernel visits, and in which order: the walk that its grid takes over them.

Shapes: B batch, T query position, S key position, P steps of the walk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility

#: Position of the keys that are added to fill up the last tile: behind every query, so that none sees them.
BEHIND = int(jnp.iinfo(jnp.int32).max)
#: Bits of `Walk.ends_P`.
FIRST, LAST, IDLE = 1, 2, 4


class Tiles(NamedTuple):
    """Sizes of a tile of scores, multiples of 128."""

    queries: int
    keys: int
    rows: int = 128
    """On TPUs: queries that a kernel works on at a time, so that what it holds of them fits into registers."""


class Walk(NamedTuple):
    """The tiles of scores in the order of a kernel's grid: by queries, and within them by keys."""

    query_P: Any
    """Tile of queries of each step."""
    key_P: Any
    """Tile of keys of each step."""
    ends_P: Any
    """Bits: FIRST in the first step of a tile of queries, LAST in its last one, both if there is only one; IDLE in
    steps that fill up a walk to the length of another."""


def walk(tiles: Tiles, queries: int, keys: range, visibility: Visibility) -> Walk:
    """The walk over `queries` tiles of queries and the tiles `keys` of keys.

    It leaves out tiles of scores of which the shapes alone tell that nothing in them is visible: above the diagonal, or
    outside of the window. Every tile of queries is visited at least once, for something must write its results. Where
    the queries are one of several parts, all parts' walks are as long as the longest of them.
    """
    if visibility.ordered:
        return Walk(*_steps([i * tiles.queries for i in range(queries)], tiles, keys, visibility.window))
    parts = None if visibility.parts is None else _starts(visibility.parts, tiles, queries)
    if parts is None:
        return Walk(*_steps([None] * queries, tiles, keys, visibility.window))
    walks = [_steps(starts, tiles, keys, visibility.window) for starts in parts]
    longest = max(steps.shape[1] for steps in walks)
    filled = [np.pad(steps, ((0, 0), (0, longest - steps.shape[1])), mode="edge") for steps in walks]
    for steps, own in zip(filled, walks, strict=True):
        steps[2, own.shape[1] :] = IDLE
    assert visibility.part_B is not None, "parts come with the number of one"
    return Walk(*jnp.asarray(np.stack(filled))[visibility.part_B[0]])


def walks(tiles: Tiles, queries: int, keys: Sequence[range], visibility: Visibility) -> tuple[Walk, list[int]]:
    """The walks over several ranges of tiles of keys, arrays [ranges, P] filled up with `IDLE` steps; their lengths."""
    found = [walk(tiles, queries, each, visibility) for each in keys]
    lengths = [len(each.key_P) for each in found]

    def filled(x_P: Any, idle: int | None = None) -> jax.Array:
        return padded(jnp.asarray(x_P), max(lengths), 0, idle)

    rows = [Walk(filled(each.query_P, None), filled(each.key_P, None), filled(each.ends_P, IDLE)) for each in found]
    return jax.tree.map(lambda *x: jnp.stack(x), *rows), lengths


def _starts(parts: Sequence[Sequence[int]], tiles: Tiles, queries: int) -> list[list[int | None]] | None:
    """For each part the place at which each of its tiles of queries begins; None if pieces are no whole tiles."""
    each, left = divmod(queries, len(parts[0]))
    places = sorted(place for part in parts for place in part)
    lengths = {b - a for a, b in itertools.pairwise(places)}
    if left or lengths - {each * tiles.queries}:
        return None
    return [[place + i * tiles.queries for place in part for i in range(each)] for part in parts]


def _steps(starts: Sequence[int | None], tiles: Tiles, keys: range, window: int | None) -> np.ndarray:
    """A walk as int32 [3, P], for tiles of queries that begin at these places (None: anywhere)."""
    steps = []
    for i, place in enumerate(starts):
        start, stop = keys.start, keys.stop
        if place is not None:
            stop = min(stop, (place + tiles.queries - 1) // tiles.keys + 1)
            if window is not None:
                start = max(start, (place - window + 1) // tiles.keys)
        row = list(range(start, stop)) or [keys.start]
        for at, j in enumerate(row):
            steps.append((i, j, FIRST * (at == 0) + LAST * (at == len(row) - 1)))
    return np.array(steps, np.int32).T


def extremes(visibility: Visibility, tiles: Tiles) -> list[tuple[jax.Array, jax.Array]]:
    """The least and the largest value of each tile, a pair of [B, tiles] for each of four arrays.

    These are the positions and segments of the queries, then those of the keys. The visibility must be padded to whole
    tiles.
    """

    def extremes_of(x_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        x_BJI = x_BT.reshape(x_BT.shape[0], -1, size)
        return x_BJI.min(-1), x_BJI.max(-1)

    v = visibility
    queries = [extremes_of(x, tiles.queries) for x in (v.query_positions_BT, v.query_segments_BT)]
    return queries + [extremes_of(x, tiles.keys) for x in (v.key_positions_BS, v.key_segments_BS)]


def may_see(queries: Sequence[jax.Array], keys: Sequence[jax.Array], window: int | None) -> jax.Array:
    """Whether any query of a tile may see any key of another tile, of arrays that broadcast against each other.

    Both are given by least and largest position and least and largest segment. Within a tile they may be combined in
    ways in which no query sees a key; so true is no promise, but false is.
    """
    (q_low, q_high, q_first, q_last), (k_low, k_high, k_first, k_last) = queries, keys
    visible = (q_high >= k_low) & (q_last >= k_first) & (q_first <= k_last)
    return visible if window is None else visible & (q_low - k_high < window)


def all_see(queries: Sequence[jax.Array], keys: Sequence[jax.Array], window: int | None) -> jax.Array:
    """Whether every query of a tile sees every key of another tile; arguments as of `may_see`."""
    (q_low, q_high, q_first, q_last), (k_low, k_high, k_first, k_last) = queries, keys
    seen = (q_low >= k_high) & (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    return seen if window is None else seen & (q_high - k_low < window)


class Bounds(NamedTuple):
    """For each tile of queries (keys) the range of tiles of keys (queries) that its loop goes over, int32 [B, tiles].

    Fields are arrays, or inside of a kernel references to them.
    """

    first: jax.Array
    """The first tile that may be visible."""
    full: jax.Array
    """The first tile of a run in which every query sees every key: the last such run, in which causal attention has
    all of them, unless a tile holds the end of a document."""
    rest: jax.Array
    """The tile after that run; equal to `full` if there is none."""
    stop: jax.Array
    """The tile after the last one that may be visible; no larger than `first` if none may be."""


def bounds(visibility: Visibility, tiles: Tiles) -> tuple[Bounds, Bounds]:
    """The ranges of tiles of keys for each tile of queries, and of tiles of queries for each tile of keys.

    The visibility must be padded to whole tiles.
    """
    places, segments, k_places, k_segments = extremes(visibility, tiles)
    queries = [x_BI[:, :, None] for x_BI in (*places, *segments)]
    keys = [x_BJ[:, None, :] for x_BJ in (*k_places, *k_segments)]
    visible_BIJ, full_BIJ = (see(queries, keys, visibility.window) for see in (may_see, all_see))

    def along(axis: int) -> Bounds:
        count = visible_BIJ.shape[axis]
        number = jax.lax.broadcasted_iota(jnp.int32, visible_BIJ.shape, axis)

        def last(which_BIJ: jax.Array) -> jax.Array:
            return jnp.max(jnp.where(which_BIJ, number + 1, 0), axis)

        first, stop, rest = jnp.min(jnp.where(visible_BIJ, number, count), axis), last(visible_BIJ), last(full_BIJ)
        full = last(~full_BIJ & (number < jnp.expand_dims(rest, axis)))
        full, rest = (jnp.where(rest == 0, first, x) for x in (full, rest))  # without a run both lie at the first tile
        return Bounds(first, full, rest, stop)

    return along(2), along(1)


class Read(NamedTuple):
    """What one step of a walk reads: decoded entries of what `reads` returns."""

    tile: jax.Array
    """Tile of keys."""
    visible: jax.Array
    """Whether any query of the step's tile of scores may see any key."""
    full: jax.Array
    """Whether every one of its queries sees every key."""

    @classmethod
    def of(cls, entry: jax.Array) -> Read:
        """From an entry, or several."""
        return cls(jnp.where(entry < 0, -1 - entry, entry >> 1), entry >= 0, (entry >= 0) & (entry & 1 == 1))


def reads(walk: Walk, tiles: Tiles, visibility: Visibility) -> jax.Array:
    """Which tile of keys each step of the walk reads, int32 [B * P], for `Read.of`.

    An entry is twice the tile, and one more where the tile of scores is visible as a whole. A step whose tile of scores
    has nothing visible computes nothing. Its entry is `-1 - tile` with the tile that the step before has read, so that
    its block stays the same and no transfer is started. The visibility must be padded to whole tiles.
    """
    places, segments, k_places, k_segments = extremes(visibility, tiles)
    queries = [x_BI[:, walk.query_P] for x_BI in (*places, *segments)]
    keys = [x_BJ[:, walk.key_P] for x_BJ in (*k_places, *k_segments)]
    visible_BP = may_see(queries, keys, visibility.window) & (jnp.asarray(walk.ends_P) != IDLE)
    steps_P = jnp.arange(len(walk.key_P))
    last_BP = jax.lax.cummax(jnp.where(visible_BP, steps_P, 0), axis=1)
    tile_BP = jnp.asarray(walk.key_P)[last_BP]
    full_BP = all_see(queries, keys, visibility.window)
    return jnp.where(visible_BP, 2 * tile_BP + full_BP, -1 - tile_BP).astype(jnp.int32).reshape(-1)


def padded(x: jax.Array, size: int, axis: int, value: int | None = 0) -> jax.Array:
    """`x` padded at the end of `axis` to a multiple of `size`, with `value` or, if that is None, its last entry."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, mode="edge") if value is None else jnp.pad(x, widths, constant_values=value)


def padded_visibility(v: Visibility, tiles: Tiles) -> Visibility:
    """The visibility padded to whole tiles: added queries see what the last query sees, added keys are seen by none."""
    return Visibility(
        query_positions_BT=padded(v.query_positions_BT.astype(jnp.int32), tiles.queries, 1, None),
        key_positions_BS=padded(v.key_positions_BS.astype(jnp.int32), tiles.keys, 1, BEHIND),
        query_segments_BT=padded(v.query_segments_BT.astype(jnp.int32), tiles.queries, 1, None),
        key_segments_BS=padded(v.key_segments_BS.astype(jnp.int32), tiles.keys, 1, None),
        window=v.window,
        ordered=v.ordered,
        parts=v.parts,
        part_B=v.part_B,
    )
