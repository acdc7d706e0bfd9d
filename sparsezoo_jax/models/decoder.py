"""The decoder: embedding, layers in scanned segments, final norm, logits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.models.attention import KEYS
from sparsezoo_jax.models.cache import DecoderCache, LayerCache
from sparsezoo_jax.models.common import CallContext, LayerAux, LayerType, positions_within_segments
from sparsezoo_jax.models.config import DecoderConfig, LayerSpec
from sparsezoo_jax.models.contract import Observed, PreGateConfig
from sparsezoo_jax.models.elimination import Elimination
from sparsezoo_jax.models.embedding import Tables, lookup, lookup_in_copies, project_on_copies
from sparsezoo_jax.models.layers import STREAM, Passed, Segment, run_segments, update_segments
from sparsezoo_jax.models.mtp import Ahead, MTPModule, same_document, shifted
from sparsezoo_jax.models.records import checked
from sparsezoo_jax.models.routers import Routing, top_1
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.sharding import constrain, gather_copies

Summarise = Callable[[dict[str, jax.Array], LayerSpec, CallContext], dict[str, jax.Array]]
Edit = Callable[[str, int, jax.Array], jax.Array]
Keep = Callable[[int, dict[str, jax.Array], jax.Array], jax.Array]


class Output(NamedTuple):
    """Result of a forward pass."""

    logits: jax.Array
    """float32 [B, T, V]; empty [B, T, 0] if they were not asked for."""
    hidden: jax.Array
    """Final state after its norm [B, T, D], from which `Decoder.logits_of` makes logits."""
    losses: dict[str, jax.Array]
    """Auxiliary losses, averaged over the layers that have them."""
    stats: dict[str, jax.Array]
    """Statistics per layer, float32 [L], averaged over real tokens; NaN where a layer has no such statistic."""
    cache: DecoderCache | None = None
    """The cache after this call, when one was given."""
    records: dict[str, tuple[jax.Array | None, ...]] = {}
    """What was asked to be recorded: name to one array per layer, None where a layer has no such array."""
    observed: tuple[Observed, ...] = ()
    """For each layer, and each module of multi-token prediction in training mode, what `Decoder.after_step` updates its
    variables from; last, where it has any, for the head."""
    tables: Tables | None = None
    """For `Decoder.logits_of`, if logits were not asked for and there is no cache."""
    ahead: tuple[Ahead, ...] = ()
    """In training mode, what the modules of multi-token prediction made, by depth."""


class Decoder(nnx.Module):
    """A decoder-only transformer; see `DecoderConfig`.

    After `train()` layers that sample (routers with noise) do so, every call takes the next of the model's random
    streams, and modules of multi-token prediction run; as built, or after `eval()`, a call is deterministic.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.deterministic = True
        ctx = config.build_context()
        vocab, d = config.vocab_size, config.d_model
        embedding_std = config.init.embedding_std
        if embedding_std is None:
            embedding_std = d**-0.5 if config.init.kind == "fan_in" else config.init.scale

        def table(rows: int, axes: tuple[str, str], padding: int = 0) -> nnx.Param:
            drawn = embedding_std * jax.random.normal(rngs.params(), (rows, d), ctx.param_dtype)
            return nnx.Param(jnp.pad(drawn, ((0, padding), (0, 0))), axes=axes)

        padding = config.vocab_rows - vocab
        self.embedding_VD = table(vocab, ("vocab", "embed"), padding)
        self.positions_PD = table(config.max_seq_len, ("positions", "embed")) if config.learned_positions else None
        self.per_layer = config.per_layer.build_table(ctx, config.norm, rngs, vocab)
        self.altup = config.altup.build_ends(ctx, rngs)
        self.segments = nnx.List([Segment.build(config, segment, rngs) for segment in config.segments()])
        self.final_norm = config.norm.build(ctx)
        self.mtp = nnx.List([MTPModule(config, rngs) for _ in range(config.mtp_layers)])
        self.head = config.residual.build_head(ctx, rngs)
        output = None
        if not config.tie_embeddings:
            drawn = ctx.weight(rngs, (d, vocab), ("embed", "vocab"), d, std=config.init.output_std)
            output = drawn.replace(jnp.pad(drawn[...], ((0, 0), (0, padding))))
        self.output_DV = output
        # Outside the layers, for what changes inside a scan is lost; each layer folds its place into the key.
        samples = any(spec.ffn.samples for spec in config.layer_specs())
        self.noise = nnx.RngStream(rngs.params(), tag="noise") if samples else None
        gate = config.ffn.pre_gate(config)
        self.pre_gate = None if gate is None else PreGate(gate, rngs)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: DecoderCache | None = None,
        logits: bool = True,
        record: Collection[str] = (),
        summarise: Summarise | None = None,
        edit: Edit | None = None,
        keep: Keep | None = None,
        density_eps: jax.Array | None = None,
        eliminate: Elimination | None = None,
    ) -> Output:
        """Logits of every next token.

        Args:
          tokens_BT: int [B, T].
          segment_ids: int [B, T], the document of each token; tokens see those before them of their own document only.
            0 marks padding.
            With a cache: 0 for padding, anything else for tokens.
          positions: int [B, T] within the document, for position embeddings. Default: counted from the start of each
            segment, or on from the tokens in the cache.
          cache: keys and values of earlier tokens; see `init_cache`. Layers run unrolled then.
          logits: make the logits of all positions. Off, `logits_of(out.hidden[...])` makes those that are wanted.
          record: names of internal arrays to return in `records`; `models.records` lists them. Static under jit.
          summarise: called in each layer with its records, its specification and the call's context; what it returns
            takes the records' place. So the arrays of one layer live at a time, not those of all.
          edit: called with "ffn_output" or "residual", the layer's number from 0 and that array [B, T, D] (see
            `models.records`); what it returns takes the array's place. Layers run unrolled then.
          keep: called with the layer's number from 0, the records of its FFN and `FFN.dictionary` [F, D], where there
            is one and `record` names "ffn_hidden"; returns bool [B, T, F]. Hidden units where it is false are 0 in the
            FFN's output and in the records. Not for a residual stream whose width is routed. Layers run unrolled then.
          density_eps: positive scalar; gated and plain FFNs return the loss "smooth_density" for it (see `models.ffn`).
          eliminate: blocks of tokens that layers leave out (see `models.elimination`), for training without a cache. If
            layers keep different numbers of them, they run unrolled.
        """
        config = self.config
        ctx = call_context(config, tokens_BT, segment_ids, positions, cache)
        ctx.record, ctx.summarise, ctx.edit, ctx.keep = checked(record), summarise, edit, keep
        ctx.density_eps, ctx.elimination = density_eps, eliminate
        ctx.rng = None if self.deterministic or self.noise is None else self.noise()
        routers_cache = None
        if self.pre_gate is not None:
            held = None if cache is None else cache.pre_gate
            ctx.experts, routers_cache = self.pre_gate(tokens_BT, segment_ids, positions, held)
        with jax.named_scope("embedding"):
            x_BTD, tables = self.embedded(tokens_BT, ctx, self._tables() if cache is None else None)

        vectors_LBTP = None if self.per_layer is None else self.per_layer(tokens_BT, x_BTD)
        passed = Passed(x_BTD if self.altup is None else self.altup.spread(x_BTD))

        # Caches and edits are told apart by layer, which the scanned form can't do.
        scan = config.scan_layers and cache is None and edit is None and keep is None
        scan = scan and (eliminate is None or eliminate.uniform)
        if scan and config.kv_shared_layers:
            passed = passed._replace(kept=self._nothing_kept(tokens_BT))
        held = None if cache is None else cache.layers
        with jax.named_scope("layers"):
            passed, auxes, caches = run_segments(
                self.segments, passed, ctx, held, vectors_LBTP, scan=scan, remat=config.remat
            )
        x_BTD = passed.x if self.altup is None else self.altup.join(passed.x)
        hidden_BTD, head_aux = self.head(x_BTD, self.final_norm, ctx)
        ahead, extra, head_auxes = (), [], [head_aux]
        if tables is not None and not self.deterministic:
            ahead, tables, extra, further = self._predict_ahead(tokens_BT, hidden_BTD, ctx, tables)
            head_auxes += further
        losses, stats = collected(auxes, [*extra, *head_auxes])
        if cache is not None:
            assert ctx.cache_end is not None
            cache = cache.advanced(ctx.positions_BT, ctx.valid_BT)
            cache = cache._replace(layers=tuple(caches), pre_gate=routers_cache)
        made = jnp.zeros((*hidden_BTD.shape[:2], 0), jnp.float32)
        if logits:
            made = self.logits_of(hidden_BTD, tables)[..., : config.vocab_size]
        modules = (
            {"layer": layer.observed, "head": head.observed} for layer, head in zip(extra, head_auxes[1:], strict=True)
        )
        observed = (*(aux.observed for aux in auxes), *modules, *([head_aux.observed] if head_aux.observed else []))
        unused = None if logits else tables
        return Output(made, hidden_BTD, losses, stats, cache, records_of(auxes), observed, unused, ahead)

    def _nothing_kept(self, tokens_BT: jax.Array) -> dict[LayerType, LayerCache]:
        """What a scan begins with in place of the keys and values that its layers keep."""
        config = self.config
        empty = [
            constrain(jnp.zeros((*tokens_BT.shape, *shape), config.dtype), KEYS)
            for shape in config.attention.cache_shapes
        ]
        return {layer_type: LayerCache(*empty) for layer_type in sorted(set(config.layer_pattern))}

    def embedded(
        self, tokens_BT: jax.Array, ctx: CallContext, tables: Tables | None
    ) -> tuple[jax.Array, Tables | None]:
        """The stream below the first layer, and the tables for their next use; None: without copies, to decode."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x_BTD: Any
        if tables is None:
            x_BTD = lookup(self.embedding_VD[...], tokens_BT, dtype)
        else:
            x_BTD, tables = lookup_in_copies(tables, tokens_BT, dtype)
        scale = config.d_model**0.5 if config.embedding_scale == "sqrt_d_model" else config.embedding_scale
        x_BTD = x_BTD * jnp.asarray(scale, dtype)
        if self.positions_PD is not None:
            x_BTD = x_BTD + lookup(self.positions_PD[...], ctx.positions_BT, dtype, "positions")
        return constrain(x_BTD, STREAM), tables

    def _predict_ahead(
        self, tokens_BT: jax.Array, hidden_BTD: jax.Array, ctx: CallContext, tables: Tables
    ) -> tuple[tuple[Ahead, ...], Tables | None, list[LayerAux], list[LayerAux]]:
        """What the modules of multi-token prediction make of the final states, and their layers' and heads' results."""
        ahead: list[Ahead] = []
        auxes: list[LayerAux] = []
        head_auxes: list[LayerAux] = []
        left: Tables | None = tables
        for depth, module in enumerate(self.mtp, 1):
            valid_BT = same_document(ctx.segments_BT, depth)
            # What has no token of its own document ahead is padding to the module: nothing sees it, no load counts it.
            segments_BT = jnp.where(valid_BT, ctx.segments_BT, 0)
            own = call_context(self.config, tokens_BT, segments_BT, ctx.positions_BT)
            own.density_eps = ctx.density_eps
            own.rng = None if ctx.rng is None else jax.random.fold_in(ctx.rng, self.config.layers + depth)
            embedded_BTD, left = self.embedded(shifted(tokens_BT, depth), own, left)
            hidden_BTD, aux, head_aux = module(embedded_BTD, hidden_BTD, own)
            ahead.append(Ahead(hidden_BTD, valid_BT))
            auxes.append(aux)
            head_auxes.append(head_aux)
        return tuple(ahead), left, auxes, head_auxes

    def after_step(self, observed: tuple[Observed, ...], key: jax.Array) -> None:
        """Let the layers update what no gradient moves (router biases, dead neurons), after an optimizer step.

        Args:
          observed: `Output.observed` of the step's batch, averaged over its micro-batches. Modules that observe
            something have a method `after_step` that gets theirs, stacked as their variables are.
          key: of the random numbers of this step's updates.
        """
        rest = update_segments(self.segments, list(observed), key)
        for depth, module in enumerate(self.mtp, 1):
            module.after_step(rest.pop(0), jax.random.fold_in(key, len(self.segments) + depth))
        if rest:
            self.head.after_step(rest[0], jax.random.fold_in(key, len(self.segments)))

    def _tables(self) -> Tables:
        dtype = jnp.dtype(self.config.dtype)
        embedding = gather_copies(self.embedding_VD[...], ("vocab", "embed"), dtype)
        if self.output_DV is None:
            return Tables(embedding, None)
        return Tables(embedding, gather_copies(self.output_DV[...], ("embed", "vocab"), dtype))

    def logits_of(self, hidden_BTD: jax.Array, tables: Tables | None = None) -> jax.Array:
        """Logits [B, T, V], float32, of final states [B, T, D]; with a padded vocabulary, -inf for the padding.

        `tables`: those of the call that made the states. On a mesh they were gathered once, for lookups, logits and all
        chunks of these; without them the compiler moves the output projection or the states, which is for few tokens.
        """
        with jax.named_scope("logits"):
            return self._logits_of(hidden_BTD, tables)

    def _logits_of(self, hidden_BTD: jax.Array, tables: Tables | None) -> jax.Array:
        if self.config.logit_divisor != 1.0:
            hidden_BTD = hidden_BTD / jnp.asarray(self.config.logit_divisor, hidden_BTD.dtype)
        logits = constrain(self._project(hidden_BTD, tables), ("batch", "length", "words"))
        cap = self.config.final_softcap
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        # Cut off, the padding would leave devices that split the words with unequal parts.
        return jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -jnp.inf)

    def _project(self, hidden_BTD: jax.Array, tables: Tables | None) -> jax.Array:
        """`hidden W`, float32 [B, T, V], by the copies in `tables`; None: by the output projection as it is stored."""
        if tables is not None:
            return project_on_copies(tables, hidden_BTD, self.head)
        weight_DV = self.embedding_VD[...].T if self.output_DV is None else self.output_DV[...]
        return self.head.project(hidden_BTD, weight_DV.astype(hidden_BTD.dtype), jnp.dtype(jnp.float32))

    def init_cache(self, batch: int, length: int) -> DecoderCache:
        """An empty cache for `batch` sequences of up to `length` tokens, padding included.

        It may be longer than `max_seq_len`, which limits the tokens that are no padding. Nothing checks under jit that
        no more than `length` tokens go in; further ones would overwrite the last slots.
        """
        require(length > 0, "cache length", length, "must be above 0")
        layers = tuple(cache for segment in self.segments for cache in segment.empty_caches(batch, length))
        router = None if self.pre_gate is None else self.pre_gate.decoder.init_cache(batch, length)
        return DecoderCache(layers, jnp.full((batch, length), -1, jnp.int32), jnp.int32(0), router)

    def unstacked(self) -> Decoder:
        """The same model with one set of arrays a layer instead of stacks, for decoding only.

        Slicing a layer out of a stack copies its weights in every step; doing it once, outside jit, does not.
        """
        if not any(segment.stacked for segment in self.segments):
            return self
        graphdef, state = nnx.split(self)
        model = nnx.merge(graphdef, state)
        model.segments = nnx.List([single for segment in self.segments for single in segment.unstacked()])
        if model.pre_gate is not None:
            model.pre_gate.decoder = model.pre_gate.decoder.unstacked()
        return model


class PreGate(nnx.Module):
    """The router of all layers: one more decoder, and a map from its final states to scores of the experts."""

    def __init__(self, config: PreGateConfig, rngs: nnx.Rngs):
        self.decoder = Decoder(config.decoder, rngs=rngs)
        ctx, d = config.decoder.build_context(), config.decoder.d_model
        # Every device routes its own tokens over all experts, so the columns are not split.
        self.router_DE = ctx.weight(rngs, (d, config.experts), ("embed", None), d)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Routing, DecoderCache | None]:
        """The expert of every token, and its cache with these tokens in it; arguments as of `Decoder.__call__`."""
        scores_BTE, cache = self.scores(tokens_BT, segment_ids, positions, cache)
        return top_1(scores_BTE), cache

    def scores(
        self,
        tokens_BT: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[jax.Array, DecoderCache | None]:
        """Scores of the experts, float32 [B, T, E], and the cache."""
        out = self.decoder(tokens_BT, segment_ids=segment_ids, positions=positions, cache=cache, logits=False)
        return matmul(out.hidden, self.router_DE[...].astype(out.hidden.dtype), jnp.dtype(jnp.float32)), out.cache


def call_context(
    config: DecoderConfig,
    tokens_BT: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: DecoderCache | None = None,
) -> CallContext:
    """What the layers of a decoder are called with for these tokens; arguments as of `Decoder.__call__`."""
    batch, length = tokens_BT.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    valid_BT = segment_ids > 0
    if cache is None:
        require(length <= config.max_seq_len, "tokens", f"<{length} long>", _limit(config))
        if positions is None:
            positions = positions_within_segments(segment_ids)
        everywhere, end = Visibility.of_tokens(segment_ids), None
    else:
        end = cache.end
        if positions is None:
            held = jnp.max(cache.positions_BS, axis=-1, keepdims=True) + 1
            positions = held + jnp.cumsum(valid_BT, axis=-1) - 1
        key_positions = cache.advanced(positions, valid_BT).positions_BS
        everywhere = Visibility(
            query_positions_BT=jnp.maximum(positions, 0),
            key_positions_BS=key_positions,
            query_segments_BT=valid_BT.astype(jnp.int32),
            key_segments_BS=jnp.where(key_positions >= 0, 1, -1),
        )
    visible: dict[LayerType, Visibility] = {"global": everywhere}
    if "local" in config.layer_pattern:
        visible["local"] = everywhere.within(config.attention.window or 0)
    ctx = CallContext(jnp.maximum(positions, 0), segment_ids, visible, cache_end=end)
    ctx.keys_seen = {name: ctx.mean_over_tokens(rule.keys_seen) for name, rule in visible.items()}
    return ctx


def _limit(config: DecoderConfig) -> str:
    return f"must be at most model.max_seq_len={config.max_seq_len}"


def collected(auxes: list[LayerAux], others: list[LayerAux]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Losses averaged over the layers, and the others, that have them; statistics as one array over all layers."""
    having = [*auxes, *others]
    loss_names = sorted({name for aux in having for name in aux.losses})
    losses = {
        name: jnp.mean(jnp.stack([aux.losses[name] for aux in having if name in aux.losses])) for name in loss_names
    }
    stat_names = sorted({name for aux in auxes for name in aux.stats})
    absent = jnp.full((), jnp.nan, jnp.float32)
    stats = {name: jnp.stack([aux.stats.get(name, absent) for aux in auxes]) for name in stat_names}
    return losses, stats


def records_of(auxes: list[LayerAux]) -> dict[str, tuple[jax.Array | None, ...]]:
    """What layers recorded: name to one array per layer, None where a layer has no such array."""
    names = sorted({name for aux in auxes for name in aux.records})
    return {name: tuple(aux.records.get(name) for aux in auxes) for name in names}
