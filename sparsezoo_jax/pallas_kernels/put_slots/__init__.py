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
    kept: jax.Array, new: jax.Array, slot: jax.Array | int, *, axis: int, implementation: str | None = None
) -> jax.Array:
    """`kept` with `new`, converted to its dtype, in slots `slot` and following of `axis`.

    In place where `kept` is donated, except that XLA for CPU writes the whole of a bfloat16 array to change a part
    (through float32, four times slower still, if the bits are not moved as integers). The native form writes the new
    slots alone.

    Args:
      kept: [..., S, ...].
      new: the same shape but T <= S slots.
      slot: int32 scalar, not negative; clipped so that all T slots exist, as `jax.lax.dynamic_update_slice` does.
      axis: of the slots, counted from the front.
      implementation: "xla", "native", or None: "native" on a CPU for bfloat16.

    Raises:
      ConfigError: shapes that don't fit, or an implementation that can't take them.
    """
    wanted = (*kept.shape[:axis], new.shape[axis] if new.ndim > axis else 0, *kept.shape[axis + 1 :])
    require(new.shape == wanted, "put_slots.new", new.shape, f"must be {kept.shape} with as many slots or fewer")
    require(new.shape[axis] <= kept.shape[axis], "put_slots.new", new.shape, f"must be no longer than {kept.shape}")
    new, slot = new.astype(kept.dtype), jnp.asarray(slot, jnp.int32)
    narrow = kept.dtype == jnp.bfloat16

    def xla(kept, new, slot):
        start = [slot if i == axis else 0 for i in range(kept.ndim)]

        def update(kept, new):
            return jax.lax.dynamic_update_slice(kept, new, start)

        def update_bits(kept, new):
            kept_bits, new_bits = (jax.lax.bitcast_convert_type(array, jnp.uint16) for array in (kept, new))
            return jax.lax.bitcast_convert_type(update(kept_bits, new_bits), kept.dtype)

        if not narrow:
            return update(kept, new)
        # On other devices moving bits would copy the whole array twice.
        return jax.lax.platform_dependent(kept, new, cpu=update_bits, default=update)

    def cpp(kept: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        same = [jax.ShapeDtypeStruct(kept.shape, kept.dtype)]
        outer, inner = math.prod(kept.shape[:axis]), math.prod(kept.shape[axis + 1 :])
        aliases = {0: 0}
        return native.call("put_slots", same, kept, new, slot, aliases=aliases, outer=outer, inner=inner)[0]

    implementations = [plain(xla), native_cpu(cpp, native_refusal(kept=kept, new=new), default=narrow)]
    return dispatch("put_slots", implementation, implementations)(kept, new, slot)
