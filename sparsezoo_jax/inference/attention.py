"""Attention laid out for decoding: one matrix for query, key and value, and caches by head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.caches import HeadCache, SplitCache
from sparsezoo_jax.inference.matrices import Rows, WeightFormat
from sparsezoo_jax.models.attention import GQA, Projections
from sparsezoo_jax.models.spark import SparkAttention
from sparsezoo_jax.models.width import WHOLE, Width
from sparsezoo_jax.pallas_kernels.attention import attention_rows
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.spark_attention.rows import spark_attention_rows


class PackedProjections(nnx.Module):
    """`Projections` with query, key and value maps as one matrix, for sublayers that see the whole stream."""

    def __init__(self, source: Projections, form: WeightFormat):
        self.dtype = source.dtype
        maps = [source.q_DNH[...], source.k_DKH[...], source.v_DKH[...]]
        self.heads = tuple(weight.shape[1] for weight in maps)
        d = maps[0].shape[0]
        self.qkv_rows = Rows(jnp.concatenate([weight.reshape(d, -1).T for weight in maps]), form, source.dtype)
        self.output_rows = Rows(source.o_NHD[...].reshape(-1, d).T, form, source.dtype)
        self.q_bias, self.k_bias, self.v_bias = source.q_bias, source.k_bias, source.v_bias
        self.o_bias, self.q_norm, self.k_norm = source.o_bias, source.q_norm, source.k_norm

    def restore(self, source: Projections) -> None:
        """Put the weights back into `source`."""
        weights = [source.q_DNH, source.k_DKH, source.v_DKH]
        sizes = [weight.shape[1] * weight.shape[2] for weight in weights]
        rows = jnp.split(self.qkv_rows.restored(), [sizes[0], sizes[0] + sizes[1]])
        for weight, part in zip(weights, rows, strict=True):
            weight[...] = part.T.reshape(weight.shape)
        source.o_NHD[...] = self.output_rows.restored().T.reshape(source.o_NHD.shape)

    def qkv(self, x_BTD: jax.Array, stream: Width = WHOLE) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], not rotated yet."""
        all_BTAH = self.qkv_rows.product(x_BTD).reshape(*x_BTD.shape[:2], sum(self.heads), -1)
        n, k, _ = self.heads
        parts = [all_BTAH[:, :, :n], all_BTAH[:, :, n : n + k], all_BTAH[:, :, n + k :]]
        biases = (self.q_bias, self.k_bias, self.v_bias)
        q, k, v = (
            part if bias is None else part + bias[...].astype(self.dtype)
            for part, bias in zip(parts, biases, strict=True)
        )
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def output(self, y_BTNH: jax.Array, stream: Width = WHOLE) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        y = self.output_rows.product(y_BTNH.reshape(*y_BTNH.shape[:2], -1))
        return y if self.o_bias is None else y + self.o_bias[...].astype(self.dtype)


class PackedGQA(GQA):
    """`GQA` over a cache by head; one token a sequence reads visible keys only, and each once."""

    def __init__(self, source: GQA, form: WeightFormat):
        self.config, self.layer_type = source.config, source.layer_type
        self.projections: Any = PackedProjections(source.projections, form)

    def empty_cache(self, batch: int, length: int) -> HeadCache:
        """A cache of `length` slots."""
        config = self.config
        return HeadCache.empty(batch, length, config.kv_heads, config.head_dim, self.projections.dtype)

    def attend(self, q: jax.Array, cache: Any, mask_BTS: jax.Array) -> jax.Array:
        """The mixed values [B, T, N, H] of rotated queries."""
        if not isinstance(cache, HeadCache):
            return super().attend(q, cache, mask_BTS)
        if q.shape[1] > 1:
            return super().attend(q, cache.joined(), mask_BTS)
        config = self.config
        y_BNH = attention_rows(q[:, 0], *cache, mask_BTS[:, 0], scale=self.scale, softcap=config.softcap)
        return y_BNH[:, None]


class PackedSparkAttention(SparkAttention):
    """`SparkAttention` over a split cache; one token a sequence reads the predictor's part and selected keys only."""

    def __init__(self, source: SparkAttention, form: WeightFormat):
        self.config, self.layer_type = source.config, source.layer_type
        self.projections: Any = PackedProjections(source.projections, form)

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
