"""What is added up from one layer's recorded arrays, on the device: counts and sums, from which `meters` makes figures.

Every summary is a sum over tokens, so that the summaries of batches add up. Sizes do not grow with the tokens read:
the largest are one number a neuron, and one a count of keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.evaluation import flow
from sparsezoo_jax.evaluation.counts import tally
from sparsezoo_jax.evaluation.expert_meters import summarise_experts
from sparsezoo_jax.models.chunks import has_predecessor
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.config import LayerSpec
from sparsezoo_jax.models.records import (
    ATTENTION_SCORES,
    ATTENTION_SELECTED,
    ATTENTION_VISIBLE,
    EXPERT_SCORES,
    FFN_GATE,
    FFN_SCORES,
)

NAMES = (
    FFN_SCORES,
    FFN_GATE,
    EXPERT_SCORES,
    ATTENTION_SCORES,
    ATTENTION_SELECTED,
    ATTENTION_VISIBLE,
    *flow.NAMES,
)
"""The records that `summarise_layer` reads."""

LIMIT = 8.0
BINS = 640
EDGES = np.linspace(-LIMIT, LIMIT, BINS + 1)
"""Edges of the histogram of standardised scores; scores beyond the ends count into the outermost bins."""

ROWS = 512
"""Rows of scores (tokens, or queries of one head) that a batch contributes to selection and score statistics."""

BLOCKS = (8, 16, 32, 64, 128, 256)
"""Tokens of a block whose active neurons are joined: each length twice the one before."""

Summary = dict[str, jax.Array]


def summarise_layer(records: dict[str, jax.Array], spec: LayerSpec, ctx: CallContext) -> Summary:
    """Sums over the real tokens of one batch of what `records` of one layer hold; names that are absent are left out.

    `ffn_*`, `experts_*` and `attention_*` names: activity over all tokens; selection and scores over at most `ROWS`
    rows, evenly spread, for they cost a sort. `flow_*` names: see `evaluation.flow`.
    """
    summary: Summary = {}
    if FFN_GATE in records:
        summary |= _activity(records[FFN_GATE] != 0, ctx.valid_BT) | _changes(records[FFN_GATE], ctx)
    if FFN_SCORES in records and FFN_GATE in records:
        width = records[FFN_SCORES].shape[-1]
        scores, active, valid = (
            _spread(x) for x in (_rows(records[FFN_SCORES]), _rows(records[FFN_GATE] != 0), ctx.valid_BT.reshape(-1))
        )
        visible = jnp.broadcast_to(valid[:, None], scores.shape)
        summary |= _named("ffn", _score_sums(scores, visible))
        if spec.ffn.target_active is not None:
            k = min(round(spec.ffn.target_active), width)
            summary |= _named("ffn", _selection_sums(scores, active & visible, visible, k))
    if EXPERT_SCORES in records:
        summary |= summarise_experts(records[EXPERT_SCORES], ctx, spec.ffn.shared)
    if ATTENTION_VISIBLE in records:
        summary |= _attention(records, spec, ctx)
    return summary | flow.flow_sums(records, ctx)


def _activity(active_BTF: jax.Array, valid_BT: jax.Array) -> Summary:
    active_BTF = active_BTF & valid_BT[..., None]
    count_BT = jnp.sum(active_BTF, axis=-1, dtype=jnp.int32)
    return {
        "tokens": jnp.sum(valid_BT, dtype=jnp.int32),
        "ffn_tokens_by_count": tally(count_BT, valid_BT, active_BTF.shape[-1] + 1),
        "ffn_tokens_by_neuron": jnp.sum(active_BTF, axis=(0, 1), dtype=jnp.int32),
        **_unions(_rows(active_BTF)),
    }


def _changes(gate_BTF: jax.Array, ctx: CallContext) -> Summary:
    """Tokens with a predecessor in their document, and of these the sum of the shares of neurons that are the same."""
    pairs_BT = has_predecessor(ctx)
    # Not by a difference, which a compiler may take before both sides are rounded.
    same_BT = jnp.mean(gate_BTF[:, 1:] == gate_BTF[:, :-1], axis=-1, dtype=jnp.float32)
    return {
        "ffn_pairs": jnp.sum(pairs_BT, dtype=jnp.int32),
        "ffn_unchanged": jnp.sum(jnp.where(pairs_BT[:, 1:], same_BT, 0)),
    }


def _unions(active_RF: jax.Array) -> Summary:
    """Neurons that some token of a block uses, summed over whole blocks of the rows one after another, and the blocks.

    Blocks are cut as a kernel cuts them that computes the neurons of a block of tokens, whatever document these are of.
    """
    used, blocks = [], []
    union_NF = active_RF
    for n in BLOCKS:
        size = n if n == BLOCKS[0] else 2
        whole = len(union_NF) // size
        union_NF = jnp.any(union_NF[: whole * size].reshape(whole, size, active_RF.shape[-1]), axis=1)
        used.append(jnp.sum(union_NF, dtype=jnp.int32))
        blocks.append(whole)
    return {"ffn_used_by_blocks": jnp.stack(used), "ffn_blocks": jnp.asarray(blocks, jnp.int32)}


def _attention(records: dict[str, jax.Array], spec: LayerSpec, ctx: CallContext) -> Summary:
    visible_BTS = records[ATTENTION_VISIBLE] & ctx.valid_BT[..., None]
    selected_BNTS = records.get(ATTENTION_SELECTED, visible_BTS[:, None])
    keys = visible_BTS.shape[-1]
    seen_BNT = jnp.broadcast_to(jnp.sum(visible_BTS, axis=-1, dtype=jnp.int32)[:, None], selected_BNTS.shape[:3])
    attended_BNT = jnp.sum(selected_BNTS & visible_BTS[:, None], axis=-1, dtype=jnp.int32)
    counted = seen_BNT > 0
    summary = {
        "attention_queries_by_attended": tally(attended_BNT, counted, keys + 1),
        "attention_queries_by_visible": tally(seen_BNT, counted, keys + 1),
        "attention_attended_by_visible": tally(seen_BNT, attended_BNT, keys + 1),
    }
    k = spec.attention.target_keys
    if ATTENTION_SCORES in records and k is not None:
        # Queries that see no more than k keys attend to all of them: there is nothing to select or to fail at.
        visible_BNTS = jnp.broadcast_to(visible_BTS[:, None], selected_BNTS.shape) & (seen_BNT > k)[..., None]
        scores, selected, visible = (
            _spread(_rows(x)) for x in (records[ATTENTION_SCORES], selected_BNTS, visible_BNTS)
        )
        summary |= _named("attention", _score_sums(scores, visible))
        summary |= _named("attention", _selection_sums(scores, selected & visible, visible, min(k, keys)))
    return summary


def _selection_sums(scores_RS: jax.Array, selected_RS: jax.Array, visible_RS: jax.Array, k: int) -> Summary:
    """Agreement of a selection with the exact top k of each row that has visible entries; ties at the k-th are top.

    Precision is not defined where nothing is selected: such rows count as rows, not towards precision.
    """
    scores_RS = jnp.where(visible_RS, scores_RS, -jnp.inf)
    exact_RS = visible_RS & (scores_RS >= jax.lax.top_k(scores_RS, k)[0][:, -1:])
    hits, selected, exact = (
        jnp.sum(x, axis=-1, dtype=jnp.float32) for x in (selected_RS & exact_RS, selected_RS, exact_RS)
    )
    counted = jnp.any(visible_RS, axis=-1)

    def total(x: jax.Array, where: jax.Array = counted) -> jax.Array:
        return jnp.sum(jnp.where(where, x, 0), dtype=jnp.float32)

    return {
        "selection_rows": total(jnp.ones_like(hits)),
        "selection_rows_with_any": total(jnp.ones_like(hits), selected > 0),
        "precision": total(hits / jnp.maximum(selected, 1)),
        "recall": total(hits / jnp.maximum(exact, 1)),
        "f1": total(2 * hits / jnp.maximum(selected + exact, 1)),
        "jaccard": total(hits / jnp.maximum(selected + exact - hits, 1)),
        "selected": total(selected),
        "selectable": total(jnp.sum(visible_RS, axis=-1, dtype=jnp.float32)),
        "aimed_at": total(jnp.full_like(hits, k)),
    }


def _score_sums(scores_RS: jax.Array, visible_RS: jax.Array) -> Summary:
    """Powers and histogram of scores standardised within their row; rows of equal scores are left out."""
    x = scores_RS.astype(jnp.float32)
    n = jnp.sum(visible_RS, axis=-1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(visible_RS, x, 0), axis=-1, keepdims=True) / jnp.maximum(n, 1)
    variance = jnp.sum(jnp.where(visible_RS, jnp.square(x - mean), 0), axis=-1, keepdims=True) / jnp.maximum(n, 1)
    counted = visible_RS & (variance > 0)
    z = jnp.where(counted, (x - mean) * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)
    bins = jnp.clip(jnp.floor((z + LIMIT) * (BINS / (2 * LIMIT))).astype(jnp.int32), 0, BINS - 1)
    return {
        "scores": jnp.sum(counted, dtype=jnp.int32),
        **{f"scores_power_{p}": jnp.sum(z**p) for p in (1, 2, 3, 4)},
        "scores_histogram": tally(bins, counted, BINS),
    }


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _spread(x: jax.Array) -> jax.Array:
    """At most `ROWS` of the rows of `x`: one of each of as many equal stretches, at a place that differs between them.

    Rows in a fixed step would meet the same positions of every sequence, or the queries of one head only.
    """
    if len(x) <= ROWS:
        return x
    stretch = np.arange(ROWS)
    golden_ratio = (5**0.5 - 1) / 2
    return x[((stretch + stretch * golden_ratio % 1) * (len(x) / ROWS)).astype(np.int32)]


def _named(prefix: str, summary: Summary) -> Summary:
    return {f"{prefix}_{name}": value for name, value in summary.items()}
