"""Sums over chunks of consecutive tokens, and how many experts tokens, chunks and neighbours activate.

A chunk is the part of a window of n positions (0..n-1, n..2n-1, ... on the packed axis) that lies in one document, so
no document ever counts for another; windows are cut at T. Shape letters: C windows, N positions in one, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.models.common import CallContext


class Chunks(NamedTuple):
    """Which tokens form a chunk."""

    same_BCNN: jax.Array
    """True where two real tokens of a window belong to one document."""
    first_BCN: jax.Array
    """True for the first token of each chunk: the place at which a chunk counts once."""

    def windows(self, x_BTE: jax.Array) -> jax.Array:
        """[B, T, E] as windows [B, C, N, E], filled up with zeros."""
        batch, count, n, _ = self.same_BCNN.shape
        missing = count * n - x_BTE.shape[1]
        return jnp.pad(x_BTE, ((0, 0), (0, missing), (0, 0))).reshape(batch, count, n, -1)

    def sums(self, x_BTE: jax.Array) -> jax.Array:
        """For every token the float32 sum over its chunk, [B, C, N, E]; the same for all tokens of a chunk."""
        same = self.same_BCNN.astype(jnp.float32)
        # The sums of near-zero logarithms decide a loss: no reduced precision here.
        return jnp.einsum(
            "bcnm,bcme->bcne", same, self.windows(x_BTE.astype(jnp.float32)), precision=jax.lax.Precision.HIGHEST
        )

    def mean(self, x_BCNE: jax.Array) -> jax.Array:
        """Mean over chunks and experts of a quantity that all tokens of a chunk share; 0 without a chunk."""
        weights = self.first_BCN[..., None].astype(jnp.float32)
        return jnp.sum(x_BCNE * weights) / jnp.maximum(jnp.sum(weights) * x_BCNE.shape[-1], 1)


def chunks_of(ctx: CallContext, n: int) -> Chunks:
    """The chunks of windows of `n` positions; padding belongs to none."""
    batch, length = ctx.segments_BT.shape
    padded = jnp.pad(ctx.segments_BT, ((0, 0), (0, -length % n)))
    segments_BCN = padded.reshape(batch, -1, n)
    real_BCN = segments_BCN > 0
    same_BCNN = (segments_BCN[..., :, None] == segments_BCN[..., None, :]) & real_BCN[..., None]
    earlier = jnp.tril(jnp.ones((n, n), bool), k=-1)
    return Chunks(same_BCNN, real_BCN & ~jnp.any(same_BCNN & earlier, axis=-1))


def has_predecessor(ctx: CallContext) -> jax.Array:
    """True for tokens whose predecessor is a token of the same document, [B, T]."""
    same = (ctx.segments_BT[:, 1:] == ctx.segments_BT[:, :-1]) & (ctx.segments_BT[:, 1:] > 0)
    return jnp.pad(same, ((0, 0), (1, 0)))


def activation_stats(active_BTE: jax.Array, ctx: CallContext, window: int = 8) -> dict[str, jax.Array]:
    """Statistics of a layer whose tokens activate experts (booleans [B, T, E]).

    `ffn_density`: mean share of active experts, 1 - TLS. `chunk_density_8`: share that some token of a chunk of 8
    activates, averaged over chunks, 1 - CLS_8. `expert_reuse`: share of a token's experts that the next token of its
    document activates again.

    Source: BlockFFN (arXiv 2507.08771), section 3 (token- and chunk-level sparsity) and its reuse ratio.
    """
    active_BTE = jax.lax.stop_gradient(active_BTE).astype(jnp.float32)
    chunks = chunks_of(ctx, window)
    again_BT = jnp.sum(active_BTE[:, 1:] * active_BTE[:, :-1], axis=-1)
    count_BT = jnp.sum(active_BTE[:, :-1], axis=-1)
    pairs_BT = (has_predecessor(ctx)[:, 1:] & (count_BT > 0)).astype(jnp.float32)
    reuse = jnp.sum(pairs_BT * again_BT / jnp.maximum(count_BT, 1)) / jnp.maximum(jnp.sum(pairs_BT), 1)
    return {
        "ffn_density": ctx.mean_over_tokens(jnp.mean(active_BTE, axis=-1)),
        f"chunk_density_{window}": chunks.mean((chunks.sums(active_BTE) > 0).astype(jnp.float32)),
        "expert_reuse": reuse,
    }
