"""Attention laid out for decoding: one matrix for all maps from the stream, and caches by head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.caches import HeadCache, LatentCache, SplitCache
from sparsezoo_jax.inference.layouts import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import InputMap, OutputMap, Rows, WeightFormat, assign, few_tokens
from sparsezoo_jax.models.attention import GQA, Projections
from sparsezoo_jax.models.mla import MLA
from sparsezoo_jax.models.spark import SparkAttention
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.attention import attention_rows
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.spark_attention.rows import spark_attention_rows


class PackedProjections(nnx.Module):
    """`Projections` with query, key and value maps as one matrix; `active` as in `StreamMap`.

    Of each key/value head its queries' maps, its keys' and its values' follow one another, so that a device of a mesh
    that splits the heads has all three.
    """

    def __init__(self, source: Projections, form: WeightFormat, active: float | None = None):
        self.dtype = source.dtype
        d, self.kv_heads, self.width = source.k_DKH.shape
        q_DKGH = source.q_DNH[...].reshape(d, self.kv_heads, -1, self.width)
        k_DK1H, v_DK1H = source.k_DKH[...][:, :, None], source.v_DKH[...][:, :, None]
        qkv_DO = jnp.concatenate([q_DKGH, k_DK1H, v_DK1H], axis=2).reshape(d, -1)
        self.qkv_map = InputMap(qkv_DO, active, form, source.dtype, "heads")
        self.output_map = OutputMap(source.o_NHD[...].reshape(-1, d), active, form, source.dtype, "heads")
        self.q_bias, self.k_bias, self.v_bias = source.q_bias, source.k_bias, source.v_bias
        self.o_bias, self.q_norm, self.k_norm = source.o_bias, source.q_norm, source.k_norm

    def restore(self, source: Projections) -> None:
        """Put the weights back into `source`."""
        qkv_DO = self.qkv_map.restored()
        qkv_DKAH = qkv_DO.reshape(len(qkv_DO), self.kv_heads, -1, self.width)
        assign(source.q_DNH, qkv_DKAH[:, :, :-2])
        assign(source.k_DKH, qkv_DKAH[:, :, -2])
        assign(source.v_DKH, qkv_DKAH[:, :, -1])
        assign(source.o_NHD, self.output_map.restored())

    def bytes_read(self) -> float:
        """Bytes of weights that one token reads."""
        biases = (self.q_bias, self.k_bias, self.v_bias, self.o_bias)
        added = sum(bias[...].nbytes for bias in biases if bias is not None)
        return self.qkv_map.bytes_read + self.output_map.bytes_read + added

    def qkv(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], not rotated yet."""
        shape = x_BTD.shape[:2]
        all_BTKAH = self.qkv_map(x_BTD, stream).reshape(*shape, self.kv_heads, -1, self.width)
        queries_BTKGH = all_BTKAH[:, :, :, :-2]
        parts = [queries_BTKGH.reshape(*shape, -1, self.width), all_BTKAH[:, :, :, -2], all_BTKAH[:, :, :, -1]]
        biases = (self.q_bias, self.k_bias, self.v_bias)
        q, k, v = (
            part if bias is None else part + bias[...].astype(self.dtype)
            for part, bias in zip(parts, biases, strict=True)
        )
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        y = self.output_map(y_BTNH.reshape(*y_BTNH.shape[:2], -1), stream)
        return y if self.o_bias is None else y + self.o_bias[...].astype(self.dtype)


class PackedGQA(GQA, DecodingLayout):
    """`GQA` over a cache by head; one token a sequence reads visible keys only, and each once."""

    def __init__(self, source: GQA, form: WeightFormat, active: float | None = None):
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.projections: Any = PackedProjections(source.projections, form, active)

    def restore(self, source: GQA) -> None:
        """Put the weights back into `source`."""
        self.projections.restore(source.projections)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever the density."""
        return self.projections.bytes_read()

    def empty_cache(self, batch: int, length: int) -> HeadCache:
        """A cache of `length` slots."""
        config = self.config
        return HeadCache.empty(batch, length, config.kv_heads, config.head_dim, self.projections.dtype)

    def attend(self, q: jax.Array, cache: Any, visible: Visibility) -> jax.Array:
        """The mixed values [B, T, N, H] of rotated queries."""
        if not isinstance(cache, HeadCache):
            return super().attend(q, cache, visible)
        if q.shape[1] > 1:
            return super().attend(q, cache.joined(), visible)
        config = self.config
        y_BNH = attention_rows(q[:, 0], *cache, visible.mask[:, 0], scale=self.scale, softcap=config.softcap)
        return y_BNH[:, None]


class PackedSparkAttention(SparkAttention, DecodingLayout):
    """`SparkAttention` over a split cache; one token a sequence reads the predictor's part and selected keys only."""

    def __init__(self, source: SparkAttention, form: WeightFormat):
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.projections: Any = PackedProjections(source.projections, form)

    def restore(self, source: SparkAttention) -> None:
        """Put the weights back into `source`."""
        self.projections.restore(source.projections)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever the density."""
        return self.projections.bytes_read()

    def empty_cache(self, batch: int, length: int) -> SplitCache:
        """A cache of `length` slots."""
        config = self.config
        return SplitCache.empty(batch, length, config.kv_heads, config.head_dim, config.r, self.projections.dtype)

    def attend(self, q: jax.Array, cache: Any, visible: Visibility) -> tuple[jax.Array, jax.Array]:
        """The mixed values [B, T, N, H] of rotated queries, and the keys that each attends to [B, T, N]."""
        if not isinstance(cache, SplitCache):
            return super().attend(q, cache, visible)
        if q.shape[1] > 1:
            return super().attend(q, cache.joined(), visible)
        form = {name: value for name, value in self.form.items() if name != "r"}
        y_BNH, attended_BN = spark_attention_rows(q[:, 0], *cache, visible.mask[:, 0], **form)
        return y_BNH[:, None], attended_BN[:, None]


class PackedMLA(MLA, DecodingLayout):
    """`MLA` with both maps down as one matrix, and latents and rotated keys in one cache.

    The map from the latent lies by head, its part for keys by latents and its part for values by values, for decoding
    multiplies queries by the one and mixed latents by the other.
    """

    def __init__(self, source: MLA, form: WeightFormat):
        self.lay_out_latent(source, form)

        def rows(weight_NK: jax.Array, *axes: str | None) -> Rows:
            return Rows(weight_NK, form, source.dtype, axes)

        q_DF = _query_map(source)[...].reshape(source.kv_a_DC.shape[0], -1)
        self.down = rows(jnp.concatenate([q_DF, source.kv_a_DC[...]], axis=-1).T, "latent", "embed")
        q_up = source.q_b_RNH
        self.q_up = None if q_up is None else rows(q_up[...].reshape(q_up.shape[0], -1).T, "heads", "latent")
        self.output_rows = rows(source.o_NHD[...].reshape(-1, source.o_NHD.shape[-1]).T, "embed", "heads")

    def lay_out_latent(self, source: MLA, form: WeightFormat) -> None:
        """Set up all but the maps from and to the stream, and to queries."""
        self.config, self.dtype, self.layer_type = source.config, source.dtype, source.layer_type
        self.q_a_norm, self.kv_a_norm = source.q_a_norm, source.kv_a_norm
        nope, kv_b_CNH = self.config.qk_nope_head_dim, source.kv_b_CNH[...]

        def of_heads(weights: Iterable[jax.Array]) -> nnx.List:
            # An array for each head: cutting one out of a stack would copy it.
            return nnx.List([Rows(weight, form, source.dtype, (None, None)) for weight in weights])

        heads = range(self.config.heads)
        self.key_up = of_heads(kv_b_CNH[:, head, :nope] for head in heads)
        self.value_up = of_heads(kv_b_CNH[:, head, nope:].T for head in heads)

    def restore(self, source: MLA) -> None:
        """Put the weights back into `source`."""
        q_DF, kv_DC = jnp.split(self.down.restored().T, [self._query_width], axis=-1)
        assign(_query_map(source), q_DF)
        assign(source.kv_a_DC, kv_DC)
        if self.q_up is not None and source.q_b_RNH is not None:
            assign(source.q_b_RNH, self.q_up.restored().T)
        assign(source.kv_b_CNH, self.kv_up_weight())
        assign(source.o_NHD, self.output_rows.restored().T)

    def bytes_read(self, density: float = 1.0) -> float:
        """Bytes of weights that one token reads, whatever the density."""
        q_up = [] if self.q_up is None else [self.q_up]
        return sum(rows.nbytes for rows in (self.down, *q_up, *self.key_up, *self.value_up, self.output_rows))

    @property
    def _query_width(self) -> int:
        """Columns of the map down that are queries, or their latent."""
        config = self.config
        return config.heads * config.qk_head_dim if config.q_lora_rank is None else config.q_lora_rank

    def empty_cache(self, batch: int, length: int) -> LatentCache:
        """A cache of `length` slots."""
        return LatentCache.empty(batch, length, self.config.kv_lora_rank + self.config.qk_rope_head_dim, self.dtype)

    def down_projected(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, N, H], not rotated yet, and the latent before its norm with the rotated part [B, T, C + P]."""
        q_BTF, joint_BTC = jnp.split(self.down.product(x_BTD), [self._query_width], axis=-1)
        if self.q_up is not None and self.q_a_norm is not None:
            q_BTF = self.q_up.product(self.q_a_norm(q_BTF))
        return q_BTF.reshape(*q_BTF.shape[:2], self.config.heads, -1), joint_BTC

    def kv_up_weight(self) -> jax.Array:
        """The map from the latent to all heads' keys and values, [C, N, H] in the activations' dtype."""
        keys_CNH = jnp.stack([rows.restored() for rows in self.key_up], axis=1)
        values_CNH = jnp.stack([rows.restored().T for rows in self.value_up], axis=1)
        return jnp.concatenate([keys_CNH, values_CNH], axis=-1)

    def to_latent(self, q_BTNH: jax.Array) -> jax.Array:
        """Queries of keys without position as queries of latents, [B, T, N, C]."""
        if few_tokens(q_BTNH[:, :, 0]) is None:
            return super().to_latent(q_BTNH)
        return jnp.stack([rows.product(q_BTNH[:, :, head]) for head, rows in enumerate(self.key_up)], axis=2)

    def from_latent(self, mixed_BTNC: jax.Array) -> jax.Array:
        """Mixed latents as mixed values, [B, T, N, H]."""
        if few_tokens(mixed_BTNC[:, :, 0]) is None:
            return super().from_latent(mixed_BTNC)
        return jnp.stack([rows.product(mixed_BTNC[:, :, head]) for head, rows in enumerate(self.value_up)], axis=2)

    def mixed_latents(self, q_BTNC: jax.Array, cache: Any, visible: Visibility, scale: float) -> jax.Array:
        """The mixed latents [B, T, N, C] of queries of latent and rotated key."""
        width = self.config.kv_lora_rank
        if not isinstance(cache, LatentCache):
            return super().mixed_latents(q_BTNC, cache, visible, scale)
        if q_BTNC.shape[1] > 1:
            return super().mixed_latents(q_BTNC, cache.split(width), visible, scale)
        # A row is key and value at once: its latent part is mixed, and so is the rest, which is small and cut off.
        rows_B1SC = cache.row_B1SC
        mixed_BNC = attention_rows(q_BTNC[:, 0], rows_B1SC, rows_B1SC, visible.mask[:, 0], scale=scale)
        return mixed_BNC[:, None, :, :width]

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return self.output_rows.product(y_BTNH.reshape(*y_BTNH.shape[:2], -1))


def _query_map(source: MLA) -> nnx.Param:
    """The map of queries from the stream, or that to their latent."""
    weight = source.q_a_DR if source.q_DNH is None else source.q_DNH
    assert weight is not None
    return weight


@packs(GQA)
def _gqa(source: GQA, formats: Formats, active: float | None) -> PackedGQA | None:
    # Layers above read what this one keeps, in the layout that it is trained in.
    return PackedGQA(source, formats.weights, active) if source.keys == "own" else None


@packs(SparkAttention)
def _spark(source: SparkAttention, formats: Formats, active: float | None) -> PackedSparkAttention:
    return PackedSparkAttention(source, formats.weights)


@packs(MLA)
def _mla(source: MLA, formats: Formats, active: float | None) -> PackedMLA:
    return PackedMLA(source, formats.weights)
