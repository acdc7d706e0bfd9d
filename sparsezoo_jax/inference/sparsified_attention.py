"""Attention with masks on its maps, laid out for decoding: a few tokens read the rows of channels that are left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from sparsezoo_jax.inference.attention import PackedGQA, PackedMLA, PackedSparkAttention
from sparsezoo_jax.inference.channels import ChannelMap, biased, bytes_of, norms_of, rotation_of
from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import WeightFormat, assign
from sparsezoo_jax.models.attention import GQA, Projections
from sparsezoo_jax.models.common import CallContext, LayerAux
from sparsezoo_jax.models.contract import Attention
from sparsezoo_jax.models.masks import MaskedWidth, Masks
from sparsezoo_jax.models.matrices import find
from sparsezoo_jax.models.mla import MLA
from sparsezoo_jax.models.spark import SparkAttention
from sparsezoo_jax.models.sparsified import SparsifiedAttention
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.sharding import LogicalAxes


class MaskedProjections(nnx.Module):
    """`Projections` with the four maps by their channels."""

    def __init__(self, source: Projections, masks: Masks, form: WeightFormat):
        self.dtype = source.dtype
        self.heads, self.kv_heads, self.width = source.q_DNH.shape[1], *source.k_DKH.shape[1:]

        def laid_out(name: str, weight: jax.Array, axes: LogicalAxes) -> ChannelMap:
            return ChannelMap(weight, name in masks.names, form, source.dtype, axes)

        d = source.q_DNH.shape[0]
        self.q_map = laid_out("q", source.q_DNH[...].reshape(d, -1), ("embed", "heads"))
        self.k_map = laid_out("k", source.k_DKH[...].reshape(d, -1), ("embed", "kv_heads"))
        self.v_map = laid_out("v", source.v_DKH[...].reshape(d, -1), ("embed", "kv_heads"))
        self.o_map = laid_out("o", source.o_NHD[...].reshape(-1, d), ("heads", "embed"))
        self.q_bias, self.k_bias, self.v_bias = source.q_bias, source.k_bias, source.v_bias
        self.o_bias, self.q_norm, self.k_norm = source.o_bias, source.q_norm, source.k_norm

    def restore(self, source: Projections) -> None:
        """Put the weights back into `source`."""
        targets = (source.q_DNH, source.k_DKH, source.v_DKH, source.o_NHD)
        for target, map in zip(targets, (self.q_map, self.k_map, self.v_map, self.o_map), strict=True):
            assign(target, map.restored())

    def bytes_read(self, target: float) -> float:
        """Bytes of weights that one token reads."""
        maps = sum(map.bytes_read(target) for map in (self.q_map, self.k_map, self.v_map, self.o_map))
        return maps + bytes_of(self.q_bias, self.k_bias, self.v_bias, self.o_bias)

    def qkv(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], not rotated yet."""

        def project(name: str, map: ChannelMap, bias: nnx.Param | None, heads: int) -> jax.Array:
            y_BTO = map(stream.channels(name, x_BTD, map.restored))
            y_BTO = stream.added(name, y_BTO)
            return biased(y_BTO.reshape(*x_BTD.shape[:2], heads, self.width), bias)

        q = project("q", self.q_map, self.q_bias, self.heads)
        k = project("k", self.k_map, self.k_bias, self.kv_heads)
        v = project("v", self.v_map, self.v_bias, self.kv_heads)
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        y_BTI = y_BTNH.reshape(*y_BTNH.shape[:2], -1)
        y_BTD = self.o_map(stream.channels("o", y_BTI, self.o_map.restored))
        return biased(stream.added("o", y_BTD), self.o_bias)


class MaskedGQA(PackedGQA):
    """`GQA` over a cache by head, with its maps by their channels."""

    def __init__(self, source: GQA, masks: Masks, form: WeightFormat):
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.projections: Any = MaskedProjections(source.projections, masks, form)

    def bytes_left(self, target: float) -> float:
        """Bytes of weights that one token reads which leaves out a share `target` of the channels."""
        return self.projections.bytes_read(target)


class MaskedSparkAttention(PackedSparkAttention):
    """`SparkAttention` over a split cache, with its maps by their channels."""

    def __init__(self, source: SparkAttention, masks: Masks, form: WeightFormat):
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.projections: Any = MaskedProjections(source.projections, masks, form)

    def bytes_left(self, target: float) -> float:
        """Bytes of weights that one token reads which leaves out a share `target` of the channels."""
        return self.projections.bytes_read(target)


class MaskedMLA(PackedMLA):
    """`MLA` over a cache of latents, with its maps by their channels; the map from the latent of keys and values has
    no mask.
    """

    def __init__(self, source: MLA, masks: Masks, form: WeightFormat):
        self.lay_out_latent(source, form)

        def laid_out(name: str, axes: LogicalAxes) -> ChannelMap:
            weight = find(source, source.matrices[name])[...]
            weight = weight.reshape(-1, weight.shape[-1]) if name == "o" else weight.reshape(len(weight), -1)
            return ChannelMap(weight, name in masks.names, form, source.dtype, axes)

        self.q_map = laid_out("q", ("embed", "heads" if self.q_a_norm is None else "latent"))
        self.q_up_map = None if self.q_a_norm is None else laid_out("q_up", ("latent", "heads"))
        self.k_map, self.o_map = laid_out("k", ("embed", "latent")), laid_out("o", ("heads", "embed"))

    def _maps(self) -> dict[str, ChannelMap]:
        maps = {"q": self.q_map, "k": self.k_map, "o": self.o_map}
        return maps if self.q_up_map is None else {**maps, "q_up": self.q_up_map}

    def restore(self, source: MLA) -> None:
        """Put the weights back into `source`."""
        for name, map in self._maps().items():
            assign(find(source, source.matrices[name]), map.restored())
        assign(source.kv_b_CNH, self.kv_up_weight())

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads without masks."""
        return self.bytes_left(0)

    def bytes_left(self, target: float) -> float:
        """Bytes of weights that one token reads which leaves out a share `target` of the channels."""
        expanded = sum(rows.nbytes for rows in (*self.key_up, *self.value_up))
        return expanded + sum(map.bytes_read(target) for map in self._maps().values())

    def down_projected(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, N, H], not rotated yet, and the latent before its norm with the rotated part [B, T, C + P]."""

        def mapped(name: str, x: jax.Array, map: ChannelMap) -> jax.Array:
            return stream.added(name, map(stream.channels(name, x, map.restored)))

        joint_BTC, q_BTF = mapped("k", x_BTD, self.k_map), mapped("q", x_BTD, self.q_map)
        if self.q_up_map is not None and self.q_a_norm is not None:
            q_BTF = mapped("q_up", self.q_a_norm(q_BTF), self.q_up_map)
        return q_BTF.reshape(*q_BTF.shape[:2], self.config.heads, -1), joint_BTC

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        y_BTI = y_BTNH.reshape(*y_BTNH.shape[:2], -1)
        return stream.added("o", self.o_map(stream.channels("o", y_BTI, self.o_map.restored)))


Inner = MaskedGQA | MaskedSparkAttention | MaskedMLA


class PackedSparsifiedAttention(Attention, DecodingLayout):
    """`SparsifiedAttention` laid out for decoding."""

    def __init__(self, source: SparsifiedAttention, inner: Inner, form: WeightFormat):
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.masks, self.bypass, self.inner = source.masks, source.bypass, inner
        self.rotation = rotation_of(source, form)
        weights = {name: find(source.inner, path)[...] for name, path in source.inner.matrices.items()}
        self.norms = norms_of(source.masks, weights)

    def restore(self, source: SparsifiedAttention) -> None:
        """Put the weights back into `source`."""
        inner: Any = source.inner
        self.inner.restore(inner)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever the density."""
        rotation = 0 if self.rotation is None else self.rotation.bytes_read(0)
        return self.inner.bytes_left(self.config.sparsity.target) + rotation

    def empty_cache(self, batch: int, length: int) -> Any:
        """A cache of `length` slots."""
        return self.inner.empty_cache(batch, length)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, cache: Any = None) -> tuple[jax.Array, LayerAux, Any]:
        x_BTD = x_BTD if self.rotation is None else self.rotation(x_BTD)
        width = MaskedWidth(self.masks, ctx, self.bypass, {name: norm[...] for name, norm in self.norms.items()})
        y_BTD, aux, cache = self.inner(x_BTD, replace(ctx, width=width), cache)
        return y_BTD, width.seen(aux), cache


_LAYOUTS: dict[type, Any] = {GQA: MaskedGQA, SparkAttention: MaskedSparkAttention, MLA: MaskedMLA}


@packs(SparsifiedAttention)
def _attention(source: SparsifiedAttention, formats: Formats, active: float | None) -> PackedSparsifiedAttention | None:
    layout = _LAYOUTS.get(type(source.inner))
    if layout is None:
        return None
    return PackedSparsifiedAttention(source, layout(source.inner, source.masks, formats.weights), formats.weights)
