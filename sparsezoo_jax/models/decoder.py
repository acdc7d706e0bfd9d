"""The decoder: embedding, layers in scanned segments, final norm, logits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.models.cache import DecoderCache, LayerCache
from sparsezoo_jax.models.common import CallContext, LayerAux, LayerType
from sparsezoo_jax.models.config import DecoderConfig, LayerSpec, SegmentSpec
from sparsezoo_jax.models.embedding import lookup
from sparsezoo_jax.models.records import FFN_OUTPUT, RESIDUAL, SUBLAYER_INPUT, checked
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.sharding import constrain

Summarise = Callable[[dict[str, jax.Array], LayerSpec, CallContext], dict[str, jax.Array]]
Edit = Callable[[str, int, jax.Array], jax.Array]


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
    observed: tuple[dict[str, jax.Array], ...] = ()
    """For each layer what `Decoder.after_step` updates its variables from; last, where it has any, for the head."""


class Block(nnx.Module):
    """One layer: attention, then a feed-forward network, each in a residual connection."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, rngs: nnx.Rngs):
        ctx = config.build_context(spec.layer_type)
        self.spec = spec
        self.attention_residual = config.residual.build(ctx, config.norm, rngs, "attention")
        self.attention = spec.attention.build(ctx, rngs)
        self.ffn_residual = config.residual.build(ctx, config.norm, rngs, "ffn")
        self.ffn = spec.ffn.build(ctx, rngs)

    def __call__(
        self, x_BTD: jax.Array, ctx: CallContext, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerAux, LayerCache | None]:
        inputs: list[jax.Array] = []

        def attend(h_BTD, ctx):
            inputs.append(h_BTD)
            y, aux, updated = self.attention(h_BTD, ctx, cache)
            return y, (aux, updated)

        def feed_forward(h_BTD, ctx):
            inputs.append(h_BTD)
            y, aux = self.ffn(h_BTD, ctx)
            y = ctx.edited(FFN_OUTPUT, y)
            return y, aux.merged(LayerAux(records=ctx.recorded({FFN_OUTPUT: lambda: y})))

        first = self.attention_residual(x_BTD, ctx, attend)
        x_BTD = constrain(first.stream_BTD, ("batch", "length", "embed"))
        second = self.ffn_residual(x_BTD, replace(ctx, routing=first.routing), feed_forward)
        x_BTD = ctx.edited(RESIDUAL, constrain(second.stream_BTD, ("batch", "length", "embed")))
        (attention_aux, cache), ffn_aux = first.extra, second.extra
        parts = {"attention_residual": first.aux, "ffn_residual": second.aux, "ffn": ffn_aux}
        aux = attention_aux.merged(ffn_aux).merged(first.aux.averaged(second.aux))
        aux = aux._replace(
            records={
                **aux.records,
                **ctx.recorded({RESIDUAL: lambda: x_BTD, SUBLAYER_INPUT: lambda: jnp.stack(inputs)}),
            },
            observed={name: part.observed for name, part in parts.items() if part.observed},
        )
        if ctx.summarise is not None:
            aux = aux._replace(records=ctx.summarise(aux.records, self.spec, ctx))
        return x_BTD, aux, cache

    def after_step(self, observed: dict[str, dict[str, jax.Array]]) -> None:
        """Let the parts that observed something move their variables; values are stacked as these are."""
        for name, values in observed.items():
            getattr(self, name).after_step(values)


class Period(nnx.Module):
    """The layers of one period of the layer pattern; a segment stacks its repeats along a leading axis."""

    def __init__(self, blocks: list[Block]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, caches: tuple[LayerCache | None, ...] | None):
        auxes, updated = [], []
        for i, (block, cache) in enumerate(zip(self.blocks, caches or (None,) * len(self.blocks), strict=True)):
            x_BTD, aux, cache = block(x_BTD, ctx.folded(i).of_layer(ctx.layer + i), cache)
            auxes.append(aux)
            updated.append(cache)
        return x_BTD, tuple(auxes), tuple(updated)


class Decoder(nnx.Module):
    """A decoder-only transformer; see `DecoderConfig`.

    After `train()` layers that sample (routers with noise) do so, and every call takes the next of the model's random
    streams; as built, or after `eval()`, a call is deterministic.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.stacked = True
        self.deterministic = True
        ctx = config.build_context()
        vocab, d = config.vocab_size, config.d_model
        embedding_std = config.init.embedding_std
        if embedding_std is None:
            embedding_std = d**-0.5 if config.init.kind == "fan_in" else config.init.scale

        def table(rows: int, axes: tuple[str, str]) -> nnx.Param:
            return nnx.Param(embedding_std * jax.random.normal(rngs.params(), (rows, d), ctx.param_dtype), axes=axes)

        self.embedding_VD = table(vocab, ("vocab", "embed"))
        self.positions_PD = table(config.max_seq_len, ("positions", "embed")) if config.learned_positions else None
        self.segments = nnx.List([self._stack(segment, rngs) for segment in config.segments()])
        self.final_norm = config.norm.build(ctx)
        self.head = config.residual.build_head(ctx, rngs)
        self.output_DV = (
            None
            if config.tie_embeddings
            else ctx.weight(rngs, (d, vocab), ("embed", "vocab"), d, std=config.init.output_std)
        )
        # A layout of the output projection for decoding, and number formats; see `inference.packing`.
        self.output_rows: Any = None
        self.formats: Any = None
        # Outside the layers, for what changes inside a scan is lost; each layer folds its place into the key.
        self.noise = nnx.RngStream(rngs.params(), tag="noise") if getattr(config.ffn, "samples", False) else None

    def _stack(self, segment: SegmentSpec, rngs: nnx.Rngs) -> Period:
        @nnx.split_rngs(splits=segment.repeats)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def build(rngs):
            return Period([Block(self.config, spec, rngs) for spec in segment.period])

        return build(rngs)

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
        """
        config = self.config
        ctx = self._call_context(tokens_BT, segment_ids, positions, cache)
        ctx.record, ctx.summarise, ctx.edit = checked(record), summarise, edit
        ctx.rng = None if self.deterministic or self.noise is None else self.noise()
        dtype = jnp.dtype(config.dtype)
        x_BTD: Any = lookup(self.embedding_VD[...], tokens_BT, dtype)
        scale = config.d_model**0.5 if config.embedding_scale == "sqrt_d_model" else config.embedding_scale
        x_BTD = x_BTD * jnp.asarray(scale, dtype)
        if self.positions_PD is not None:
            x_BTD = x_BTD + lookup(self.positions_PD[...], ctx.positions_BT, dtype, "positions")
        x_BTD = constrain(x_BTD, ("batch", "length", "embed"))

        auxes: list[LayerAux] = []
        caches: list[LayerCache] = []
        unused = None if cache is None else list(cache.layers)
        for i, (period, spec) in enumerate(zip(self.segments, self._specs(), strict=True)):
            if not self.stacked or unused is not None or edit is not None or not config.scan_layers:
                placed = ctx.folded(i).of_layer(len(auxes))
                x_BTD, segment_auxes, updated = self._unrolled(period, spec, x_BTD, placed, unused)
                caches.extend(updated)
            else:
                x_BTD, segment_auxes = self._scanned(period, x_BTD, ctx.folded(i))
            auxes.extend(segment_auxes)

        if self.head is None:
            hidden_BTD, head_aux = self.final_norm(x_BTD), LayerAux()
        else:
            hidden_BTD, head_aux = self.head(x_BTD, self.final_norm, ctx)
        losses, stats = _collect(auxes, head_aux)
        if cache is not None:
            assert ctx.cache_end is not None
            cache = cache.advanced(ctx.positions_BT, ctx.valid_BT)._replace(layers=tuple(caches))
        made = self.logits_of(hidden_BTD) if logits else jnp.zeros((*hidden_BTD.shape[:2], 0), jnp.float32)
        observed = (*(aux.observed for aux in auxes), *([head_aux.observed] if head_aux.observed else []))
        return Output(made, hidden_BTD, losses, stats, cache, _records(auxes), observed)

    def _specs(self) -> tuple[SegmentSpec, ...]:
        if self.stacked:
            return self.config.segments()
        return tuple(SegmentSpec((spec,), 1) for spec in self.config.layer_specs())

    def after_step(self, observed: tuple[dict[str, jax.Array], ...]) -> None:
        """Let the layers update variables that are no parameters (router biases), after an optimizer step.

        Args:
          observed: `Output.observed` of the step's batch, averaged over its micro-batches. Modules that observe
            something have a method `after_step` that gets theirs, stacked as their variables are.
        """
        rest = list(observed)
        for period, spec in zip(self.segments, self._specs(), strict=True):
            width = len(spec.period)
            own, rest = rest[: width * spec.repeats], rest[width * spec.repeats :]
            for i, block in enumerate(period.blocks):
                stacked = jax.tree.map(lambda *x: jnp.stack(x) if self.stacked else x[0], *own[i::width])
                block.after_step(stacked)
        if rest and self.head is not None:
            self.head.after_step(rest[0])

    def _projection(self) -> jax.Array:
        return self.embedding_VD[...].T if self.output_DV is None else self.output_DV[...]

    def output_weight(self) -> jax.Array:
        """The output projection [D, V], with its model width gathered.

        In a loop over chunks it is taken before the loop, or every trip would gather the table and reduce its gradient
        over all devices.
        """
        weight_DV = self._projection()
        # It travels in the activations' dtype, but chunks add up their gradients in that of the parameters.
        moved = constrain(weight_DV.astype(jnp.dtype(self.config.dtype)), (None, "vocab"))
        return moved.astype(weight_DV.dtype)

    def logits_of(self, hidden_BTD: jax.Array, weight_DV: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, V], float32, of final states [B, T, D]; `weight_DV`: `output_weight()`, if at hand."""
        if self.config.logit_divisor != 1.0:
            hidden_BTD = hidden_BTD / jnp.asarray(self.config.logit_divisor, hidden_BTD.dtype)
        if self.output_rows is not None:
            logits = self.output_rows.product(hidden_BTD, jnp.dtype(jnp.float32))
        else:
            if weight_DV is None:
                weight_DV = self._projection()
            project = matmul if self.head is None else self.head.project
            logits = project(hidden_BTD, weight_DV.astype(hidden_BTD.dtype), jnp.dtype(jnp.float32))
        logits = constrain(logits, ("batch", "length", "vocab"))
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _scanned(self, period: Period, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, list[LayerAux]]:
        graphdef, state = nnx.split(period)

        def body(x_BTD, inputs):
            state, i = inputs
            x_BTD, auxes, _ = nnx.merge(graphdef, state)(x_BTD, ctx.folded(i), None)
            return x_BTD, auxes

        repeats = jax.tree.leaves(state)[0].shape[0]
        inputs = (state, jnp.arange(repeats))
        x_BTD, stacked = jax.lax.scan(_rematerialised(body, self.config.remat), x_BTD, inputs)
        return x_BTD, [jax.tree.map(lambda leaf, i=i: leaf[i], aux) for i in range(repeats) for aux in stacked]

    def _unrolled(self, period: Period, spec: SegmentSpec, x_BTD: jax.Array, ctx: CallContext, unused):
        graphdef, state = nnx.split(period)
        auxes, caches = [], []
        for i in range(spec.repeats):
            state_i = jax.tree.map(lambda leaf, i=i: leaf[i], state) if self.stacked else state
            layer_caches = None if unused is None else tuple(unused.pop(0) for _ in spec.period)

            def body(x_BTD, state, layer_caches=layer_caches, i=i):
                placed = ctx.folded(i).of_layer(ctx.layer + i * len(spec.period))
                return nnx.merge(graphdef, state)(x_BTD, placed, layer_caches)

            x_BTD, aux, updated = _rematerialised(body, self.config.remat)(x_BTD, state_i)
            auxes.extend(aux)
            caches.extend(cache for cache in updated if cache is not None)
        return x_BTD, auxes, caches

    def _call_context(self, tokens_BT, segment_ids, positions, cache: DecoderCache | None) -> CallContext:
        batch, length = tokens_BT.shape
        if segment_ids is None:
            segment_ids = jnp.ones((batch, length), jnp.int32)
        valid_BT = segment_ids > 0
        if cache is None:
            require(length <= self.config.max_seq_len, "tokens", f"<{length} long>", _limit(self.config))
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
        if "local" in self.config.layer_pattern:
            visible["local"] = everywhere.within(self.config.attention.window or 0)
        masks: dict[LayerType, jax.Array] = {name: rule.mask for name, rule in visible.items()}
        return CallContext(jnp.maximum(positions, 0), segment_ids, masks, visible, end)

    def init_cache(self, batch: int, length: int) -> DecoderCache:
        """An empty cache for `batch` sequences of up to `length` tokens, padding included.

        It may be longer than `max_seq_len`, which limits the tokens that are no padding. Nothing checks under jit that
        no more than `length` tokens go in; further ones would overwrite the last slots.
        """
        require(length > 0, "cache length", length, "must be above 0")
        shapes, dtype = self.config.attention.cache_shapes, jnp.dtype(self.config.dtype)

        def empty(attention: Any) -> Any:
            if hasattr(attention, "empty_cache"):
                return attention.empty_cache(batch, length)
            return LayerCache(*(jnp.zeros((batch, length, *shape), dtype) for shape in shapes))

        layers = tuple(
            empty(block.attention)
            for period, spec in zip(self.segments, self._specs(), strict=True)
            for _ in range(spec.repeats)
            for block in period.blocks
        )
        return DecoderCache(layers, jnp.full((batch, length), -1, jnp.int32), jnp.int32(0))

    def unstacked(self) -> Decoder:
        """The same model with one set of arrays a layer instead of stacks, for decoding only.

        Slicing a layer out of a stack copies its weights in every step; doing it once, outside jit, does not. FFNs with
        a method `prepare` derive here, once, what depends on their weights alone.
        """
        if not self.stacked:
            return self
        graphdef, state = nnx.split(self)
        model = nnx.merge(graphdef, state)
        layers = []
        for period, spec in zip(self.segments, self.config.segments(), strict=True):
            for i in range(spec.repeats):
                for block in period.blocks:
                    block_def, block_state = nnx.split(block)
                    single = nnx.merge(block_def, jax.tree.map(lambda leaf, i=i: leaf[i], block_state))
                    ffn: Any = single.ffn
                    if hasattr(ffn, "prepare"):
                        ffn.prepare()
                    layers.append(Period([single]))
        model.segments = nnx.List(layers)
        model.stacked = False
        return model


def _limit(config: DecoderConfig) -> str:
    return f"must be at most model.max_seq_len={config.max_seq_len}"


def _rematerialised(body: Any, remat: str):
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy)


def _collect(auxes: list[LayerAux], head: LayerAux) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Losses averaged over the layers (and the head) that have them; statistics as one array over all layers."""
    having = [*auxes, head]
    loss_names = sorted({name for aux in having for name in aux.losses})
    losses = {
        name: jnp.mean(jnp.stack([aux.losses[name] for aux in having if name in aux.losses])) for name in loss_names
    }
    stat_names = sorted({name for aux in auxes for name in aux.stats})
    absent = jnp.full((), jnp.nan, jnp.float32)
    stats = {name: jnp.stack([aux.stats.get(name, absent) for aux in auxes]) for name in stat_names}
    return losses, stats


def _records(auxes: list[LayerAux]) -> dict[str, tuple[jax.Array | None, ...]]:
    names = sorted({name for aux in auxes for name in aux.records})
    return {name: tuple(aux.records.get(name) for aux in auxes) for name in names}


def positions_within_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Position of each token counted from the first token of its run of equal segment ids, int32 [B, T]."""
    index = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    previous = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids_BT != previous, index, 0), axis=1)
    return index - start
