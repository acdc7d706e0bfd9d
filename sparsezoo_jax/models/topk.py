"""The exact k largest of rows, without sorting them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BITS = {jnp.dtype(jnp.float32): jnp.int32, jnp.dtype(jnp.bfloat16): jnp.int16}


def top_k_mask(x: jax.Array, k: int) -> jax.Array:
    """Which entries of rows `x` [..., N] are among the k largest, bool [..., N]; has no gradient.

    Of equal entries at the k-th place the first ones are taken, so that exactly k are true; but where that entry is 0,
    all zeros are: whoever keeps the entries has the same of both. Bits of floats that are not negative are ordered as
    the floats are, so the k-th largest is found bit by bit, by counting. That is several times faster than a sort on a
    CPU, and devices that share a row exchange a count for each bit instead of the row.

    Args:
      x: float32 or bfloat16, at least 0 and not NaN.
      k: from 1 to N.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), _BITS[x.dtype])

    def count(mask: jax.Array) -> jax.Array:
        # float32, because it is made of comparisons faster than integers are, and exact below 2^24.
        return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.float32)

    kth = _largest(lambda least: count(bits >= least) >= k, bits.dtype, bits.dtype.itemsize * 8 - 1, bits.shape)
    above, at_least = bits > kth, bits >= kth
    # Places of tied entries are counted likewise, where there are any.
    tied = (bits == kth) & (kth > 0)
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    room = k - count(above)

    def first_ones() -> jax.Array:
        length = x.shape[-1].bit_length()
        end = _largest(lambda end: count(tied & (place < end)) <= room, jnp.dtype(jnp.int32), length, x.shape)
        return above | (tied & (place < end)) | (at_least & (kth == 0))

    return jax.lax.cond(jnp.any(count(at_least & (kth > 0)) > k), first_ones, lambda: at_least)


def _largest(holds, dtype: jnp.dtype, length: int, shape: tuple[int, ...]) -> jax.Array:
    """The largest integer of `length` bits for which `holds`, which is true of 0 and false from some number on.

    `holds` maps integers [..., 1] to booleans [..., 1].
    """

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | jnp.left_shift(jnp.ones((), dtype), (length - 1 - i).astype(dtype))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, length, bit, jnp.zeros((*shape[:-1], 1), dtype))
