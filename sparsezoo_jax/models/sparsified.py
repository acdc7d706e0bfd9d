"""Layers that leave out channels of their maps' inputs: activation sparsity after training.

Any attention or feed-forward kind whose maps take their inputs through `Width.channels` can be wrapped. `models.masks`
says which channels a map reads. With all thresholds 0 the layer computes what the wrapped one does; its weights are the
same.

Sources: CATS (arXiv 2404.08763), TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427), R-Sparse (arXiv 2504.19449).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
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
from sparsezoo_jax.models.masks import NEURONS, ActivationSparsity, MaskedWidth, Masks


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
