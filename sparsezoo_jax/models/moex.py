"""MoE-X (arXiv 2503.07639): wide, sparse ReLU experts behind a gate that predicts which of them stay sparsest.

Together the experts are one wide MLP whose hidden units, the features, are few and scaled by the gate:
`y = features(x) @ dictionary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models import routers
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import ActivationName, BuildContext, CallContext, LayerAux, activation_fn
from sparsezoo_jax.models.contract import FFN, FFNKind, MapSize, register_ffn
from sparsezoo_jax.models.experts import expert_channels, hidden_read, network_maps, show_experts
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES, FFN_GATE, FFN_HIDDEN, FFN_SCORES, GATE_SCORES
from sparsezoo_jax.models.routers import Routing
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.grouped_ffn import (
    Channels,
    Dispatch,
    Moved,
    grouped_ffn,
    move_and_why,
    pre_activations,
)
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.sharding import replicate

ExpertGate = Literal["sparsity", "switch"]


class GateStatistics(nnx.Variable):
    """Means and variances of the experts' weights, kept where weights don't change."""


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoEXFFNConfig(FFNKind):
    """`sum_j w_j W_dec,j act(W_enc,j x)` over the k experts of each token that a gate expects to be sparsest.

    Loss, to be weighted by an objective: `balance`, the mean over layers (the paper adds 0.001 of it for each layer).
    No token is dropped; nothing has a bias.
    """

    expert_maps: ClassVar[frozenset[str]] = frozenset({"up", "down"})

    kind: Literal["moex"] = "moex"
    expert_width: int
    """Neurons of one expert."""
    experts: int = 8
    """Experts."""
    k: int = 2
    """Experts of a token."""
    gate: ExpertGate = "sparsity"
    """sparsity: no parameters, scores are minus the expected share of active neurons. switch: a learned linear map."""
    activation: ActivationName = "relu"
    """Non-linearity of the experts. The sparsity gate's prediction is meant for relu."""
    literal: bool = False
    """Divide by the variance, not the standard deviation, of the expected pre-activation, as the paper's paragraph on
    its implementation reads; scores then depend on the scale of input and weights. For comparison only."""
    score_eps: float = 1e-8
    """Added to that variance."""
    balance: Literal["dense", "sparse"] = "dense"
    """Probabilities in the balance loss: softmax over the scores of all experts, or the weights of the chosen ones."""
    implementation: Dispatch | None = None
    """Form of the experts' product; None picks by platform."""
    moved: Moved | None = None
    """What devices of mesh.expert send each other: all experts' weights, or tokens, to their experts and back. None:
    whichever are fewer bytes (docs/moe.md)."""

    def __post_init__(self):
        name = "model.ffn"
        for field in ("experts", "expert_width"):
            require(getattr(self, field) > 0, f"{name}.{field}", getattr(self, field), "must be above 0")
        require(0 < self.k <= self.experts, f"{name}.k", self.k, f"must be from 1 to {self.experts} experts")
        require(self.score_eps > 0, f"{name}.score_eps", self.score_eps, "must be above 0")
        require(
            self.gate == "sparsity" or not self.literal, f"{name}.literal", self.literal, "is for gate=sparsity only"
        )

    @property
    def d_ff(self) -> int:
        """Neurons of all experts: the number of features."""
        return self.experts * self.expert_width

    def _gate_numbers(self) -> int:
        """Numbers by which each input dimension enters the gate: mean and variance of every expert, or its weight."""
        return (2 if self.gate == "sparsity" else 1) * self.experts

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: all of k experts), the gate's numbers included.

        The first map of its k experts is always computed whole.
        """
        width = self.k * self.expert_width
        return d_model * (self._gate_numbers() + width + (width if active is None else active))

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The two maps of a token's experts."""
        maps = network_maps(d_model, self.expert_width, self.k * self.expert_width, gated=False)
        return maps if active is None else {**maps, "down": maps["down"]._replace(read=active / self.k)}

    def expert_axis(self, name: str) -> tuple[int, int]:
        """Experts have an axis of their own, the first."""
        return 0, self.experts

    def idle_parameters(self, d_model: int) -> int:
        """Parameters of the experts that a token does not take."""
        return 2 * d_model * (self.experts - self.k) * self.expert_width

    def dense_twin(self) -> PlainFFNConfig:
        """The same wide MLP with all its neurons computed; half a neuron an expert stands for a learned gate."""
        extra = 0 if self.gate == "sparsity" else round(self.experts / 2)
        return PlainFFNConfig(d_ff=self.d_ff + extra, activation=self.activation)

    def upcycled(
        self, source: Any, weights: Mapping[str, jax.Array], noise: float, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Parameters that make every expert a copy of a dense layer, by name.

        `W_enc` of each expert is multiplied by `1 + noise * N(0, 1)`, drawn for each of its entries: without noise all
        experts would have equal scores and gradients for ever. A learned gate is not among the results.

        Args:
          source: configuration of the dense layer.
          weights: its parameters by name, with any leading axes.
          noise: relative standard deviation.
          key: of the noise.

        Raises:
          ConfigError: a layer that is no plain FFN without biases, or not as wide as one expert.

        Source: sparse upcycling (arXiv 2212.05055); noise is our remedy for the tie.
        """
        field = "train.init_from"
        require(source.kind == "plain", field, source.kind, "experts can only be copies of an FFN of kind plain")
        require(not source.bias, field, "bias=True", "experts have no biases, so that FFN must have none")
        require(
            source.d_ff == self.expert_width,
            field,
            f"d_ff={source.d_ff}",
            f"must be model.ffn.expert_width={self.expert_width}, for experts are copies of that FFN",
        )

        def copies(x: jax.Array) -> jax.Array:
            return jnp.repeat(x[..., None, :, :], self.experts, axis=-3)

        up_EDW = copies(weights["up_DF"])
        if noise > 0:
            factor = 1 + noise * jax.random.normal(key, up_EDW.shape, jnp.float32)
            up_EDW = (up_EDW.astype(jnp.float32) * factor).astype(up_EDW.dtype)
        return {"up_EDW": up_EDW, "down_EWD": copies(weights["down_FD"])}

    def on_mesh(self, shape: tuple[int, int, int]) -> str | None:
        """What devices that split the experts send each other."""
        if self.implementation == "dense":
            return None
        return move_and_why(self.moved, shape, self.k, (self.experts, shape[-1], self.expert_width), maps=2)

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> MoEXFFN:
        return MoEXFFN(self, ctx, rngs)


class MoEXFFN(FFN):
    """Mixture of sparse experts; see `MoEXFFNConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {"up": "up_EDW", "down": "down_EWD"}

    def __init__(self, config: MoEXFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, e, width = ctx.d_model, config.experts, config.expert_width
        self.up_EDW = ctx.weight(rngs, (e, d, width), ("experts", "embed", "ffn"), d)
        self.down_EWD = ctx.weight(rngs, (e, width, d), ("experts", "ffn", "embed"), width, output=True)
        # Every device routes its own tokens over all experts, so the gate's columns are not split.
        self.router_DE = ctx.weight(rngs, (d, e), ("embed", None), d) if config.gate == "switch" else None
        self.mean_ED: GateStatistics | None = None
        self.variance_ED: GateStatistics | None = None

    def prepare(self) -> None:
        """Keep the gate's statistics from now on; weights must not change, or be differentiated, any more."""
        if self.config.gate == "sparsity":
            mean_ED, variance_ED = gate_statistics(self.up_EDW[...])
            self.mean_ED = nnx.data(GateStatistics(mean_ED))
            self.variance_ED = nnx.data(GateStatistics(variance_ED))

    def scores(self, x: jax.Array) -> jax.Array:
        """The gate's scores of all experts, float32 [..., E], for x [..., D]; the larger, the sooner chosen."""
        if self.router_DE is not None:
            return matmul(x, self.router_DE[...].astype(self.dtype), jnp.dtype(jnp.float32))
        if self.mean_ED is None or self.variance_ED is None:
            statistics = gate_statistics(self.up_EDW[...])
        else:
            statistics = self.mean_ED[...], self.variance_ED[...]
        return sparsity_scores(x, *statistics, eps=self.config.score_eps, literal=self.config.literal)

    def route(self, x: jax.Array) -> Routing:
        """Softmax over the k largest scores; all other weights are 0. Of equal scores the first wins."""
        return routers.top_k(self.scores(x), self.config.k)

    def features(self, x: jax.Array) -> jax.Array:
        """Hidden units `w_j act(W_enc,j x)` of the wide MLP, expert after expert: [..., F] for x [..., D].

        Those of experts that are not chosen are 0. `features(x) @ dictionary` is the layer's output.

        Source: MoE-X (arXiv 2503.07639), equations 7 to 10.
        """
        return self._features(x, self.route(x), None)

    @property
    def dictionary(self) -> jax.Array:
        """What each feature adds to the output when it is 1: `W_dec` of all experts, [F, D]."""
        return self.down_EWD[...].reshape(self.config.d_ff, -1)

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Both maps of all experts, [E, D, W] and [E, W, D], in the activations' dtype."""
        return self.up_EDW[...].astype(self.dtype), self.down_EWD[...].astype(self.dtype)

    def channels(self, width: Width) -> Channels | None:
        """Which channels the experts' maps leave out."""
        return expert_channels(width, self.up_EDW[...], self.down_EWD[...])

    def mixed(self, x_BTD: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of each token's experts, and the number of their hidden units that are not 0 [B, T]."""
        y_BTD, counts = self.product(x_BTD, routing)
        return y_BTD, jnp.sum(counts["hidden"], axis=-1)

    def _shown(
        self, x_BTD: jax.Array, routing: Routing, ctx: CallContext
    ) -> tuple[jax.Array, jax.Array, Channels | None]:
        """As `mixed`, by the channels that `ctx.width` leaves, which is told what is read; and these."""
        channels = self.channels(ctx.width)
        y_BTD, counts = self.product(x_BTD, routing, channels)
        activation, up_EDW = activation_fn(self.config.activation), self.weights()[0]
        show_experts(x_BTD, up_EDW, None, activation, routing.active_BTE, channels, counts, ctx)
        return y_BTD, jnp.sum(counts["hidden"], axis=-1), channels

    def product(
        self, x_BTD: jax.Array, routing: Routing, channels: Channels | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """That sum, and by name how many hidden units are not 0, and how many channels maps read, [B, T, K]."""
        assert routing.experts_BTK is not None
        assert routing.weights_BTK is not None
        result: Any = grouped_ffn(
            x_BTD,
            routing.experts_BTK,
            routing.weights_BTK,
            *self.weights(),
            activation=activation_fn(self.config.activation),
            return_active=True,
            implementation=self.config.implementation,
            moved=self.config.moved,
            channels=channels,
        )
        y_BTD, counts = result
        return y_BTD, counts if channels is not None else {"hidden": counts}

    def _features(self, x: jax.Array, routing: Routing, channels: Channels | None, *, whole: bool = False) -> jax.Array:
        activation = activation_fn(self.config.activation)
        return hidden_read(x, routing.weights_BTE, self.weights()[0], None, activation, channels, whole=whole)

    def _pre_activations(self, x: jax.Array) -> jax.Array:
        return pre_activations(x, self.weights()[0]).reshape(*x.shape[:-1], self.config.d_ff)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        config = self.config
        routing = self.route(x_BTD)
        channels = None
        if ctx.width is WHOLE:
            y_BTD, active_BT = self.mixed(x_BTD, routing)
        else:
            y_BTD, active_BT, channels = self._shown(x_BTD, routing, ctx)
        l0 = ctx.mean_over_tokens(active_BT)
        load_E = routers.loads(routing.active_BTE, ctx)
        stats = activation_stats(routing.active_BTE, ctx) | {
            "ffn_density": l0 / config.d_ff,
            "l0": l0,
            "max_load": jnp.max(load_E) / jnp.maximum(jnp.mean(load_E), 1e-20),
            **routers.device_load(load_E),
        }
        records = {
            EXPERT_SCORES: lambda: routing.weights_BTE,
            GATE_SCORES: lambda: self.scores(x_BTD),
            FFN_SCORES: lambda: self._pre_activations(x_BTD),
            FFN_GATE: lambda: self._features(x_BTD, routing, channels, whole=True),
            FFN_HIDDEN: lambda: self._features(x_BTD, routing, channels),
        }
        losses = {"balance": first_choice_balance(routing, ctx, config.balance)}
        return y_BTD, LayerAux(losses, stats, ctx.recorded(records))


def gate_statistics(up_EDW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance over the W neurons of each expert's weights from each input, float32 [E, D] each."""
    wide_EDW = up_EDW.astype(jnp.promote_types(up_EDW.dtype, jnp.float32))
    mean_ED = jnp.mean(wide_EDW, axis=-1)
    return replicate(mean_ED), replicate(jnp.mean(jnp.square(wide_EDW - mean_ED[..., None]), axis=-1))


def sparsity_scores(
    x: jax.Array, mean_ED: jax.Array, variance_ED: jax.Array, *, eps: float = 1e-8, literal: bool = False
) -> jax.Array:
    """`-erf(mu / (sqrt(2) sigma))` of each expert, [..., E] in (-1, 1), for x [..., D]; the larger, the sparser.

    If the weights from input i are drawn from N(mean_i, variance_i), a pre-activation is drawn from N(mu, sigma^2) with
    mu = mean . x and sigma^2 = variance . x^2, so that W (1 - score) / 2 of the W neurons are expected to be active.
    Differentiable in all arrays.

    Args:
      eps: added to sigma^2.
      literal: divide by sigma^2 in place of sigma; see `MoEXFFNConfig.literal`.

    Source: MoE-X (arXiv 2503.07639), equations 3 to 6.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    precise = jax.lax.Precision.HIGHEST
    mu = product(jnp.matmul(wide, mean_ED.T, precision=precise))
    spread = product(jnp.matmul(jnp.square(wide), variance_ED.T, precision=precise)) + eps
    return -jax.lax.erf(mu / (2**0.5 * (spread if literal else jnp.sqrt(spread))))


def first_choice_balance(
    routing: Routing, ctx: CallContext, probabilities: Literal["dense", "sparse"] = "dense"
) -> jax.Array:
    """`E * sum_e f_e P_e`, f_e the share of tokens whose largest p is expert e, P_e the mean of p_e: 1 if even, to E.

    p: softmax over the scores of all experts ("dense"), or the weights of the chosen ones ("sparse").

    Source: MoE-X (arXiv 2503.07639), equations 18 to 20, which are Switch Transformer's.
    """
    p_BTE = routing.probabilities_BTE if probabilities == "dense" else routing.weights_BTE
    first_BTE = jax.nn.one_hot(jnp.argmax(p_BTE, axis=-1), p_BTE.shape[-1], dtype=bool)
    return routers.balance_loss(routing._replace(active_BTE=first_BTE, probabilities_BTE=p_BTE), ctx)
