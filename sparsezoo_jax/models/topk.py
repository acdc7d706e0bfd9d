"""The exact k largest of rows, without sorting them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.rows import native_refusal
from sparsezoo_jax.sharding import mesh_is_active

_BITS = {jnp.dtype(jnp.float32): jnp.int32, jnp.dtype(jnp.bfloat16): jnp.int16}
#: Bytes of the rows that a CPU looks at together: they are read once for each bit, so they are to stay in its cache.
_BLOCK = 2**16


def top_k_mask(x: jax.Array, k: int | jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Which entries of rows `x` [..., N] are among the k largest, bool [..., N]; has no gradient.

    Of equal entries at the k-th place the first ones are taken, so that exactly k are true; but where that entry is 0,
    all zeros are: whoever keeps the entries has the same of both.

    Args:
      x: float32 or bfloat16, at least 0 and not NaN.
      k: from 1 to N.
      implementation: "xla", "native" (see `dispatch`), or None: "native" on a CPU.
    """
    x, k = jax.lax.stop_gradient(x), jnp.asarray(k, jnp.int32)
    implementations = [plain(_by_bits), native_cpu(_natively, native_refusal(x=x))]
    return dispatch("top_k_mask", implementation, implementations)(x, k)


def _natively(x: jax.Array, k: jax.Array) -> jax.Array:
    # Each row has its own k, so that rows of all dimensions, mapped ones too, are rows alike.
    results = [jax.ShapeDtypeStruct(x.shape, jnp.bool_)]
    return native.call("top_k_mask", results, x, jnp.broadcast_to(k, x.shape[:-1]), vmap_method="broadcast_all")[0]


def _by_bits(x: jax.Array, k: jax.Array) -> jax.Array:
    """Bits of floats that are not negative are ordered as the floats are, so the k-th largest is found bit by bit.

    That takes a count for each bit, which is several times faster than a sort on a CPU, and devices that share a row
    exchange counts instead of the row.
    """
    rows = math.gcd(math.prod(x.shape[:-1]), 2 ** max(_BLOCK // (x.shape[-1] * x.dtype.itemsize), 1).bit_length() // 2)
    if rows < 2 or mesh_is_active():  # a mesh splits rows otherwise
        return _mask(x, k)

    def by_blocks(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.map(partial(_mask, k=k), x.reshape(-1, rows, x.shape[-1])).reshape(x.shape)

    return jax.lax.platform_dependent(x, k, cpu=by_blocks, default=_mask)


def _mask(x: jax.Array, k: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype])

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


def _largest(
    holds: Callable[[jax.Array], jax.Array], dtype: jnp.dtype, length: int, shape: tuple[int, ...]
) -> jax.Array:
    """The largest integers [..., 1] of `length` bits for which `holds`, as it does for 0 and up to some number.

    `holds` maps integers [..., 1] to booleans [..., 1]; `shape` is that of a row's entries, [..., N].
    """

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | jnp.left_shift(jnp.ones((), dtype), (length - 1 - i).astype(dtype))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, length, bit, jnp.zeros((*shape[:-1], 1), dtype))
