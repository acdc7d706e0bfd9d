"""Feed-forward networks laid out for decoding: neurons by rows.

A few tokens read the weights of active neurons or experts only; a prompt goes through the training form on the same
weights, without losses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.matrices import Rows, WeightFormat
from sparsezoo_jax.models.blockffn import BlockFFN
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import EXACT_ZERO_ACTIVATIONS, CallContext, LayerAux, activation_fn
from sparsezoo_jax.models.ffn import GatedFFN
from sparsezoo_jax.models.spark import SparkFFN
from sparsezoo_jax.pallas_kernels.block_ffn import block_ffn
from sparsezoo_jax.pallas_kernels.block_ffn.rows import block_ffn_rows
from sparsezoo_jax.pallas_kernels.gated_ffn import gated_ffn_rows
from sparsezoo_jax.pallas_kernels.rows import MOST_ROWS
from sparsezoo_jax.pallas_kernels.spark_ffn import spark_ffn
from sparsezoo_jax.pallas_kernels.spark_ffn.rows import spark_ffn_rows


def tokens_of(x_BTD: jax.Array) -> jax.Array | None:
    """The tokens as rows [M, D], or None where they are too many for the forms that read active weights only."""
    rows = x_BTD.reshape(-1, x_BTD.shape[-1])
    return rows if len(rows) <= MOST_ROWS else None


class PackedGatedFFN(nnx.Module):
    """`GatedFFN` with every neuron's weights as rows; for layers without biases that compute every neuron."""

    def __init__(self, source: GatedFFN, form: WeightFormat):
        self.activation = source.config.activation
        self.gate = Rows(source.gate_DF[...].T, form, source.dtype)
        self.up = Rows(source.up_DF[...].T, form, source.dtype)
        self.down = Rows(source.down_FD[...], form, source.dtype)

    @staticmethod
    def takes(source: GatedFFN) -> bool:
        """Whether this can stand in for `source`."""
        config = source.config
        sparse = any(config.activation_sparsity_pattern) or config.activation in EXACT_ZERO_ACTIVATIONS
        return not config.bias and not sparse

    def restore(self, source: GatedFFN) -> None:
        """Put the weights back into `source`."""
        source.gate_DF[...], source.up_DF[...] = self.gate.restored().T, self.up.restored().T
        source.down_FD[...] = self.down.restored()

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        aux, rows = LayerAux(stats={"ffn_density": jnp.float32(1)}), tokens_of(x_BTD)
        if rows is not None:
            (gate, g), (up, u), (down, d) = self.gate.arrays, self.up.arrays, self.down.arrays
            y = gated_ffn_rows(rows, gate, up, down, activation=self.activation, scales=(g, u, d))
            return y.reshape(x_BTD.shape), aux
        hidden = activation_fn(self.activation)(self.gate.product(x_BTD)) * self.up.product(x_BTD)
        return hidden @ self.down.restored(), aux


class PackedSparkFFN(nnx.Module):
    """`SparkFFN` with the predictor's rows [F, r], and the rest of each neuron, of K2 and of V, as one row."""

    def __init__(self, source: SparkFFN, form: WeightFormat, predictor: WeightFormat):
        self.config = source.config
        self.k1 = Rows(source.k1_RF[...].T, predictor, source.dtype)
        self.rest = Rows((source.k2_DF[...].T, source.v_FD[...]), form, source.dtype)

    @staticmethod
    def takes(source: SparkFFN) -> bool:
        """Whether this can stand in for `source`: if it selects by the statistical rule."""
        return source.config.selection == "statistical"

    def restore(self, source: SparkFFN) -> None:
        """Put the weights back into `source`."""
        k2_FD, v_FD = self.rest.parts()
        source.k1_RF[...], source.k2_DF[...], source.v_FD[...] = self.k1.restored().T, k2_FD.T, v_FD

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        config, rows = self.config, tokens_of(x_BTD)
        rule = {"top_k": config.top_k, "ddof": config.ddof, "huber_delta": config.huber_delta}
        if rows is not None:
            (k1, s1), (rest, s2) = self.k1.arrays, self.rest.arrays
            y, active_M = spark_ffn_rows(rows, k1, rest, scales=(s1, s2), **rule)
            density_BT = active_M.reshape(x_BTD.shape[:2]) / config.d_ff
        else:
            k2_FD, v_FD = self.rest.parts()
            y, gate = spark_ffn(x_BTD, self.k1.restored().T, k2_FD.T, v_FD, return_gate=True, **rule)
            density_BT = jnp.mean(gate != 0, axis=-1, dtype=jnp.float32)
        return y.reshape(x_BTD.shape), LayerAux(stats={"ffn_density": ctx.mean_over_tokens(density_BT)})


class PackedBlockFFN(nnx.Module):
    """`BlockFFN` with experts [E, W, D]; router and scales stay as they are."""

    def __init__(self, source: BlockFFN, form: WeightFormat):
        self.config, experts, d = source.config, source.config.experts, source.up_DF.shape[0]

        def by_expert(rows_FD: jax.Array) -> Rows:
            return Rows(rows_FD.reshape(experts, -1, d), form, source.dtype)

        self.up, self.down = by_expert(source.up_DF[...].T), by_expert(source.down_FD[...])
        self.gate = None if source.gate_DF is None else by_expert(source.gate_DF[...].T)
        # Of the layer itself only the router is needed, which is not split by expert.
        graphdef, state = nnx.split(source)
        self.router = nnx.merge(graphdef, state)
        for name in ("up_DF", "down_FD", "gate_DF"):
            setattr(self.router, name, None)

    def restore(self, source: BlockFFN) -> None:
        """Put the weights back into `source`."""
        for name, rows in (("up_DF", self.up), ("gate_DF", self.gate)):
            if rows is not None:
                weight = rows.restored()
                getattr(source, name)[...] = weight.reshape(-1, weight.shape[-1]).T
        source.down_FD[...] = self.down.restored().reshape(source.down_FD.shape)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        _, _, scores_BTE = self.router.route(x_BTD)
        aux, rows = LayerAux(stats=activation_stats(scores_BTE != 0, ctx)), tokens_of(x_BTD)
        gate, g = (None, None) if self.gate is None else self.gate.arrays
        if rows is not None:
            (up, u), (down, d) = self.up.arrays, self.down.arrays
            scores_ME = scores_BTE.reshape(len(rows), -1)
            return block_ffn_rows(rows, scores_ME, up, down, gate, scales=(u, d, g)).reshape(x_BTD.shape), aux

        def neurons(rows: Rows) -> jax.Array:
            weight = rows.restored()
            return weight.reshape(-1, weight.shape[-1])

        gate_DF = None if self.gate is None else neurons(self.gate).T
        width = self.config.expert_width
        y = block_ffn(x_BTD, scores_BTE, neurons(self.up).T, neurons(self.down), gate_DF, expert_width=width)
        return y, aux
