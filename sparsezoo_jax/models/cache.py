"""The key/value cache of incremental decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels import put_slots


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H] each; slots that were not written yet hold zeros.

    Attention that makes both from something smaller keeps that here instead: latent attention its latent and the
    rotated key. The attention configuration's `cache_shapes` gives both [K, H]. `axes` are the logical axes of each.
    """

    axes = ("batch", None, "kv_heads", "head_dim")

    k_BSKH: jax.Array
    v_BSKH: jax.Array

    def updated(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slot: jax.Array) -> LayerCache:
        """The cache with the keys and values of T new tokens in slots `slot` .. `slot + T - 1`."""
        # Plain JAX, with which this layout belongs; `inference.packed` has caches of its own.
        pairs = ((self.k_BSKH, k_BTKH), (self.v_BSKH, v_BTKH))
        return LayerCache(*(put_slots(kept, new, slot, axis=1, implementation="xla") for kept, new in pairs))


class SublayerCaches(NamedTuple):
    """The cache of a layer whose feed-forward network keeps something of earlier tokens, too (`FFN.empty_cache`)."""

    attention: Any
    ffn: Any


class DecoderCache(NamedTuple):
    """The caches of all layers, and where each slot's token stands.

    `positions_BS` is -1 for slots that hold no token (not yet written, or padding); `end` is the first free slot, the
    same for all rows.
    """

    layers: tuple[Any, ...]
    """Of each layer what its attention keeps, a `LayerCache` or what takes its place, or `SublayerCaches`."""
    positions_BS: jax.Array
    end: jax.Array
    pre_gate: Any = None
    """The `DecoderCache` of the router of all layers, where there is one (`FFNKind.pre_gate`)."""

    def advanced(self, positions_BT: jax.Array, valid_BT: jax.Array) -> DecoderCache:
        """The cache after T more tokens at `positions_BT`; tokens that are not valid leave their slots unused."""
        positions_BS = jax.lax.dynamic_update_slice(
            self.positions_BS, jnp.where(valid_BT, positions_BT, -1).astype(jnp.int32), (0, self.end)
        )
        return self._replace(positions_BS=positions_BS, end=self.end + positions_BT.shape[1])

    def truncated(self, end: jax.Array) -> DecoderCache:
        """The cache with the tokens of its first `end` slots only; the next ones go to where the others were.

        What feed-forward networks keep stays.
        """
        kept_BS = jnp.where(jnp.arange(self.positions_BS.shape[1]) < end, self.positions_BS, -1)
        router = None if self.pre_gate is None else self.pre_gate.truncated(end)
        return self._replace(positions_BS=kept_BS, end=jnp.asarray(end, jnp.int32), pre_gate=router)
