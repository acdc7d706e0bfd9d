"""Linear maps that read or write only the active blocks of a width, chosen for each token."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import Implementation, dispatch, native_cpu
from sparsezoo_jax.pallas_kernels.grouped_linear import by_block, by_token, reference
from sparsezoo_jax.pallas_kernels.grouped_linear.reference import Blocks, active_blocks, only_active
from sparsezoo_jax.pallas_kernels.ragged import native_refusal
from sparsezoo_jax.sharding import shard_map, sum_shards

Grouping = Literal["dense", "ragged", "loop", "native"]

__all__ = ["Blocks", "Grouping", "active_blocks", "from_blocks", "only_active", "to_blocks"]


def from_blocks(
    x: jax.Array,
    routed: jax.Array,
    w: jax.Array,
    blocks: Blocks,
    *,
    dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`sum_b x_b W_b` over the active blocks b of each token: shared ones, and its own; differentiable in x and w.

    Blocks that are not active are not read, whatever x holds there, and get no gradient.

    Args:
      x: [..., D], usually [B, T, D]; block b is [b D / count, (b + 1) D / count).
      routed: int [..., K], the active blocks of each token beside the shared ones, in [shared, count), all different.
      w: [D, O], of the dtype of x.
      blocks: how D is cut.
      dtype: of the result; None: that of x.
      implementation: "dense" multiplies all blocks by a mask and is the definition; "ragged" sorts the tokens by block
        and multiplies by `ragged_matmul`; "loop" sorts them into tiles of one block and loops over these; "native"
        takes a few tokens at a time through all blocks. All multiply the shared blocks in one product. None: for a CPU
        "native" in float32 and "loop" otherwise, "ragged" elsewhere. On a mesh all but "dense" see each device's tokens
        by themselves, and O stays split where the mesh splits FFN neurons.

    Returns:
      [..., O].

    Raises:
      ConfigError: shapes that don't fit each other, or no such implementation.

    Source: the input side of MoHD (arXiv 2412.05644).
    """
    _check("from_blocks", x, routed, w.shape[0], w.shape[0], blocks)
    implementations = [
        Implementation("dense", partial(reference.from_blocks, blocks=blocks, dtype=dtype), default=False),
        Implementation("ragged", partial(by_block.ragged_from_blocks, blocks=blocks, dtype=dtype)),
        Implementation("loop", partial(by_block.loop_from_blocks, blocks=blocks, dtype=dtype), "cpu"),
        native_cpu(partial(by_token.from_blocks, blocks=blocks), native_refusal(x, w, dtype), sharded=True),
    ]
    apply = dispatch("from_blocks", implementation, implementations, recompute=True)
    if implementation == "dense":
        return apply(x, routed, w)

    def on_shards(x, routed, w, split):
        return apply(*_flat(x, routed), w).reshape(*x.shape[:-1], w.shape[1])

    leading = _leading(x)
    in_axes = [(*leading, None), (*leading, None), (None, "ffn")]
    return product(shard_map(on_shards, [x, routed, w], in_axes, (*leading, "ffn")))


def to_blocks(
    x: jax.Array,
    routed: jax.Array,
    w: jax.Array,
    blocks: Blocks,
    *,
    dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`x W` on the active blocks of each token's result, zeros elsewhere; differentiable in x and w.

    Args:
      x: [..., O].
      w: [O, D]. The others as in `from_blocks`.

    Returns:
      [..., D].

    Raises:
      ConfigError: shapes that don't fit each other, or no such implementation.

    Source: the output side of MoHD (arXiv 2412.05644).
    """
    _check("to_blocks", x, routed, w.shape[0], w.shape[1], blocks)
    implementations = [
        Implementation("dense", partial(reference.to_blocks, blocks=blocks, dtype=dtype), default=False),
        Implementation("ragged", partial(by_block.ragged_to_blocks, blocks=blocks, dtype=dtype)),
        Implementation("loop", partial(by_block.loop_to_blocks, blocks=blocks, dtype=dtype), "cpu"),
        native_cpu(partial(by_token.to_blocks, blocks=blocks), native_refusal(x, w, dtype), sharded=True),
    ]
    apply = dispatch("to_blocks", implementation, implementations, recompute=True)
    if implementation == "dense":
        return apply(x, routed, w)

    def on_shards(x, routed, w, split):
        y: Any = sum_shards(apply(*_flat(x, routed), w), split["ffn"])
        return y.reshape(*x.shape[:-1], w.shape[1])

    leading = _leading(x)
    in_axes = [(*leading, "ffn"), (*leading, None), ("ffn", None)]
    return product(shard_map(on_shards, [x, routed, w], in_axes, (*leading, None)))


def _flat(x: jax.Array, routed: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.reshape(-1, x.shape[-1])
    return x, routed.reshape(x.shape[0], routed.shape[-1])


def _leading(x: jax.Array) -> tuple[str | None, ...]:
    return (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3))


def _check(name: str, x: jax.Array, routed: jax.Array, inputs: int, width: int, blocks: Blocks) -> None:
    require(x.shape[-1] == inputs, f"{name}.w", inputs, f"must have {x.shape[-1]} inputs, for x")
    require(width % blocks.count == 0, f"{name}.blocks", blocks.count, f"must divide the width of {width}")
    require(
        0 <= blocks.shared <= blocks.count, f"{name}.shared", blocks.shared, f"must be from 0 to {blocks.count} blocks"
    )
    require(
        routed.shape[:-1] == x.shape[:-1],
        f"{name}.routed",
        routed.shape,
        f"must be that of x {x.shape} but for its end",
    )
