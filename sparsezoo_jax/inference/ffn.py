"""Feed-forward networks laid out for decoding: neurons by rows.

A few tokens read the weights of active neurons only. A prompt's go through products of all weights; of layers with few
active neurons the maps behind the gate meet each token by its own rows (`token_rows`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import (
    InputMap,
    OutputMap,
    Rows,
    WeightFormat,
    assign,
    few_tokens,
    flat,
    many_sequences,
)
from sparsezoo_jax.models.common import EXACT_ZERO_ACTIVATIONS, CallContext, LayerAux, activation_fn
from sparsezoo_jax.models.contract import FFN
from sparsezoo_jax.models.ffn import GatedFFN, PlainFFN, density
from sparsezoo_jax.models.spark import SparkFFN
from sparsezoo_jax.models.sparselm import SparseLMFFN
from sparsezoo_jax.models.width import Width
from sparsezoo_jax.pallas_kernels.active_rows import active_rows
from sparsezoo_jax.pallas_kernels.gated_ffn import gated_ffn_rows
from sparsezoo_jax.pallas_kernels.relu_ffn.rows import relu_ffn_rows
from sparsezoo_jax.pallas_kernels.spark_ffn import select_neurons
from sparsezoo_jax.pallas_kernels.spark_ffn.rows import spark_ffn_rows
from sparsezoo_jax.pallas_kernels.token_rows import token_rows

#: Logical axes of weights by rows of neurons.
NEURONS = ("ffn", "embed")


class PackedGatedFFN(FFN, DecodingLayout):
    """`GatedFFN` with every neuron's weights as rows; for layers without biases that compute every neuron."""

    def __init__(self, source: GatedFFN, form: WeightFormat):
        self.activation = source.config.activation
        self.gate = Rows(source.gate_DF[...].T, form, source.dtype, NEURONS)
        self.up = Rows(source.up_DF[...].T, form, source.dtype, NEURONS)
        self.down = Rows(source.down_FD[...], form, source.dtype, NEURONS)

    def restore(self, source: GatedFFN) -> None:
        """Put the weights back into `source`."""
        assign(source.gate_DF, self.gate.restored().T)
        assign(source.up_DF, self.up.restored().T)
        assign(source.down_FD, self.down.restored())

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever share of the neurons is active: all of them."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        aux, rows = LayerAux(stats={"ffn_density": jnp.float32(1)}), few_tokens(x_BTD)
        if rows is not None and not many_sequences(x_BTD):
            (gate, g), (up, u), (down, d) = self.gate.arrays, self.up.arrays, self.down.arrays
            y = gated_ffn_rows(rows, gate, up, down, activation=self.activation, scales=(g, u, d))
            return y.reshape(x_BTD.shape), aux
        hidden = activation_fn(self.activation)(self.gate.product(x_BTD)) * self.up.product(x_BTD)
        return self.down.combination(hidden), aux


class MappedGatedFFN(GatedFFN, DecodingLayout):
    """`GatedFFN` of any form, with gate and up maps as one matrix; `active` as in `StreamMap`."""

    def __init__(self, source: GatedFFN, form: WeightFormat, active: float | None):
        self.config, self.dtype, self.summed_layers = source.config, source.dtype, source.summed_layers
        self.gate_bias, self.up_bias, self.down_bias = source.gate_bias, source.up_bias, source.down_bias
        inner_DF = jnp.concatenate([source.gate_DF[...], source.up_DF[...]], axis=-1)
        self.inner_map = InputMap(inner_DF, active, form, source.dtype, "ffn")
        self.output_map = OutputMap(source.down_FD[...], active, form, source.dtype, "ffn")

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.output_map.restored()

    def restore(self, source: GatedFFN) -> None:
        """Put the weights back into `source`."""
        gate_DF, up_DF = jnp.split(self.inner_map.restored(), 2, axis=-1)
        assign(source.gate_DF, gate_DF)
        assign(source.up_DF, up_DF)
        assign(source.down_FD, self.output_map.restored())

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever share of the neurons is active."""
        return _mapped_bytes(self.inner_map, self.output_map, self.gate_bias, self.up_bias, self.down_bias)

    def gate_and_up(self, x_BTD: jax.Array, stream: Width) -> tuple[jax.Array, jax.Array]:
        """Gates before their non-linearity, and what they multiply: [B, T, F] each."""
        gate, up = jnp.split(self.inner_map(x_BTD, stream), 2, axis=-1)
        return _biased(gate, self.gate_bias), _biased(up, self.up_bias)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return _biased(self.output_map(hidden_BTF, stream), self.down_bias)


class MappedPlainFFN(PlainFFN, DecodingLayout):
    """`PlainFFN` of any form, with weights by rows; `active` as in `StreamMap`."""

    def __init__(self, source: PlainFFN, form: WeightFormat, active: float | None):
        self.config, self.dtype = source.config, source.dtype
        self.up_bias, self.down_bias = source.up_bias, source.down_bias
        self.inner_map = InputMap(source.up_DF[...], active, form, source.dtype, "ffn")
        self.output_map = OutputMap(source.down_FD[...], active, form, source.dtype, "ffn")

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.output_map.restored()

    def restore(self, source: PlainFFN) -> None:
        """Put the weights back into `source`."""
        assign(source.up_DF, self.inner_map.restored())
        assign(source.down_FD, self.output_map.restored())

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever share of the neurons is active."""
        return _mapped_bytes(self.inner_map, self.output_map, self.up_bias, self.down_bias)

    def scores(self, x_BTD: jax.Array, stream: Width) -> jax.Array:
        """Neurons before their non-linearity, [B, T, F]."""
        return _biased(self.inner_map(x_BTD, stream), self.up_bias)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return _biased(self.output_map(hidden_BTF, stream), self.down_bias)


class PackedPlainFFN(PlainFFN, DecodingLayout):
    """`PlainFFN` whose units may be 0, by rows of neurons; of the second map a few tokens read those of other units."""

    def __init__(self, source: PlainFFN, form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        self.up_bias, self.down_bias = source.up_bias, source.down_bias
        self.up = Rows(source.up_DF[...].T, form, source.dtype, NEURONS)
        self.down = Rows(source.down_FD[...], form, source.dtype, NEURONS)

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down.restored()

    def restore(self, source: PlainFFN) -> None:
        """Put the weights back into `source`."""
        assign(source.up_DF, self.up.restored().T)
        assign(source.down_FD, self.down.restored())

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the neurons active."""
        biases = sum(bias[...].nbytes for bias in (self.up_bias, self.down_bias) if bias is not None)
        return self.up.nbytes + density * self.down.nbytes + biases

    def scores(self, x_BTD: jax.Array, stream: Width) -> jax.Array:
        """Neurons before their non-linearity, [B, T, F]."""
        return _biased(self.up.product(x_BTD), self.up_bias)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        rows = few_tokens(hidden_BTF)
        if rows is None:
            y_BTD = token_rows(None, flat(hidden_BTF), *self.down.arrays).reshape(*hidden_BTF.shape[:2], -1)
        else:
            y_BTD = active_rows(rows, *self.down.arrays).reshape(*hidden_BTF.shape[:2], -1)
        return _biased(y_BTD, self.down_bias)


def _biased(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return y if bias is None else y + bias[...].astype(y.dtype)


def _mapped_bytes(inner: InputMap, output: OutputMap, *biases: nnx.Param | None) -> float:
    return inner.bytes_read + output.bytes_read + sum(bias[...].nbytes for bias in biases if bias is not None)


class PackedSparkFFN(FFN, DecodingLayout):
    """`SparkFFN` with the predictor's rows [F, r], and the rest of each neuron, of K2 and of V, as one row."""

    def __init__(self, source: SparkFFN, form: WeightFormat, predictor: WeightFormat):
        self.config = source.config
        self.k1 = Rows(source.k1_RF[...].T, predictor, source.dtype, ("ffn", "predictor"))
        self.rest = Rows((source.k2_DF[...].T, source.v_FD[...]), form, source.dtype, NEURONS)

    def restore(self, source: SparkFFN) -> None:
        """Put the weights back into `source`."""
        k2_FD, v_FD = self.rest.parts()
        assign(source.k1_RF, self.k1.restored().T)
        assign(source.k2_DF, k2_FD.T)
        assign(source.v_FD, v_FD)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the neurons active."""
        return self.k1.nbytes + density * self.rest.nbytes

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        config, rows = self.config, few_tokens(x_BTD)
        rule = {"top_k": config.top_k, "ddof": config.ddof, "huber_delta": config.huber_delta}
        if rows is not None:
            (k1, s1), (rest, s2) = self.k1.arrays, self.rest.arrays
            y, active_M = spark_ffn_rows(rows, k1, rest, scales=(s1, s2), **rule)
            density_BT = active_M.reshape(x_BTD.shape[:2]) / config.d_ff
        else:
            r = self.k1.first
            scores_BTF = self.k1.product(x_BTD[..., :r])
            gate = jax.nn.gelu(select_neurons(scores_BTF, rule.pop("top_k"), **rule), approximate=True)
            share = config.top_k / config.d_ff
            y = token_rows(flat(x_BTD[..., r:]), flat(gate), *self.rest.arrays, density=share)
            density_BT = jnp.mean(gate != 0, axis=-1, dtype=jnp.float32)
        return y.reshape(x_BTD.shape), LayerAux(stats={"ffn_density": ctx.mean_over_tokens(density_BT)})


class PackedSparseLMFFN(FFN, DecodingLayout):
    """`SparseLMFFN` with the rows of the map before the ReLU, and the rest of each neuron as one row."""

    def __init__(self, source: SparseLMFFN, form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        gate, up, down = source.gate_DF, source.up_DF, source.down_FD
        first = up if gate is None else gate
        self.first = Rows(first[...].T, form, source.dtype, NEURONS)
        rest = down[...] if gate is None else (up[...].T, down[...])
        self.rest = Rows(rest, form, source.dtype, NEURONS)

    def restore(self, source: SparseLMFFN) -> None:
        """Put the weights back into `source`."""
        first_DF = self.first.restored().T
        if source.gate_DF is None:
            assign(source.up_DF, first_DF)
            assign(source.down_FD, self.rest.restored())
            return
        up_FD, down_FD = self.rest.parts()
        assign(source.gate_DF, first_DF)
        assign(source.up_DF, up_FD.T)
        assign(source.down_FD, down_FD)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the neurons active."""
        return self.first.nbytes + density * self.rest.nbytes

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        rows = few_tokens(x_BTD)
        if rows is not None:
            (first, s1), (rest, s2) = self.first.arrays, self.rest.arrays
            y, active_M = relu_ffn_rows(rows, first, rest, scales=(s1, s2))
            active_BT = active_M.reshape(x_BTD.shape[:2])
        else:
            gate = jax.nn.relu(self.first.product(x_BTD))
            y = token_rows(flat(x_BTD) if self.config.gated else None, flat(gate), *self.rest.arrays)
            active_BT = jnp.sum(gate != 0, axis=-1, dtype=jnp.float32)
        density = ctx.mean_over_tokens(active_BT) / self.config.d_ff
        return y.reshape(x_BTD.shape), LayerAux(stats={"ffn_density": density})


class PackedReGLUFFN(GatedFFN, DecodingLayout):
    """`GatedFFN` whose gate is a ReLU, with its threshold: rows of the gate, and the rest of each neuron as one row."""

    def __init__(self, source: GatedFFN, form: WeightFormat):
        self.config, self.dtype, self.summed_layers = source.config, source.dtype, source.summed_layers
        self.gate = Rows(source.gate_DF[...].T, form, source.dtype, NEURONS)
        self.rest = Rows((source.up_DF[...].T, source.down_FD[...]), form, source.dtype, NEURONS)

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

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the neurons active."""
        return self.gate.nbytes + density * self.rest.nbytes

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        rows, threshold = few_tokens(x_BTD), self.config.threshold
        if ctx.record:
            return super().__call__(x_BTD, ctx)
        if rows is None:
            gate = jax.nn.relu(self.gate.product(x_BTD))
            gate = jnp.where(gate >= threshold, gate, 0)
            y = token_rows(flat(x_BTD), flat(gate), *self.rest.arrays)
            return y.reshape(x_BTD.shape), LayerAux(stats={"ffn_density": density(gate, ctx)})
        (gate, s1), (rest, s2) = self.gate.arrays, self.rest.arrays
        y, active_M = relu_ffn_rows(rows, gate, rest, scales=(s1, s2), threshold=threshold)
        share = ctx.mean_over_tokens(active_M.reshape(x_BTD.shape[:2])) / self.config.d_ff
        return y.reshape(x_BTD.shape), LayerAux(stats={"ffn_density": share})

    def gate_and_up(self, x_BTD: jax.Array, stream: Width) -> tuple[jax.Array, jax.Array]:
        """Gates before their non-linearity, and what they multiply: [B, T, F] each."""
        return self.gate.product(x_BTD), self.rest.first_product(x_BTD)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return self.rest.second_combination(hidden_BTF)


@packs(GatedFFN)
def _gated(
    source: GatedFFN, formats: Formats, active: float | None
) -> PackedGatedFFN | PackedReGLUFFN | MappedGatedFFN:
    config = source.config
    plain = active is None and not config.bias and config.up_activation is None
    if plain and config.activation == "relu" and not config.activation_sparsity_pattern:
        return PackedReGLUFFN(source, formats.weights)
    sparse = any(config.activation_sparsity_pattern) or config.activation in EXACT_ZERO_ACTIVATIONS
    if plain and not sparse:
        return PackedGatedFFN(source, formats.weights)
    return MappedGatedFFN(source, formats.weights, active)


@packs(PlainFFN)
def _plain(source: PlainFFN, formats: Formats, active: float | None) -> PackedPlainFFN | MappedPlainFFN:
    if active is None and source.config.activation in EXACT_ZERO_ACTIVATIONS:
        return PackedPlainFFN(source, formats.weights)
    return MappedPlainFFN(source, formats.weights, active)


@packs(SparseLMFFN)
def _sparselm(source: SparseLMFFN, formats: Formats, active: float | None) -> PackedSparseLMFFN:
    return PackedSparseLMFFN(source, formats.weights)


@packs(SparkFFN)
def _spark(source: SparkFFN, formats: Formats, active: float | None) -> PackedSparkFFN | None:
    # The rows of other selection rules (sorted, positive, all) are known only when all scores are.
    if source.config.selection != "statistical":
        return None
    return PackedSparkFFN(source, formats.weights, formats.predictor or formats.weights)
