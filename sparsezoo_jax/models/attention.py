"""Grouped-query attention over all keys or a sliding window, and the projections that attention kinds share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.cache import LayerCache
from sparsezoo_jax.models.common import BuildContext, CallContext, KeysOf, LayerAux
from sparsezoo_jax.models.contract import Attention, AttentionKind, MapSize, register_attention
from sparsezoo_jax.models.norms import Norm, NormConfig, unit_rms
from sparsezoo_jax.models.records import ATTENTION_VISIBLE
from sparsezoo_jax.models.rope import RopeConfig, apply_rope
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.attention import flash_attention
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.sharding import constrain

#: Logical axes of keys and values.
KEYS = ("batch", None, "kv_heads", "head_dim")
NormOver = Literal["head", "heads"]


@register_attention
@dataclass(frozen=True, kw_only=True, config=STRICT)
class GQAConfig(AttentionKind):
    """Grouped-query attention; as many key/value heads as query heads make it multi-head attention."""

    partial_width: ClassVar[bool] = True
    shares_keys: ClassVar[bool] = True
    scores_blocks: ClassVar[bool] = True

    kind: Literal["gqa"] = "gqa"
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; must divide the query heads."""
    head_dim: int
    """Width of one head."""
    window: int | None = None
    """Keys that a query of a local layer sees, itself included."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary position embeddings; None: none."""
    query_scale: float | None = None
    """Factor on the scores; None: head_dim^-1/2."""
    softcap: float | None = None
    """Scores become cap * tanh(scores / cap)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, before rotation."""
    qk_norm_over: NormOver = "head"
    """What each of these norms is over: one head (Qwen 3), or all heads together, whose scales differ (OLMo 2)."""
    qk_norm_eps: float = 1e-6
    """Added to the mean square by these norms."""
    qk_norm_zero_centered: bool = False
    """Store their scales as offsets from 1 (Gemma 3)."""
    value_norm: bool = False
    """RMS-normalise values, without a scale, by `qk_norm_eps` (Gemma 3n)."""
    bias: bool = False
    """Biases on the four projections."""
    output_bias: bool | None = None
    """Bias on the output projection (Qwen 2: none beside those of the other three). None: as `bias`."""
    implementation: str | None = None
    """Kernel of `flash_attention`; None picks by platform."""

    def __post_init__(self):
        check_heads(self.heads, self.kv_heads, self.head_dim, self.window, self.rope)
        require(self.qk_norm_eps > 0, "model.attention.qk_norm_eps", self.qk_norm_eps, "must be above 0")
        allowed = "works together with model.attention.qk_norm only"
        require(self.qk_norm or self.qk_norm_over == "head", "model.attention.qk_norm_over", self.qk_norm_over, allowed)
        centred = self.qk_norm_zero_centered
        require(self.qk_norm or not centred, "model.attention.qk_norm_zero_centered", centred, allowed)

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The four projections."""
        return projection_maps(d_model, self.heads, self.kv_heads, self.head_dim)

    def projection_flops(self, d_model: int) -> int:
        """FLOPs per token of the four projections (a multiply-add counts 2)."""
        return projection_flops(d_model, self.heads, self.kv_heads, self.head_dim)

    @property
    def score_heads(self) -> int:
        """Heads by which tensor parallelism can split the scores."""
        return self.kv_heads

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Per token: keys and values, [heads, width] each."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    def mixing_flops(self, keys: int, target: float | None = None) -> float:
        """FLOPs per token of scores and mixing over `keys` visible keys; `target` changes nothing."""
        return 4 * self.heads * self.head_dim * keys

    def projection_weights(self, d_model: int) -> int:
        """Weights of the four projections; every token needs all."""
        return projection_weights(self, d_model)

    def key_weights(self, d_model: int) -> int:
        """Weights of the maps to keys and values, biases included."""
        return 2 * self.kv_heads * self.head_dim * (d_model + (1 if self.bias else 0))

    def cache_reads(self, keys: int, target: float | None = None) -> float:
        """Numbers that one token reads from a cache of `keys` visible keys; `target` changes nothing."""
        return 2 * self.kv_heads * self.head_dim * keys

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> GQA:
        return ReusingGQA(self, ctx, rngs) if ctx.keys == "reused" else GQA(self, ctx, rngs)


def check_heads(heads: int, kv_heads: int, head_dim: int, window: int | None, rope: RopeConfig | None) -> None:
    """Raise `ConfigError` for head counts and widths that can't be built."""
    field = "model.attention"
    require(heads > 0, f"{field}.heads", heads, "must be above 0")
    require(kv_heads > 0, f"{field}.kv_heads", kv_heads, "must be above 0")
    require(heads % kv_heads == 0, f"{field}.kv_heads", kv_heads, f"must divide {field}.heads={heads}")
    require(head_dim > 0, f"{field}.head_dim", head_dim, "must be above 0")
    if rope is not None:
        rope.check(head_dim, f"{field}.head_dim")
    require(window is None or window > 0, f"{field}.window", window, "must be above 0")


def projection_maps(d_model: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, MapSize]:
    """`AttentionKind.linear_maps` of query, key, value and output projections."""
    width, kv_width = heads * head_dim, kv_heads * head_dim
    return {
        "q": MapSize(d_model, width, d_model),
        "k": MapSize(d_model, kv_width, d_model),
        "v": MapSize(d_model, kv_width, d_model),
        "o": MapSize(width, d_model, width),
    }


def projection_flops(d_model: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """FLOPs per token of query, key, value and output projections."""
    return 4 * d_model * head_dim * (heads + kv_heads)


def projection_weights(config, d_model: int) -> int:
    """Weights of query, key, value and output projections, biases included."""
    width = config.head_dim * (config.heads + config.kv_heads)
    biases = config.head_dim * (config.heads + 2 * config.kv_heads) if config.bias else 0
    return 2 * d_model * width + biases + (d_model if has_output_bias(config) else 0)


def has_output_bias(config) -> bool:
    """Whether the output projection has a bias."""
    return config.bias if config.output_bias is None else config.output_bias


class HeadNorm(Norm):
    """The RMS norm of queries or keys, over each head or over all of them at once."""

    def __init__(self, config, ctx: BuildContext, heads: int, axis: str):
        whole = config.qk_norm_over == "heads"
        norm = NormConfig(eps=config.qk_norm_eps, zero_centered=config.qk_norm_zero_centered)
        width = config.head_dim
        super().__init__(norm, ctx, heads * width if whole else width, axis if whole else "head_dim")
        self.whole = whole

    def __call__(self, x_BTNH: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """Normalised [B, T, N, H]."""
        if not self.whole:
            return super().__call__(x_BTNH, where)
        return super().__call__(x_BTNH.reshape(*x_BTNH.shape[:2], -1), where).reshape(x_BTNH.shape)


class QueryProjections(nnx.Module):
    """The query and output maps of an attention layer."""

    def __init__(self, config, ctx: BuildContext, rngs: nnx.Rngs):
        d, heads, width = ctx.d_model, config.heads, config.head_dim
        self.dtype = ctx.dtype
        self.q_DNH = ctx.weight(rngs, (d, heads, width), ("embed", "heads", "head_dim"), ctx.fan_in)
        self._build_keys(config, ctx, rngs)
        self.o_NHD = ctx.weight(rngs, (heads, width, d), ("heads", "head_dim", "embed"), heads * width, output=True)
        self.q_bias = ctx.constant(0.0, (heads, width), ("heads", "head_dim")) if config.bias else None
        self.o_bias = ctx.constant(0.0, (d,), ("embed",)) if has_output_bias(config) else None
        self.q_norm = HeadNorm(config, ctx, heads, "heads") if config.qk_norm else None

    def _build_keys(self, config, ctx: BuildContext, rngs: nnx.Rngs) -> None:
        """The maps between those of queries and outputs, in the order in which weights are drawn. Here: none."""

    def _projected(self, name: str, x_BTD: jax.Array, stream: Width, weight: Any, bias: Any, norm: Any) -> jax.Array:
        heads, width = weight.shape[1:]
        weight_DO = weight[...].astype(self.dtype).reshape(-1, heads * width)
        y = stream.read(stream.channels(name, x_BTD, lambda: weight_DO), weight_DO)
        y = stream.added(name, y)
        y = y.reshape(*x_BTD.shape[:2], heads, width)
        y = y if bias is None else y + bias[...].astype(self.dtype)
        return y if norm is None else norm(y)

    def queries(self, x_BTD: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """Queries [B, T, N, H], not rotated yet. They stay where their part of the sequence is."""
        q = self._projected("q", x_BTD, stream, self.q_DNH, self.q_bias, self.q_norm)
        return constrain(q, ("batch", "length", "heads", "head_dim"))

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        o_NHD = self.o_NHD[...].astype(self.dtype)
        y = stream.added("o", stream.write(stream.channels("o", y_BTNH, lambda: o_NHD), o_NHD))
        return y if self.o_bias is None else y + self.o_bias[...].astype(self.dtype)


class Projections(QueryProjections):
    """The query, key, value and output maps of an attention layer."""

    def _build_keys(self, config, ctx: BuildContext, rngs: nnx.Rngs) -> None:
        d, kv_heads, width = ctx.d_model, config.kv_heads, config.head_dim
        self.k_DKH = ctx.weight(rngs, (d, kv_heads, width), ("embed", "kv_heads", "head_dim"), ctx.fan_in)
        self.v_DKH = ctx.weight(rngs, (d, kv_heads, width), ("embed", "kv_heads", "head_dim"), ctx.fan_in)
        self.k_bias = ctx.constant(0.0, (kv_heads, width), ("kv_heads", "head_dim")) if config.bias else None
        self.v_bias = ctx.constant(0.0, (kv_heads, width), ("kv_heads", "head_dim")) if config.bias else None
        self.k_norm = HeadNorm(config, ctx, kv_heads, "kv_heads") if config.qk_norm else None

    def qkv(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], not rotated yet.

        Keys and values of the whole sequence come to the queries.
        """
        q = self.queries(x_BTD, stream)
        k = self._projected("k", x_BTD, stream, self.k_DKH, self.k_bias, self.k_norm)
        v = self._projected("v", x_BTD, stream, self.v_DKH, self.v_bias, None)
        return q, constrain(k, KEYS), constrain(v, KEYS)


class GQA(Attention):
    """Softmax attention; see `GQAConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {
        "q": "projections/q_DNH",
        "k": "projections/k_DKH",
        "v": "projections/v_DKH",
        "o": "projections/o_NHD",
    }
    keys: KeysOf = "own"

    def __init__(self, config: GQAConfig, ctx: BuildContext, rngs: nnx.Rngs):
        super().__init__(config, ctx)
        self.keys = ctx.keys
        self.projections: Any = self._projections(ctx, rngs)

    def _projections(self, ctx: BuildContext, rngs: nnx.Rngs) -> QueryProjections:
        return Projections(self.config, ctx, rngs)

    def __call__(
        self, x_BTD: jax.Array, ctx: CallContext, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerAux, LayerCache | None]:
        config = self.config
        q, k, v = self.projections.qkv(x_BTD, ctx.width)
        if config.value_norm:
            v = unit_rms(v, config.qk_norm_eps)
        q, k = self._rotated(q, k, ctx)
        cache = None if cache is None else cache.updated(k, v, ctx.cache_end)
        out_BTD, aux = self._mixed(q, (k, v) if cache is None else cache, ctx)
        return out_BTD, aux, LayerCache(k, v) if cache is None and self.keys == "kept" else cache

    def queries_keys(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, jax.Array]:
        q, k, _ = self.projections.qkv(x_BTD, ctx.width)
        return self._rotated(q, k, ctx)

    def _rotated(self, q: jax.Array, k: jax.Array, ctx: CallContext) -> tuple[jax.Array, jax.Array]:
        if self.config.rope is None:
            return q, k
        rope = self.config.rope.of(self.layer_type)
        return apply_rope(q, ctx.positions_BT, *rope), apply_rope(k, ctx.positions_BT, *rope)

    def _mixed(self, q: jax.Array, keys_values: Any, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        """The output [B, T, D] of rotated queries."""
        visible = ctx.visible[self.layer_type]
        y = self.attend(q, keys_values, visible)
        records = ctx.recorded({ATTENTION_VISIBLE: lambda: visible.mask})
        aux = LayerAux(stats={"attended_keys": ctx.keys_seen[self.layer_type]}, records=records)
        return self.projections.output(y, ctx.width), aux

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.config.head_dim**-0.5 if self.config.query_scale is None else self.config.query_scale

    def attend(self, q: jax.Array, keys_values: Any, visible: Visibility) -> jax.Array:
        """The mixed values [B, T, N, H] of rotated queries, for keys and values [B, S, K, H]."""
        k, v = keys_values
        form = {"softcap": self.config.softcap, "implementation": self.config.implementation}
        return flash_attention(q, k, v, visible, scale=self.scale, **form)


class ReusingGQA(GQA):
    """`GQA` to the keys and values that a layer below kept (`CallContext.kept`); its own cache is empty."""

    def _projections(self, ctx: BuildContext, rngs: nnx.Rngs) -> QueryProjections:
        return QueryProjections(self.config, ctx, rngs)

    def __call__(
        self, x_BTD: jax.Array, ctx: CallContext, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerAux, LayerCache | None]:
        q = self.projections.queries(x_BTD, ctx.width)
        if self.config.rope is not None:
            q = apply_rope(q, ctx.positions_BT, *self.config.rope.of(self.layer_type))
        return *self._mixed(q, ctx.kept[self.layer_type], ctx), cache

    def empty_cache(self, batch: int, length: int) -> LayerCache:
        """A cache of no heads."""
        shape = (batch, length, 0, self.config.head_dim)
        # Two arrays, as each is given away to be written to.
        return LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
