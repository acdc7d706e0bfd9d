"""Linear maps from and to active blocks by the native library, a few tokens at a time through all of their blocks.

Shapes: N tokens, K routed blocks of a token, D the width that is cut into blocks, S that of the shared ones, C routed
blocks of I, O the other width. Float32 throughout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.pallas_kernels.grouped_linear.reference import Blocks
from sparsezoo_jax.pallas_kernels.matmul import matmul


def from_blocks(x_ND: jax.Array, routed_NK: jax.Array, w_DO: jax.Array, blocks: Blocks) -> jax.Array:
    """See the package."""
    if blocks.shared == blocks.count:
        return matmul(x_ND, w_DO)
    return _from(x_ND, w_DO, routed_NK.astype(jnp.int32), blocks)


def to_blocks(x_NO: jax.Array, routed_NK: jax.Array, w_OD: jax.Array, blocks: Blocks) -> jax.Array:
    """See the package."""
    if blocks.shared == blocks.count:
        return matmul(x_NO, w_OD)
    return _to(x_NO, w_OD, routed_NK.astype(jnp.int32), blocks)


def _call(operation: str, shape: tuple[int, int], blocks: Blocks, *arrays: jax.Array) -> jax.Array:
    cut: Any = {"count": blocks.count, "shared": blocks.shared}
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return native.call(operation, (result,), *arrays, vmap_method="sequential", **cut)[0]


def _sum_of_blocks(x_ND, routed_NK, w_DO, blocks: Blocks) -> jax.Array:
    return _call("sum_of_blocks", (x_ND.shape[0], w_DO.shape[1]), blocks, x_ND, routed_NK, w_DO)


def _products_by_block(x_NO, routed_NK, w_DO, blocks: Blocks) -> jax.Array:
    """`x W^T` in the blocks of each token."""
    size = w_DO.shape[0] // blocks.count
    shared_OS = w_DO[: blocks.shared * size].T
    routed_COI = jnp.swapaxes(w_DO[blocks.shared * size :].reshape(-1, size, w_DO.shape[1]), 1, 2)
    shape = (x_NO.shape[0], w_DO.shape[0])
    return _call("products_by_block", shape, blocks, x_NO, routed_NK, shared_OS, routed_COI)


def _weight_gradient(narrow_ND, wide_NO, routed_NK, blocks: Blocks) -> jax.Array:
    """[D, O]: of each block the sum over its tokens."""
    shape = (narrow_ND.shape[1], wide_NO.shape[1])
    return _call("sums_by_block", shape, blocks, narrow_ND, routed_NK, wide_NO)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _from(x_ND, w_DO, routed_NK, blocks: Blocks) -> jax.Array:
    return _sum_of_blocks(x_ND, routed_NK, w_DO, blocks)


def _from_forward(x_ND, w_DO, routed_NK, blocks: Blocks):
    return _from(x_ND, w_DO, routed_NK, blocks), (x_ND, w_DO, routed_NK)


def _from_backward(blocks: Blocks, residuals, g_NO):
    x_ND, w_DO, routed_NK = residuals
    dw_DO = _weight_gradient(x_ND, g_NO, routed_NK, blocks)
    return _products_by_block(g_NO, routed_NK, w_DO, blocks), dw_DO, None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to(x_NO, w_OD, routed_NK, blocks: Blocks) -> jax.Array:
    return _products_by_block(x_NO, routed_NK, w_OD.T, blocks)


def _to_forward(x_NO, w_OD, routed_NK, blocks: Blocks):
    return _to(x_NO, w_OD, routed_NK, blocks), (x_NO, w_OD, routed_NK)


def _to_backward(blocks: Blocks, residuals, g_ND):
    x_NO, w_OD, routed_NK = residuals
    dw_DO = _weight_gradient(g_ND, x_NO, routed_NK, blocks)
    return _sum_of_blocks(g_ND, routed_NK, w_OD.T, blocks), dw_DO.T, None


_from.defvjp(_from_forward, _from_backward)
_to.defvjp(_to_forward, _to_backward)
