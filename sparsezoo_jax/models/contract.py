"""What a layer kind is: the base classes of its configuration and of its module, and the registries of kinds.

A kind is a frozen configuration dataclass, registered under its `kind`, and the module that its `build` makes.
Members without a body must be defined; the others have the default that most kinds want. docs/kinds.md adds a kind
from outside the package, step by step.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.cache import LayerCache
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux, LayerType
from sparsezoo_jax.models.norms import Norm, NormConfig
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.registry import Kind, Registry

if TYPE_CHECKING:
    from sparsezoo_jax.models.config import DecoderConfig

Extra = TypeVar("Extra")
SublayerName = Literal["attention", "ffn"]
Sublayer = Callable[[jax.Array, CallContext], tuple[jax.Array, Extra]]
#: For each router or bias that observed something, what it observed: nested names to arrays.
Observed = Mapping[str, Any]


class MapSize(NamedTuple):
    """A linear map of which channels of the input may be left out; see `Width.channels`."""

    channels: int
    """Entries of a token's input."""
    weights: float
    """Weights that are not needed for a token that leaves a channel out."""
    read: float
    """Channels that a token reads otherwise."""


class PreGateConfig(NamedTuple):
    """A router that chooses the experts of all layers by the tokens alone."""

    decoder: DecoderConfig
    """What reads the tokens, without its output projection."""
    experts: int
    """Of which every token takes one."""


class Part(nnx.Module):
    """What all modules of a layer share."""

    matrices: ClassVar[Mapping[str, str]] = {}
    """Path within the module of the matrix of each map that its configuration's `weight_maps` names, joined with '/';
    the matrix has the axes of the map's input in its front. "neurons" has none of its own. Default: none is known."""

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Move variables that no gradient moves (a router's bias, dead neurons), after an optimizer step.

        Args:
          observed: what `LayerAux.observed` had, averaged over the step's batch; stacked over layers as variables are.
          key: of random numbers; another one in every step and for every part.
        """
        raise NotImplementedError(f"{type(self).__name__} observes {', '.join(observed)} and defines no after_step")


class FFN(Part):
    """The feed-forward network of one layer."""

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        """The output [B, T, D] for normalised states [B, T, D].

        Statistics hold at least `ffn_density`, the share of neurons that a token activates; exact zeros only count as
        inactive.
        """
        raise NotImplementedError

    @property
    def dictionary(self) -> jax.Array | None:
        """What each of the hidden units (`records.FFN_HIDDEN`) adds to the output when it is 1, [F, D].

        Default: None, for a network that doesn't record them.
        """
        return None

    def prepare(self) -> None:
        """Derive what depends on the weights alone, once, before decoding. Default: nothing."""

    def empty_cache(self, batch: int) -> Any:
        """What decoding `batch` sequences keeps of earlier tokens, a tuple of arrays with an attribute `axes`, the
        logical axes of all of them. Outputs must not depend on which tokens these were: rejected drafts stay in it.

        Default: None, nothing.
        """
        return None

    def decode(self, x_BTD: jax.Array, ctx: CallContext, cache: Any) -> tuple[jax.Array, LayerAux, Any]:
        """As the call, over what was kept of earlier tokens, and what is kept now."""
        raise NotImplementedError(f"{type(self).__name__} has an empty_cache and defines no decode")


class Attention(Part):
    """The attention of one layer."""

    def __init__(self, config: Any, ctx: BuildContext):
        self.config, self.dtype = config, ctx.dtype
        self.layer_type: LayerType = ctx.layer_type

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, cache: Any = None) -> tuple[jax.Array, LayerAux, Any]:
        """The output [B, T, D] for normalised states [B, T, D], and the cache with these tokens in it, if one is given.

        Statistics hold at least `attended_keys`, the keys that a query weighs, averaged over heads.
        """
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """Factor on the scores of `queries_keys`."""
        raise NotImplementedError

    def queries_keys(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, N, H] and keys [B, T, K, H] as they are scored, where `AttentionKind.scores_blocks`."""
        raise NotImplementedError

    def empty_cache(self, batch: int, length: int) -> Any:
        """A cache for `length` tokens of each of `batch` sequences. Default: one array for each of `cache_shapes`.

        A cache of another class has an attribute `axes`, the logical axes of its arrays.
        """
        return LayerCache(*(jnp.zeros((batch, length, *shape), self.dtype) for shape in self.config.cache_shapes))


class Joined(NamedTuple, Generic[Extra]):
    """What a residual connection around a sublayer returns."""

    stream_BTD: jax.Array
    """The stream after the sublayer."""
    extra: Extra
    """Whatever the sublayer returned beside its output."""
    aux: LayerAux = LayerAux()
    """Losses, statistics and observations of the connection itself."""
    routing: Any = None
    """What the next connection of the same layer finds as `CallContext.routing`."""


class Residual(Part):
    """The connection of one sublayer with the residual stream."""

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, sublayer: Sublayer[Extra]) -> Joined[Extra]:
        """The stream [B, T, D] after `sublayer`, which gets what it reads of it, and a context."""
        raise NotImplementedError

    def active_share(self) -> float | None:
        """Share of the width that the sublayer's maps compute; None: all of it."""
        return None

    def maps(self) -> tuple[nnx.Module, ...]:
        """Modules of the connection with matrices of their own (routers, fusions); every token reads all of them."""
        return ()


class Head(Part):
    """The final norm's place in the residual kind: what of the final state the output projection reads."""

    def __call__(self, x_BTD: jax.Array, norm: Norm, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        """The final state [B, T, D] after its norm. Default: all of it."""
        return norm(x_BTD), LayerAux()

    def project(self, hidden_BTD: jax.Array, weight_DV: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`hidden W`, [B, T, V] in `dtype`, for states that this made; another form may only leave out what is 0."""
        return matmul(hidden_BTD, weight_DV, dtype)

    def maps(self) -> tuple[nnx.Module, ...]:
        """Modules of the head with matrices of their own; every token reads all of them."""
        return ()


class FFNKind(Kind):
    """Configuration of a feed-forward network. Neurons are counted over all experts where there are some."""

    d_ff: int
    """Neurons."""
    partial_width: ClassVar[bool] = False
    """Whether all maps from and to the residual stream are made by `CallContext.width`, so that it can be routed."""
    expert_maps: ClassVar[frozenset[str]] = frozenset()
    """Those of its maps that each expert has for itself; see `expert_axis`."""
    records_hidden: ClassVar[bool] = False
    """Whether the module records `records.FFN_HIDDEN`, by which blocks of tokens are scored (`models.elimination`), and
    treats each token apart from the others."""

    def check(self, d_model: int) -> None:
        """Raise `ConfigError` for a width that this can't be built into."""

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """Maps whose inputs pass through `Width.channels`, by name; `active` as in `weights`. Default: none.

        "neurons" is what the gate of a gated network multiplies: a neuron that is left out needs no other weights. Of
        `expert_maps` the inputs pass through `Width.of_experts`; sizes are those of one expert, weights of a token's.
        """
        return {}

    def weight_maps(self, d_model: int) -> dict[str, int]:
        """Maps whose weights can be pruned, by name: channels of their inputs. Default: those of `linear_maps`."""
        return {name: size.channels for name, size in self.linear_maps(d_model).items()}

    def expert_axis(self, name: str) -> tuple[int, int]:
        """Of the parameter of one of `expert_maps` the axis along which experts lie one after another, and how many."""
        raise NotImplementedError(f"{type(self).__name__} has expert_maps and defines no expert_axis")

    def for_layer(self, layer: int, layers: int) -> Self:
        """The configuration of one layer, counted from 0. Default: all are alike."""
        return self

    @property
    def samples(self) -> bool:
        """Whether training needs random numbers."""
        return False

    @property
    def shared(self) -> int:
        """Experts that every token takes; they come first."""
        return 0

    @property
    def target_active(self) -> float | None:
        """Neurons that a token's selection aims at; None where nothing is selected by count."""
        return None

    def pre_gate(self, config: DecoderConfig) -> PreGateConfig | None:
        """The one router of all layers of this kind in a decoder; layers find its choice as `CallContext.experts`.

        Default: None, for layers that route by themselves or not at all.
        """
        return None

    @abc.abstractmethod
    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: those that are aimed at, or all)."""

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token, `active` as above; a multiply-add counts 2. Default: twice the weights."""
        return 2 * self.weights(d_model, active)

    def idle_parameters(self, d_model: int) -> int:
        """Parameters that no token needs all at once: those of experts beyond a fixed number of chosen ones."""
        return 0

    def on_mesh(self, shape: tuple[int, int, int]) -> str | None:
        """One line on how the devices of the active mesh share the layer's work, for a stream [B, T, D] of this shape.

        Default: None, nothing to say.
        """
        return None

    def dense_twin(self) -> FFNKind | None:
        """The layer of equal parameters that computes all neurons; None where there is none."""
        return None

    def upcycled(
        self, source: FFNKind, weights: Mapping[str, jax.Array], noise: float, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Parameters by name, made of those of a layer of another kind.

        Args:
          source: that layer's configuration.
          weights: its parameters by name, with any leading axes.
          noise: relative standard deviation of what makes copies differ.
          key: of the noise.

        Raises:
          ConfigError: they can't be made of that.
        """
        raise ConfigError("train.init_from", source.kind, f"an FFN of kind {self.kind} can't be made of another kind")

    @abc.abstractmethod
    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> FFN:
        """The module of one layer."""


class AttentionKind(Kind):
    """Configuration of an attention layer."""

    shares_keys: ClassVar[bool] = False
    """Whether layers may attend to keys and values of others: `build` looks at `BuildContext.keys`."""

    scores_blocks: ClassVar[bool] = False
    """Whether the module has `queries_keys`, by which blocks of tokens are scored (`models.elimination`)."""

    heads: int
    """Query heads."""
    window: int | None
    """Keys that a query of a local layer sees, itself included; None where there are no local layers."""
    partial_width: ClassVar[bool] = False
    """As in `FFNKind`."""

    def check(self, d_model: int) -> None:
        """Raise `ConfigError` for a width that this can't be built into."""

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """Maps whose inputs pass through `Width.channels`, by name. Default: none."""
        return {}

    def weight_maps(self, d_model: int) -> dict[str, int]:
        """Maps whose weights can be pruned, by name: channels of their inputs. Default: those of `linear_maps`."""
        return {name: size.channels for name, size in self.linear_maps(d_model).items()}

    @property
    def fixed_length(self) -> int | None:
        """Tokens of every sequence, where they are mixed by their places and in both directions, which is for images.

        Default: None, any number.
        """
        return None

    @property
    @abc.abstractmethod
    def score_heads(self) -> int:
        """Heads by which tensor parallelism can split the scores."""

    @property
    @abc.abstractmethod
    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What a token leaves in the cache: two arrays [heads, width], usually keys and values."""

    @property
    def target_keys(self) -> int | None:
        """Keys that each query's selection aims at; None where all visible keys are attended."""
        return None

    @abc.abstractmethod
    def projection_weights(self, d_model: int) -> int:
        """Weights of the maps from and to the stream that one token needs."""

    def projection_flops(self, d_model: int) -> float:
        """FLOPs per token of these maps; a multiply-add counts 2. Default: twice the weights."""
        return 2 * self.projection_weights(d_model)

    def key_weights(self, d_model: int) -> int:
        """Of `projection_weights` those that a layer with keys and values of another lacks. Default: none."""
        return 0

    @abc.abstractmethod
    def mixing_flops(self, keys: int, target: float | None = None) -> float:
        """FLOPs per token of scores and mixing over `keys` visible keys, `target` of them attended (None: as aimed)."""

    @abc.abstractmethod
    def cache_reads(self, keys: int, target: float | None = None) -> float:
        """Numbers that one token reads from a cache of `keys` visible keys; `target` as above."""

    def dense_twin(self) -> AttentionKind:
        """Attention of equal parameters to all visible keys. Default: this one."""
        return self

    @abc.abstractmethod
    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> Attention:
        """The module of one layer."""


class ResidualKind(Kind):
    """Configuration of how sublayers join the residual stream."""

    def check(self, d_model: int, attention: AttentionKind, ffn: FFNKind) -> None:
        """Raise `ConfigError` for a decoder that this can't be the residual connection of."""

    def fan_in(self, d_model: int) -> int:
        """Dimensions by which sublayers scale the initial weights that read the stream."""
        return d_model

    def active_width(self, d_model: int, sublayer: SublayerName | Literal["head"]) -> int:
        """Dimensions of the stream that a token's sublayer (or the output projection) reads or writes."""
        return d_model

    def weights(self, d_model: int, sublayer: SublayerName | Literal["head"]) -> float:
        """Matrix weights of the connection (or the head) that one token needs."""
        return 0

    def dense_twin(self) -> ResidualKind:
        """The connection of equal parameters whose sublayers see all of the stream. Default: this one."""
        return self

    @abc.abstractmethod
    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, sublayer: SublayerName) -> Residual:
        """The connection of one sublayer."""

    def build_head(self, ctx: BuildContext, rngs: nnx.Rngs) -> Head:
        """What the output projection reads."""
        return Head()


FFN_KINDS: Registry[FFNKind] = Registry("model.ffn", FFNKind)
ATTENTION_KINDS: Registry[AttentionKind] = Registry("model.attention", AttentionKind)
RESIDUAL_KINDS: Registry[ResidualKind] = Registry("model.residual", ResidualKind)
register_ffn = FFN_KINDS.register
register_attention = ATTENTION_KINDS.register
register_residual = RESIDUAL_KINDS.register

FFNConfig = Annotated[FFNKind, FFN_KINDS]
AttentionConfig = Annotated[AttentionKind, ATTENTION_KINDS]
ResidualConfig = Annotated[ResidualKind, RESIDUAL_KINDS]
