"""What the kernels share: arrays by head in whole tiles (GPUs have their own), and the formulas for one tile of scores.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K queries per key/value head,
H head width, R = r of it the predictor's, V width of values, I queries and J keys of a tile of scores [I, J]. What
there is one of for each query of a tile is a column [I, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.spark_attention.reference import NEGATIVE, Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Tiles, padded
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import RowStatistics, quantile_of_count

#: The threshold of queries that attend to all they see: below every score, above NEGATIVE.
ALL = 0.1 * NEGATIVE
#: What a running maximum starts from: above NEGATIVE, so that exp() of the difference of the two is 0, below any score.
LOWEST_BEST = 0.5 * NEGATIVE
#: exp() of it, times a million keys and values of a million, is still a float32, and so is its inverse.
LARGEST_CAP = 56.0


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
    """Queries, keys and values in the layout that kernels read: by head, the lengths filled up to whole tiles.

    The fields are arrays, or inside of a kernel the references to them; gradients have the same layout.
    """

    q1: Any
    """[B, K, G, T, R], the dimensions of the queries that select, times their scale."""
    q2: Any
    """[B, K, G, T, H - R], the other dimensions, times their scale; None where there is no softplus."""
    k1: Any
    """[B, K, S, R]."""
    k2: Any
    """[B, K, S, H - R], or None."""
    v: Any
    """[B, K, S, V]."""


def arrange(q, k, v, p: Problem, tiles: Tiles) -> Operands:
    """Bring queries [B, T, N, H], keys and values [B, S, K, H] into the layout of `Operands`."""

    def keys(x_BSKH: jax.Array) -> jax.Array:
        return padded(x_BSKH.swapaxes(1, 2), tiles.keys, 2)

    # Scaled before the product, in the queries' dtype, as the definition does: else bfloat16 selects other keys.
    kv_heads = k.shape[2]
    q1 = to_heads(p.predictor_scale * q[..., : p.r], kv_heads, tiles)
    if p.weighting == "none":
        return Operands(q1, None, keys(k[..., : p.r]), None, keys(v))
    q2 = to_heads(p.value_scale * q[..., p.r :], kv_heads, tiles)
    return Operands(q1, q2, keys(k[..., : p.r]), keys(k[..., p.r :]), keys(v))


def to_heads(x_BTNH: jax.Array, kv_heads: int, tiles: Tiles) -> jax.Array:
    """[B, T, N, H] as [B, K, G, T, H], with T filled up to whole tiles."""
    batch, queries, _, width = x_BTNH.shape
    x_BTKGH = x_BTNH.reshape(batch, queries, kv_heads, -1, width)
    return padded(x_BTKGH.transpose(0, 2, 3, 1, 4), tiles.queries, 3)


def from_heads(x_BKGTH: jax.Array, queries: int) -> jax.Array:
    """[B, K, G, T, H] as [B, T, N, H], without the queries that filled up the last tile."""
    batch, _, _, _, width = x_BKGTH.shape
    return x_BKGTH[:, :, :, :queries].transpose(0, 3, 1, 2, 4).reshape(batch, queries, -1, width)


def joined(parts: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    """An array like `like` whose last axis has the parts side by side; zeros where it is longer than they are."""
    return padded(jnp.concatenate(parts, axis=-1), like.shape[-1], -1 % like.ndim).astype(like.dtype)


def name_of(p: Problem) -> str:
    """What profiles call the kernels of a problem, before what each of them does."""
    return "flash_attention" if (p.selection, p.weighting) == ("none", "none") else "spark_attention"


# Formulas -----------------------------------------------------------------------------------------------------------


def accumulator_dtype(x: Any) -> Any:
    """The dtype in which scores of `x` are made and summed: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """`softcapped` with a product in place of its division."""
    return scores if cap is None else cap * jnp.tanh(scores * (1 / cap))


def slope_of_cap(capped: jax.Array, cap: float | None) -> jax.Array | float:
    """The derivative of `capped` with regard to its argument, as a function of its result."""
    return 1.0 if cap is None else 1 - jnp.square(capped * (1 / cap))


def softplus_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log(1 + exp(x))` and its derivative, which the compiler drops where it is not used."""
    grown = jnp.exp(jnp.minimum(x, 80))  # beyond, exp overflows and softplus is x
    return jnp.maximum(x, jnp.log(1 + grown)), grown / (1 + grown)


def chosen(scores: jax.Array, visible: jax.Array | None, threshold: jax.Array, p: Problem) -> Any:
    """Booleans [I, J] of the selected keys, from scores [I, J] and each query's threshold [I, 1].

    None, as argument and as result, stands for all keys.
    """
    if p.selection == "none":
        return visible
    over = scores >= threshold
    return over if visible is None else visible & over


def where(condition: jax.Array | None, x: jax.Array, otherwise: float) -> jax.Array:
    """`jnp.where`, in which None as the condition is true everywhere."""
    return x if condition is None else jnp.where(condition, x, otherwise)


def bounded(p: Problem) -> bool:
    """Whether a cap holds scores where exp() of them neither over- nor underflows: sums then need no best score."""
    return p.softcap is not None and p.softcap <= LARGEST_CAP


class Moments(NamedTuple):
    """What a query's threshold is computed from, beside the number of its visible scores; a column of each."""

    mean: Any
    """Mean of the visible scores."""
    squares: Any
    """Sum of their squared distances from the mean."""
    best: Any
    """The largest of them."""

    @classmethod
    def of_tile(cls, scores: jax.Array, visible: jax.Array | None, count: jax.Array) -> Moments:
        """The moments of those scores [I, J] that are `visible` (None: all), of which each query has `count`.

        That is a column [I, 1] or an array [I], and so are they. The squares take a second pass over the tile, from the
        mean that the first one found.
        """
        columns = count.ndim == scores.ndim
        mean = jnp.sum(where(visible, scores, 0), axis=-1, keepdims=columns) / jnp.maximum(count, 1)
        distance = scores - (mean if columns else mean[..., None])
        squares = jnp.sum(where(visible, jnp.square(distance), 0), axis=-1, keepdims=columns)
        return cls(mean, squares, jnp.max(where(visible, scores, NEGATIVE), axis=-1, keepdims=columns))

    def merged(self, tile: Moments, before: jax.Array, share: jax.Array) -> Moments:
        """The moments of all scores so far and those of one more tile together.

        Args:
          tile: moments of the tile's visible scores.
          before: how many scores `self` is of, [I, 1].
          share: the tile's visible scores as a fraction of all of them, itself included.

        Means and squares are updated by differences of means, so that no large numbers are subtracted (Chan, Golub and
        LeVeque, The American Statistician 37, 1983).
        """
        delta = tile.mean - self.mean
        squares = self.squares + (tile.squares + jnp.square(delta) * before * share)
        return Moments(self.mean + delta * share, squares, jnp.maximum(self.best, tile.best))


def threshold_of(count: jax.Array, m: Moments, p: Problem) -> jax.Array:
    """The score from which on keys are selected, for queries that see `count` keys."""
    std = jnp.sqrt(m.squares / jnp.maximum(count - p.ddof, 1))
    statistics = RowStatistics(count, m.mean, std, quantile_of_count(count, p.top_k))
    # The best score is always selected. The kernel that compares makes it again, and its last bit may differ.
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
    """Weights of a tile [I, J], and the gradients of its predictor scores and of its softplus arguments (or None).

    With s the softmax over the selected keys, u the softplus and y = sum_j s_j u_j v_j, the gradient of the weight
    s_j u_j is dy v_j, and that of the softmax's argument is s_j (u_j dy v_j - dy y). No gradient flows through the
    selection.

    Args:
      softmax: s, [I, J].
      scores: the predictor's scores after their cap, [I, J].
      arguments: of the softplus, after their cap; None where there is no softplus (u = 1).
      dweights: dy v_j, [I, J].
      delta: dy y, [I, 1].
      p: the problem.

    Returns:
      s u, and the gradients of scores and arguments before their caps.
    """
    weights, dsoftmax, darguments = softmax, dweights, None
    if arguments is not None:
        factor, slope = softplus_and_slope(arguments)
        weights, dsoftmax = softmax * factor, dweights * factor
        darguments = softmax * dweights * slope * slope_of_cap(arguments, p.softcap_values)
    return weights, softmax * (dsoftmax - delta) * slope_of_cap(scores, p.softcap), darguments
