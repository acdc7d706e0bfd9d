"""Sparsified layers laid out for decoding: a few tokens read the rows of the channels that their masks leave.

A map with a mask lies by its input channels, and a token's product is the sum of the rows of channels that are not 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.attention import PackedGQA
from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import Packed, Rows, WeightFormat, assign, few_tokens
from sparsezoo_jax.inference.sparsified_experts import (
    MaskedBlockFFN,
    MaskedDECOFFN,
    MaskedLayout,
    MaskedMoEFFN,
    MaskedMoEXFFN,
    expert_matrices,
    masked_mixture,
)
from sparsezoo_jax.models.attention import GQA, Projections
from sparsezoo_jax.models.common import CallContext, LayerAux
from sparsezoo_jax.models.contract import FFN, Attention
from sparsezoo_jax.models.ffn import GatedFFN, PlainFFN
from sparsezoo_jax.models.masks import DENSITY, NEURONS, MaskedWidth, Masks, channel_norms
from sparsezoo_jax.models.sparsified import SparsifiedAttention, SparsifiedFFN
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.active_rows import active_rows
from sparsezoo_jax.pallas_kernels.thresholded_ffn import thresholded_ffn_rows
from sparsezoo_jax.sharding import LogicalAxes


class ChannelMap(nnx.Module):
    """`x W` for x [B, T, I] by rows of inputs, or by rows of outputs for a map that reads all channels."""

    def __init__(self, weight_IO: jax.Array, masked: bool, form: WeightFormat, dtype: jnp.dtype, axes: LogicalAxes):
        self.masked = masked
        laid_out, axes = (weight_IO, axes) if masked else (weight_IO.T, tuple(reversed(axes)))
        self.rows = Rows(laid_out, form, dtype, axes)

    def restored(self) -> jax.Array:
        """W, [I, O], in the activations' dtype."""
        return self.rows.restored() if self.masked else self.rows.restored().T

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """[B, T, O]."""
        if not self.masked:
            return self.rows.product(x_BTI)
        x = few_tokens(x_BTI)
        if x is None:
            return self.rows.combination(x_BTI)
        return active_rows(x, *self.rows.arrays).reshape(*x_BTI.shape[:2], -1)

    def bytes_read(self, target: float) -> float:
        """Bytes that a token reads which leaves out a share `target` of the channels, if this is masked."""
        return self.rows.nbytes * (1 - target if self.masked else 1)


def _biased(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return y if bias is None else y + bias[...].astype(y.dtype)


def _bytes_of(*biases: nnx.Param | None) -> int:
    return sum(bias[...].nbytes for bias in biases if bias is not None)


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
        return maps + _bytes_of(self.q_bias, self.k_bias, self.v_bias, self.o_bias)

    def qkv(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], not rotated yet."""

        def project(name: str, map: ChannelMap, bias: nnx.Param | None, heads: int) -> jax.Array:
            y_BTO = map(stream.channels(name, x_BTD, map.restored))
            y_BTO = stream.added(name, y_BTO)
            return _biased(y_BTO.reshape(*x_BTD.shape[:2], heads, self.width), bias)

        q = project("q", self.q_map, self.q_bias, self.heads)
        k = project("k", self.k_map, self.k_bias, self.kv_heads)
        v = project("v", self.v_map, self.v_bias, self.kv_heads)
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        y_BTI = y_BTNH.reshape(*y_BTNH.shape[:2], -1)
        y_BTD = self.o_map(stream.channels("o", y_BTI, self.o_map.restored))
        return _biased(stream.added("o", y_BTD), self.o_bias)


class MaskedGQA(PackedGQA):
    """`GQA` over a cache by head, with its maps by their channels."""

    def __init__(self, source: GQA, masks: Masks, form: WeightFormat):
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.projections: Any = MaskedProjections(source.projections, masks, form)


class MaskedGatedFFN(GatedFFN):
    """`GatedFFN` with its maps by their channels."""

    def __init__(self, source: GatedFFN, masks: Masks, form: WeightFormat):
        self.config, self.dtype, self.summed_layers = source.config, source.dtype, source.summed_layers
        self.gate_bias, self.up_bias, self.down_bias = source.gate_bias, source.up_bias, source.down_bias

        def laid_out(name: str, weight: nnx.Param, axes: LogicalAxes) -> ChannelMap:
            return ChannelMap(weight[...], name in masks.names, form, source.dtype, axes)

        self.gate_map = laid_out("gate", source.gate_DF, ("embed", "ffn"))
        self.up_map = laid_out("up", source.up_DF, ("embed", "ffn"))
        self.down_map = laid_out("down", source.down_FD, ("ffn", "embed"))

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down_map.restored()

    def restore(self, source: GatedFFN) -> None:
        """Put the weights back into `source`."""
        assign(source.gate_DF, self.gate_map.restored())
        assign(source.up_DF, self.up_map.restored())
        assign(source.down_FD, self.down_map.restored())

    def bytes_read(self, target: float) -> float:
        """Bytes of weights that one token reads."""
        maps = sum(map.bytes_read(target) for map in (self.gate_map, self.up_map, self.down_map))
        return maps + _bytes_of(self.gate_bias, self.up_bias, self.down_bias)

    def gate_and_up(self, x_BTD: jax.Array, stream: Width) -> tuple[jax.Array, jax.Array]:
        """Gates before their non-linearity, and what they multiply: [B, T, F] each."""
        to_gate = stream.channels("gate", x_BTD, self.gate_map.restored)
        to_up = stream.channels("up", x_BTD, self.up_map.restored)
        gate = stream.added("gate", self.gate_map(to_gate))
        return _biased(gate, self.gate_bias), _biased(stream.added("up", self.up_map(to_up)), self.up_bias)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return _biased(stream.added("down", self.down_map(hidden_BTF)), self.down_bias)


class MaskedPlainFFN(PlainFFN):
    """`PlainFFN` with its maps by their channels."""

    def __init__(self, source: PlainFFN, masks: Masks, form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        self.up_bias, self.down_bias = source.up_bias, source.down_bias
        self.up_map = ChannelMap(source.up_DF[...], "up" in masks.names, form, source.dtype, ("embed", "ffn"))
        self.down_map = ChannelMap(source.down_FD[...], "down" in masks.names, form, source.dtype, ("ffn", "embed"))

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down_map.restored()

    def restore(self, source: PlainFFN) -> None:
        """Put the weights back into `source`."""
        assign(source.up_DF, self.up_map.restored())
        assign(source.down_FD, self.down_map.restored())

    def bytes_read(self, target: float) -> float:
        """Bytes of weights that one token reads."""
        maps = self.up_map.bytes_read(target) + self.down_map.bytes_read(target)
        return maps + _bytes_of(self.up_bias, self.down_bias)

    def scores(self, x_BTD: jax.Array, stream: Width) -> jax.Array:
        """Neurons before their non-linearity, [B, T, F]."""
        x_BTD = stream.channels("up", x_BTD, self.up_map.restored)
        return _biased(stream.added("up", self.up_map(x_BTD)), self.up_bias)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return _biased(stream.added("down", self.down_map(hidden_BTF)), self.down_bias)


class ThresholdedFFN(GatedFFN):
    """`GatedFFN` whose neurons are left out by their gates: rows of the gate, and what else a neuron has as one row."""

    def __init__(self, source: GatedFFN, masks: Masks, form: WeightFormat):
        self.config, self.dtype, self.summed_layers = source.config, source.dtype, source.summed_layers
        self.masks = masks
        self.gate_bias = self.up_bias = self.down_bias = None
        self.gate = Rows(source.gate_DF[...].T, form, source.dtype, ("ffn", "embed"))
        self.rest = Rows((source.up_DF[...].T, source.down_FD[...]), form, source.dtype, ("ffn", "embed"))

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.rest.parts()[1]

    def restore(self, source: GatedFFN) -> None:
        """Put the weights back into `source`."""
        up_FD, down_FD = self.rest.parts()
        assign(source.gate_DF, self.gate.restored().T)
        assign(source.up_DF, up_FD.T)
        assign(source.down_FD, down_FD)

    def by_rows(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, jax.Array] | None:
        """The output and the share of each token's neurons that are left [B, T]; None if there are too many tokens."""
        rows = few_tokens(x_BTD)
        if rows is None or ctx.record:
            return None
        (gate, s1), (rest, s2) = self.gate.arrays, self.rest.arrays
        y, active_M = thresholded_ffn_rows(
            rows, gate, rest, self.masks.cut(NEURONS), activation=self.config.activation, scales=(s1, s2)
        )
        return y.reshape(x_BTD.shape), active_M.reshape(x_BTD.shape[:2]) / self.config.d_ff

    def gate_and_up(self, x_BTD: jax.Array, stream: Width) -> tuple[jax.Array, jax.Array]:
        """Gates before their non-linearity, and what they multiply: [B, T, F] each."""
        return self.gate.product(x_BTD), self.rest.first_product(x_BTD)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return self.rest.second_combination(hidden_BTF)


def _norms(masks: Masks, weights: Mapping[str, jax.Array], experts: Collection[str] = ()) -> nnx.Dict:
    """Norms of the weights of channels, by map where scores have them: making them would take as long as a token.

    Of a weight for the output of heads, [N, H, D], the first two axes are channels; of those of `experts`, [E, I, O],
    they are the experts and their channels.
    """

    def of(name: str) -> Packed:
        norms = channel_norms(weights[name], 2 if name == "o" or name in experts else 1)
        norms = norms.reshape(-1) if name == "o" else norms
        return Packed(norms, axes=(None,) * norms.ndim)

    return nnx.Dict({name: of(name) for name in masks.names if name in masks.config.weighted})


def _rotation(source: SparsifiedFFN | SparsifiedAttention, form: WeightFormat) -> ChannelMap | None:
    """The matrix before the maps, where there is one."""
    if source.rotation is None:
        return None
    weight_DD = source.rotation.rotation_DD[...]
    dtype = getattr(source.inner, "dtype", weight_DD.dtype)
    return ChannelMap(weight_DD, False, form, dtype, (None, None))


Inner = MaskedGatedFFN | MaskedPlainFFN | ThresholdedFFN | MaskedMoEFFN | MaskedBlockFFN | MaskedMoEXFFN | MaskedDECOFFN


class PackedSparsifiedFFN(FFN, DecodingLayout):
    """`SparsifiedFFN` laid out for decoding."""

    def __init__(self, source: SparsifiedFFN, inner: Inner, form: WeightFormat):
        self.config, self.masks, self.bypass, self.inner = source.config, source.masks, source.bypass, inner
        of = source.config.of
        self.norms = _norms(source.masks, expert_matrices(source.inner, of), of.expert_maps)
        self.rotation = _rotation(source, form)

    @property
    def dictionary(self) -> jax.Array | None:
        """As of the network itself."""
        return self.inner.dictionary

    def restore(self, source: SparsifiedFFN) -> None:
        """Put the weights back into `source`."""
        self.inner.restore(source.inner)  # pyright: ignore[reportArgumentType]

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, with this share of the neurons left where a gate decides on them."""
        target = self.config.sparsity.target
        if isinstance(self.inner, ThresholdedFFN):
            return self.inner.gate.nbytes + density * self.inner.rest.nbytes
        if isinstance(self.inner, MaskedLayout):
            return self.inner.read(density, lambda name: 1 - target)
        rotation = 0 if self.rotation is None else self.rotation.bytes_read(0)
        return self.inner.bytes_read(target) + rotation

    def bytes_of(self, stats: Mapping[str, float]) -> float:
        """Bytes of weights that a token with these statistics read: of experts by what their maps left out for it."""
        if not isinstance(self.inner, MaskedLayout):
            return super().bytes_of(stats)
        asked = 1 - self.config.sparsity.target
        return self.inner.read(stats["ffn_density"], lambda name: stats.get(DENSITY + name, asked))

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        x_BTD = x_BTD if self.rotation is None else self.rotation(x_BTD)
        width = MaskedWidth(self.masks, ctx, self.bypass, {name: norm[...] for name, norm in self.norms.items()})
        found = self.inner.by_rows(x_BTD, ctx) if isinstance(self.inner, ThresholdedFFN) else None
        if found is None:
            y_BTD, aux = self.inner(x_BTD, replace(ctx, width=width))
            return y_BTD, width.seen(aux)
        y_BTD, active_BT = found
        density = ctx.mean_over_tokens(active_BT)
        return y_BTD, LayerAux(stats={"ffn_density": density, "density_neurons": density})


class PackedSparsifiedAttention(Attention, DecodingLayout):
    """`SparsifiedAttention` laid out for decoding."""

    def __init__(self, source: SparsifiedAttention, inner: MaskedGQA, form: WeightFormat):
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.masks, self.bypass, self.inner = source.masks, source.bypass, inner
        layer: Any = source.inner
        maps = layer.projections
        self.rotation = _rotation(source, form)
        weights = {"q": maps.q_DNH, "k": maps.k_DKH, "v": maps.v_DKH, "o": maps.o_NHD}
        self.norms = _norms(source.masks, {name: weight[...] for name, weight in weights.items()})

    def restore(self, source: SparsifiedAttention) -> None:
        """Put the weights back into `source`."""
        inner: Any = source.inner
        self.inner.restore(inner)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever the density."""
        rotation = 0 if self.rotation is None else self.rotation.bytes_read(0)
        return self.inner.projections.bytes_read(self.config.sparsity.target) + rotation

    def empty_cache(self, batch: int, length: int) -> Any:
        """A cache of `length` slots."""
        return self.inner.empty_cache(batch, length)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, cache: Any = None) -> tuple[jax.Array, LayerAux, Any]:
        x_BTD = x_BTD if self.rotation is None else self.rotation(x_BTD)
        width = MaskedWidth(self.masks, ctx, self.bypass, {name: norm[...] for name, norm in self.norms.items()})
        y_BTD, aux, cache = self.inner(x_BTD, replace(ctx, width=width), cache)
        return y_BTD, width.seen(aux), cache


@packs(SparsifiedFFN)
def _ffn(source: SparsifiedFFN, formats: Formats, active: float | None) -> PackedSparsifiedFFN | None:
    inner, masks, form = source.inner, source.masks, formats.weights
    if type(inner) is GatedFFN:
        config, sparsity = inner.config, source.config.sparsity
        thresholds = sparsity.gate == "threshold" and not sparsity.dense_tokens
        plain = not (config.bias or config.up_activation or config.activation_sparsity_pattern or config.threshold)
        if masks.names == (NEURONS,) and thresholds and plain:
            return PackedSparsifiedFFN(source, ThresholdedFFN(inner, masks, form), form)
        if NEURONS not in masks.names:
            return PackedSparsifiedFFN(source, MaskedGatedFFN(inner, masks, form), form)
    if type(inner) is PlainFFN:
        return PackedSparsifiedFFN(source, MaskedPlainFFN(inner, masks, form), form)
    mixture = masked_mixture(inner, masks.names, formats)
    return None if mixture is None else PackedSparsifiedFFN(source, mixture, form)


@packs(SparsifiedAttention)
def _attention(source: SparsifiedAttention, formats: Formats, active: float | None) -> PackedSparsifiedAttention | None:
    if type(source.inner) is not GQA:
        return None
    return PackedSparsifiedAttention(source, MaskedGQA(source.inner, source.masks, formats.weights), formats.weights)
