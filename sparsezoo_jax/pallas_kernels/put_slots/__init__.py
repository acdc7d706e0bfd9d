"""Writing new tokens into a key/value cache, in place."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.rows import native_refusal

__all__ = ["put_slots"]


def put_slots(
    cache: jax.Array, new: jax.Array, slot: jax.Array | int, *, axis: int, implementation: str | None = None
) -> jax.Array:
    """`cache` with `new`, converted to its dtype, in slots `slot` and following of `axis`.

    In place where `cache` is donated, except that XLA for CPU writes all of a bfloat16 array to change a part of it: by
    way of float32, unless the bits are moved as integers, which is four times faster. The native operation writes the
    new slots alone.

    Args:
      cache: [..., S, ...].
      new: the same shape but T <= S slots.
      slot: int32 scalar, not negative; clipped so that all T slots exist, as `jax.lax.dynamic_update_slice` does.
      axis: of the slots, counted from the front.
      implementation: "xla", "native", or None: "native" on a CPU for bfloat16.

    Raises:
      ConfigError: shapes that don't fit, or an implementation that can't take them.
    """
    wanted = (*cache.shape[:axis], new.shape[axis] if new.ndim > axis else 0, *cache.shape[axis + 1 :])
    require(new.shape == wanted, "put_slots.new", new.shape, f"must be {cache.shape} with as many slots or fewer")
    require(new.shape[axis] <= cache.shape[axis], "put_slots.new", new.shape, f"must be no longer than {cache.shape}")
    new, slot = new.astype(cache.dtype), jnp.asarray(slot, jnp.int32)
    narrow = cache.dtype == jnp.bfloat16

    def xla(cache, new, slot):
        start = [slot if i == axis else 0 for i in range(cache.ndim)]

        def update(cache, new):
            return jax.lax.dynamic_update_slice(cache, new, start)

        def update_bits(cache, new):
            cache_bits, new_bits = (jax.lax.bitcast_convert_type(array, jnp.uint16) for array in (cache, new))
            return jax.lax.bitcast_convert_type(update(cache_bits, new_bits), cache.dtype)

        if not narrow:
            return update(cache, new)
        # On other devices the conversion to integers would copy the array, there and back.
        return jax.lax.platform_dependent(cache, new, cpu=update_bits, default=update)

    def cpp(cache: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        same = [jax.ShapeDtypeStruct(cache.shape, cache.dtype)]
        outer, inner = math.prod(cache.shape[:axis]), math.prod(cache.shape[axis + 1 :])
        aliases = {0: 0}
        return native.call("put_slots", same, cache, new, slot, aliases=aliases, outer=outer, inner=inner)[0]

    implementations = [plain(xla), native_cpu(cpp, native_refusal(cache=cache, new=new), default=narrow)]
    return dispatch("put_slots", implementation, implementations)(cache, new, slot)
