"""Blocks of tokens that a layer leaves out while a model is fine-tuned: attention and FFN run on the others alone.

What is left out keeps its residual stream; what is kept keeps its position, and sees no key that was left out. How many
blocks a sublayer keeps is a fixed number, so that programs have fixed shapes: those of the highest importance.

Shape letters: B batch, T token, n block (of keys), m block of queries, k kept block, P tokens of kept blocks, D model
width, F FFN width, R rank, L layers, N query heads, K key/value heads, G = N/K, H head width.

Source: LeMo (arXiv 2501.09767; JENGA, USENIX ATC 2025).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.models.common import CallContext, LayerType, positions_within_segments
from sparsezoo_jax.models.contract import FFN, Attention, Extra, Joined, Residual, Sublayer, SublayerName
from sparsezoo_jax.models.records import FFN_HIDDEN
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import sees

Pairs = Literal["visible", "all"]
Predictors = Mapping[str, Any]
"""By sublayer, arrays [L, ...]: of "attention" a `Network` for "query" and one for "key", of "ffn" a `Network`."""

#: Records of a call that observes: float32 [B, m, n] scores of attention, [B, n] importance to the FFN, and
#: [2, B, n, D] mean inputs of attention and FFN.
BLOCK_SCORES, FFN_IMPORTANCE, BLOCK_INPUTS = "block_scores", "ffn_importance", "block_inputs"


class Network(NamedTuple):
    """`relu(relu(x W_in) W_middle) W_out`, three matrices of low rank one after another."""

    inner: jax.Array
    """[D, R]."""
    middle: jax.Array
    """[R, D']."""
    outer: jax.Array
    """[D', R] of attention's networks, [D', 1] of an FFN's."""

    def __call__(self, x_BnD: jax.Array) -> jax.Array:
        return self.hidden(x_BnD)[1] @ self.outer

    def hidden(self, x_BnD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the two non-linearities put out, [B, n, R] and [B, n, D']."""
        first = jax.nn.relu(x_BnD @ self.inner)
        return first, jax.nn.relu(first @ self.middle)


@dataclass(frozen=True)
class Elimination:
    """Which blocks of tokens the layers of one forward pass keep."""

    block: int
    """Tokens of a block; divides the length of the sequences."""
    kept: Mapping[str, tuple[int, ...]]
    """Blocks that attention and FFN keep: one number for all layers, or one for each; a sublayer without any keeps
    all."""
    pairs: Pairs = "visible"
    """Queries by which a key is scored: those that see it, or all of its document."""
    predictors: Predictors | None = None
    """What says the importance of a block by its mean input; None: it is computed of all tokens."""
    thresholds: Mapping[str, jax.Array] | None = None
    """By sublayer float32 [L]: keep the blocks whose importance is above that of the layer, whatever `kept` says. All
    tokens are computed then and masked, which saves nothing: for measuring."""
    observes: bool = False
    """Leave nothing out, and record the importance of blocks."""

    @property
    def uniform(self) -> bool:
        """Whether all layers keep as many blocks, so that one program does for all of them."""
        return all(len(set(counts)) <= 1 for counts in self.kept.values())

    def count(self, name: str, layer: Any, blocks: int) -> int:
        """Blocks of `blocks` that a sublayer keeps; `layer` is an int where layers differ."""
        counts = self.kept.get(name, ())
        if not counts or self.observes:
            return blocks
        return min(counts[0] if self.uniform or len(counts) == 1 else counts[layer], blocks)

    def predictor(self, name: str, layer: Any) -> Any:
        """That of a layer, None without any."""
        if self.predictors is None:
            return None
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self.predictors[name])


def attention_scores(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    visible: Visibility,
    valid_BT: jax.Array,
    *,
    block: int,
    scale: float,
    pairs: Pairs = "visible",
) -> jax.Array:
    """Largest score of each block of keys with each block of queries, float32 [B, m, n]; 0 where none is seen.

    A score is the mean over heads of max(scale q k, 0), before any softmax. Memory is that of one block of queries and
    all keys.

    Args:
      q_BTNH, k_BTKH: rotated queries and keys of the same tokens.
      visible: which keys a query sees; padding, where `valid_BT` is false, has no score.
      pairs: "all" counts keys after the query, too.

    Source: LeMo, section on token-block elimination: I(B_mn), of S the average of positive scores over heads.
    """
    batch, length, heads, width = q_BTNH.shape
    groups, blocks = k_BTKH.shape[2], length // block

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, blocks, block, *x.shape[2:]), 1, 0)

    queries = (
        cut(q_BTNH.reshape(batch, length, groups, heads // groups, width)),
        cut(visible.query_positions_BT),
        cut(jnp.where(valid_BT, visible.query_segments_BT, 0)),
    )

    def of_block(own: tuple[jax.Array, ...]) -> jax.Array:
        q, positions, segments = own
        found = jnp.einsum("bikgh,bjkh->bkgij", q, k_BTKH, preferred_element_type=jnp.float32)
        mean_BiT = jnp.mean(jax.nn.relu(scale * found), axis=(1, 2))
        keys = (visible.key_positions_BS[:, None, :], visible.key_segments_BS[:, None, :])
        if pairs == "visible":
            seen = sees(positions[..., None], keys[0], segments[..., None], keys[1], visible.window)
        else:
            seen = segments[..., None] == keys[1]
        seen &= (segments > 0)[..., None]
        return jnp.max(jnp.where(seen, mean_BiT, 0).reshape(batch, block, blocks, block), axis=(1, 3))

    return jnp.moveaxis(jax.lax.map(of_block, queries), 0, 1)


def ffn_importance(hidden_BTF: jax.Array, valid_BT: jax.Array, block: int) -> jax.Array:
    """Importance of blocks to an FFN, float32 [B, n]: the sum over neurons of a block's largest magnitude.

    As for attention, with neurons in place of blocks of queries; hidden units of gated networks have either sign, so
    that magnitudes take the place of positive parts. Padding counts nothing.
    """
    magnitude_BTF = jnp.where(valid_BT[..., None], jnp.abs(hidden_BTF.astype(jnp.float32)), 0)
    batch, length, neurons = magnitude_BTF.shape
    return jnp.sum(jnp.max(magnitude_BTF.reshape(batch, length // block, block, neurons), axis=2), axis=-1)


def block_means(x_BTD: jax.Array, valid_BT: jax.Array, block: int) -> jax.Array:
    """Mean of the tokens of each block that are no padding, float32 [B, n, D]; 0 where there are none."""
    batch, length, width = x_BTD.shape
    weights_BnT1 = valid_BT.reshape(batch, length // block, block, 1).astype(jnp.float32)
    sums_BnD = jnp.sum(x_BTD.astype(jnp.float32).reshape(batch, length // block, block, width) * weights_BnT1, axis=2)
    return sums_BnD / jnp.maximum(jnp.sum(weights_BnT1, axis=2), 1)


def pairs_of_blocks(segments_BT: jax.Array, block: int, pairs: Pairs) -> jax.Array:
    """Whether a block of queries has a token that may see one of a block of keys, bool [B, m, n].

    Documents are runs of equal segments, 0 is padding. Windows are left out of account.
    """
    batch, length = segments_BT.shape
    own_BnT = segments_BT.reshape(batch, length // block, block)
    first_Bn, last_Bn = own_BnT[..., 0], own_BnT[..., -1]
    places = jnp.arange(length // block)
    # Of two blocks the earlier one's last document is the later one's first, or they have none in common.
    after = (first_Bn[:, :, None] == last_Bn[:, None, :]) & (first_Bn > 0)[:, :, None] & (places[:, None] > places)
    same = jnp.any(own_BnT > 0, axis=-1)[:, :, None] & (places[:, None] == places)
    return after | same | (after.swapaxes(1, 2) if pairs == "all" else False)


def predicted_scores(networks: Mapping[str, Network], means_BnD: jax.Array) -> jax.Array:
    """What the networks of queries and keys say of `attention_scores`, [B, m, n]: the product of their outputs."""
    return jnp.einsum("bmr,bnr->bmn", networks["query"](means_BnD), networks["key"](means_BnD))


def chosen_blocks(importance_Bn: jax.Array, valid_BT: jax.Array, kept: int) -> jax.Array:
    """The `kept` blocks of the highest importance in their order, int32 [B, k]; of equal ones the first.

    Blocks of padding alone come last.
    """
    has_tokens_Bn = jnp.any(valid_BT.reshape(*importance_Bn.shape, -1), axis=-1)
    # Predicted importance may be negative.
    return jnp.sort(jax.lax.top_k(jnp.where(has_tokens_Bn, importance_Bn, -jnp.inf), kept)[1], axis=-1)


def taken(x_BT: jax.Array, places_Bk: jax.Array, block: int) -> jax.Array:
    """The blocks at `places_Bk` of [B, T, ...], one after another: [B, P, ...]."""
    batch, length = x_BT.shape[:2]
    found = jax.vmap(lambda x, i: x[i])(x_BT.reshape(batch, length // block, block, *x_BT.shape[2:]), places_Bk)
    return found.reshape(batch, -1, *x_BT.shape[2:])


def put(x_BT: jax.Array, places_Bk: jax.Array, y_BP: jax.Array, block: int) -> jax.Array:
    """[B, T, ...] with the blocks at `places_Bk` replaced by those of [B, P, ...]."""
    batch = len(x_BT)
    blocks, new = (x.reshape(batch, -1, block, *x.shape[2:]) for x in (x_BT, y_BP))
    unique = {"unique_indices": True, "indices_are_sorted": True}
    return jax.vmap(lambda x, i, y: x.at[i].set(y, **unique))(blocks, places_Bk, new).reshape(x_BT.shape)


def context_of_blocks(ctx: CallContext, places_Bk: jax.Array, block: int) -> CallContext:
    """What the tokens of the kept blocks are called with: their positions, and of their keys those that are kept."""

    def of_rule(rule: Visibility) -> Visibility:
        if rule.ordered and rule.window is None:
            return Visibility.of_tokens(segments_BP)  # kept tokens are in order: kernels skip what is behind them
        return rule.replaced(*(taken(x, places_Bk, block) for x in rule.arrays), ordered=False)

    positions_BP, segments_BP = (taken(x, places_Bk, block) for x in (ctx.positions_BT, ctx.segments_BT))
    visible: dict[LayerType, Visibility] = {name: of_rule(rule) for name, rule in ctx.visible.items()}
    found = replace(ctx, positions_BT=positions_BP, segments_BT=segments_BP, visible=visible)
    for name, rule in visible.items():
        count_BP = positions_within_segments(segments_BP) + 1 if rule.ordered else rule.keys_seen
        found.keys_seen = {**found.keys_seen, name: found.mean_over_tokens(count_BP)}
    return found


def context_of_tokens(ctx: CallContext, kept_BT: jax.Array) -> CallContext:
    """The context in which tokens that are not kept are no keys and count as padding."""

    def of_rule(rule: Visibility) -> Visibility:
        queries_BT, keys_BT, *segments = rule.arrays
        segments = (jnp.where(kept_BT, x, -1) for x in segments)
        return rule.replaced(queries_BT, keys_BT, *segments, ordered=rule.ordered)

    visible: dict[LayerType, Visibility] = {name: of_rule(rule) for name, rule in ctx.visible.items()}
    found = replace(ctx, segments_BT=jnp.where(kept_BT, ctx.segments_BT, 0), visible=visible)
    found.keys_seen = {name: found.mean_over_tokens(rule.keys_seen) for name, rule in visible.items()}
    return found


def predicted_importance(
    network: Any, name: str, means_BnD: jax.Array, segments_BT: jax.Array, block: int, pairs: Pairs
) -> jax.Array:
    """Importance of blocks [B, n] by the networks of a layer."""
    if name == "ffn":
        return network(means_BnD)[..., 0]
    counted = pairs_of_blocks(segments_BT, block, pairs)
    return jnp.sum(jnp.where(counted, predicted_scores(network, means_BnD), 0), axis=1)


class SublayerBlocks(abc.ABC):
    """A sublayer of a layer and its residual connection, which treats tokens apart from each other."""

    name: SublayerName

    def __init__(self, connection: Residual, module: Any):
        self.connection, self.module = connection, module

    @abc.abstractmethod
    def importance(self, h_BTD: jax.Array, ctx: CallContext) -> jax.Array:
        """That of blocks [B, n], of what the sublayer would read and make of all tokens."""

    def connected(self, x_BTD: jax.Array, ctx: CallContext, sublayer: Sublayer[Extra]) -> Joined[Extra]:
        """The connection around `sublayer` (the module, as the layer calls it), on the blocks that are kept.

        The stream of the others passes.
        """
        rule: Elimination | None = ctx.elimination
        if rule is None:
            return self.connection(x_BTD, ctx, sublayer)
        blocks = x_BTD.shape[1] // rule.block
        kept = rule.count(self.name, ctx.layer, blocks)
        if kept == blocks and rule.thresholds is None:
            return self.connection(x_BTD, ctx, sublayer)
        h_BTD = self.input(jax.lax.stop_gradient(x_BTD), ctx)
        network = rule.predictor(self.name, ctx.layer)
        if network is None:
            importance_Bn = self.importance(h_BTD, ctx)
        else:
            means_BnD = block_means(h_BTD, ctx.valid_BT, rule.block)
            importance_Bn = predicted_importance(network, self.name, means_BnD, ctx.segments_BT, rule.block, rule.pairs)
        if rule.thresholds is not None:
            kept_Bn = importance_Bn > rule.thresholds[self.name][ctx.layer]
            kept_BT = jnp.repeat(kept_Bn, rule.block, axis=1)
            joined = self.connection(x_BTD, context_of_tokens(ctx, kept_BT), sublayer)
            return joined._replace(stream_BTD=jnp.where(kept_BT[..., None], joined.stream_BTD, x_BTD))
        places_Bk = chosen_blocks(jax.lax.stop_gradient(importance_Bn), ctx.valid_BT, kept)
        own = context_of_blocks(ctx, places_Bk, rule.block)
        joined = self.connection(taken(x_BTD, places_Bk, rule.block), own, sublayer)
        return joined._replace(stream_BTD=put(x_BTD, places_Bk, joined.stream_BTD, rule.block))

    def input(self, x_BTD: jax.Array, ctx: CallContext) -> jax.Array:
        """What the connection lets its sublayer read, [B, T, D]."""
        seen: list[jax.Array] = []

        def sublayer(h_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, None]:
            seen.append(h_BTD)
            return jnp.zeros_like(h_BTD), None

        self.connection(x_BTD, ctx, sublayer)
        return seen[0]


class AttentionBlocks(SublayerBlocks):
    """Attention, and the scores of its queries and keys."""

    name = "attention"

    def scores(self, h_BTD: jax.Array, ctx: CallContext) -> jax.Array:
        """`attention_scores` of a layer that reads `h_BTD`."""
        attention: Attention = self.module
        rule: Elimination = ctx.elimination
        q, k = attention.queries_keys(h_BTD, ctx)
        visible = ctx.visible[attention.layer_type]
        form = {"block": rule.block, "scale": attention.scale, "pairs": rule.pairs}
        return attention_scores(q, k, visible, ctx.valid_BT, **form)

    def importance(self, h_BTD: jax.Array, ctx: CallContext) -> jax.Array:
        return jnp.sum(self.scores(h_BTD, ctx), axis=1)


class FFNBlocks(SublayerBlocks):
    """A feed-forward network, and its hidden units."""

    name = "ffn"

    def importance(self, h_BTD: jax.Array, ctx: CallContext) -> jax.Array:
        ffn: FFN = self.module
        _, aux = ffn(h_BTD, replace(ctx, record=frozenset({FFN_HIDDEN})))
        return ffn_importance(aux.records[FFN_HIDDEN], ctx.valid_BT, ctx.elimination.block)


def observed_blocks(
    sublayers: tuple[AttentionBlocks, FFNBlocks], streams: tuple[jax.Array, jax.Array], ctx: CallContext
) -> dict[str, jax.Array]:
    """What predictors are made of, by name of the record: of a layer's sublayers and the streams that they read."""
    inputs = [part.input(x_BTD, ctx) for part, x_BTD in zip(sublayers, streams, strict=True)]
    return {
        BLOCK_SCORES: sublayers[0].scores(inputs[0], ctx),
        FFN_IMPORTANCE: sublayers[1].importance(inputs[1], ctx),
        BLOCK_INPUTS: jnp.stack([block_means(h_BTD, ctx.valid_BT, ctx.elimination.block) for h_BTD in inputs]),
    }
