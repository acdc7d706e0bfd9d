"""Key/value caches laid out for decoding: what one head reads in one go lies side by side.

S slots, K key/value heads of width H, r dimensions of the predictor; slots that were not written yet hold zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels import put_slots

#: Logical axes of the arrays of these caches.
BY_HEAD = ("batch", "kv_heads", None, None)


def _written(cache_BKSH: jax.Array, new_BTKH: jax.Array, slot: jax.Array) -> jax.Array:
    """`cache_BKSH` with `new_BTKH` in slots `slot` and following."""
    return put_slots(cache_BKSH, new_BTKH.transpose(0, 2, 1, 3), slot, axis=2)


class HeadCache(NamedTuple):
    """Keys and values of one layer by head, [B, K, S, H] each."""

    axes = BY_HEAD

    k_BKSH: jax.Array
    v_BKSH: jax.Array

    @classmethod
    def empty(cls, batch: int, length: int, heads: int, width: int, dtype: jnp.dtype) -> HeadCache:
        """A cache of `length` slots."""
        shape = (batch, heads, length, width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def updated(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slot: jax.Array) -> HeadCache:
        """The cache with the keys and values of T new tokens in slots `slot` .. `slot + T - 1`."""
        return HeadCache(_written(self.k_BKSH, k_BTKH, slot), _written(self.v_BKSH, v_BTKH, slot))

    def joined(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H]."""
        return self.k_BKSH.transpose(0, 2, 1, 3), self.v_BKSH.transpose(0, 2, 1, 3)


class LatentCache(NamedTuple):
    """The cache of latent attention: of each token its latent and its rotated key as one row, [B, 1, S, C + P]."""

    axes = BY_HEAD

    row_B1SC: jax.Array

    @classmethod
    def empty(cls, batch: int, length: int, width: int, dtype: jnp.dtype) -> LatentCache:
        """A cache of `length` slots."""
        return cls(jnp.zeros((batch, 1, length, width), dtype))

    def updated(self, latent_BT1C: jax.Array, k_rope_BT1P: jax.Array, slot: jax.Array) -> LatentCache:
        """The cache with the latents and keys of T new tokens in slots `slot` .. `slot + T - 1`."""
        return LatentCache(_written(self.row_B1SC, jnp.concatenate([latent_BT1C, k_rope_BT1P], axis=-1), slot))

    def split(self, width: int) -> tuple[jax.Array, jax.Array]:
        """Latents [B, S, 1, C] of a width C, and rotated keys [B, S, 1, P]."""
        row_BS1C = self.row_B1SC.transpose(0, 2, 1, 3)
        return row_BS1C[..., :width], row_BS1C[..., width:]


class SplitCache(NamedTuple):
    """The cache of Spark attention: the keys' dimensions that select, all of which are read, apart from the rest."""

    axes = BY_HEAD

    k1_BKSR: jax.Array
    rest_BKSE: jax.Array
    """The other H - r dimensions of a key, and its value, as one row of 2 H - r."""

    @classmethod
    def empty(cls, batch: int, length: int, heads: int, width: int, r: int, dtype: jnp.dtype) -> SplitCache:
        """A cache of `length` slots."""
        shape = (batch, heads, length)
        return cls(jnp.zeros((*shape, r), dtype), jnp.zeros((*shape, 2 * width - r), dtype))

    def updated(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slot: jax.Array) -> SplitCache:
        """The cache with the keys and values of T new tokens in slots `slot` .. `slot + T - 1`."""
        r = self.k1_BKSR.shape[-1]
        rest = jnp.concatenate([k_BTKH[..., r:], v_BTKH], axis=-1)
        return SplitCache(_written(self.k1_BKSR, k_BTKH[..., :r], slot), _written(self.rest_BKSE, rest, slot))

    def joined(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H]."""
        r, both = self.k1_BKSR.shape[-1], self.rest_BKSE.shape[-1]
        split = both - (both + r) // 2
        k = jnp.concatenate([self.k1_BKSR, self.rest_BKSE[..., :split]], axis=-1)
        return k.transpose(0, 2, 1, 3), self.rest_BKSE[..., split:].transpose(0, 2, 1, 3)
