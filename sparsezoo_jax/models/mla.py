"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.cache import LayerCache
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.contract import Attention, AttentionKind, MapSize, register_attention
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.records import ATTENTION_VISIBLE
from sparsezoo_jax.models.rope import RopeConfig, apply_rope
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.attention import flash_attention
from sparsezoo_jax.pallas_kernels.matmul import from_stream, matmul
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.sharding import constrain


@register_attention
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MLAConfig(AttentionKind):
    """`softmax(q k) v` with q from a query latent (or none), and k, v from a key/value latent that alone is cached.

    Each head's query and key have a part without position and a rotated part; the rotated key is shared by all heads.
    """

    kind: Literal["mla"] = "mla"
    heads: int
    """Heads."""
    q_lora_rank: int | None = 768
    """Width of the query latent; None: queries come from the stream itself (PLM)."""
    kv_lora_rank: int = 256
    """Width of the key/value latent."""
    qk_nope_head_dim: int = 128
    """Width of each head's query and key without position."""
    qk_rope_head_dim: int = 64
    """Width of the rotated part; even."""
    v_head_dim: int = 128
    """Width of each head's value."""
    window: int | None = None
    """Keys that a query of a local layer sees, itself included."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embeddings of the rotated part."""
    latent_norm_eps: float = 1e-6
    """Added to the mean square by the RMSNorms of both latents."""
    kv_up_init_std: float | None = None
    """Initial std of the map from the latent to keys and values (BlockFFN: 0.02). None: as any other matrix."""
    implementation: str | None = None
    """Kernel of `flash_attention`; None picks by platform."""

    def __post_init__(self):
        field = "model.attention"
        for name in ("heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            require(getattr(self, name) > 0, f"{field}.{name}", getattr(self, name), "must be above 0")
        self.rope.check(self.qk_rope_head_dim, f"{field}.qk_rope_head_dim")
        require(self.latent_norm_eps > 0, f"{field}.latent_norm_eps", self.latent_norm_eps, "must be above 0")
        for name in ("q_lora_rank", "window", "kv_up_init_std"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{field}.{name}", value, "must be above 0 or None")

    @property
    def qk_head_dim(self) -> int:
        """Width of each head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def score_heads(self) -> int:
        """Heads by which tensor parallelism can split the scores."""
        return self.heads

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Per token: the normalised latent and the rotated key, one "head" each."""
        return (1, self.kv_lora_rank), (1, self.qk_rope_head_dim)

    def mixing_flops(self, keys: int, target: float | None = None) -> float:
        """FLOPs per token of scores and mixing over `keys` visible keys, as in training; `target` changes nothing.

        Decoding from the cache multiplies by the latent instead: `2 heads (2 kv_lora_rank + qk_rope_head_dim) keys`.
        """
        return 2 * self.heads * (self.qk_head_dim + self.v_head_dim) * keys

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """Those from the stream to queries (or their latent, and from that on to queries: "q_up") and to the latent of
        keys and values ("k"), and that back to the stream.

        That from the latent to keys and values is not among them: decoding moves it onto queries and results.
        """
        wide, mixed = self.heads * self.qk_head_dim, self.heads * self.v_head_dim
        latent, joint = self.q_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim
        queries = {"q": MapSize(d_model, wide if latent is None else latent, d_model)}
        if latent is not None:
            queries["q_up"] = MapSize(latent, wide, latent)
        return {**queries, "k": MapSize(d_model, joint, d_model), "o": MapSize(mixed, d_model, mixed)}

    def projection_weights(self, d_model: int) -> int:
        """Weights of the five maps (four without a query latent); every token needs all."""
        wide = self.heads * self.qk_head_dim
        queries = d_model * wide if self.q_lora_rank is None else self.q_lora_rank * (d_model + wide)
        latent = d_model * (self.kv_lora_rank + self.qk_rope_head_dim)
        expanded = self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + latent + expanded + d_model * self.heads * self.v_head_dim

    def cache_reads(self, keys: int, target: float | None = None) -> float:
        """Numbers that one token reads from a cache of `keys` visible keys; `target` changes nothing."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * keys

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> MLA:
        return MLA(self, ctx, rngs)


class MLA(Attention):
    """Multi-head latent attention; see `MLAConfig`. Letters: R query latent, C key/value latent, P rotated width."""

    def __init__(self, config: MLAConfig, ctx: BuildContext, rngs: nnx.Rngs):
        super().__init__(config, ctx)
        d, heads, r, c = ctx.d_model, config.heads, config.q_lora_rank, config.kv_lora_rank
        joint, expanded = c + config.qk_rope_head_dim, config.qk_nope_head_dim + config.v_head_dim
        norm = NormConfig(eps=config.latent_norm_eps)
        head_axes = ("latent", "heads", "head_dim")
        query = (heads, config.qk_head_dim)
        self.q_DNH = ctx.weight(rngs, (d, *query), ("embed", "heads", "head_dim"), d) if r is None else None
        self.q_a_DR = None if r is None else ctx.weight(rngs, (d, r), ("embed", "latent"), d)
        self.q_a_norm = None if r is None else norm.build(ctx, r, "latent")
        self.q_b_RNH = None if r is None else ctx.weight(rngs, (r, *query), head_axes, r)
        self.kv_a_DC = ctx.weight(rngs, (d, joint), ("embed", "latent"), d)
        self.kv_a_norm = norm.build(ctx, c, "latent")
        self.kv_b_CNH = ctx.weight(rngs, (c, heads, expanded), head_axes, c, std=config.kv_up_init_std)
        self.o_NHD = ctx.weight(
            rngs, (heads, config.v_head_dim, d), ("heads", "head_dim", "embed"), heads * config.v_head_dim, output=True
        )

    def __call__(
        self, x_BTD: jax.Array, ctx: CallContext, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerAux, LayerCache | None]:
        config, visible = self.config, ctx.visible[self.layer_type]
        nope, scale = config.qk_nope_head_dim, config.qk_head_dim**-0.5
        q_BTNH, joint_BTC = self.down_projected(x_BTD, ctx.width)
        q_BTNH = constrain(q_BTNH, ("batch", "length", "heads", "head_dim"))
        latent_BTC = self.kv_a_norm(joint_BTC[..., : config.kv_lora_rank])
        q_nope, q_rope = q_BTNH[..., :nope], self._rotated(q_BTNH[..., nope:], ctx)
        k_rope_BS1P = self._rotated(joint_BTC[..., None, config.kv_lora_rank :], ctx)
        if cache is None:
            # The latent, not the wider keys and values, is what the parts of a split sequence exchange.
            latent_BSC = constrain(latent_BTC, ("batch", None, None))
            kv_BSNH = self._per_head(latent_BSC, self.kv_up_weight())
            kv_BSNH = constrain(kv_BSNH, ("batch", None, "heads", "head_dim"))
            k_rope = jnp.broadcast_to(k_rope_BS1P, (*kv_BSNH.shape[:3], config.qk_rope_head_dim))
            k_BSNH = jnp.concatenate([kv_BSNH[..., :nope], k_rope], axis=-1)
            q_BTNH = jnp.concatenate([q_nope, q_rope], axis=-1)
            y_BTNH = self.attend(q_BTNH, k_BSNH, kv_BSNH[..., nope:], visible, scale)
        else:
            # The same attention with the map from the latent moved onto queries and results: it then is multi-query
            # attention whose keys are the cached rows, and nothing is expanded for each cached token.
            cache = cache.updated(latent_BTC[..., None, :], k_rope_BS1P, ctx.cache_end)
            q_BTNC = jnp.concatenate([self.to_latent(q_nope), q_rope], axis=-1)
            y_BTNH = self.from_latent(self.mixed_latents(q_BTNC, cache, visible, scale))
        y_BTD = self.output(y_BTNH, ctx.width)
        records = ctx.recorded({ATTENTION_VISIBLE: lambda: visible.mask})
        aux = LayerAux(stats={"attended_keys": ctx.keys_seen[self.layer_type]}, records=records)
        return y_BTD, aux, cache

    @property
    def matrices(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Paths of the maps' matrices."""
        queries = {"q": "q_DNH"} if self.config.q_lora_rank is None else {"q": "q_a_DR", "q_up": "q_b_RNH"}
        return {**queries, "k": "kv_a_DC", "o": "o_NHD"}

    def down_projected(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, N, H], not rotated yet, and the latent before its norm with the rotated part [B, T, C + P]."""

        def mapped(name: str, x: jax.Array, weight: nnx.Param, product: Callable[..., jax.Array]) -> jax.Array:
            matrix = weight[...].astype(self.dtype)
            return stream.added(name, product(stream.channels(name, x, lambda: matrix), matrix))

        joint_BTC = mapped("k", x_BTD, self.kv_a_DC, from_stream)
        if self.q_a_DR is None or self.q_a_norm is None or self.q_b_RNH is None:
            assert self.q_DNH is not None
            return mapped("q", x_BTD, self.q_DNH, self._per_head), joint_BTC
        q_BTR = self.q_a_norm(mapped("q", x_BTD, self.q_a_DR, from_stream))
        return mapped("q_up", q_BTR, self.q_b_RNH, self._per_head), joint_BTC

    def kv_up_weight(self) -> jax.Array:
        """The map from the latent to all heads' keys and values, [C, N, H] in the activations' dtype."""
        return self.kv_b_CNH[...].astype(self.dtype)

    def to_latent(self, q_BTNH: jax.Array) -> jax.Array:
        """Queries of keys without position as queries of latents, [B, T, N, C]."""
        return jnp.einsum("btnh,cnh->btnc", q_BTNH, self.kv_up_weight()[..., : self.config.qk_nope_head_dim])

    def from_latent(self, mixed_BTNC: jax.Array) -> jax.Array:
        """Mixed latents as mixed values, [B, T, N, H]."""
        return jnp.einsum("btnc,cnh->btnh", mixed_BTNC, self.kv_up_weight()[..., self.config.qk_nope_head_dim :])

    def attend(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKV: jax.Array, visible: Visibility, scale: float
    ) -> jax.Array:
        """The mixed values [B, T, N, V]."""
        return flash_attention(q_BTNH, k_BSKH, v_BSKV, visible, scale=scale, implementation=self.config.implementation)

    def mixed_latents(self, q_BTNC: jax.Array, cache: Any, visible: Visibility, scale: float) -> jax.Array:
        """The mixed latents [B, T, N, C] of queries of latent and rotated key."""
        return self.attend(q_BTNC, jnp.concatenate(cache, axis=-1), cache[0], visible, scale)

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        o_NHD = self.o_NHD[...].astype(self.dtype)
        return stream.added("o", stream.write(stream.channels("o", y_BTNH, lambda: o_NHD), o_NHD))

    def _per_head(self, x_BTC: jax.Array, weight_CNH: jax.Array) -> jax.Array:
        latent, heads, width = weight_CNH.shape
        y = matmul(x_BTC, weight_CNH.reshape(latent, heads * width))
        return y.reshape(*x_BTC.shape[:2], heads, width)

    def _rotated(self, x_BTNP: jax.Array, ctx: CallContext) -> jax.Array:
        return apply_rope(x_BTNP, ctx.positions_BT, *self.config.rope.of(self.layer_type))
