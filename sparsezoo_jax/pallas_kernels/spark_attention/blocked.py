"""Spark and flash attention in plain JAX, for CPUs: a few tiles of scores at a time, and memory linear in the lengths.

As the kernels do it: a loop over tiles of queries, in it one over those tiles of keys that they may see, by positions
and segments. The threshold of a query needs the moments of all its scores, so a first loop takes these and a second one
makes the scores again; where everything is selected one loop does. The number of turns is known only when the program
runs, which `jax.grad` can't differentiate: the gradient is a function of its own, that makes the scores once more.
Nothing depends on the lengths but the number of turns, so programs are as large for any.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, R = r of it the predictor's, V width of values, I queries and J keys of a tile of scores [I, J], C tiles
of queries. A turn makes the tiles of P sequences and of M heads of keys of each, [P, M, G, I, J], and there are L such
parts of all heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.spark_attention import common
from sparsezoo_jax.pallas_kernels.spark_attention.common import (
    ALL,
    LOWEST_BEST,
    Moments,
    Operands,
    accumulator_dtype,
    arrange,
    bounded,
    capped,
    chosen,
    joined,
    softplus_and_slope,
    threshold_of,
    tile_gradients,
    to_heads,
    where,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Bounds, Tiles, bounds, padded_visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility, sees

#: Rows of a tile (queries times the heads that share a key) and keys, at most, and scores of a turn. With fewer scores
#: starting operations takes longer than they do; with more they leave the caches.
_ROWS, _KEYS, _SCORES = 512, 256, 1 << 18
#: Queries or keys below which no tile is cut smaller.
_FEWEST = 64


class Part(NamedTuple):
    """Sizes of what one turn computes."""

    sequences: int
    heads: int
    """Of keys."""
    tiles: Tiles


def part_for(q, k, window: int | None) -> Part:
    """The part for queries [B, T, N, H] and keys [B, S, K, H].

    Lengths are cut evenly, so that little is added, and into at least two tiles, half of a window wide at most: of a
    tile that is visible in part all is computed.
    """
    (batch, queries, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads

    def even(length: int, most: int) -> int:
        most = max(_FEWEST, min(most, length // 2, length if window is None else window // 2))
        return 8 * math.ceil(length / math.ceil(length / most) / 8)

    tiles = Tiles(even(queries, min(_KEYS, _ROWS // group)), even(keys, _KEYS))
    fitting = max(1, _SCORES // (tiles.queries * group * tiles.keys))
    own = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= fitting)
    sequences = max(n for n in range(1, batch + 1) if batch % n == 0 and n * own <= fitting) if own == kv_heads else 1
    return Part(sequences, own, tiles)


class Tile(NamedTuple):
    """Queries or keys of a tile, in the scores' dtype."""

    predictor: jax.Array
    """[P, M, G, I, R] or [P, M, J, R]."""
    rest: jax.Array | None
    """[P, M, G, I, H - R] or [P, M, J, H - R]; None where there is no softplus."""
    values: jax.Array | None
    """Of keys their values [P, M, J, V]; of queries the gradient of y [P, M, G, I, V], in the backward pass."""
    positions: jax.Array
    """[P, 1, 1, I, 1] or [P, 1, 1, 1, J]."""
    segments: jax.Array


class Walk(NamedTuple):
    """Arrays of which tiles are taken, and in what order."""

    p: Problem
    part: Part
    operands: Operands
    dy: jax.Array | None
    """[B, K, G, T, V]; None in the forward pass."""
    places: Visibility
    """Padded to whole tiles."""
    turns: Bounds
    """For each tile of queries of each sequence the tiles of keys."""

    @classmethod
    def over(cls, q, k, v, dy, visibility: Visibility, p: Problem) -> Walk:
        """The walk over q, k, v and the gradient of y, shaped as `spark_attention` takes and returns them."""
        part = part_for(q, k, visibility.window)
        dy = None if dy is None else to_heads(dy, k.shape[2], part.tiles)
        places = padded_visibility(visibility, part.tiles)
        return cls(p, part, arrange(q, k, v, p, part.tiles), dy, places, bounds(places, part.tiles)[0])

    @property
    def dtype(self) -> Any:
        """That of scores and sums."""
        return accumulator_dtype(self.operands.q1)

    @property
    def parts(self) -> int:
        """L."""
        batch, kv_heads = self.operands.k1.shape[:2]
        return batch // self.part.sequences * (kv_heads // self.part.heads)

    @property
    def query_tiles(self) -> int:
        """C."""
        return self.places.query_positions_BT.shape[1] // self.part.tiles.queries

    @property
    def key_tiles(self) -> int:
        """As `query_tiles`."""
        return self.places.key_positions_BS.shape[1] // self.part.tiles.keys

    def queries(self, part: jax.Array, tile: jax.Array) -> Tile:
        """A tile of the queries of part `part` of L."""
        o, v, size = self.operands, self.places, self.part.tiles.queries
        arrays = (self.cut(x, part, tile, size) for x in (o.q1, o.q2, self.dy))
        places = (self.cut_places(x, part, tile, size) for x in (v.query_positions_BT, v.query_segments_BT))
        return Tile(*arrays, *(x[:, None, None, :, None] for x in places))

    def keys(self, part: jax.Array, tile: jax.Array) -> Tile:
        """A tile of the keys of part `part` of L."""
        o, v, size = self.operands, self.places, self.part.tiles.keys
        arrays = (self.cut(x, part, tile, size) for x in (o.k1, o.k2, o.v))
        places = (self.cut_places(x, part, tile, size) for x in (v.key_positions_BS, v.key_segments_BS))
        return Tile(*arrays, *(x[:, None, None, None] for x in places))

    def cut(self, x: Any, part: jax.Array, tile: jax.Array, size: int) -> Any:
        """Of [B, K, ..., T, width] a part's tile [P, M, ..., size, width] in the scores' dtype; None of None."""
        if x is None:
            return None
        across = x.shape[1] // self.part.heads
        starts = [jnp.int32(0)] * x.ndim
        starts[:2], starts[-2] = (part // across * self.part.sequences, part % across * self.part.heads), tile * size
        sizes = [self.part.sequences, self.part.heads, *x.shape[2:-2], size, x.shape[-1]]
        return jax.lax.dynamic_slice(x, starts, sizes).astype(self.dtype)

    def cut_places(self, x_BT: jax.Array, part: jax.Array, tile: jax.Array, size: int) -> jax.Array:
        """Of [B, T] a part's tile [P, size]."""
        first = part // (self.operands.k1.shape[1] // self.part.heads) * self.part.sequences
        return jax.lax.dynamic_slice(x_BT, (first, tile * size), (self.part.sequences, size))

    def over_keys(self, part: jax.Array, tile: jax.Array, step: Callable[..., Any], start: Any) -> Any:
        """`step(j, keys, carry)` for the tiles of keys that a tile of queries may see."""
        first, stop = (self.cut_places(x, part, tile, 1) for x in (self.turns.first, self.turns.stop))
        return jax.lax.fori_loop(jnp.min(first), jnp.max(stop), lambda j, c: step(j, self.keys(part, j), c), start)

    def scores(self, queries: Tile, keys: Tile) -> tuple[jax.Array, jax.Array]:
        """The predictor's scores [P, M, G, I, J] after their cap, and booleans [P, 1, 1, I, J] of the visible ones."""
        scores = capped(product(queries.predictor, keys.predictor, 1), self.p.softcap)
        places = (queries.positions, keys.positions, queries.segments, keys.segments)
        return scores, sees(*places, self.places.window)

    def arguments(self, queries: Tile, keys: Tile) -> jax.Array | None:
        """The softplus's arguments [P, M, G, I, J] after their cap."""
        if queries.rest is None:
            return None
        return capped(product(queries.rest, keys.rest, 1), self.p.softcap_values)

    def by_token(self, x_LCPMGIV: jax.Array, length: int) -> jax.Array:
        """Results of all tiles of queries as [B, T, N, V]."""
        count, sequences, heads, group, size, width = x_LCPMGIV.shape[1:]
        across = self.operands.k1.shape[1] // heads
        x = x_LCPMGIV.reshape(-1, across, count, sequences, heads, group, size, width)
        x = x.transpose(0, 3, 2, 6, 1, 4, 5, 7)
        return x.reshape(-1, count * size, across * heads * group, width)[:, :length]


def product(a: Any, b: Any, axis: int) -> jax.Array:
    """`a` [P, M, G, I, n] times b over n, which is the last (1) or last but one (0) of b's axes: [P, M, G, I, ...]."""
    a_PMRn = a.reshape(*a.shape[:2], -1, a.shape[-1])
    y = jax.lax.dot_general(a_PMRn, b, (((3,), (2 + axis,)), ((0, 1), (0, 1))))
    return y.reshape(*a.shape[:-1], y.shape[-1])


def transposed_product(a: Any, b: Any) -> jax.Array:
    """Sums over G and I of `a` [P, M, G, I, n] times `b` [P, M, G, I, J]: [P, M, n, J].

    Of the two orders of the result that in which XLA for CPUs copies the smaller operand.
    """
    a, b = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return jax.lax.dot_general(a, b, (((2,), (2,)), ((0, 1), (0, 1))))


def forward(q, k, v, visibility: Visibility, p: Problem) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Mixed values [B, T, N, V], attended keys [B, T, N], and for `backward` threshold and normaliser of each query.

    The normaliser is the logarithm of the softmax's sum; the two are [L, C, P, M, G, I].
    """
    walk, length = Walk.over(q, k, v, None, visibility, p), q.shape[1]
    attend = _all_keys if p.selection == "none" else _selected_keys

    def of_tile(n: jax.Array) -> tuple[jax.Array, ...]:
        y, *numbers = attend(walk, n // walk.query_tiles, n % walk.query_tiles)
        return y, *(x[..., 0] for x in numbers)

    each = jax.lax.map(of_tile, jnp.arange(walk.parts * walk.query_tiles, dtype=jnp.int32))
    y, normaliser, *selection = (x.reshape(walk.parts, walk.query_tiles, *x.shape[1:]) for x in each)
    y = walk.by_token(y, length).astype(v.dtype)
    if p.selection == "none":
        attended = jnp.broadcast_to(visibility.keys_seen[:, :, None], q.shape[:3])
        return y, attended, (jnp.full_like(normaliser, ALL), normaliser)
    threshold, attended = selection
    return y, walk.by_token(attended[..., None], length)[..., 0], (threshold, normaliser)


def _all_keys(walk: Walk, part: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values mixed by the weights of all visible keys, and the normaliser, in one loop.

    The best score so far stands for the best of all, as in the kernels.
    """
    p, queries = walk.p, walk.queries(part, tile)

    def step(j, keys: Tile, carry):
        del j
        best, total, mixed = carry
        scores, visible = walk.scores(queries, keys)
        scores = jnp.where(visible, scores, NEGATIVE)
        if best is not None:
            before, best = best, jnp.maximum(best, jnp.max(scores, axis=-1, keepdims=True))
            shrunk, scores = jnp.exp(before - best), scores - best
            total, mixed = shrunk * total, shrunk * mixed
        weights = jnp.exp(scores)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        if (arguments := walk.arguments(queries, keys)) is not None:
            weights *= softplus_and_slope(arguments)[0]
        return best, total, mixed + product(weights, keys.values, 0)

    zero = jnp.zeros((*queries.predictor.shape[:-1], 1), walk.dtype)
    best = None if bounded(p) else jnp.full_like(zero, LOWEST_BEST)
    start = (best, zero, jnp.zeros((*zero.shape[:-1], walk.operands.v.shape[-1]), walk.dtype))
    best, total, mixed = walk.over_keys(part, tile, step, start)
    # A query that sees nothing has a softmax over nothing: its values are zero.
    total = jnp.where(total == 0, 1, total)
    return mixed / total, jnp.log(total) if best is None else best + jnp.log(total)


def _selected_keys(walk: Walk, part: jax.Array, tile: jax.Array) -> tuple[jax.Array, ...]:
    """Values mixed by the selected keys' weights, the normaliser, the threshold, and the number of attended keys."""
    p, queries = walk.p, walk.queries(part, tile)
    zero = jnp.zeros((*queries.predictor.shape[:-1], 1), walk.dtype)

    def measure(j, keys: Tile, carry):
        del j
        before, moments = carry
        scores, visible = walk.scores(queries, keys)
        here = jnp.sum(visible, axis=-1, keepdims=True, dtype=walk.dtype)
        count = before + here
        found = Moments.of_tile(scores, visible, here)
        return count, moments.merged(found, before, here / jnp.maximum(count, 1))

    start = (zero[:, :1, :1], Moments(zero, zero, jnp.full_like(zero, NEGATIVE)))
    count, moments = walk.over_keys(part, tile, measure, start)
    threshold = threshold_of(count, moments, p)

    def mix(j, keys: Tile, carry):
        del j
        total, attended, mixed = carry
        scores, visible = walk.scores(queries, keys)
        selected = chosen(scores, visible, threshold, p)
        weights = jnp.where(selected, jnp.exp(scores - moments.best), 0)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        attended += jnp.sum(selected, axis=-1, keepdims=True, dtype=jnp.int32)
        if (arguments := walk.arguments(queries, keys)) is not None:
            weights *= softplus_and_slope(arguments)[0]
        return total, attended, mixed + product(weights, keys.values, 0)

    start = (zero, zero.astype(jnp.int32), jnp.zeros((*zero.shape[:-1], walk.operands.v.shape[-1]), walk.dtype))
    total, attended, mixed = walk.over_keys(part, tile, mix, start)
    total = jnp.where(total == 0, 1, total)
    return mixed / total, moments.best + jnp.log(total), threshold, attended


def backward(
    q, k, v, visibility: Visibility, y, statistics: tuple[jax.Array, jax.Array], dy, p: Problem
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v from that of y [B, T, N, V] and the `statistics` that `forward` returned."""
    walk, (_, length, _, _) = Walk.over(q, k, v, dy, visibility, p), q.shape
    delta_BTN1 = jnp.sum(dy.astype(walk.dtype) * y.astype(walk.dtype), -1, keepdims=True)
    delta = to_heads(delta_BTN1, k.shape[2], walk.part.tiles)
    threshold, normaliser = statistics

    def of_part(_, part: jax.Array):
        """Gradients of one part: of its keys, sums over tiles of queries, and of each such tile."""

        def of_tile(sums, tile: jax.Array):
            queries = walk.queries(part, tile)
            lowest, shift = (x[part, tile][..., None] for x in (threshold, normaliser))
            own_delta = walk.cut(delta, part, tile, walk.part.tiles.queries)

            def step(j, keys: Tile, carry):
                dq1, dq2, dkeys = carry
                scores, visible = walk.scores(queries, keys)
                softmax = where(chosen(scores, visible, lowest, p), jnp.exp(scores - shift), 0)
                dweights = product(queries.values, keys.values, 1)
                arguments = walk.arguments(queries, keys)
                weights, ds, da = tile_gradients(softmax, scores, arguments, dweights, own_delta, p)
                dq1 += product(ds, keys.predictor, 0)
                parts = [transposed_product(queries.predictor, ds), transposed_product(queries.values, weights)]
                if da is not None:
                    dq2 += product(da, keys.rest, 0)
                    parts.append(transposed_product(queries.rest, da))
                return dq1, dq2, [_added(total, part, j) for total, part in zip(dkeys, parts, strict=True)]

            start = (*jax.tree.map(jnp.zeros_like, (queries.predictor, queries.rest)), sums)
            dq1, dq2, sums = walk.over_keys(part, tile, step, start)
            return sums, (dq1, dq2)

        o, size, (_, _, tiles) = walk.operands, (walk.key_tiles, *walk.part[:2]), walk.part
        zeros = [jnp.zeros((*size, x.shape[-1], tiles.keys), walk.dtype) for x in (o.k1, o.v, o.k2) if x is not None]
        return None, jax.lax.scan(of_tile, zeros, jnp.arange(walk.query_tiles, dtype=jnp.int32))

    dkeys, dqueries = jax.lax.scan(of_part, None, jnp.arange(walk.parts, dtype=jnp.int32))[1]

    def of_keys(x_LCPMVJ: jax.Array) -> jax.Array:
        """Sums as [B, S, K, V]."""
        count, sequences, heads, width, size = x_LCPMVJ.shape[1:]
        x = x_LCPMVJ.reshape(-1, k.shape[2] // heads, count, sequences, heads, width, size)
        return x.transpose(0, 3, 2, 6, 1, 4, 5).reshape(-1, count * size, k.shape[2], width)[:, : k.shape[1]]

    scales = (p.predictor_scale, p.value_scale)
    dq = [walk.by_token(scale * x, length) for x, scale in zip(dqueries, scales, strict=True) if x is not None]
    dk1, dv, *rest = map(of_keys, dkeys)
    return joined(dq, q), joined([dk1, *rest], k), dv.astype(v.dtype)


def _added(totals: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    """`totals` with `part` added to its row `index`."""
    total = jax.lax.dynamic_index_in_dim(totals, index, 0, keepdims=False) + part
    return jax.lax.dynamic_update_index_in_dim(totals, total, index, 0)


def refusal(q, k, v, visibility: Any, selection: str) -> str | None:
    """Why these arrays can't be taken, or None if they can."""
    return common.refusal(q, k, v, visibility, selection, interpret=True)
