"""MoHD, mixture of hidden dimensions (arXiv 2412.05644): every sublayer reads and writes a routed part of the stream.

The residual stream is cut into equal blocks ("sub-dimensions"). Shared blocks take part for every token, and a router
adds some of the others for each token; the sublayer sees only these, and only these get its output. docs/mohd.md
lists what the paper leaves open. Shape letters beside those of `models.common`: N blocks, I width of one, K routed
blocks of a token.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models import routers
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.contract import (
    AttentionKind,
    Extra,
    FFNKind,
    Head,
    Joined,
    Observed,
    Residual,
    ResidualKind,
    Sublayer,
    SublayerName,
    register_residual,
)
from sparsezoo_jax.models.norms import Norm, NormConfig
from sparsezoo_jax.models.residual import PreNorm, PreNormConfig
from sparsezoo_jax.models.routers import RouterBias, Routing
from sparsezoo_jax.models.width import WHOLE, AllChannels
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks, Grouping, from_blocks, to_blocks
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.sharding import replicate

WIDTH_BALANCE = "width_balance"


@register_residual
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoHDConfig(ResidualKind):
    """`x + Fuse(mask * sublayer(a * gates * norm(x)))` with gates of the blocks that a router gives each token.

    Loss, to be weighted by an objective: `width_balance`, the mean over routers of how unevenly routed blocks are used.
    """

    kind: Literal["mohd"] = "mohd"
    blocks: int = 16
    """Blocks that the width is cut into (the paper's N)."""
    active: int = 8
    """Blocks of a token, shared ones included (K = delta N)."""
    shared: int = 6
    """Blocks that every token has, the first ones (psi N); about three quarters of the active ones."""
    sublayers: Literal["both", "attention", "ffn"] = "both"
    """Which sublayers see part of the width; the other is in a plain pre-norm connection."""
    routers: Literal["sublayer", "layer"] = "sublayer"
    """One router for each sublayer, or one for a layer: the feed-forward network then takes the attention's blocks."""
    output_blocks: Literal["same", "routed"] = "same"
    """Blocks that a sublayer writes: those it read, or those of a second router, whose gates scale what is written."""
    router: Literal["learned", "random"] = "learned"
    """random: centroids stay as they were drawn and carry no gradient (a control)."""
    router_std: float = 0.02
    """Standard deviation of the routers' initial centroids."""
    shared_gate: Literal["soft", "hard"] = "soft"
    """soft: shared blocks are weighted by their affinity like the others; hard: by 1."""
    scale_mode: Literal["rms", "mean", "y_literal", "none"] = "rms"
    """Factor on the gates. rms, mean: gates of mean 1 over a token's blocks, times delta^-1/2 (keeps the energy of the
    input) or delta^-1 (keeps sums). y_literal: `N sum(g) g` of a public re-implementation. none: the softmax's g."""
    norm_after_mask: bool = False
    """Normalise over the active blocks instead of the whole width; rms and mean then have no further factor."""
    post_norm: bool = False
    """Normalise the sublayer's output over its active blocks before fusion (Gemma 2)."""
    fusion: Literal["monarch", "square", "block_diagonal", "none"] = "monarch"
    """`y + M y` over the sublayer's output. monarch: M mixes within blocks, then across them; square: the same over
    about sqrt(d_model) groups, for large widths; block_diagonal: within blocks only (a control); none: M = 0."""
    balance: Literal["normalised", "unnormalised", "bias"] = "normalised"
    """Form of `width_balance`: affinities normalised over the routed blocks (1 when even), or not, as in a public
    re-implementation. bias: the first, and a bias that evens out loads without any loss."""
    bias_rate: float = 1e-3
    """Change of a router's bias in a step (balance=bias)."""
    masked_head: bool = False
    """The output projection reads only the active blocks of a last router, too."""
    init_fan_in: Literal["active", "all"] = "active"
    """Inputs by which maps from the stream scale their initial weights (model.init.kind=fan_in)."""
    warmup_steps: int = 0
    """Train steps in which the routed blocks go from all to `active`, one after another (implementation=dense)."""
    implementation: Grouping | None = None
    """Form of the maps: dense multiplies the whole width by masks (the reference); ragged and loop compute active
    blocks only. None picks by platform."""

    def __post_init__(self):
        name = "model.residual"
        require(self.blocks > 0, f"{name}.blocks", self.blocks, "must be above 0")
        require(0 < self.active <= self.blocks, f"{name}.active", self.active, f"must be from 1 to {self.blocks}")
        require(0 <= self.shared <= self.active, f"{name}.shared", self.shared, f"must be from 0 to {self.active}")
        for field in ("router_std", "bias_rate", "warmup_steps"):
            require(getattr(self, field) >= 0, f"{name}.{field}", getattr(self, field), "must be at least 0")
        one = self.routers == "layer"
        require(
            not one or self.sublayers == "both",
            f"{name}.routers",
            self.routers,
            "must be sublayer unless both have one",
        )
        # A token of no routed block has nothing that could follow a second choice or a schedule.
        require(
            self.warmup_steps == 0 or self.implementation == "dense",
            f"{name}.implementation",
            self.implementation,
            "must be dense with warmup_steps, for the grouped forms have a fixed number of blocks",
        )

    @property
    def cut(self) -> Blocks:
        """How the width is cut."""
        return Blocks(self.blocks, self.shared)

    @property
    def routed(self) -> int:
        """Blocks that the router adds for a token."""
        return self.active - self.shared

    def routed_at(self, step: jax.Array) -> jax.Array:
        """Blocks that the router adds after `step` train steps of a warm-up.

        That is `routed + ceil((blocks - active) (1 - step / warmup_steps))`, and `routed` from its end on, exactly: a
        rounded quotient can be a block off. int32 in the shape of `step`, integers of any shape.
        """
        free = self.blocks - self.active
        # The step from which the j-th of the blocks that go is gone, in Python's integers, which don't overflow.
        gone_from = jnp.asarray([-(-j * self.warmup_steps // free) for j in range(1, free + 1)], jnp.int32)
        return self.routed + free - jnp.sum(jnp.expand_dims(step, -1) >= gone_from, axis=-1, dtype=jnp.int32)

    @property
    def grouped(self) -> bool:
        """Whether sublayers compute active blocks only, not the whole width between masks."""
        return self.implementation != "dense" and self.active < self.blocks

    @property
    def delta(self) -> float:
        """Share of the width that is active."""
        return self.active / self.blocks

    def check(self, d_model: int, attention: AttentionKind, ffn: FFNKind) -> None:
        """Raise `ConfigError` for a width that can't be cut so, or a sublayer that needs all of it."""
        require(
            d_model % self.blocks == 0, "model.residual.blocks", self.blocks, f"must divide model.d_model={d_model}"
        )
        for name, kind in (("attention", attention), ("ffn", ffn)):
            able = kind.partial_width or not self._masks(name)
            require(able, f"model.{name}.kind", kind.kind, "needs all of the width; model.residual.kind=mohd routes it")

    def _masks(self, sublayer: str) -> bool:
        return self.masked_head if sublayer == "head" else self.sublayers in ("both", sublayer)

    def fan_in(self, d_model: int) -> int:
        """Dimensions by which sublayers scale the initial weights that read the stream."""
        return d_model if self.init_fan_in == "all" else d_model // self.blocks * self.active

    def active_width(self, d_model: int, sublayer: SublayerName | Literal["head"]) -> int:
        """Dimensions of the stream that a token's sublayer (or the output projection) reads or writes."""
        return d_model // self.blocks * self.active if self._masks(sublayer) else d_model

    def weights(self, d_model: int, sublayer: SublayerName | Literal["head"]) -> float:
        """Matrix weights of the connection that one token needs: routers, and the fusion of active blocks."""
        if not self._masks(sublayer):
            return 0
        routed = self.has_router and not (sublayer == "ffn" and self.routers == "layer")
        routers_of = 0 if not routed else 1 if sublayer == "head" or self.output_blocks == "same" else 2
        fusion = 0 if sublayer == "head" else self.delta * self.fusion_weights(d_model)
        return routers_of * self.blocks * d_model + fusion

    @property
    def has_router(self) -> bool:
        """Whether anything depends on affinities: not where all active blocks are shared and weigh 1."""
        return self.routed > 0 or self.shared_gate == "soft"

    def fusion_shape(self, d_model: int) -> tuple[int, int]:
        """Groups and size of a group of the fusion: b1 b2 = d_model."""
        if self.fusion != "square":
            return self.blocks, d_model // self.blocks
        near = next(b for b in range(math.isqrt(d_model), 0, -1) if d_model % b == 0)
        return near, d_model // near

    def fusion_weights(self, d_model: int) -> int:
        """Parameters of one fusion: `D (b1 + b2)`, without its second factor `D b2`."""
        groups, size = self.fusion_shape(d_model)
        return {"none": 0, "block_diagonal": size}.get(self.fusion, groups + size) * d_model

    def dense_twin(self) -> PreNormConfig:
        """The connection whose sublayers see all of the stream, of (nearly) equal parameters: no router, no fusion."""
        return PreNormConfig(post_norm=self.post_norm)

    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, sublayer: SublayerName) -> MoHD | PreNorm:
        if not self._masks(sublayer):
            return self.dense_twin().build(ctx, norm, rngs, sublayer)
        return MoHD(self, ctx, norm, rngs, routes=not (sublayer == "ffn" and self.routers == "layer"))

    def build_head(self, ctx: BuildContext, rngs: nnx.Rngs) -> Head:
        return RoutedHead(self, ctx, rngs) if self.masked_head else Head()


class Chosen(NamedTuple):
    """Blocks of each token."""

    gates_BTN: jax.Array
    """float32, factor on each block; 0 where it is not active."""
    active_BTN: jax.Array
    """Booleans."""
    routed_BTK: jax.Array
    """The active blocks beside the shared ones."""


class Warmup(nnx.Variable):
    """Train steps made, which a schedule in the forward pass depends on: no parameter."""


class BlockRouter(nnx.Module):
    """Affinities of a token to the blocks, and the blocks and gates that follow; see `MoHDConfig`."""

    def __init__(self, config: MoHDConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype

        def centroids() -> nnx.Param:
            drawn = jax.random.normal(rngs.params(), (ctx.d_model, config.blocks), ctx.param_dtype)
            return nnx.Param(config.router_std * drawn, axes=("embed", "latent"))

        self.centroids_DN = centroids() if config.has_router else None
        balances = config.balance == "bias" and config.routed > 0
        self.bias_E = RouterBias(jnp.zeros(config.blocks - config.shared), axes=(None,)) if balances else None
        self.steps = Warmup(jnp.zeros((), jnp.int32), axes=()) if config.warmup_steps and config.routed else None

    def __call__(self, u_BTD: jax.Array, ctx: CallContext) -> tuple[Chosen, LayerAux]:
        config, shape = self.config, u_BTD.shape[:2]
        if self.centroids_DN is None:
            active_BTN = jnp.broadcast_to(jnp.arange(config.blocks) < config.shared, (*shape, config.blocks))
            none_BTK = jnp.zeros((*shape, 0), jnp.int32)
            return Chosen(active_BTN * self._factor(config.active), active_BTN, none_BTK), LayerAux()
        # Every device routes its own tokens over all blocks: centroids, split in storage, are gathered.
        centroids_DN = replicate(self.centroids_DN[...].astype(self.dtype))
        scores_BTN = matmul(u_BTD, centroids_DN, jnp.dtype(jnp.float32))
        if config.router == "random":
            scores_BTN = jax.lax.stop_gradient(scores_BTN)
        affinity_BTN = jax.nn.softmax(scores_BTN, axis=-1)
        routable_BTE = affinity_BTN[..., config.shared :]
        bias_E = 0 if self.bias_E is None else self.bias_E[...]
        best_BTK = routers.best_with_bias(routable_BTE, jnp.asarray(bias_E), config.routed)
        count = jnp.int32(config.active)
        if self.steps is None:
            taken_BTE = jnp.any(best_BTK[..., None] == jnp.arange(config.blocks - config.shared), axis=-2)
        else:
            routed = config.routed_at(self.steps[...])
            order_BTE = jnp.argsort(-jax.lax.stop_gradient(routable_BTE + bias_E), axis=-1)
            taken_BTE = jnp.argsort(order_BTE, axis=-1) < routed
            count = config.shared + routed
        shared_BTN = jnp.ones((*shape, config.shared), bool)
        active_BTN = jnp.concatenate([shared_BTN, taken_BTE], axis=-1)
        chosen = Chosen(self._gates(affinity_BTN, active_BTN, count), active_BTN, best_BTK + config.shared)
        return chosen, self._aux(routable_BTE, taken_BTE, active_BTN, ctx)

    def _factor(self, active: jax.Array | int) -> jax.Array:
        """What gates of mean 1 are multiplied by."""
        delta = jnp.asarray(active, jnp.float32) / self.config.blocks
        if self.config.norm_after_mask or self.config.scale_mode not in ("rms", "mean"):
            return jnp.float32(1)
        return 1 / (delta if self.config.scale_mode == "mean" else jnp.sqrt(delta))

    def _gates(self, affinity_BTN: jax.Array, active_BTN: jax.Array, count: jax.Array) -> jax.Array:
        config = self.config
        first = config.shared if config.shared_gate == "hard" else 0
        soft_BTN = (affinity_BTN * active_BTN)[..., first:]
        total_BT1 = jnp.sum(soft_BTN, axis=-1, keepdims=True)
        if config.scale_mode in ("rms", "mean"):
            soft_BTN = (count - first) * soft_BTN / jnp.maximum(total_BT1, jnp.finfo(jnp.float32).tiny)
        elif config.scale_mode == "y_literal":
            soft_BTN = config.blocks * total_BT1 * soft_BTN
        hard_BTN = jnp.ones((*soft_BTN.shape[:2], first), jnp.float32)
        return self._factor(count) * jnp.concatenate([hard_BTN, soft_BTN], axis=-1)

    def _aux(self, routable_BTE, taken_BTE, active_BTN, ctx: CallContext) -> LayerAux:
        config = self.config
        stats = {"width_density": ctx.mean_over_tokens(jnp.mean(active_BTN, axis=-1, dtype=jnp.float32))}
        if not config.routed:
            return LayerAux(stats=stats)
        if config.balance == "unnormalised":
            probabilities_BTE, factor = routable_BTE, config.routed
        else:
            total_BT1 = jnp.sum(routable_BTE, axis=-1, keepdims=True)
            probabilities_BTE, factor = routable_BTE / jnp.maximum(total_BT1, jnp.finfo(jnp.float32).tiny), 1
        routing = Routing(routable_BTE * taken_BTE, taken_BTE, probabilities_BTE)
        load_E = routers.loads(taken_BTE, ctx)
        stats["width_max_load"] = jnp.max(load_E) / jnp.maximum(jnp.mean(load_E), 1e-20)
        moves = self.bias_E is not None or self.steps is not None
        return LayerAux(
            losses={WIDTH_BALANCE: factor * routers.balance_loss(routing, ctx)},
            stats=stats,
            observed={"load": load_E} if moves else {},
        )

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Move the bias by the loads of the routed blocks, [E] or stacked [layers, E]; count the step."""
        if self.bias_E is not None:
            self.bias_E[...] = routers.balanced_bias(self.bias_E[...], observed["load"], self.config.bias_rate)
        if self.steps is not None:
            self.steps[...] = self.steps[...] + 1


def over_blocks(x_BTD: jax.Array, values_BTN: jax.Array) -> jax.Array:
    """`x` with every block multiplied by its value."""
    split_BTNI = x_BTD.reshape(*values_BTN.shape, -1)
    return (split_BTNI * values_BTN[..., None].astype(x_BTD.dtype)).reshape(x_BTD.shape)


def expanded(active_BTN: jax.Array, d_model: int) -> jax.Array:
    """Booleans of blocks as booleans of dimensions, [B, T, D]."""
    return jnp.repeat(active_BTN, d_model // active_BTN.shape[-1], axis=-1)


class RoutedWidth(AllChannels):
    """Maps of a sublayer that compute active blocks only."""

    def __init__(self, config: MoHDConfig, read_BTK: jax.Array, written_BTK: jax.Array):
        self.cut, self.implementation = config.cut, config.implementation
        self.read_BTK, self.written_BTK = read_BTK, written_BTK

    def read(self, x_BTD: jax.Array, weight_DO: jax.Array) -> jax.Array:
        return from_blocks(x_BTD, self.read_BTK, weight_DO, self.cut, implementation=self.implementation)

    def write(self, y: jax.Array, weight: jax.Array) -> jax.Array:
        y_BTO, weight_OD = y.reshape(*y.shape[:2], -1), weight.reshape(-1, weight.shape[-1])
        return to_blocks(y_BTO, self.written_BTK, weight_OD, self.cut, implementation=self.implementation)


class Fusion(nnx.Module):
    """`y + M y` with the Monarch matrix `M = P^T L P R` (Dao et al., arXiv 2204.00595, section 3), or R alone.

    On y as [P, Q] (b1 groups of b2): R mixes within each group, L across groups at each place. The last factor starts
    at 0 and the one before it as the identity, so the whole starts as `y`.
    """

    def __init__(self, config: MoHDConfig, ctx: BuildContext):
        self.dtype = ctx.dtype
        groups, size = config.fusion_shape(ctx.d_model)
        identity = jnp.broadcast_to(jnp.eye(size, dtype=ctx.param_dtype), (groups, size, size))
        crosses = config.fusion != "block_diagonal"
        self.within_PQQ = nnx.Param(identity if crosses else jnp.zeros_like(identity), axes=("embed", "latent", None))
        self.across_QPP = ctx.constant(0.0, (size, groups, groups), ("embed", "latent", None)) if crosses else None

    def __call__(self, y_BTD: jax.Array) -> jax.Array:
        groups, size, _ = self.within_PQQ.shape
        mixed = y_BTD.reshape(*y_BTD.shape[:-1], groups, size)
        mixed = product(jnp.einsum("btpq,pjq->btpj", mixed, replicate(self.within_PQQ[...].astype(self.dtype))))
        if self.across_QPP is not None:
            across_QPP = replicate(self.across_QPP[...].astype(self.dtype))
            mixed = product(jnp.einsum("btpj,jip->btij", mixed, across_QPP))
        return y_BTD + mixed.reshape(y_BTD.shape)


class MoHD(Residual):
    """Residual connection whose sublayer sees a routed part of the stream; see `MoHDConfig`."""

    def __init__(self, config: MoHDConfig, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, *, routes: bool):
        self.config = config
        self.pre = norm.build(ctx)
        self.post = norm.build(ctx) if config.post_norm else None
        self.router = BlockRouter(config, ctx, rngs) if routes else None
        self.output_router = BlockRouter(config, ctx, rngs) if routes and config.output_blocks == "routed" else None
        self.fusion = None if config.fusion == "none" else Fusion(config, ctx)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, sublayer: Sublayer[Extra]) -> Joined[Extra]:
        config, d = self.config, x_BTD.shape[-1]
        normed_BTD = self.pre(x_BTD)
        routing, aux = self._route(normed_BTD, ctx)
        read, written = routing
        h_BTD = self.pre(x_BTD, where=expanded(read.active_BTN, d)) if config.norm_after_mask else normed_BTD
        # The masked form is the plain sublayer between these masks; the grouped one leaves out what they make 0.
        width = RoutedWidth(config, read.routed_BTK, written.routed_BTK) if config.grouped else WHOLE
        y_BTD, extra = sublayer(over_blocks(h_BTD, read.gates_BTN), replace(ctx, width=width))
        mask_BTD = expanded(written.active_BTN, d)
        y_BTD = jnp.where(mask_BTD, y_BTD, 0)
        if self.post is not None:
            y_BTD = self.post(y_BTD, where=mask_BTD)
        if config.output_blocks == "routed":
            y_BTD = over_blocks(y_BTD, written.gates_BTN)
        if self.fusion is not None:
            y_BTD = self.fusion(y_BTD)
        return Joined(x_BTD + y_BTD, extra, aux, routing)

    def _route(self, normed_BTD: jax.Array, ctx: CallContext) -> tuple[tuple[Chosen, Chosen], LayerAux]:
        if self.router is None:
            return ctx.routing, LayerAux()
        read, aux = self.router(normed_BTD, ctx)
        observed = {"router": aux.observed} if aux.observed else {}
        written = read
        if self.output_router is not None:
            written, second = self.output_router(normed_BTD, ctx)
            observed |= {"output_router": second.observed} if second.observed else {}
            aux = aux.averaged(second)
        return (read, written), aux._replace(observed=observed)

    def active_share(self) -> float | None:
        """Share of the width that the sublayer's maps compute; None: all of it."""
        return self.config.delta if self.config.grouped else None

    def maps(self) -> tuple[nnx.Module, ...]:
        """Its routers and its fusion."""
        return tuple(part for part in (self.router, self.output_router, self.fusion) if part is not None)

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Let the routers move what is no parameter; values are single or stacked as their variables are."""
        for i, (name, values) in enumerate(observed.items()):
            getattr(self, name).after_step(values, jax.random.fold_in(key, i))


def routed_blocks(hidden_BTD: jax.Array, config: MoHDConfig) -> jax.Array:
    """The routed blocks [B, T, K] in which states that a `RoutedHead` made are not 0."""
    split_BTNI = hidden_BTD.reshape(*hidden_BTD.shape[:2], config.blocks, -1)
    used_BTE = jnp.any(split_BTNI[..., config.shared :, :] != 0, axis=-1)
    return jax.lax.top_k(used_BTE.astype(jnp.float32), config.routed)[1] + config.shared


class RoutedHead(Head):
    """The part of the final state that the output projection reads, chosen by a router of its own."""

    def __init__(self, config: MoHDConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config = config
        self.router = BlockRouter(config, ctx, rngs)

    def __call__(self, x_BTD: jax.Array, norm: Norm, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        """The normalised state [B, T, D], gated, zero outside each token's blocks."""
        h_BTD = norm(x_BTD)
        chosen, aux = self.router(h_BTD, ctx)
        if self.config.norm_after_mask:
            h_BTD = norm(x_BTD, where=expanded(chosen.active_BTN, x_BTD.shape[-1]))
        return over_blocks(h_BTD, chosen.gates_BTN), aux._replace(stats={})

    def project(self, hidden_BTD: jax.Array, weight_DV: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`hidden W` in `dtype` for states that this made; grouped forms find each token's blocks by their being not 0.

        A block of a token that is 0 all over adds nothing, whether it was chosen or not.
        """
        config = self.config
        if config.implementation == "dense":
            return matmul(hidden_BTD, weight_DV, dtype)
        routed_BTK, form = routed_blocks(hidden_BTD, config), config.implementation
        return from_blocks(hidden_BTD, routed_BTK, weight_DV, config.cut, dtype=dtype, implementation=form)

    def maps(self) -> tuple[nnx.Module, ...]:
        """Its router."""
        return (self.router,)

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Let the router move what is no parameter."""
        self.router.after_step(observed, key)
