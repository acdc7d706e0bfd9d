"""Which channels of their inputs the maps of a layer leave out, token by token; `models.sparsified` has the layers.

A channel of a token's input has a score, and a map reads the channels whose score is above a threshold, or as many of
the largest as it may.

Sources: CATS (arXiv 2404.08763), TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427), R-Sparse (arXiv 2504.19449).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import CallContext, LayerAux
from sparsezoo_jax.models.contract import MapSize
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


class MaskedWidth(WholeWidth):
    """One call of a layer with `Masks`: the whole width, by active channels, and what was seen of them."""

    def __init__(
        self, masks: Masks, ctx: CallContext, bypass: nnx.Dict | None = None, norms: dict[str, jax.Array] | None = None
    ):
        """`bypass`: by map, `LowRank` maps of what it leaves out.

        `norms`: of the weights of channels by map, [I] or of experts [E, I], for layers that have laid them out;
        default: by the weights.

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
        found: dict[str, OfExpert] = {}
        for name, weight in weights.items():
            if name not in masks.names:
                continue
            norms_EI = None
            if name in masks.config.weighted:
                assert weight is not None
                norms_EI = channel_norms(weight(), 2) if self.norms is None else self.norms[name]
                norms_EI = jax.lax.stop_gradient(norms_EI.reshape(experts, -1))
            found[name] = OfExpert(jnp.full((experts, 1), masks.cut(name)), norms_EI)
        if not found:
            return None
        self.of_maps |= found
        first = masks.config.dense_tokens
        whole_BT = ctx.positions_BT < first if first else None
        return Channels(_MASKED[masks.config.gate], found, masks.config.gate == "top_k", whole_BT)

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
