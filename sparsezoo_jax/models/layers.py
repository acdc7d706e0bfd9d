"""The decoder's layers: one layer, and a run of equal ones that is compiled once and looped over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.models.adapter import adapted
from sparsezoo_jax.models.altup import STREAMS
from sparsezoo_jax.models.cache import SublayerCaches
from sparsezoo_jax.models.common import CallContext, LayerAux, LayerType
from sparsezoo_jax.models.contract import FFN, Attention, Observed, Sublayer
from sparsezoo_jax.models.elimination import AttentionBlocks, FFNBlocks, observed_blocks
from sparsezoo_jax.models.records import FFN_HIDDEN, FFN_OUTPUT, RESIDUAL, SUBLAYER_INPUT
from sparsezoo_jax.models.remat import Remat, rematerialised
from sparsezoo_jax.sharding import constrain

if TYPE_CHECKING:
    from sparsezoo_jax.models.config import DecoderConfig, LayerSpec, SegmentSpec

STREAM = ("batch", "length", "embed")


class Passed(NamedTuple):
    """What goes from layer to layer."""

    x: jax.Array
    """The residual stream [B, T, D], or streams [S, B, T, D] under AltUp."""
    kept: dict[LayerType, Any] = {}
    """Keys and values of the last layer of each type that keeps its own for later ones."""


class LayerWatch:
    """What a caller asked to see or to change of one layer's call: see `Decoder.__call__`, `record` and `edit`."""

    def __init__(self, ctx: CallContext):
        self.ctx = ctx
        self.inputs: list[jax.Array] = []
        self.records: dict[str, jax.Array] = {}

    def attention(self, attention: Attention, cache: Any) -> Sublayer[tuple[LayerAux, Any]]:
        """`attention` over `cache` as a residual connection calls it."""

        def watched(h_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, tuple[LayerAux, Any]]:
            self.inputs.append(h_BTD)
            y_BTD, aux, updated = attention(h_BTD, ctx, cache)
            return y_BTD, (aux, updated)

        return watched

    def ffn(self, ffn: FFN, cache: Any) -> Sublayer[tuple[LayerAux, Any]]:
        """`ffn`, over `cache` if it keeps one, as a residual connection calls it."""

        def watched(h_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, tuple[LayerAux, Any]]:
            self.inputs.append(h_BTD)
            y_BTD, aux, updated = (*ffn(h_BTD, ctx), None) if cache is None else ffn.decode(h_BTD, ctx, cache)
            if self.ctx.keep is not None:
                y_BTD, aux = self._with_kept_units(y_BTD, aux, ffn.dictionary)
            return self._seen(FFN_OUTPUT, self.ctx.edited(FFN_OUTPUT, y_BTD)), (aux, updated)

        return watched

    def residual(self, x_BTD: jax.Array) -> jax.Array:
        """The stream after the layer."""
        return self._seen(RESIDUAL, self.ctx.edited(RESIDUAL, x_BTD))

    def recorded(self, aux: LayerAux, spec: LayerSpec) -> LayerAux:
        """`aux` with what was seen among its records, or with the summary of all records that the caller wants."""
        inputs = self.ctx.recorded({SUBLAYER_INPUT: lambda: jnp.stack(self.inputs)})
        records = {**aux.records, **self.records, **inputs}
        if self.ctx.summarise is not None:
            records = self.ctx.summarise(records, spec, self.ctx)
        return aux._replace(records=records)

    def _with_kept_units(
        self, y_BTD: jax.Array, aux: LayerAux, dictionary_FD: jax.Array | None
    ) -> tuple[jax.Array, LayerAux]:
        """An FFN's output and records without the hidden units that the caller doesn't keep."""
        if dictionary_FD is None or FFN_HIDDEN not in aux.records:
            return y_BTD, aux
        hidden_BTF = aux.records[FFN_HIDDEN]
        kept_BTF = self.ctx.keep(self.ctx.layer, aux.records, dictionary_FD)
        # Taken off the output, so that whatever else it is made of (a bias, a shared expert) stays.
        dropped_BTF = jnp.where(kept_BTF, 0, hidden_BTF).astype(jnp.float32)
        dropped_BTD = dropped_BTF @ dictionary_FD.astype(jnp.float32)
        y_BTD = (y_BTD.astype(jnp.float32) - dropped_BTD).astype(y_BTD.dtype)
        return y_BTD, aux._replace(records={**aux.records, FFN_HIDDEN: jnp.where(kept_BTF, hidden_BTF, 0)})

    def _seen(self, name: str, array: jax.Array) -> jax.Array:
        self.records |= self.ctx.recorded({name: lambda: array})
        return array


class Block(nnx.Module):
    """One layer: attention, then a feed-forward network, each in a residual connection."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, rngs: nnx.Rngs):
        ctx = config.build_context(spec.layer_type, spec.keys)
        self.spec = spec
        self.attention_residual = config.residual.build(ctx, config.norm, rngs, "attention")
        self.attention = spec.attention.build(ctx, rngs)
        self.ffn_residual = config.residual.build(ctx, config.norm, rngs, "ffn")
        self.ffn = spec.ffn.build(ctx, rngs)
        self.attention_adapter = config.adapter.build(ctx, rngs, "attention")
        self.ffn_adapter = config.adapter.build(ctx, rngs, "ffn")
        self.altup = config.altup.build(ctx, config.norm, rngs)
        self.per_layer = config.per_layer.build(ctx, config.norm, rngs, scaled=self.altup is not None)

    def __call__(
        self, passed: Passed, ctx: CallContext, cache: Any, vectors_BTP: jax.Array | None = None
    ) -> tuple[Passed, LayerAux, Any]:
        """What goes on to the next layer, the layer's auxiliary results and its cache.

        Without a cache given, one that holds the layer's keys and values where it keeps these. `vectors_BTP` are the
        layer's of the per-layer embeddings.
        """
        watch = LayerWatch(ctx)
        if passed.kept:
            ctx = replace(ctx, kept=passed.kept)
        predicted = passed.x if self.altup is None else self.altup.predict(passed.x)
        held = cache if isinstance(cache, SublayerCaches) else SublayerCaches(cache, None)
        x_BTD, aux, held = self._sublayers(predicted if self.altup is None else predicted[0], ctx, held, watch)
        if self.altup is None:
            x = watch.residual(constrain(self._with_vectors(x_BTD, x_BTD, vectors_BTP), STREAM))
        else:
            x = self.altup.correct(predicted, x_BTD)
            first_BTD, others = x[0], self._with_vectors(x[1:], x[0], vectors_BTP)
            x = constrain(jnp.concatenate([watch.residual(first_BTD)[None], others]), STREAMS)
        kept = dict(passed.kept)
        if self.spec.keys == "kept":
            kept[self.spec.layer_type] = held.attention
        return Passed(x, kept), watch.recorded(aux, self.spec), held.attention if held.ffn is None else held

    def empty_cache(self, batch: int, length: int) -> Any:
        """A cache for `length` tokens of each of `batch` sequences."""
        attention, ffn = self.attention.empty_cache(batch, length), self.ffn.empty_cache(batch)
        return attention if ffn is None else SublayerCaches(attention, ffn)

    def _with_vectors(self, x: jax.Array, read_BTD: jax.Array, vectors_BTP: jax.Array | None) -> jax.Array:
        """`x` with what the per-layer embeddings add, whose gate reads `read_BTD`."""
        if self.per_layer is None:
            return x
        assert vectors_BTP is not None
        return x + self.per_layer(read_BTD, vectors_BTP)

    def _sublayers(
        self, x_BTD: jax.Array, ctx: CallContext, held: SublayerCaches, watch: LayerWatch
    ) -> tuple[jax.Array, LayerAux, SublayerCaches]:
        """The stream after attention and feed-forward network."""
        attention = adapted(watch.attention(self.attention, held.attention), self.attention_adapter)
        ffn = adapted(watch.ffn(self.ffn, held.ffn), self.ffn_adapter)
        blocks = (AttentionBlocks(self.attention_residual, self.attention), FFNBlocks(self.ffn_residual, self.ffn))
        with jax.named_scope("attention"):
            attended = blocks[0].connected(x_BTD, ctx, attention)
        if ctx.elimination is not None and ctx.elimination.observes:
            watch.records |= observed_blocks(blocks, (x_BTD, attended.stream_BTD), ctx)
        x_BTD, (attention_aux, cache) = constrain(attended.stream_BTD, STREAM), attended.extra
        with jax.named_scope("ffn"):
            fed = blocks[1].connected(x_BTD, replace(ctx, routing=attended.routing), ffn)
        x_BTD, (ffn_aux, ffn_cache) = constrain(fed.stream_BTD, STREAM), fed.extra
        aux = attention_aux.merged(ffn_aux).merged(attended.aux.averaged(fed.aux))
        parts = {
            "attention_residual": attended.aux,
            "attention": attention_aux,
            "ffn_residual": fed.aux,
            "ffn": ffn_aux,
        }
        observed = {name: part.observed for name, part in parts.items() if part.observed}
        return x_BTD, aux._replace(observed=observed), SublayerCaches(cache, ffn_cache)

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Let the parts that observed something move their variables; values are stacked as these are."""
        for i, (name, values) in enumerate(observed.items()):
            getattr(self, name).after_step(values, jax.random.fold_in(key, i))


class Segment(nnx.Module):
    """Equal periods of the layer pattern, one after another.

    The blocks of one period hold the parameters of all repeats, stacked along a leading axis; in a segment that
    `unstacked` made, those of its one layer as they are.
    """

    def __init__(self, blocks: Sequence[Block], spec: SegmentSpec, *, stacked: bool):
        self.blocks = nnx.List(blocks)
        self.spec, self.stacked = spec, stacked

    @classmethod
    def build(cls, config: DecoderConfig, spec: SegmentSpec, rngs: nnx.Rngs) -> Segment:
        """The segment with new parameters, stacked."""

        @nnx.split_rngs(splits=spec.repeats)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def build(rngs: nnx.Rngs) -> Segment:
            return cls([Block(config, layer, rngs) for layer in spec.period], spec, stacked=True)

        return build(rngs)

    def __call__(
        self,
        passed: Passed,
        ctx: CallContext,
        caches: Sequence[Any] | None,
        vectors: jax.Array | None = None,
        *,
        scan: bool,
        remat: Remat,
    ) -> tuple[Passed, list[LayerAux], list[Any]]:
        """What all layers leave, the auxiliary results and (where `caches` are given) caches of each.

        Args:
          vectors: of the per-layer embeddings, [layers, B, T, P], if there are any.
          scan: compile one period and loop over it; without it, and for the one layer of an unstacked segment, layers
            run one after another.
          remat: as in `DecoderConfig`.
        """
        if scan and self.stacked:
            return *self._scanned(passed, ctx, vectors, remat), []
        return self._unrolled(passed, ctx, caches, vectors, remat)

    def _period(
        self, passed: Passed, ctx: CallContext, caches: Sequence[Any] | None, vectors: jax.Array | None
    ) -> tuple[Passed, tuple[LayerAux, ...], tuple[Any, ...]]:
        """One period, of unstacked blocks."""
        auxes, updated = [], []
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            own = None if vectors is None else vectors[i]
            passed, aux, cache = block(passed, ctx.folded(i).of_layer(ctx.layer + i), cache, own)
            auxes.append(aux)
            updated.append(None if caches is None else cache)
        return passed, tuple(auxes), tuple(updated)

    def _scanned(
        self, passed: Passed, ctx: CallContext, vectors: jax.Array | None, remat: Remat
    ) -> tuple[Passed, list[LayerAux]]:
        graphdef, state = nnx.split(self)

        def body(passed, inputs):
            state, i, vectors = inputs
            placed = ctx.folded(i).of_layer(ctx.layer + i * len(self.spec.period))
            passed, auxes, _ = nnx.merge(graphdef, state)._period(passed, placed, None, vectors)
            return passed, auxes

        repeats = self.spec.repeats
        own = None if vectors is None else vectors.reshape(repeats, -1, *vectors.shape[1:])
        passed, stacked = jax.lax.scan(rematerialised(body, remat), passed, (state, jnp.arange(repeats), own))
        return passed, [jax.tree.map(lambda leaf, i=i: leaf[i], aux) for i in range(repeats) for aux in stacked]

    def _unrolled(
        self,
        passed: Passed,
        ctx: CallContext,
        caches: Sequence[Any] | None,
        vectors: jax.Array | None,
        remat: Remat,
    ) -> tuple[Passed, list[LayerAux], list[Any]]:
        graphdef, state = nnx.split(self)
        auxes: list[LayerAux] = []
        after: list[Any] = []
        width = len(self.spec.period)
        for i in range(self.spec.repeats):
            state_i = jax.tree.map(lambda leaf, i=i: leaf[i], state) if self.stacked else state
            caches_i = None if caches is None else tuple(caches[i * width : (i + 1) * width])

            own = None if vectors is None else vectors[i * width : (i + 1) * width]

            def body(passed, state, vectors, caches_i=caches_i, i=i):
                placed = ctx.folded(i).of_layer(ctx.layer + i * width)
                return nnx.merge(graphdef, state)._period(passed, placed, caches_i, vectors)

            passed, aux, updated = rematerialised(body, remat)(passed, state_i, own)
            auxes.extend(aux)
            after.extend(cache for cache in updated if cache is not None)
        return passed, auxes, after

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.spec.period) * self.spec.repeats

    def empty_caches(self, batch: int, length: int) -> list[Any]:
        """An empty cache for each layer."""
        return [block.empty_cache(batch, length) for _ in range(self.spec.repeats) for block in self.blocks]

    def after_step(self, observed: Sequence[Observed], key: jax.Array) -> None:
        """Let the layers move their variables by what each of them observed."""
        width = len(self.spec.period)
        for i, block in enumerate(self.blocks):
            own = observed[i::width]
            values = jax.tree.map(lambda *x: jnp.stack(x), *own) if self.stacked else own[0]
            block.after_step(values, jax.random.fold_in(key, i))

    def unstacked(self) -> list[Segment]:
        """A segment for each layer, with parameters of its own; FFNs derive there what decoding needs (`prepare`)."""
        singles: list[Segment] = []
        for i in range(self.spec.repeats):
            for block, spec in zip(self.blocks, self.spec.period, strict=True):
                graphdef, state = nnx.split(block)
                single = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
                single.ffn.prepare()
                singles.append(Segment([single], self.spec._replace(period=(spec,), repeats=1), stacked=False))
        return singles


def run_segments(
    segments: Sequence[Segment],
    passed: Passed,
    ctx: CallContext,
    caches: Sequence[Any] | None = None,
    vectors: jax.Array | None = None,
    *,
    scan: bool,
    remat: Remat,
) -> tuple[Passed, list[LayerAux], list[Any]]:
    """What all layers leave, and the auxiliary results and caches of each; arguments as of `Segment.__call__`."""
    auxes: list[LayerAux] = []
    updated: list[Any] = []
    for i, segment in enumerate(segments):
        first = len(auxes)
        own = slice(first, first + segment.layers)
        held = None if caches is None else caches[own]
        vectors_i = None if vectors is None else vectors[own]
        placed = ctx.folded(i).of_layer(first)
        passed, segment_auxes, after = segment(passed, placed, held, vectors_i, scan=scan, remat=remat)
        auxes.extend(segment_auxes)
        updated.extend(after)
    return passed, auxes, updated


def update_segments(segments: Sequence[Segment], observed: list[Observed], key: jax.Array) -> list[Observed]:
    """Let all layers move their variables by what each observed; returns what others observed, which comes last."""
    for i, segment in enumerate(segments):
        own, observed = observed[: segment.layers], observed[segment.layers :]
        segment.after_step(own, jax.random.fold_in(key, i))
    return observed
