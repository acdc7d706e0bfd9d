"""What every layer kind shares: building context, initialisers, call context and the auxiliary results of a layer.

Shape letters in this package: B batch, T query position, S key position, D model width, F FFN width, N query heads,
K key/value heads, H head width, E experts, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass as config_dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.activations import ACTIVATIONS
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility

LayerType = Literal["global", "local"]
KeysOf = Literal["own", "kept", "reused"]
"""Whose keys and values a layer attends to: its own, its own that later layers get too, or those that they get."""
DType = Literal["float32", "bfloat16"]


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class InitConfig:
    """How weights start."""

    kind: Literal["fan_in", "fixed"] = "fan_in"
    """fan_in: normal with std = scale / sqrt(inputs); fixed: normal with std = scale."""
    scale: float = 1.0
    """Scale of the above."""
    embedding_std: float | None = None
    """Standard deviation of embeddings. None: 1 / sqrt(d_model) under fan_in, `scale` under fixed."""
    output_std: float | None = None
    """Standard deviation of an untied output projection. None: as any other matrix."""
    width_base: int | None = None
    """Divide the std of matrices by sqrt(d_model / width_base) (MiniCPM, with kind fixed: 256). None: don't."""
    residual_depth_scaling: bool = False
    """Divide the std of projections that write to the residual stream by sqrt(2 * layers), as GPT-2 does."""

    def __post_init__(self):
        require(self.scale > 0, "model.init.scale", self.scale, "must be above 0")
        for name in ("embedding_std", "output_std", "width_base"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.init.{name}", value, "must be above 0 or None")


@dataclass(frozen=True)
class BuildContext:
    """What a layer kind needs to know of the decoder it is built into."""

    d_model: int
    layers: int
    init: InitConfig
    param_dtype: jnp.dtype
    dtype: jnp.dtype
    layer_type: LayerType = "global"
    stream_fan_in: int | None = None
    """Fan-in of sublayers' maps from the residual stream. None: all of its width."""
    first_layers: int = 0
    """Layers at the bottom that have another feed-forward network."""
    keys: KeysOf = "own"
    """Whose keys and values the layer attends to."""

    @property
    def fan_in(self) -> int:
        """Fan-in of maps from the residual stream."""
        return self.d_model if self.stream_fan_in is None else self.stream_fan_in

    def weight(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        inputs: int,
        *,
        scale: float = 1.0,
        std: float | None = None,
        output: bool = False,
    ) -> nnx.Param:
        """A normally initialised parameter; `axes` are its logical axis names, `inputs` its fan-in.

        `output=True` marks a projection that writes to the residual stream. A given `std` takes the place of that of
        the decoder's `init`; `scale` multiplies the latter.
        """
        deviation = scale * self.deviation(inputs) if std is None else std
        if output and self.init.residual_depth_scaling:
            deviation /= math.sqrt(2 * self.layers)
        return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, self.param_dtype), axes=axes)

    def deviation(self, inputs: int) -> float:
        """Standard deviation of the initial weights of a map with this fan-in."""
        width_base = self.d_model if self.init.width_base is None else self.init.width_base
        own = self.init.scale * (inputs**-0.5 if self.init.kind == "fan_in" else 1.0)
        return own * math.sqrt(width_base / self.d_model)

    def constant(self, value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """A parameter that starts at `value` everywhere (norm scales, biases)."""
        return nnx.Param(jnp.full(shape, value, self.param_dtype), axes=axes)


class LayerAux(NamedTuple):
    """Results of a layer beside its output: losses to be weighted by objectives, and statistics to be reported.

    A kind always returns the same keys, so that layers stack under `jax.lax.scan`. Losses and statistics are scalars;
    records are the internal arrays that the call asked for (see `models.records`); observed are arrays of any shape,
    averages over real tokens, from which an FFN that has them updates variables of its own after each train step
    (see `Decoder.after_step`).
    """

    losses: dict[str, jax.Array] = {}
    stats: dict[str, jax.Array] = {}
    records: dict[str, jax.Array] = {}
    observed: dict[str, jax.Array] = {}

    def merged(self, other: LayerAux) -> LayerAux:
        return LayerAux(*({**mine, **theirs} for mine, theirs in zip(self, other, strict=True)))

    def averaged(self, other: LayerAux) -> LayerAux:
        """Losses and statistics that both have as the mean of the two, those of one as they are; nothing else."""

        def mean(mine: dict[str, jax.Array], theirs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            both = {name: (mine[name] + theirs[name]) / 2 for name in mine.keys() & theirs.keys()}
            return {**mine, **theirs, **both}

        return LayerAux(mean(self.losses, other.losses), mean(self.stats, other.stats))


@dataclass
class CallContext:
    """What the layers of one forward pass share: positions, masks and which tokens are real."""

    positions_BT: jax.Array
    """Position of each token within its document."""
    segments_BT: jax.Array
    """Document of each token; 0 marks padding."""
    valid_BT: jax.Array = field(init=False)
    """True for tokens that are no padding; statistics average over these."""
    visible: dict[LayerType, Visibility] = field(default_factory=dict)
    """For each layer type, which keys each query may see."""
    keys_seen: dict[LayerType, jax.Array] = field(default_factory=dict)
    """For each layer type, how many keys a token may see on average: counted once, not in every layer."""
    cache_end: Any = None
    """First free slot of the key/value cache, when one is in use."""
    record: frozenset[str] = frozenset()
    """Names of internal arrays that the caller wants; see `models.records`."""
    summarise: Any = None
    """Reduces a layer's records before they leave the layer; see `Decoder.__call__`."""
    edit: Any = None
    """Changes the residual stream or an FFN's output; see `Decoder.__call__`."""
    keep: Any = None
    """Says which hidden units an FFN's output keeps; see `Decoder.__call__`."""
    elimination: Any = None
    """`elimination.Elimination` of blocks of tokens; None: layers compute all tokens."""
    layer: Any = 0
    """The layer, or the first of several, where something is edited, kept or eliminated; traced in a scan."""
    rng: jax.Array | None = None
    """Key of the layer's random numbers while it trains; None where the layer must be deterministic."""
    density_eps: jax.Array | None = None
    """Scalar for which FFNs return the loss `models.ffn.smooth_density`; None: they don't."""
    routing: Any = None
    """What the residual connection before, in the same layer, leaves for the next (see `models.residual`)."""
    experts: Any = None
    """`routers.Routing` that one router chose for all layers (`FFNKind.pre_gate`); None where there is none."""
    kept: Mapping[LayerType, Any] = field(default_factory=dict)
    """For each layer type, keys and values of the layer of that type that kept its own last."""
    width: Width = WHOLE
    """How a sublayer reads and writes the residual stream; its residual connection sets it."""

    def __post_init__(self):
        self.valid_BT = self.segments_BT > 0

    def folded(self, index: jax.Array | int) -> CallContext:
        """The same with other random numbers for every `index`."""
        return self if self.rng is None else replace(self, rng=jax.random.fold_in(self.rng, index))

    def of_layer(self, layer: Any) -> CallContext:
        """The same for layer `layer`; only calls that edit, keep or eliminate something know which one it is."""
        asked = (self.edit, self.keep, self.elimination)
        return self if all(x is None for x in asked) else replace(self, layer=layer)

    def edited(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """What the caller makes of this layer's array called `name`."""
        return x_BTD if self.edit is None else self.edit(name, self.layer, x_BTD)

    def recorded(self, arrays: Mapping[str, Callable[[], jax.Array]]) -> dict[str, jax.Array]:
        """Those of `arrays` (name to a function that makes the array) that the caller wants."""
        return {name: make() for name, make in arrays.items() if name in self.record}

    def mean_over_tokens(self, x_BT: jax.Array) -> jax.Array:
        """Average of a per-token quantity over real tokens, float32."""
        weights = self.valid_BT.astype(jnp.float32)
        return jnp.sum(x_BT.astype(jnp.float32) * weights) / jnp.maximum(jnp.sum(weights), 1)


def positions_within_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Position of each token counted from the first token of its run of equal segment ids, int32 [B, T]."""
    index = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    previous = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids_BT != previous, index, 0), axis=1)
    return index - start


def activation_fn(name: str) -> Callable[[jax.Array], jax.Array]:
    """The pointwise non-linearity called `name`."""
    return ACTIVATIONS[name]


ActivationName = Literal["gelu_tanh", "gelu", "silu", "relu", "relu2"]
EXACT_ZERO_ACTIVATIONS = ("relu", "relu2")
