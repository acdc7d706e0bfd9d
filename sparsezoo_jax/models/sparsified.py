"""Layers that leave out channels of their maps' inputs: activation sparsity after training.

Any attention or feed-forward kind whose maps take their inputs through `Width.channels` can be wrapped. A channel of a
token's input has a score, and a map reads the channels whose score is above a threshold, or as many of the largest as
it may. With all thresholds 0 the layer computes what the wrapped one does; its weights are the same.

Sources: CATS (arXiv 2404.08763), TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427), R-Sparse (arXiv 2504.19449).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.contract import (
    FFN,
    Attention,
    AttentionConfig,
    AttentionKind,
    FFNConfig,
    FFNKind,
    MapSize,
    Observed,
    Part,
    register_attention,
    register_ffn,
)
from sparsezoo_jax.models.records import MAPS, input_of, scores_of
from sparsezoo_jax.models.topk import top_k_mask
from sparsezoo_jax.models.width import Weight, WholeWidth
from sparsezoo_jax.pallas_kernels.grouped_ffn import Channels

#: The map name of the neurons of a gated network: their gates are scored, after the non-linearity (CATS).
NEURONS = "neurons"
#: The same of the experts that all tokens take; and the maps of these neurons.
SHARED_NEURONS = "shared_neurons"
_OF_NEURONS = {NEURONS: {"up", "down"}, SHARED_NEURONS: {"shared_up", "shared_down"}}
#: Maps that read the residual stream.
STREAM_MAPS = frozenset({"q", "k", "v", "gate", "up"})
#: Statistics of a sparsified layer: this and the name of a map; share of the channels that a token reads.
DENSITY = "density_"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ActivationSparsity:
    """Which channels the maps of a layer read: score, then gate, then the product with what is left."""

    maps: tuple[str, ...] = Field(min_length=1)
    """Maps that leave channels out: q, q_up (from a latent of queries), k, v, o, gate, up, down, or neurons (both up
    and down, by the gate's output); shared_gate and so on of experts that all tokens take."""
    target: float
    """Share of channels that is to be left out; accounting counts with it."""
    gate: Literal["threshold", "top_k"] = "threshold"
    """threshold: channels with a score above that of the map and layer; top_k: a fixed number, those of the largest."""
    weighted: tuple[str, ...] = ()
    """Maps whose score is |x_i| ||W_i||, W_i the weights of channel i (WINA); of the others it is |x_i| (TEAL)."""
    dense_tokens: int = 0
    """First tokens of a document that read everything."""
    rotate: bool = False
    """Sublayers read the stream in a basis of their own, by a matrix before their maps; its channels are what is left
    out (WINA's transformation)."""
    ranks: tuple[int, ...] = ()
    """For each of the maps the rank of a low-rank map that reads the channels left out, 0 for none (R-Sparse); none at
    all: they are left out everywhere."""

    def __post_init__(self):
        for name in self.maps:
            require(name in MAPS, "sparsity.maps", name, f"must be one of {', '.join(MAPS)}")
        for field in ("maps", "weighted"):
            names = getattr(self, field)
            require(len(set(names)) == len(names), f"sparsity.{field}", ",".join(names), "must name each map once")
        others = ",".join(name for name in self.weighted if name not in self.maps or name in _OF_NEURONS)
        require(not others, "sparsity.weighted", others, "must be among the maps, and not neurons")
        require(0 <= self.target < 1, "sparsity.target", self.target, "must be in [0, 1)")
        require(self.dense_tokens >= 0, "sparsity.dense_tokens", self.dense_tokens, "must be at least 0")
        count = f"must be one for each of the {len(self.maps)} maps, at least 0, or none at all"
        fits = len(self.ranks) in (0, len(self.maps)) and all(rank >= 0 for rank in self.ranks)
        require(fits, "sparsity.ranks", ",".join(map(str, self.ranks)), count)
        for neurons, others in _OF_NEURONS.items():
            require(not self.rank(neurons), "sparsity.ranks", self.rank(neurons), f"must be 0 for {neurons}")
            twice = neurons in self.maps and not others.isdisjoint(self.maps)
            allowed = f"can't have {neurons} beside {' or '.join(sorted(others, reverse=True))}"
            require(not twice, "sparsity.maps", ",".join(self.maps), allowed)

    def rank(self, name: str) -> int:
        """That of the map that reads what the map called `name` leaves out; 0: there is none."""
        return self.ranks[self.maps.index(name)] if self.ranks and name in self.maps else 0

    def rotated(self, maps: dict[str, MapSize]) -> bool:
        """Whether a layer of these maps reads the stream in a basis of its own."""
        return self.rotate and not STREAM_MAPS.isdisjoint(self.of(maps))

    def of(self, maps: dict[str, MapSize]) -> tuple[str, ...]:
        """Those of a layer's maps that leave channels out, in the layer's order.

        Raises:
          ConfigError: none of them.
        """
        found = tuple(name for name in maps if name in self.maps)
        allowed = f"must have one of the layer's maps, {', '.join(maps) or 'of which none is known'}"
        require(bool(found), "sparsity.maps", ",".join(self.maps), allowed)
        return found

    def saved(self, maps: dict[str, MapSize], *, counted: bool) -> float:
        """Weights of a layer that a token does not need because of what is left out.

        `counted`: neurons that are left out are not among the channels read, because they were measured.
        """
        return sum(
            size.weights * max(0.0, size.read - (1 - self.target) * size.channels)
            for name, size in maps.items()
            if name in self.maps and not (counted and name == NEURONS)
        )


class Cut(nnx.Variable):
    """Of each map of a layer the threshold of its scores, or the share of channels left out: no parameter."""


def channel_norms(weight: jax.Array, axes: int) -> jax.Array:
    """Norms of the weights of each input channel, float32: of a matrix [..., O] with `axes` axes of inputs."""
    return jnp.linalg.norm(weight.astype(jnp.float32).reshape(*weight.shape[:axes], -1), axis=-1)


def _above(score: jax.Array, cut: jax.Array) -> jax.Array:
    return score > cut


def _largest(score: jax.Array, cut: jax.Array) -> jax.Array:
    channels = score.shape[-1]
    kept = jnp.round((1 - cut) * channels).astype(jnp.int32)
    return top_k_mask(score, jnp.clip(kept, 1, channels))


#: Which channels are read, of their scores, float32 [..., I] and at least 0, and of a map's cut.
GATES = {"threshold": _above, "top_k": _largest}


class OfExpert(NamedTuple):
    """What decides on the channels of one map of experts."""

    cut_E1: jax.Array
    """The map's cut, the same for all of them."""
    norms_EI: jax.Array | None
    """Norms of each expert's weights of the channels, where scores have them."""


def _masked(gate: str, x: jax.Array, own: OfExpert) -> jax.Array:
    score = jax.lax.stop_gradient(jnp.abs(x).astype(jnp.float32))
    score = score if own.norms_EI is None else score * own.norms_EI
    cut = jnp.max(own.cut_E1) if gate == "top_k" else own.cut_E1
    return jnp.where(GATES[gate](score, cut), x, 0)


#: The same of experts, for `grouped_ffn.Channels`.
_MASKED = {name: partial(_masked, name) for name in GATES}


class Masks(nnx.Module):
    """Which channels the maps of a layer leave out; `cut_P` has an entry for each of `names`, 0 leaves nothing out."""

    def __init__(self, config: ActivationSparsity, names: tuple[str, ...]):
        self.config, self.names = config, names
        self.cut_P = Cut(jnp.zeros(len(names), jnp.float32), axes=(None,))

    def cut(self, name: str) -> jax.Array:
        """Threshold, or share of channels left out, of one map."""
        return self.cut_P[self.names.index(name)]

    def kept(self, name: str, score: jax.Array) -> jax.Array:
        """Which channels a map reads, by their scores float32 [..., I], which are at least 0."""
        return GATES[self.config.gate](score, self.cut(name))


class Rotation(nnx.Module):
    """`x R` for a sublayer's input x [B, T, D]; R is the identity at first."""

    def __init__(self, ctx: BuildContext):
        self.rotation_DD = nnx.Param(jnp.eye(ctx.d_model, dtype=ctx.param_dtype), axes=(None, None))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D]."""
        return x_BTD @ self.rotation_DD[...].astype(x_BTD.dtype)


class LowRank(nnx.Module):
    """`x A B` for x [..., I]: A [I, R], B [R, O], which start as 0."""

    def __init__(self, inputs: int, rank: int, outputs: int, dtype: jnp.dtype):
        self.a_IR = nnx.Param(jnp.zeros((inputs, rank), dtype), axes=(None, None))
        self.b_RO = nnx.Param(jnp.zeros((rank, outputs), dtype), axes=(None, None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., O]."""
        return (x @ self.a_IR[...].astype(x.dtype)) @ self.b_RO[...].astype(x.dtype)


def bypasses(config: ActivationSparsity, layer: Part, maps: dict[str, MapSize], ctx: BuildContext) -> nnx.Dict:
    """For the maps of a layer with a rank, what reads the channels that they leave out."""
    made = {}
    for name in config.of(maps):
        if rank := config.rank(name):
            channels = maps[name].channels
            matrix: Any = layer
            for part in layer.matrices[name].split("/"):
                matrix = getattr(matrix, part)
            made[name] = LowRank(channels, rank, matrix[...].size // channels, ctx.param_dtype)
    return nnx.Dict(made)


class MaskedWidth(WholeWidth):
    """One call of a layer with `Masks`: the whole width, by active channels, and what was seen of them."""

    def __init__(
        self, masks: Masks, ctx: CallContext, bypass: nnx.Dict | None = None, norms: dict[str, jax.Array] | None = None
    ):
        """`bypass`: by map, `LowRank` maps of what it leaves out.

        `norms`: of the weights of channels by map, [I], for layers that have laid them out; default: by the weights.

        The context is that of the layer's call.
        """
        self.masks, self.ctx, self.norms = masks, ctx, norms
        self.bypass: Any = {} if bypass is None else bypass
        self.of_maps: dict[str, OfExpert] = {}
        self.left_out: dict[str, jax.Array] = {}
        self.densities: dict[str, jax.Array] = {}
        self.records: dict[str, jax.Array] = {}

    def channels(self, name: str, x: jax.Array, weight: Weight | None = None) -> jax.Array:
        masks, ctx = self.masks, self.ctx
        if name not in masks.names:
            return x
        flat_BTI = x.reshape(*x.shape[:2], -1)
        score_BTI = jax.lax.stop_gradient(jnp.abs(flat_BTI).astype(jnp.float32))
        if name in masks.config.weighted:
            assert weight is not None
            norms = channel_norms(weight(), x.ndim - 2).reshape(-1) if self.norms is None else self.norms[name]
            score_BTI = score_BTI * jax.lax.stop_gradient(norms)
        kept_BTI = masks.kept(name, score_BTI)
        if masks.config.dense_tokens:
            kept_BTI |= (ctx.positions_BT < masks.config.dense_tokens)[..., None]
        masked_BTI = jnp.where(kept_BTI, flat_BTI, 0)
        if name in self.bypass:
            self.left_out[name] = jnp.where(kept_BTI, 0, flat_BTI)
        active_BT = jnp.mean(masked_BTI != 0, axis=-1, dtype=jnp.float32)
        self.densities[DENSITY + name] = ctx.mean_over_tokens(active_BT)
        self.records |= ctx.recorded({input_of(name): lambda: flat_BTI, scores_of(name): lambda: score_BTI})
        return masked_BTI.reshape(x.shape)

    def added(self, name: str, y: jax.Array) -> jax.Array:
        if name not in self.left_out:
            return y
        return y + self.bypass[name](self.left_out[name]).reshape(y.shape)

    def of_experts(self, experts: int, weights: Mapping[str, Weight | None]) -> Channels | None:
        masks, ctx = self.masks, self.ctx
        for name, weight in weights.items():
            if name not in masks.names:
                continue
            norms_EI = None
            if name in masks.config.weighted:
                assert weight is not None
                norms_EI = jax.lax.stop_gradient(channel_norms(weight(), 2))
            self.of_maps[name] = OfExpert(jnp.full((experts, 1), masks.cut(name)), norms_EI)
        if not self.of_maps:
            return None
        first = masks.config.dense_tokens
        whole_BT = ctx.positions_BT < first if first else None
        return Channels(_MASKED[masks.config.gate], self.of_maps, masks.config.gate == "top_k", whole_BT)

    def experts(
        self,
        name: str,
        read: Callable[[jax.Array], jax.Array],
        taken_BTE: jax.Array,
        norms_EI: jax.Array | None = None,
    ) -> None:
        # Nothing is recorded: all experts' inputs would be too large. The width around this may look at them by turns.
        if name in self.of_maps:
            self.ctx.width.experts(name, read, taken_BTE, self.of_maps[name].norms_EI)

    def experts_read(self, name: str, shares_BTK: jax.Array, taken_BTK: jax.Array) -> None:
        counted_BTK = taken_BTK & self.ctx.valid_BT[..., None]
        total = jnp.sum(jnp.where(counted_BTK, shares_BTK, 0))
        self.densities[DENSITY + name] = total / jnp.maximum(jnp.sum(counted_BTK, dtype=jnp.float32), 1)

    def seen(self, aux: LayerAux) -> LayerAux:
        """`aux` of the layer with the densities of its maps and their records."""
        stats = {**aux.stats, **self.densities}
        # A mixture's density is that of its experts.
        if DENSITY + NEURONS in stats and NEURONS not in self.of_maps:
            stats["ffn_density"] = stats[DENSITY + NEURONS]
        return aux._replace(stats=stats, records={**aux.records, **self.records})


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparsifiedFFNConfig(FFNKind):
    """A trained feed-forward network whose maps leave out channels of their inputs."""

    kind: Literal["sparsified"] = "sparsified"
    of: FFNConfig
    """The network as it was trained."""
    sparsity: ActivationSparsity
    """What is left out."""

    def __post_init__(self):
        require(self.of.kind != self.kind, "model.ffn.of.kind", self.of.kind, "must be another kind")
        self.sparsity.of(self.of.linear_maps(1))

    @property
    def d_ff(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Neurons."""
        return self.of.d_ff

    def check(self, d_model: int) -> None:
        """Raise `ConfigError` for a width that the network can't be built into."""
        self.of.check(d_model)

    def for_layer(self, layer: int, layers: int) -> Self:
        """The configuration of one layer."""
        return replace(self, of=self.of.for_layer(layer, layers))

    @property
    def samples(self) -> bool:
        """Whether training needs random numbers."""
        return self.of.samples

    @property
    def shared(self) -> int:
        """Experts that every token takes."""
        return self.of.shared

    @property
    def expert_width(self) -> int:
        """Neurons of one expert, of a network that has experts."""
        of: Any = self.of
        return of.expert_width

    @property
    def target_active(self) -> float | None:
        """Neurons that the network's own selection aims at."""
        return self.of.target_active

    def idle_parameters(self, d_model: int) -> int:
        """Parameters that no token needs all at once."""
        return self.of.idle_parameters(d_model)

    def on_mesh(self, shape: tuple[int, int, int]) -> str | None:
        """As of the network itself."""
        return self.of.on_mesh(shape)

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons, measured with what is left out (None: as aimed at)."""
        saved = self._saved(d_model, active)
        return self.of.weights(d_model, active) - saved

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token, `active` as above; a multiply-add counts 2."""
        saved = self._saved(d_model, active)
        return self.of.flops(d_model, active) - 2 * saved

    def _saved(self, d_model: int, active: float | None) -> float:
        maps = self.of.linear_maps(d_model, active)
        saved = self.sparsity.saved(maps, counted=active is not None and NEURONS not in self.of.expert_maps)
        return saved - d_model**2 * self.sparsity.rotated(maps)

    def dense_twin(self) -> FFNKind | None:
        """The layer of equal parameters that computes all neurons."""
        return self.of.dense_twin()

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> SparsifiedFFN:
        return SparsifiedFFN(self, ctx, rngs)


class SparsifiedFFN(FFN):
    """A feed-forward network with masks on its maps' inputs; see `SparsifiedFFNConfig`."""

    def __init__(self, config: SparsifiedFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config = config
        self.inner = config.of.build(ctx, rngs)
        maps = config.of.linear_maps(ctx.d_model)
        self.masks = Masks(config.sparsity, config.sparsity.of(maps))
        self.bypass = bypasses(config.sparsity, self.inner, maps, ctx)
        self.rotation = Rotation(ctx) if config.sparsity.rotated(maps) else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        width = MaskedWidth(self.masks, ctx, self.bypass)
        x_BTD = x_BTD if self.rotation is None else self.rotation(x_BTD)
        y_BTD, aux = self.inner(x_BTD, replace(ctx, width=width))
        return y_BTD, width.seen(aux)

    @property
    def dictionary(self) -> jax.Array | None:
        """As of the network itself."""
        return self.inner.dictionary

    def prepare(self) -> None:
        self.inner.prepare()

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """As of the network itself."""
        self.inner.after_step(observed, key)


@register_attention
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparsifiedAttentionConfig(AttentionKind):
    """A trained attention layer whose maps leave out channels of their inputs."""

    kind: Literal["sparsified"] = "sparsified"
    of: AttentionConfig
    """The attention as it was trained."""
    sparsity: ActivationSparsity
    """What is left out."""

    def __post_init__(self):
        require(self.of.kind != self.kind, "model.attention.of.kind", self.of.kind, "must be another kind")
        self.sparsity.of(self.of.linear_maps(1))

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Query heads."""
        return self.of.heads

    @property
    def window(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys that a query of a local layer sees."""
        return self.of.window

    def check(self, d_model: int) -> None:
        """Raise `ConfigError` for a width that the attention can't be built into."""
        self.of.check(d_model)

    @property
    def score_heads(self) -> int:
        """Heads by which tensor parallelism can split the scores."""
        return self.of.score_heads

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What a token leaves in the cache."""
        return self.of.cache_shapes

    @property
    def target_keys(self) -> int | None:
        """Keys that each query's selection aims at."""
        return self.of.target_keys

    def projection_weights(self, d_model: int) -> int:
        """Weights of the maps from and to the stream that one token needs, of what is aimed at."""
        return round(self.of.projection_weights(d_model) - self._saved(d_model))

    def projection_flops(self, d_model: int) -> float:
        """FLOPs per token of these maps; a multiply-add counts 2."""
        return self.of.projection_flops(d_model) - 2 * self._saved(d_model)

    def _saved(self, d_model: int) -> float:
        maps = self.of.linear_maps(d_model)
        return self.sparsity.saved(maps, counted=False) - d_model**2 * self.sparsity.rotated(maps)

    def mixing_flops(self, keys: int, target: float | None = None) -> float:
        """As of the attention itself."""
        return self.of.mixing_flops(keys, target)

    def cache_reads(self, keys: int, target: float | None = None) -> float:
        """As of the attention itself."""
        return self.of.cache_reads(keys, target)

    def dense_twin(self) -> AttentionKind:
        """The attention that reads all channels of all visible keys."""
        return self.of.dense_twin()

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> SparsifiedAttention:
        return SparsifiedAttention(self, ctx, rngs)


class SparsifiedAttention(Attention):
    """Attention with masks on its maps' inputs; see `SparsifiedAttentionConfig`."""

    def __init__(self, config: SparsifiedAttentionConfig, ctx: BuildContext, rngs: nnx.Rngs):
        super().__init__(config, ctx)
        self.inner = config.of.build(ctx, rngs)
        maps = config.of.linear_maps(ctx.d_model)
        self.masks = Masks(config.sparsity, config.sparsity.of(maps))
        self.bypass = bypasses(config.sparsity, self.inner, maps, ctx)
        self.rotation = Rotation(ctx) if config.sparsity.rotated(maps) else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, cache: Any = None) -> tuple[jax.Array, LayerAux, Any]:
        width = MaskedWidth(self.masks, ctx, self.bypass)
        x_BTD = x_BTD if self.rotation is None else self.rotation(x_BTD)
        y_BTD, aux, cache = self.inner(x_BTD, replace(ctx, width=width), cache)
        return y_BTD, width.seen(aux), cache

    def empty_cache(self, batch: int, length: int) -> Any:
        """A cache as the attention itself has it."""
        return self.inner.empty_cache(batch, length)
