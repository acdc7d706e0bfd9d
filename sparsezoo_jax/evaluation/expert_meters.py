"""Meters of layers that activate experts: per token, per chunk of tokens, again by the next token, and each one's load.

A layer has them if it records `expert_scores` (see `models.records`), whatever its router. First the sums over a batch,
on the device; then the figures made of them. Shape letters: B batch, T position, E experts, N chunk lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.evaluation.counts import Count, count_of, tally
from sparsezoo_jax.models.chunks import has_predecessor
from sparsezoo_jax.models.common import CallContext, positions_within_segments

CHUNKS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens in a chunk: each length twice the one before."""


@dataclasses.dataclass(frozen=True)
class ExpertMeters:
    """Which experts a layer's tokens activate, or those of all layers; shared experts count as active for every token.

    Source: BlockFFN (arXiv 2507.08771), section 3 (token- and chunk-level sparsity) and its reuse ratio.
    """

    experts: int
    """Experts, shared ones included; of all layers together where layers are pooled."""
    shared: int
    """Those that every token takes."""
    active: Count
    """Active experts of a token in one layer."""
    tokens_by_active: list[float]
    """Share of tokens with 0, 1, 2, ... active experts in one layer."""
    tls: float
    """Token-level sparsity: share of experts that are not active, mean over tokens."""
    cls: dict[str, float | None]
    """Chunk-level sparsity by chunk length: share of experts that no token of a chunk activates, mean over chunks.
    Chunks start with their document, are whole, and end within it; None where no document is that long."""
    cls_stream: dict[str, float | None]
    """The same with chunks as the released code has them: cut from the stream of a batch's tokens that have a
    predecessor in their document, whatever the documents."""
    reuse: float | None
    """Share of a token's active experts that the next token of its document activates too, mean over the tokens that
    have both; None where there are none."""
    dead: int
    """Routed experts that no token activated."""
    max_load: float | None
    """Tokens of the busiest routed expert / mean over the routed experts; None where none was active."""
    load: list[float]
    """Share of tokens that activate each routed expert, layer by layer where layers are pooled."""


# ----------------------------------------------------------------------------------------------------------- Sums


def summarise_experts(scores_BTE: jax.Array, ctx: CallContext, shared: int) -> dict[str, jax.Array]:
    """Sums over the real tokens of one batch, names starting with `experts_`.

    Args:
      scores_BTE: weights of the experts, the `shared` ones first; active where not 0.
      ctx: documents and padding of the batch.
      shared: experts that every token takes.
    """
    active_BTE = (scores_BTE != 0) & ctx.valid_BT[..., None]
    positions_BT = positions_within_segments(ctx.segments_BT)
    by_count_NE, shifted = _chunk_tallies(active_BTE, positions_BT, ctx.valid_BT), active_BTE[:, 1:]
    # Tokens without a predecessor and padding go to the end of the stream, where no chunk is counted.
    followers = has_predecessor(ctx).reshape(-1)
    stream = active_BTE.reshape(-1, active_BTE.shape[-1])[jnp.argsort(~followers, stable=True)]
    places = jnp.arange(len(followers))
    again_BT = jnp.sum(active_BTE[:, :-1] & shifted, axis=-1, dtype=jnp.float32)
    count_BT = jnp.sum(active_BTE[:, :-1], axis=-1, dtype=jnp.float32)
    pairs_BT = has_predecessor(ctx)[:, 1:] & (count_BT > 0)
    return {
        "experts_tokens": jnp.sum(ctx.valid_BT, dtype=jnp.int32),
        "experts_chunks_by_count": by_count_NE,
        "experts_stream_chunks_by_count": _chunk_tallies(stream[None], places[None], places[None] < jnp.sum(followers)),
        "experts_reuse": jnp.sum(jnp.where(pairs_BT, again_BT / jnp.maximum(count_BT, 1), 0)),
        "experts_reuse_pairs": jnp.sum(pairs_BT, dtype=jnp.int32),
        "experts_tokens_by_routed": jnp.sum(active_BTE[..., shared:], axis=(0, 1), dtype=jnp.int32),
    }


def _chunk_tallies(active_BTE: jax.Array, positions_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """How many whole chunks of each length have 0, 1, ... E experts that some token activates, int32 [N, E + 1].

    Chunks are cut from position 0 on; valid tokens of one run have consecutive positions.
    """
    # The experts of the n tokens up to each one: those of two halves. Where n positions end a chunk, it is the chunk's.
    tallies, union_BTE = [], active_BTE
    for n in CHUNKS:
        if n > 1:
            earlier = jnp.pad(union_BTE, ((0, 0), (n // 2, 0), (0, 0)))[:, : union_BTE.shape[1]]
            union_BTE = union_BTE | earlier
        ends_BT = valid_BT & ((positions_BT + 1) % n == 0)
        tallies.append(tally(jnp.sum(union_BTE, axis=-1, dtype=jnp.int32), ends_BT, union_BTE.shape[-1] + 1))
    return jnp.stack(tallies)


# -------------------------------------------------------------------------------------------------------- Figures


def expert_meters(totals: Sequence[Mapping[str, np.ndarray]]) -> ExpertMeters | None:
    """The figures of one layer from its sums over all batches, or those of several layers pooled.

    Pooled means that tokens, chunks and pairs of all layers count alike. None without a layer that has experts.
    """
    totals = [total for total in totals if "experts_tokens" in total]
    if not totals:
        return None
    experts = [total["experts_chunks_by_count"].shape[-1] - 1 for total in totals]
    routed = [len(total["experts_tokens_by_routed"]) for total in totals]
    by_active = np.zeros(max(experts) + 1, np.int64)
    for total in totals:
        tokens = total["experts_chunks_by_count"][0]  # a chunk of one token
        by_active[: len(tokens)] += tokens
    cls, cls_stream = _sparsity(totals, "experts_chunks_by_count"), _sparsity(totals, "experts_stream_chunks_by_count")
    tls = cls[str(CHUNKS[0])]
    assert tls is not None, "there is a token"
    pairs = sum(int(total["experts_reuse_pairs"]) for total in totals)
    loads = np.concatenate([total["experts_tokens_by_routed"] / total["experts_tokens"] for total in totals])
    return ExpertMeters(
        experts=sum(experts),
        shared=sum(experts) - sum(routed),
        active=count_of(by_active),
        tokens_by_active=[float(x) for x in by_active / by_active.sum()],
        tls=tls,
        cls=cls,
        cls_stream=cls_stream,
        reuse=float(sum(total["experts_reuse"] for total in totals) / pairs) if pairs else None,
        dead=int(np.sum(loads == 0)),
        max_load=float(loads.max() / loads.mean()) if loads.any() else None,
        load=[float(x) for x in loads],
    )


def _sparsity(totals: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    """Share of experts that are not active in chunks of each length."""
    found = {}
    for index, n in enumerate(CHUNKS):
        tallies = [total[name][index] for total in totals]
        active = sum(int(times @ np.arange(len(times))) for times in tallies)
        possible = sum(int(times.sum()) * (len(times) - 1) for times in tallies)
        found[str(n)] = 1 - active / possible if possible else None
    return found
