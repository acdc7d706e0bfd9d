"""Mixture of experts as a feed-forward kind: one layer, six routers (`models.routers`)."""

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
from sparsezoo_jax.models.contract import FFN, FFNKind, MapSize, Observed, register_ffn
from sparsezoo_jax.models.experts import (
    SHARED,
    channels_of_matrices,
    expert_channels,
    network_maps,
    show_experts,
)
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES
from sparsezoo_jax.models.routers import FIXED_COUNT, RouterBias, RouterName, Routing
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.grouped_ffn import (
    Channels,
    Dispatch,
    Moved,
    grouped_ffn,
    move_and_why,
    weighted_ffn,
)
from sparsezoo_jax.pallas_kernels.matmul import from_stream, matmul, to_stream
from sparsezoo_jax.sharding import constrain

Maps = tuple[jax.Array, jax.Array, jax.Array | None]
"""Up and down maps of experts, and those of their gates where they have some."""
Counts = dict[str, jax.Array]
"""By map, how many channels were read."""


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoEFFNConfig(FFNKind):
    """`sum_e w_e W_down,e act(W_up,e x)` over the experts that a router gives each token; no token is dropped.

    Losses, to be weighted by objectives: `balance` and `router_z`; for remoe `l1_balance` in their place; for topp
    `router_entropy` too.
    """

    expert_maps: ClassVar[frozenset[str]] = frozenset({"gate", "up", "neurons", "down"})

    kind: Literal["moe"] = "moe"
    experts: int
    """Experts, shared ones included."""
    expert_width: int
    """Neurons of one expert."""
    k: int
    """Experts of a token, shared ones included. remoe and topp: the number aimed at (a budget for objectives)."""
    router: RouterName = "topk"
    """topk: softmax, k best, renormalised. deepseek: the same beside shared experts. grin: SparseMixer-v2. remoe: ReLU.
    topp: as many as make up `top_p`. ling: sigmoid, the best groups of experts first, and a bias in place of
    a balance loss."""
    shared_experts: int | None = None
    """Experts that every token takes with weight 1, fused into one. None: 2 for deepseek, 0 for the others."""
    activation: ActivationName = "silu"
    """Non-linearity of the experts."""
    gated: bool = False
    """Experts are `W_down,e (act(W_gate,e x) * (W_up,e x))`."""
    groups: int = 1
    """Groups of neighbouring experts in equal numbers, from the best of which a token's come (ling)."""
    kept_groups: int = 1
    """How many groups a token's experts may come from (ling)."""
    top_p: float = 0.4
    """Probability that the experts of a token exceed together (topp)."""
    competition: float = 0.1
    """Half the relative distance from the best score within which experts are sampled (grin's epsilon)."""
    routed_scale: float = 1.0
    """Sum of the weights of a token's routed experts (ling)."""
    bias_rate: float = 1e-3
    """Change of a router's bias in a step (ling)."""
    router_std: float = 0.01
    """Standard deviation of the router's initial weights."""
    expert_std: float | None = None
    """Standard deviation of the experts' initial weights. None: as `model.init` says, by the width of one expert."""
    implementation: Dispatch | None = None
    """Form of the experts' product where k is fixed. None picks by platform; remoe and topp compute all experts."""
    moved: Moved | None = None
    """What devices of mesh.expert send each other: all experts' weights, or tokens, to their experts and back. None:
    whichever are fewer bytes (docs/moe.md)."""

    def __post_init__(self):
        name = "model.ffn"
        require(self.experts > 0, f"{name}.experts", self.experts, "must be above 0")
        require(self.expert_width > 0, f"{name}.expert_width", self.expert_width, "must be above 0")
        shared = self.shared
        require(0 <= shared < self.experts, f"{name}.shared_experts", shared, f"must be from 0 to {self.experts - 1}")
        require(
            shared < self.k <= self.experts, f"{name}.k", self.k, f"must be from {shared + 1} to {self.experts} experts"
        )
        require(0 < self.top_p < 1, f"{name}.top_p", self.top_p, "must be above 0 and below 1")
        for field in ("competition", "bias_rate"):
            require(getattr(self, field) >= 0, f"{name}.{field}", getattr(self, field), "must be at least 0")
        require(self.routed_scale > 0, f"{name}.routed_scale", self.routed_scale, "must be above 0")
        require(self.router_std >= 0, f"{name}.router_std", self.router_std, "must be at least 0")
        self._check_groups(name)
        std = self.expert_std
        require(std is None or std > 0, f"{name}.expert_std", std, "must be above 0 or None")
        computes_all = self.router not in FIXED_COUNT
        require(
            not computes_all or self.implementation in (None, "dense"),
            f"{name}.implementation",
            self.implementation,
            f"must be dense or None for router={self.router}, which gives tokens different numbers of experts",
        )

    def _check_groups(self, name: str) -> None:
        groups, kept = self.groups, self.kept_groups
        require(groups > 0, f"{name}.groups", groups, "must be above 0")
        require(0 < kept <= groups, f"{name}.kept_groups", kept, f"must be from 1 to {groups} groups")
        if groups == 1:
            return
        require(self.router == "ling", f"{name}.groups", groups, f"must be 1 for router={self.router}; ling has groups")
        require(
            self.routed % groups == 0 and self.routed >= 2 * groups,
            f"{name}.groups",
            groups,
            f"must divide the {self.routed} routed experts into groups of at least 2",
        )
        routed_k, reach = self.k - self.shared, self.routed // groups * kept
        require(
            routed_k <= reach, f"{name}.kept_groups", kept, f"must hold {routed_k} experts for a token, not {reach}"
        )

    @property
    def maps(self) -> int:
        """Matrices of one expert."""
        return 3 if self.gated else 2

    @property
    def shared(self) -> int:
        """Experts that every token takes."""
        default = 2 if self.router == "deepseek" else 0
        return default if self.shared_experts is None else self.shared_experts

    @property
    def routed(self) -> int:
        """Experts that the router chooses from."""
        return self.experts - self.shared

    @property
    def samples(self) -> bool:
        """Whether training needs random numbers."""
        return self.router == "grin"

    @property
    def d_ff(self) -> int:
        """Neurons of all experts."""
        return self.experts * self.expert_width

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The maps of the routed experts, and of those that all tokens take, which are fused."""
        width, fused = self.expert_width, self.shared * self.expert_width
        routed = max((self.k * width if active is None else active) - fused, 0)
        maps = network_maps(d_model, width, routed, gated=self.gated)
        return maps | (network_maps(d_model, fused, fused, gated=self.gated, prefix=SHARED) if fused else {})

    def weight_maps(self, d_model: int) -> dict[str, int]:
        """All of these but the neurons, which have no matrix of their own."""
        return channels_of_matrices(self.linear_maps(d_model))

    def expert_axis(self, name: str) -> tuple[int, int]:
        """Experts have an axis of their own, the first."""
        return 0, self.routed

    @property
    def target_active(self) -> float | None:
        """Neurons of a token's experts; None for topp, which aims at no number."""
        return None if self.router == "topp" else self.k * self.expert_width

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: those of k experts), the router's included."""
        return d_model * (self.routed + self.maps * (self.k * self.expert_width if active is None else active))

    def idle_parameters(self, d_model: int) -> int:
        """Parameters of the experts that a token does not take; 0 where their number is not fixed."""
        fixed = self.router in FIXED_COUNT
        return self.maps * d_model * (self.experts - self.k) * self.expert_width if fixed else 0

    def dense_twin(self) -> GatedFFNConfig:
        """The SwiGLU layer of as many parameters, to half a neuron: (maps d_ff + routed experts) / 3 wide."""
        return GatedFFNConfig(d_ff=round((self.maps * self.d_ff + self.routed) / 3), activation="silu")

    def on_mesh(self, shape: tuple[int, int, int]) -> str | None:
        """What devices that split the experts send each other."""
        if self.router not in FIXED_COUNT or self.implementation == "dense":
            return None
        up = (self.routed, shape[-1], self.expert_width)
        return move_and_why(self.moved, shape, self.k - self.shared, up, maps=self.maps)

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> MoEFFN:
        return MoEFFN(self, ctx, rngs)


class MoEFFN(FFN):
    """Mixture of experts; see `MoEFFNConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {
        "gate": "gate_EDW",
        "up": "up_EDW",
        "down": "down_EWD",
        "shared_gate": "shared_gate_DF",
        "shared_up": "shared_up_DF",
        "shared_down": "shared_down_FD",
    }

    def __init__(self, config: MoEFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, width, routed = ctx.d_model, config.expert_width, config.routed

        def normal(std: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, ctx.param_dtype), axes=axes)

        def weight(shape: tuple[int, ...], axes: tuple[str, ...], inputs: int, output: bool) -> nnx.Param:
            if config.expert_std is not None:
                return normal(config.expert_std, shape, axes)
            return ctx.weight(rngs, shape, axes, inputs, output=output)

        # Every device routes its own tokens over all experts, so the router's columns are not split.
        self.router_DE = normal(config.router_std, (d, routed), ("embed", None))
        columns = ((routed, d, width), ("experts", "embed", "ffn"), d, False)
        self.gate_EDW = weight(*columns) if config.gated else None
        self.up_EDW = weight(*columns)
        self.down_EWD = weight((routed, width, d), ("experts", "ffn", "embed"), width, True)
        fused = config.shared * width
        columns = ((d, fused), ("embed", "ffn"), d, False)
        self.shared_gate_DF = weight(*columns) if fused and config.gated else None
        self.shared_up_DF = weight(*columns) if fused else None
        self.shared_down_FD = weight((fused, d), ("ffn", "embed"), width, True) if fused else None
        self.bias_E = RouterBias(jnp.zeros(routed), axes=(None,)) if config.router == "ling" else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        scores_BTE = matmul(x_BTD, self.router_DE[...].astype(self.dtype), jnp.dtype(jnp.float32))
        routing = self._route(scores_BTE, ctx)
        y_BTD = self.mixed(x_BTD, routing, ctx)
        active_BTE = self.with_shared(routing.active_BTE)
        load_E = routers.loads(routing.active_BTE, ctx)
        stats = activation_stats(active_BTE, ctx)
        stats["max_load"] = jnp.max(load_E) / jnp.maximum(jnp.mean(load_E), 1e-20)
        stats |= routers.device_load(load_E)
        aux = LayerAux(
            losses=self._losses(scores_BTE, routing, ctx),
            stats=stats,
            records=ctx.recorded({EXPERT_SCORES: lambda: self.with_shared(routing.weights_BTE)}),
            observed={} if self.bias_E is None else {"load": load_E},
        )
        return y_BTD, aux

    def _route(self, scores_BTE: jax.Array, ctx: CallContext) -> Routing:
        config = self.config
        k = config.k - config.shared
        if config.router == "grin":
            return routers.sparse_mixer(scores_BTE, k, config.competition, ctx.rng)
        if config.router == "remoe":
            return routers.relu(scores_BTE)
        if config.router == "topp":
            return routers.top_p(scores_BTE, config.top_p)
        if self.bias_E is not None:
            form = (k, config.routed_scale, config.groups, config.kept_groups)
            return routers.biased_sigmoid(scores_BTE, self.bias_E[...], *form)
        return routers.top_k(scores_BTE, k)

    def mixed(self, x_BTD: jax.Array, routing: Routing, ctx: CallContext) -> jax.Array:
        """The weighted sum of each token's experts, shared ones included."""
        maps = _values(self.up_EDW, self.down_EWD, self.gate_EDW)
        channels = expert_channels(ctx.width, *maps)
        y_BTD, counts = self.routed_experts(x_BTD, routing, maps, channels)
        if ctx.width is not WHOLE:
            (up_EDW, _, gate_EDW), activation = self._cast(maps), activation_fn(self.config.activation)
            show_experts(x_BTD, up_EDW, gate_EDW, activation, routing.active_BTE, channels, counts, ctx)
        if self.shared_up_DF is None:
            return y_BTD
        maps = _values(self.shared_up_DF, self.shared_down_FD, self.shared_gate_DF)
        return y_BTD + self.shared_expert(x_BTD, maps, ctx.width)

    def shared_expert(self, x_BTD: jax.Array, maps: Maps, width: Width = WHOLE) -> jax.Array:
        """The sum of the shared experts, which are fused into one of these maps [D, F], [F, D], [D, F]."""
        up, down, gate = maps
        up_DF, down_FD, gate_DF = self._cast(maps)
        activation = activation_fn(self.config.activation)
        hidden = from_stream(width.channels("shared_up", x_BTD, lambda: up), up_DF)
        if gate is None or gate_DF is None:
            hidden = activation(hidden)
        else:
            gates = activation(from_stream(width.channels("shared_gate", x_BTD, lambda: gate), gate_DF))
            hidden = width.channels("shared_neurons", gates) * hidden
        hidden = constrain(hidden, ("batch", "length", "ffn"))
        return to_stream(width.channels("shared_down", hidden, lambda: down), down_FD)

    def routed_experts(
        self, x_BTD: jax.Array, routing: Routing, maps: Maps, channels: Channels | None = None
    ) -> tuple[jax.Array, Counts]:
        """The weighted sum of each token's experts, of these maps [E, D, W], [E, W, D], [E, D, W].

        With `channels` also how many of them maps read, by map [B, T, K] or for all experts [B, T, E]; otherwise {}.
        """
        maps = self._cast(maps)
        form: Any = {"activation": activation_fn(self.config.activation), "channels": channels}
        if routing.experts_BTK is None or routing.weights_BTK is None:
            found = weighted_ffn(x_BTD, routing.weights_BTE, *maps, **form)
        else:
            form |= {"implementation": self.config.implementation, "moved": self.config.moved}
            found = grouped_ffn(x_BTD, routing.experts_BTK, routing.weights_BTK, *maps, **form)
        return (found, {}) if channels is None else found

    def _cast(self, maps: Maps) -> Maps:
        up, down, gate = maps
        return up.astype(self.dtype), down.astype(self.dtype), None if gate is None else gate.astype(self.dtype)

    def _losses(self, scores_BTE: jax.Array, routing: Routing, ctx: CallContext) -> dict[str, jax.Array]:
        if self.config.router == "remoe":
            return {"l1_balance": routers.l1_balance_loss(routing, ctx, self.config.k - self.config.shared)}
        losses = {"balance": routers.balance_loss(routing, ctx), "router_z": routers.z_loss(scores_BTE, ctx)}
        if self.config.router == "topp":
            losses["router_entropy"] = routers.entropy_loss(routing, ctx)
        return losses

    def with_shared(self, x_BTE: jax.Array) -> jax.Array:
        """Routed experts' values behind those of the shared experts, which are 1."""
        return jnp.pad(x_BTE, ((0, 0), (0, 0), (self.config.shared, 0)), constant_values=1)

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Move the router's bias by the loads of the experts, [E] or stacked [layers, E] as the bias is."""
        if self.bias_E is not None:
            load_E, rate = observed["load"], self.config.bias_rate
            self.bias_E[...] = routers.balanced_bias(self.bias_E[...], load_E, rate, zero_mean=True)


def _values(up: nnx.Param | None, down: nnx.Param | None, gate: nnx.Param | None) -> Maps:
    assert up is not None
    assert down is not None
    return up[...], down[...], None if gate is None else gate[...]
