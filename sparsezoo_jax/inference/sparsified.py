"""Sparsified layers laid out for decoding: a few tokens read the rows of the channels that their masks leave.

A map with a mask lies by its input channels, and a token's product is the sum of the rows of channels that are not 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.channels import ChannelMap, biased, bytes_of, norms_of, rotation_of
from sparsezoo_jax.inference.ffn import NEURONS as NEURON_AXES
from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import Rows, WeightFormat, assign, few_tokens, flat
from sparsezoo_jax.inference.sparsified_experts import (
    Left,
    MaskedBlockFFN,
    MaskedDECOFFN,
    MaskedLayout,
    MaskedMoEFFN,
    MaskedMoEXFFN,
    expert_matrices,
    masked_mixture,
)
from sparsezoo_jax.models.common import CallContext, LayerAux
from sparsezoo_jax.models.contract import FFN
from sparsezoo_jax.models.ffn import GatedFFN, PlainFFN
from sparsezoo_jax.models.masks import DENSITY, NEURONS, MaskedWidth, Masks
from sparsezoo_jax.models.spark import SparkFFN
from sparsezoo_jax.models.sparsified import SparsifiedFFN
from sparsezoo_jax.models.width import Width
from sparsezoo_jax.pallas_kernels.active_rows import active_rows
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.expert_rows import expert_products
from sparsezoo_jax.pallas_kernels.rows import native_refusal
from sparsezoo_jax.pallas_kernels.thresholded_ffn import thresholded_ffn_rows
from sparsezoo_jax.sharding import LogicalAxes


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
        return maps + bytes_of(self.gate_bias, self.up_bias, self.down_bias)

    def gate_and_up(self, x_BTD: jax.Array, stream: Width) -> tuple[jax.Array, jax.Array]:
        """Gates before their non-linearity, and what they multiply: [B, T, F] each."""
        to_gate = stream.channels("gate", x_BTD, self.gate_map.restored)
        to_up = stream.channels("up", x_BTD, self.up_map.restored)
        gate = stream.added("gate", self.gate_map(to_gate))
        return biased(gate, self.gate_bias), biased(stream.added("up", self.up_map(to_up)), self.up_bias)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return biased(stream.added("down", self.down_map(hidden_BTF)), self.down_bias)


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
        return maps + bytes_of(self.up_bias, self.down_bias)

    def scores(self, x_BTD: jax.Array, stream: Width) -> jax.Array:
        """Neurons before their non-linearity, [B, T, F]."""
        x_BTD = stream.channels("up", x_BTD, self.up_map.restored)
        return biased(stream.added("up", self.up_map(x_BTD)), self.up_bias)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return biased(stream.added("down", self.down_map(hidden_BTF)), self.down_bias)


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


class MaskedSparkFFN(SparkFFN, MaskedLayout):
    """`SparkFFN` with its predictor by channels, and its other maps by neurons: of the few that are selected whole rows
    are read, whatever a mask leaves of the input that they are multiplied with.
    """

    def __init__(self, source: SparkFFN, masks: Masks, formats: Formats):
        self.config, self.dtype, self.masked = source.config, source.dtype, frozenset(masks.names)
        predictor, axes = formats.predictor or formats.weights, ("predictor", "ffn")
        self.k1_map = ChannelMap(source.k1_RF[...], "gate" in self.masked, predictor, source.dtype, axes)
        self.k2 = Rows(source.k2_DF[...].T, formats.weights, source.dtype, NEURON_AXES)
        self.v = Rows(source.v_FD[...], formats.weights, source.dtype, NEURON_AXES)

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.v.restored()

    def weight(self, name: str) -> jax.Array:
        """The matrix of one map, in the activations' dtype."""
        if name == "gate":
            return self.k1_map.restored()
        return self.k2.restored().T if name == "up" else self.v.restored()

    def restore(self, source: SparkFFN) -> None:
        """Put the weights back into `source`."""
        for name, path in source.matrices.items():
            assign(getattr(source, path), self.weight(name))

    def read(self, density: float, left: Left) -> float:
        """Bytes of weights that one token reads with this share of the neurons selected."""
        neurons = min(density, left(NEURONS)) if NEURONS in self.masked else density
        down = min(neurons, left("down")) if "down" in self.masked else neurons
        gate = left("gate") if "gate" in self.masked else 1
        return gate * self.k1_map.rows.nbytes + neurons * self.k2.nbytes + down * self.v.nbytes

    def mapped(self, name: str, x: jax.Array, gate_BTF: jax.Array | None = None) -> jax.Array:
        """What one map makes of its input; of neurons whose gate is 0 it may make anything that is finite."""
        if name == "gate":
            return self.k1_map(x)
        few = few_tokens(x)
        if name == "down":
            y = None if few is None else active_rows(few, *self.v.arrays)
            return self.v.combination(x) if y is None else y.reshape(*x.shape[:2], -1)
        if few is None or gate_BTF is None:
            return self.k2.product(x)

        def of_rows(x: jax.Array, gate_BTF: jax.Array) -> jax.Array:
            # The neurons are one expert's, of whose outputs the selected ones are needed.
            rows_FD, scale_F = self.k2.arrays
            of_one = rows_FD[None], None if scale_F is None else scale_F[None]
            first = jnp.zeros(len(few), jnp.int32)
            return expert_products(flat(x), first, flat(gate_BTF), *of_one, implementation="native").reshape(
                gate_BTF.shape
            )

        implementations = [plain(lambda x, _: self.k2.product(x)), native_cpu(of_rows, native_refusal(x=x))]
        return dispatch("experts", None, implementations)(x, gate_BTF)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        return self.by_maps(x_BTD, ctx)


Inner = MaskedGatedFFN | MaskedPlainFFN | ThresholdedFFN | MaskedSparkFFN
Mixture = MaskedMoEFFN | MaskedBlockFFN | MaskedMoEXFFN | MaskedDECOFFN


class PackedSparsifiedFFN(FFN, DecodingLayout):
    """`SparsifiedFFN` laid out for decoding."""

    def __init__(self, source: SparsifiedFFN, inner: Inner | Mixture, form: WeightFormat):
        self.config, self.masks, self.bypass, self.inner = source.config, source.masks, source.bypass, inner
        of = source.config.of
        self.norms = norms_of(source.masks, expert_matrices(source.inner, of), of.expert_maps)
        self.rotation = rotation_of(source, form)

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
    if type(inner) is SparkFFN:
        return PackedSparsifiedFFN(source, MaskedSparkFFN(inner, masks, formats), form)
    mixture = masked_mixture(inner, masks.names, formats)
    return None if mixture is None else PackedSparsifiedFFN(source, mixture, form)
