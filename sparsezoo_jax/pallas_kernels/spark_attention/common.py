"""What the kernels for TPUs and GPUs share: the problem, its arrays by head in whole tiles, and formulas of a tile.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, R = r predictor's part of it, V width of values, I queries and J keys of a tile. Columns are [I, 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, padded
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import RowStatistics, quantile_of_count

#: The threshold of queries that attend to all they see: below every score, above NEGATIVE.
ALL = 0.1 * NEGATIVE


class Problem(NamedTuple):
    """What the kernels know of the call when they are compiled."""

    r: int
    top_k: int
    ddof: int
    predictor_scale: float
    value_scale: float
    softcap: float | None
    softcap_values: float | None
    selection: str
    weighting: str
    window: int | None
    tiles: Tiles
    """What arrays are filled up to multiples of."""

    def definition(self) -> dict[str, Any]:
        """Keyword arguments of the definition."""
        return {name: value for name, value in self._asdict().items() if name not in ("window", "tiles")}


def refusal(q, k, v, visibility: Any, selection: str, *, interpret: bool) -> str | None:
    """Why no kernel can take these arrays, or None if one might."""
    allowed = [jnp.bfloat16, jnp.float32] + [jnp.float64] * interpret
    if q.dtype not in allowed or {k.dtype, v.dtype} != {q.dtype}:
        return f"takes bfloat16 or float32 throughout, not {q.dtype}, {k.dtype} and {v.dtype}"
    if not isinstance(visibility, Visibility):
        return "takes a Visibility, not a mask with an entry for every pair of tokens"
    if selection == "exact":
        return "can't sort scores"
    return None if q.size and k.size else "needs at least one query and one key"


# Arrays -------------------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """The arrays as kernels read them: by head, in whole tiles."""

    q1_BKGTR: jax.Array
    """The predictor's part of the queries, times its scale."""
    q2_BKGTH: jax.Array | None
    """The rest of them, times its scale; None: no softplus."""
    k1_BKSR: jax.Array
    k2_BKSH: jax.Array | None
    v_BKSV: jax.Array


def prepare(q, k, v, p: Problem) -> Operands:
    """Arrange queries [B, T, N, H], keys and values [B, S, K, H]."""

    def keys(x_BSKH: jax.Array) -> jax.Array:
        return padded(x_BSKH.swapaxes(1, 2), p.tiles.keys, 2)

    # Scaled before the product, in the queries' dtype, as the definition does: else bfloat16 selects other keys.
    kv_heads = k.shape[2]
    q1 = by_head(p.predictor_scale * q[..., : p.r], kv_heads, p.tiles)
    if p.weighting == "none":
        return Operands(q1, None, keys(k[..., : p.r]), None, keys(v))
    q2 = by_head(p.value_scale * q[..., p.r :], kv_heads, p.tiles)
    return Operands(q1, q2, keys(k[..., : p.r]), keys(k[..., p.r :]), keys(v))


def by_head(x_BTNH: jax.Array, kv_heads: int, tiles: Tiles) -> jax.Array:
    """[B, K, G, T, H] with T in whole tiles."""
    batch, queries, _, width = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, queries, kv_heads, -1, width)
    return padded(x_BTKGH.transpose(0, 2, 3, 1, 4), tiles.queries, 3)


def from_heads(x_BKGTH: jax.Array, queries: int) -> jax.Array:
    """[B, T, N, H] without the queries that filled up the last tile."""
    batch, _, _, _, width = x_BKGTH.shape
    return x_BKGTH[:, :, :, :queries].transpose(0, 3, 1, 2, 4).reshape(batch, queries, -1, width)


def joined(parts: list[jax.Array], like: jax.Array) -> jax.Array:
    """Parts of heads side by side; zeros where the head has more."""
    return padded(jnp.concatenate(parts, axis=-1), like.shape[-1], -1 % like.ndim).astype(like.dtype)


# Formulas -----------------------------------------------------------------------------------------------------------


def wide(x: Any) -> Any:
    """The dtype of scores and sums."""
    return jnp.promote_types(x.dtype, jnp.float32)


def capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """`softcapped` without a division."""
    return scores if cap is None else cap * jnp.tanh(scores * (1 / cap))


def slope_of_cap(capped: jax.Array, cap: float | None) -> jax.Array | float:
    """Derivative of the cap, from its result."""
    return 1.0 if cap is None else 1 - jnp.square(capped * (1 / cap))


def softplus_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log(1 + exp(x))` and its derivative, which the compiler drops where it is not used."""
    grown = jnp.exp(jnp.minimum(x, 80))  # beyond, exp overflows and softplus is x
    return jnp.maximum(x, jnp.log(1 + grown)), grown / (1 + grown)


class Moments(NamedTuple):
    """Columns of what the threshold needs of queries' visible scores, apart from their number."""

    mean: jax.Array
    squares: jax.Array
    """Sum of squared distances from the mean."""
    best: jax.Array

    @classmethod
    def of_tile(cls, scores: jax.Array, visible: jax.Array, here: jax.Array) -> Moments:
        """Of the scores [I, J] that are `visible`, `here` [I, 1] of them, in two passes."""
        mean = jnp.sum(jnp.where(visible, scores, 0), axis=-1, keepdims=True) / jnp.maximum(here, 1)
        squares = jnp.sum(jnp.where(visible, jnp.square(scores - mean), 0), axis=-1, keepdims=True)
        return cls(mean, squares, jnp.max(jnp.where(visible, scores, NEGATIVE), axis=-1, keepdims=True))

    def merged(self, tile: Moments, before: jax.Array, share: jax.Array) -> Moments:
        """Of the `before` scores that these are of and of a tile's, which are a `share` of all; nothing cancels.

        (Chan, Golub and LeVeque, The American Statistician 37, 1983.)
        """
        delta = tile.mean - self.mean
        squares = self.squares + (tile.squares + jnp.square(delta) * before * share)
        return Moments(self.mean + delta * share, squares, jnp.maximum(self.best, tile.best))


def threshold_of(count: jax.Array, m: Moments, p: Problem) -> jax.Array:
    """The least score that stays of queries that see `count` keys."""
    if p.selection == "none":
        return jnp.full_like(m.mean, ALL)
    std = jnp.sqrt(m.squares / jnp.maximum(count - p.ddof, 1))
    statistics = RowStatistics(count, m.mean, std, quantile_of_count(count, p.top_k))
    # The best score stays. It is made again, and may come out with another last bit.
    slack = jnp.where(jnp.isfinite(m.best), 4 * jnp.finfo(m.best.dtype).eps * jnp.abs(m.best), 0)
    below_best = jnp.where(statistics.threshold < m.best - slack, statistics.threshold, m.best - slack)
    return jnp.where(count <= p.top_k, ALL, below_best)


def tile_gradients(
    softmax: jax.Array,
    scores: jax.Array,
    arguments: jax.Array | None,
    dweights: jax.Array,
    delta: jax.Array,
    p: Problem,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The weights of a tile [I, J], and the gradients of its scores and of the softplus's arguments, before their caps.

    With s the softmax over the selected keys, u the softplus and y = sum_j s_j u_j v_j: the weights s_j u_j get
    `dweights` = dy v_j, and the softmax's argument s_j (u_j dy v_j - dy y), of which `delta` [I, 1] is the last term.
    Nothing flows through the selection. `scores` and `arguments` come capped.
    """
    weights, dsoftmax, darguments = softmax, dweights, None
    if arguments is not None:
        factor, slope = softplus_and_slope(arguments)
        weights, dsoftmax = softmax * factor, dweights * factor
        darguments = softmax * dweights * slope * slope_of_cap(arguments, p.softcap_values)
    return weights, softmax * (dsoftmax - delta) * slope_of_cap(scores, p.softcap), darguments
