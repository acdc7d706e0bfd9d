"""Mixtures of experts laid out for decoding: experts [E, W, D], neurons by rows.

A few tokens read the experts that they take only, and so does a prompt on a CPU where they are few; elsewhere it goes
through the training form on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.ffn import PackedGatedFFN
from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import Packed, Rows, WeightFormat, assign, few_tokens, flat
from sparsezoo_jax.models.blockffn import BlockFFN
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import CallContext, LayerAux
from sparsezoo_jax.models.deco import DECOFFN, statistics
from sparsezoo_jax.models.moe import Maps, MoEFFN
from sparsezoo_jax.models.moex import MoEXFFN
from sparsezoo_jax.models.readme import ReadMEFFN
from sparsezoo_jax.models.routers import Routing
from sparsezoo_jax.pallas_kernels.block_ffn import block_ffn
from sparsezoo_jax.pallas_kernels.block_ffn.rows import block_ffn_rows
from sparsezoo_jax.pallas_kernels.deco_ffn import deco_ffn
from sparsezoo_jax.pallas_kernels.deco_ffn.rows import deco_ffn_rows
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.linear import linear
from sparsezoo_jax.pallas_kernels.rows import dequantised, native_refusal

#: Logical axes of experts' weights, rows of neurons.
EXPERTS = ("experts", "ffn", "embed")


class PackedBlockFFN(BlockFFN, DecodingLayout):
    """`BlockFFN` without losses; router and scales stay as they are."""

    def __init__(self, source: BlockFFN, form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        self.router_DE, self.router_norm = source.router_DE, source.router_norm
        experts, d = source.config.experts, source.up_DF.shape[0]

        def by_expert(rows_FD: jax.Array) -> Rows:
            return Rows(rows_FD.reshape(experts, -1, d), form, source.dtype, EXPERTS)

        self.up, self.down = by_expert(source.up_DF[...].T), by_expert(source.down_FD[...])
        self.gate = None if source.gate_DF is None else by_expert(source.gate_DF[...].T)

    def restore(self, source: BlockFFN) -> None:
        """Put the weights back into `source`."""
        assign(source.up_DF, _neurons(self.up).T)
        assign(source.down_FD, _neurons(self.down))
        if self.gate is not None and source.gate_DF is not None:
            assign(source.gate_DF, _neurons(self.gate).T)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the experts active."""
        experts = self.up.nbytes + self.down.nbytes + (0 if self.gate is None else self.gate.nbytes)
        scale = 0 if self.router_norm is None else self.router_norm.scale[...].nbytes
        return self.router_DE[...].nbytes + scale + density * experts

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        _, _, scores_BTE = self.route(x_BTD)
        aux = LayerAux(stats=activation_stats(scores_BTE != 0, ctx))
        # Padding behind a chunk of drafts, or of rows that have ended, needs no experts.
        scores_BTE = jnp.where(ctx.valid_BT[..., None], scores_BTE, 0)

        def of_tokens(x_BTD: jax.Array, scores_BTE: jax.Array, implementation: str | None = None) -> jax.Array:
            (up, u), (down, d) = self.up.arrays, self.down.arrays
            gate, g = (None, None) if self.gate is None else self.gate.arrays
            form: Any = {"scales": (u, d, g), "implementation": implementation}
            return block_ffn_rows(flat(x_BTD), flat(scores_BTE), up, down, gate, **form).reshape(x_BTD.shape)

        def whole(x_BTD: jax.Array, scores_BTE: jax.Array) -> jax.Array:
            gate_DF = None if self.gate is None else _neurons(self.gate).T
            width = self.config.expert_width
            return block_ffn(x_BTD, scores_BTE, _neurons(self.up).T, _neurons(self.down), gate_DF, expert_width=width)

        if few_tokens(x_BTD, self.config.experts) is not None:
            return of_tokens(x_BTD, scores_BTE), aux
        return of_prompt(whole, partial(of_tokens, implementation="native"), x_BTD, scores_BTE), aux


class PackedMoEFFN(MoEFFN, DecodingLayout):
    """`MoEFFN` with the shared experts in front of the others, of weight 1; the router stays as it is."""

    def __init__(self, source: MoEFFN, form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        self.router_DE, self.bias_E = source.router_DE, source.bias_E

        def by_expert(routed: nnx.Param, shared: nnx.Param | None, columns: bool) -> Rows:
            rows_EWD = routed[...].swapaxes(1, 2) if columns else routed[...]
            if shared is not None:
                rows_FD = shared[...].T if columns else shared[...]
                rows_EWD = jnp.concatenate([rows_FD.reshape(-1, *rows_EWD.shape[1:]), rows_EWD])
            return Rows(rows_EWD, form, source.dtype, EXPERTS)

        self.up = by_expert(source.up_EDW, source.shared_up_DF, True)
        self.down = by_expert(source.down_EWD, source.shared_down_FD, False)
        self.gate = None if source.gate_EDW is None else by_expert(source.gate_EDW, source.shared_gate_DF, True)

    def restore(self, source: MoEFFN) -> None:
        """Put the weights back into `source`."""
        routed, shared = self._weights()
        into = (source.up_EDW, source.down_EWD, source.gate_EDW)
        into_shared = (source.shared_up_DF, source.shared_down_FD, source.shared_gate_DF)
        for param, value in zip((*into, *into_shared), (*routed, *shared), strict=True):
            if param is not None and value is not None:
                assign(param, value)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the experts active."""
        experts = self.up.nbytes + self.down.nbytes + (0 if self.gate is None else self.gate.nbytes)
        return self.router_DE[...].nbytes + density * experts

    def mixed(self, x_BTD: jax.Array, routing: Routing, ctx: CallContext) -> jax.Array:
        """The weighted sum of each token's experts, shared ones included."""
        del ctx  # every map reads all channels

        def of_tokens(x_BTD: jax.Array, weights_BTE: jax.Array, implementation: str | None = None) -> jax.Array:
            (up, u), (down, d) = self.up.arrays, self.down.arrays
            gate, g = (None, None) if self.gate is None else self.gate.arrays
            form: Any = {"activation": self.config.activation, "scales": (u, d, g), "implementation": implementation}
            return block_ffn_rows(flat(x_BTD), flat(weights_BTE), up, down, gate, **form).reshape(x_BTD.shape)

        def whole(x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
            del weights_BTE  # `routing` has them
            routed, shared = self._weights()
            y_BTD, _ = self.routed_experts(x_BTD, routing, routed)
            return y_BTD + self.shared_expert(x_BTD, shared) if self.config.shared else y_BTD

        weights_BTE = self.with_shared(routing.weights_BTE)
        if few_tokens(x_BTD, self.config.experts) is not None:
            return of_tokens(x_BTD, weights_BTE)
        return of_prompt(whole, partial(of_tokens, implementation="native"), x_BTD, weights_BTE)

    def _weights(self) -> tuple[Maps, Maps]:
        """The maps of the routed experts, and of the shared ones, as `MoEFFN` has them."""
        count = self.config.shared

        def split(rows: Rows) -> tuple[jax.Array, jax.Array]:
            rows_EWD = rows.restored()
            return rows_EWD[count:], rows_EWD[:count].reshape(-1, rows_EWD.shape[-1])

        (up_EWD, up_FD), (down_EWD, down_FD) = split(self.up), split(self.down)
        gate_EDW, gate_DF = None, None
        if self.gate is not None:
            gate_EWD, gate_FD = split(self.gate)
            gate_EDW, gate_DF = gate_EWD.swapaxes(1, 2), gate_FD.T
        return (up_EWD.swapaxes(1, 2), down_EWD, gate_EDW), (up_FD.T, down_FD, gate_DF)


class PackedMoEXFFN(MoEXFFN, DecodingLayout):
    """`MoEXFFN`, the gate's statistics kept; of a token's experts the second map is read for active neurons only."""

    def __init__(self, source: MoEXFFN, form: WeightFormat):
        self.config, self.dtype, self.router_DE = source.config, source.dtype, source.router_DE
        self.mean_ED, self.variance_ED = source.mean_ED, source.variance_ED
        self.up = Rows(source.up_EDW[...].swapaxes(1, 2), form, source.dtype, EXPERTS)
        self.down = Rows(source.down_EWD[...], form, source.dtype, EXPERTS)

    def restore(self, source: MoEXFFN) -> None:
        """Put the weights back into `source`."""
        up_EDW, down_EWD = self.weights()
        assign(source.up_EDW, up_EDW)
        assign(source.down_EWD, down_EWD)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of all neurons active."""
        gate = (self.router_DE, self.mean_ED, self.variance_ED)
        chosen = self.config.k / self.config.experts * self.up.nbytes
        return sum(w[...].nbytes for w in gate if w is not None) + chosen + density * self.down.nbytes

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Both maps of all experts, [E, D, W] and [E, W, D], in the activations' dtype."""
        return self.up.restored().swapaxes(1, 2), self.down.restored()

    def mixed(self, x_BTD: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of each token's experts, and the number of their hidden units that are not 0 [B, T]."""

        def of_tokens(x_BTD: jax.Array, weights_BTE: jax.Array, implementation: str | None = None) -> Any:
            (up, u), (down, d) = self.up.arrays, self.down.arrays
            form: Any = {"activation": self.config.activation, "scales": (u, d, None), "return_active": True}
            y, active_M = block_ffn_rows(
                flat(x_BTD), flat(weights_BTE), up, down, implementation=implementation, **form
            )
            return y.reshape(x_BTD.shape), active_M.reshape(x_BTD.shape[:2])

        def whole(x_BTD: jax.Array, weights_BTE: jax.Array) -> Any:
            del weights_BTE  # `routing` has them
            y_BTD, active_BT = MoEXFFN.mixed(self, x_BTD, routing)
            return y_BTD, active_BT.astype(jnp.int32)

        if few_tokens(x_BTD, self.config.experts) is not None:
            return of_tokens(x_BTD, routing.weights_BTE)
        return of_prompt(whole, partial(of_tokens, implementation="native"), x_BTD, routing.weights_BTE)


class PackedDECOFFN(DECOFFN, DecodingLayout):
    """`DECOFFN` without its loss: the mean over all units is a product with the mean of the rows, made once.

    A mesh splits the shared expert only: the routed ones of a device would be a part of what the mean is over.
    """

    def __init__(self, source: DECOFFN, formats: Formats):
        self.config, self.dtype = source.config, source.dtype
        self.router_scale_E, self.norm_scale_W = source.router_scale_E, source.norm_scale_W
        # Kept in the parameters' dtype: rounding it would change which experts are taken.
        self.router = Rows(source.router_DE[...].T, "model", source.router_DE.dtype, ("ffn", "embed"))
        self.up = Rows(source.expert_up_DF[...].T, formats.weights, source.dtype)
        self.down = Rows(source.expert_down_FD[...], formats.weights, source.dtype)
        # Of the rows as they are stored: rounded ones have another mean.
        self.mean_row_D = Packed(jnp.mean(dequantised(*self.up.arrays), axis=0), axes=(None,))
        self.shared = PackedGatedFFN(source.shared, formats.weights)

    def restore(self, source: DECOFFN) -> None:
        """Put the weights back into `source`."""
        self.restore_routed(source)
        self.shared.restore(source.shared)

    def restore_routed(self, source: DECOFFN) -> None:
        """Put those of the router and its experts back."""
        assign(source.router_DE, self.router.restored().T)
        assign(source.expert_up_DF, self.up.restored().T)
        assign(source.expert_down_FD, self.down.restored())

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of the routed experts active."""
        every = self.router.nbytes + self.router_scale_E[...].nbytes + self.shared.bytes_read()
        return every + density * (self.up.nbytes + self.down.nbytes)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Of the router, [B, T, E], float32."""
        rows, router_ED = x_BTD.reshape(-1, x_BTD.shape[-1]), self.router.arrays[0]
        exact = {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
        return linear(rows, router_ED, **exact).reshape(*x_BTD.shape[:2], -1)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        positive_BTE, scores_BTE = self.route(x_BTD)
        # Padding behind a chunk of drafts, or of rows that have ended, needs no experts.
        scores_BTE = jnp.where(ctx.valid_BT[..., None], scores_BTE, 0)

        def of_tokens(x_BTD: jax.Array, scores_BTE: jax.Array, implementation: str | None = None) -> jax.Array:
            (up, u), (down, d) = self.up.arrays, self.down.arrays
            form: Any = {"scales": (u, d), "implementation": implementation, **self.form()}
            y = deco_ffn_rows(flat(x_BTD), flat(scores_BTE), up, down, self.mean_row_D[...], **form)
            return y.reshape(x_BTD.shape)

        def whole(x_BTD: jax.Array, scores_BTE: jax.Array) -> jax.Array:
            return deco_ffn(x_BTD, scores_BTE, self.up.restored().T, self.down.restored(), **self.form())

        if few_tokens(x_BTD) is not None:
            y_BTD = of_tokens(x_BTD, scores_BTE)
        else:
            y_BTD = of_prompt(whole, partial(of_tokens, implementation="native"), x_BTD, scores_BTE)
        return y_BTD + self.shared(x_BTD, ctx)[0], LayerAux(stats=statistics(positive_BTE, ctx))


class PackedReadMEFFN(ReadMEFFN, DecodingLayout):
    """`ReadMEFFN` by rows of neurons; a few tokens read their own experts, and the shared neurons."""

    def __init__(self, source: ReadMEFFN, form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        self.gate = Rows(source.gate_EDW[...].swapaxes(1, 2), form, source.dtype, EXPERTS)
        self.up = Rows(source.up_EDW[...].swapaxes(1, 2), form, source.dtype, EXPERTS)
        self.down = Rows(source.down_EWD[...], form, source.dtype, EXPERTS)
        self.shared: Any = None if source.shared is None else PackedGatedFFN(source.shared, form)

    def restore(self, source: ReadMEFFN) -> None:
        """Put the weights back into `source`."""
        assign(source.gate_EDW, self.gate.restored().swapaxes(1, 2))
        assign(source.up_EDW, self.up.restored().swapaxes(1, 2))
        assign(source.down_EWD, self.down.restored())
        if self.shared is not None:
            self.shared.restore(source.shared)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads with this share of all neurons, shared ones included, active."""
        shared = 0 if self.shared is None else self.shared.bytes_read()
        return density * (self.gate.nbytes + self.up.nbytes + self.down.nbytes + shared)

    def mixed(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """What each token's expert makes of it, [B, T, D]."""

        def of_tokens(x_BTD: jax.Array, weights_BTE: jax.Array, implementation: str | None = None) -> jax.Array:
            (gate, g), (up, u), (down, d) = self.gate.arrays, self.up.arrays, self.down.arrays
            form: Any = {"activation": self.config.activation, "scales": (u, d, g), "implementation": implementation}
            return block_ffn_rows(flat(x_BTD), flat(weights_BTE), up, down, gate, **form).reshape(x_BTD.shape)

        def whole(x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
            del weights_BTE  # `routing` has them
            up_EDW, gate_EDW = (rows.restored().swapaxes(1, 2) for rows in (self.up, self.gate))
            return self.product(x_BTD, routing, up_EDW, self.down.restored(), gate_EDW)

        if few_tokens(x_BTD, self.config.experts) is not None:
            return of_tokens(x_BTD, routing.weights_BTE)
        return of_prompt(whole, partial(of_tokens, implementation="native"), x_BTD, routing.weights_BTE)


#: Share of a token's experts up to which a prompt is read by expert on a CPU: both forms take the same time at 0.7.
MOST_EXPERTS = 0.5


def of_prompt(
    whole: Callable[[jax.Array, jax.Array], Any],
    by_expert: Callable[[jax.Array, jax.Array], Any],
    x_BTD: jax.Array,
    weights_BTE: jax.Array,
) -> Any:
    """What experts make of many tokens: `by_expert`, natively, on a CPU where few weights are not 0; else `whole`.

    Each gets the tokens, and the weight of each expert for them.
    """

    def by_density(x_BTD: jax.Array, weights_BTE: jax.Array) -> Any:
        taken = jnp.sum(weights_BTE != 0, dtype=jnp.float32)
        return jax.lax.cond(taken <= MOST_EXPERTS * weights_BTE.size, by_expert, whole, x_BTD, weights_BTE)

    implementations = [plain(whole), native_cpu(by_density, native_refusal(x=x_BTD))]
    return dispatch("experts", None, implementations)(x_BTD, weights_BTE)


def _neurons(rows: Rows) -> jax.Array:
    """The rows of all experts, [F, D]."""
    weight = rows.restored()
    return weight.reshape(-1, weight.shape[-1])


@packs(BlockFFN)
def _block_ffn(source: BlockFFN, formats: Formats, active: float | None) -> PackedBlockFFN:
    return PackedBlockFFN(source, formats.weights)


@packs(DECOFFN)
def _deco(source: DECOFFN, formats: Formats, active: float | None) -> PackedDECOFFN:
    return PackedDECOFFN(source, formats)


@packs(MoEFFN)
def _moe(source: MoEFFN, formats: Formats, active: float | None) -> PackedMoEFFN:
    return PackedMoEFFN(source, formats.weights)


@packs(MoEXFFN)
def _moex(source: MoEXFFN, formats: Formats, active: float | None) -> PackedMoEXFFN:
    return PackedMoEXFFN(source, formats.weights)


@packs(ReadMEFFN)
def _readme(source: ReadMEFFN, formats: Formats, active: float | None) -> PackedReadMEFFN:
    return PackedReadMEFFN(source, formats.weights)
