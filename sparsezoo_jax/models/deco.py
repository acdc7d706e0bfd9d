"""DECO (arXiv 2605.10933): ReLU-routed experts of NormSiLU units beside a shared SwiGLU expert.

Any number of experts may be active for a token; the entropy of the router, whose weight a controller steers, brings
their share to a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.contract import FFN, FFNKind, MapSize, register_ffn
from sparsezoo_jax.models.experts import SHARED, Named, channels_of_matrices, network_maps
from sparsezoo_jax.models.ffn import GatedFFN, GatedFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES, FFN_GATE, FFN_HIDDEN
from sparsezoo_jax.models.width import WHOLE
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.deco_ffn import (
    NORMALISE,
    ExpertActivation,
    deco_ffn,
    hidden_units,
    scaled_hidden,
)
from sparsezoo_jax.pallas_kernels.grouped_ffn import Channels, Reads, of_tokens
from sparsezoo_jax.pallas_kernels.matmul import to_stream

ROUTER_ENTROPY = "router_entropy"
ROUTED_DENSITY = "routed_density"

ENTROPY_EPS = 1e-5
"""Added to the sum of a token's scores before dividing by it, and inside the logarithm."""


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DECOConfig(FFNKind):
    """`sum_e A_e W_down,e NormSiLU(W_up,e x)` with scores `A = g * ReLU(W_router x)`, and a shared SwiGLU expert.

    Scores are not normalised. NormSiLU removes the mean over the units of all experts, active or not, and normalises
    those of each expert by their RMS. Returns the auxiliary loss "router_entropy".
    """

    expert_maps: ClassVar[frozenset[str]] = frozenset({"up", "down"})

    kind: Literal["deco"] = "deco"
    experts: int
    """Routed experts."""
    expert_width: int = 64
    """Neurons of one routed expert (code: 64 in all sizes)."""
    shared_width: int = 128
    """Neurons of the shared SwiGLU expert, which every token takes with weight 1 (code: 128 in all sizes)."""
    expert_activation: ExpertActivation = "norm_silu"
    """norm_silu: as above. no_mean: without removing the mean. no_rms: removing it only. silu: neither, as BlockFFN."""
    scale_init: float = 0.1
    """Initial value of the learned factors g of the experts' scores (code)."""
    norm_eps: float = 1e-5
    """Added to the mean square inside NormSiLU."""
    expected_density: float = 0.2
    """Share of active routed experts that FLOPs and bytes assume where none was measured. What training aims at is the
    objective's `target`."""
    dense_twin_d_ff: int | None = None
    """Width of the SwiGLU layer of equal parameters; None: the nearest whole number."""

    def __post_init__(self):
        name = "model.ffn"
        for field in ("experts", "expert_width", "shared_width", "norm_eps"):
            require(getattr(self, field) > 0, f"{name}.{field}", getattr(self, field), "must be above 0")
        twin = self.dense_twin_d_ff
        require(twin is None or twin > 0, f"{name}.dense_twin_d_ff", twin, "must be above 0 or None")
        # A factor that starts at 0 gets its expert's maps no gradient, and they give it none.
        require(self.scale_init > 0, f"{name}.scale_init", self.scale_init, "must be above 0")
        require(0 < self.expected_density <= 1, f"{name}.expected_density", self.expected_density, "must be in (0, 1]")

    @property
    def d_ff(self) -> int:
        """Neurons of all routed experts."""
        return self.experts * self.expert_width

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` routed neurons (None: `expected_density` of them).

        Router, its factors and the shared expert included. NormSiLU's scale and the mean row that decoding keeps are
        not, as little as scales of norms.
        """
        active = self.expected_density * self.d_ff if active is None else active
        return d_model * self.experts + self.experts + 3 * d_model * self.shared_width + 2 * d_model * active

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token with `active` routed neurons (None: as in `weights`; a multiply-add counts 2)."""
        return 2 * (self.weights(d_model, active) - self.experts)

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The map from the routed experts' units, and those of the shared expert.

        Of the map to these units no channel can be left out by expert: the mean over all units is part of each.
        """
        active = self.expected_density * self.d_ff if active is None else active
        down = network_maps(d_model, self.expert_width, active, gated=False)["down"]
        return {"down": down, **network_maps(d_model, *(self.shared_width,) * 2, gated=True, prefix=SHARED)}

    def weight_maps(self, d_model: int) -> dict[str, int]:
        """All matrices but the router's."""
        return {"up": d_model, **channels_of_matrices(self.linear_maps(d_model))}

    def expert_axis(self, name: str) -> tuple[int, int]:
        """Experts lie along the axis of the neurons."""
        return (0 if name == "down" else 1), self.experts

    def dense_twin(self) -> GatedFFNConfig:
        """The SwiGLU layer of (nearly) equal parameters: vectors, and at most half a neuron, are missing."""
        matrices = 2 * self.d_ff + self.experts + 3 * self.shared_width
        width = round(matrices / 3) if self.dense_twin_d_ff is None else self.dense_twin_d_ff
        return GatedFFNConfig(d_ff=width, activation="silu")

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> DECOFFN:
        return DECOFFN(self, ctx, rngs)


class DECOFFN(FFN):
    """Feed-forward layer of ReLU-routed NormSiLU experts and a shared one; see `DECOConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {
        "up": "expert_up_DF",
        "down": "expert_down_FD",
        **{SHARED + name: f"shared/{path}" for name, path in GatedFFN.matrices.items()},
    }

    def __init__(self, config: DECOConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, e, f = ctx.d_model, config.experts, config.d_ff
        # Experts are split as their neurons are, which lie side by side: hence the names of the experts' axes.
        self.router_DE = ctx.weight(rngs, (d, e), ("embed", "ffn"), d)
        self.router_scale_E = ctx.constant(config.scale_init, (e,), ("ffn",))
        self.expert_up_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), d)
        # Not marked as an output: the depth of the decoder does not scale it.
        self.expert_down_FD = ctx.weight(rngs, (f, d), ("ffn", "embed"), f)
        normalises = config.expert_activation in NORMALISE
        self.norm_scale_W = ctx.constant(1.0, (config.expert_width,), (None,)) if normalises else None
        self.shared = GatedFFNConfig(d_ff=config.shared_width, activation="silu").build(ctx, rngs)
        # The loss is the layers' sum over the number of all layers, dense ones included; the decoder averages it over
        # those that have it.
        self.share_of_layers = (ctx.layers - ctx.first_layers) / ctx.layers

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit of the routed experts adds to the output when it is 1, [F, D]."""
        return self.expert_down_FD[...]

    def route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """ReLU of the router's logits, and that times the learned factors; [B, T, E] each, float32."""
        positive_BTE = jax.nn.relu(self.logits(x_BTD))
        return positive_BTE, positive_BTE * self.router_scale_E[...].astype(positive_BTE.dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Of the router, [B, T, E], float32."""
        wide = jnp.promote_types(jnp.float32, x_BTD.dtype)
        router_DE = self.router_DE[...].astype(wide)
        return product(jnp.matmul(x_BTD.astype(wide), router_DE, precision=jax.lax.Precision.HIGHEST))

    def form(self) -> dict[str, Any]:
        """What `deco_ffn` and `deco_ffn_rows` need beside maps and scores."""
        config = self.config
        scale_W = None if self.norm_scale_W is None else self.norm_scale_W[...]
        return {
            "scale": scale_W,
            "expert_width": config.expert_width,
            "eps": config.norm_eps,
            "activation": config.expert_activation,
        }

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        positive_BTE, scores_BTE = self.route(x_BTD)
        up_DF, down_FD = self.expert_up_DF[...].astype(self.dtype), self.expert_down_FD[...].astype(self.dtype)
        form = self.form()

        if ctx.width is WHOLE:
            hidden, y_BTD = None, deco_ffn(x_BTD, scores_BTE, up_DF, down_FD, **form)
        else:
            hidden = self._shown(x_BTD, scores_BTE, up_DF, ctx)
            y_BTD = to_stream(hidden, down_FD)

        def units() -> jax.Array:
            return scaled_hidden(x_BTD, scores_BTE, up_DF, **form)

        read = units if hidden is None else lambda: hidden
        records = {EXPERT_SCORES: lambda: scores_BTE, FFN_GATE: units, FFN_HIDDEN: read}
        losses = {ROUTER_ENTROPY: self.share_of_layers * router_entropy(positive_BTE, ctx)}
        aux = LayerAux(losses, statistics(positive_BTE, ctx), ctx.recorded(records))
        shared = ctx if ctx.width is WHOLE else replace(ctx, width=Named(SHARED, ctx.width))
        return y_BTD + self.shared(x_BTD, shared)[0], aux

    def _shown(self, x_BTD: jax.Array, scores_BTE: jax.Array, up_DF: jax.Array, ctx: CallContext) -> jax.Array:
        """What the map from the experts' units reads, [B, T, F]; `ctx.width` says of which channels, and is told."""
        experts, width = self.config.experts, self.config.expert_width
        own_BTEW = hidden_units(x_BTD, up_DF, **self.form())
        channels = ctx.width.of_experts(experts, {"down": lambda: self.expert_down_FD[...].reshape(experts, width, -1)})

        def made(channels: Channels | None) -> tuple[jax.Array, dict[str, jax.Array]]:
            reads = Reads() if channels is None else Reads(channels.masked, channels.of_maps)
            read_BTEW = reads("down", own_BTEW) * scores_BTE[..., None].astype(x_BTD.dtype)
            return read_BTEW.reshape(*x_BTD.shape[:2], -1), reads.counts

        hidden_BTF, counts = of_tokens(made, channels)
        active_BTE = scores_BTE != 0
        taken_BTE = active_BTE & ctx.valid_BT[..., None]
        ctx.width.experts("up", lambda e: x_BTD, taken_BTE)
        ctx.width.experts("down", lambda e: own_BTEW[:, :, e], taken_BTE)
        if "down" in counts:
            ctx.width.experts_read("down", counts["down"] / width, active_BTE)
        return hidden_BTF


def router_entropy(positive_BTE: jax.Array, ctx: CallContext) -> jax.Array:
    """Mean over real tokens of `-sum_e p_e ln(p_e + 1e-5)`, p = scores / (their sum + 1e-5), nats; a scalar.

    Args:
      positive_BTE: ReLU of the router's logits, without the learned factors, which therefore get no gradient.

    Source: DECO's released code (router entropy regularisation).
    """
    p_BTE = positive_BTE / (jnp.sum(positive_BTE, axis=-1, keepdims=True) + ENTROPY_EPS)
    return ctx.mean_over_tokens(-jnp.sum(p_BTE * jnp.log(p_BTE + ENTROPY_EPS), axis=-1))


def statistics(positive_BTE: jax.Array, ctx: CallContext) -> dict[str, jax.Array]:
    """`activation_stats`, and `routed_density`: the same as `ffn_density`, but no dense layer has it."""
    stats = activation_stats(positive_BTE > 0, ctx)
    return {**stats, ROUTED_DENSITY: stats["ffn_density"]}
