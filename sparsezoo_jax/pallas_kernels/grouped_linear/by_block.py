"""Linear maps from and to active blocks that compute nothing else: one product for the shared blocks, grouped ones
for the routed.

Shapes: N tokens, K routed blocks of a token, A = N K assignments, D the width that is cut into blocks, C blocks, I the
width of one, O the other width, M tiles, S slots, T rows of a tile. A product reads the *narrow* side [N, D] and
makes the *wide* side [N, O], or the other way round; the backward pass of either is the other one and a product of
both sides for the weight, which has its blocks along axis 0 [D, O] or axis 1 [O, D].
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.grouped_linear.reference import Blocks
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.ragged import ragged_matmul
from sparsezoo_jax.pallas_kernels.tiles import TILE, Tiles, rows, tiled


def _dot(a: jax.Array, axis_a: int, b: jax.Array, axis_b: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=dtype)


def _placed(packed_NKI: jax.Array, routed_NK: jax.Array, blocks: Blocks) -> jax.Array:
    """The routed blocks of each token in their places among all routed ones, [N, (C - shared) I]; zeros elsewhere."""
    places = jnp.arange(blocks.shared, blocks.count)
    # A sum over the few blocks of a token: scattering rows is slow on a CPU.
    full_NCI = sum(
        jnp.where((routed_NK[:, j, None] == places)[..., None], packed_NKI[:, j, None], 0)
        for j in range(routed_NK.shape[1])
    )
    return jnp.asarray(full_NCI).reshape(packed_NKI.shape[0], -1)


def _padded(x_NI: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x_NI, ((0, 0), (0, width - x_NI.shape[1])))


class _Form(NamedTuple):
    """What is fixed when a loop is traced."""

    blocks: Blocks
    axis: int
    """Axis of the weight along which the blocks lie."""
    size: int
    """Width of one block."""
    tile: int

    @property
    def shared_width(self) -> int:
        return self.blocks.shared * self.size

    def shared(self, w: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(w, 0, self.shared_width, axis=self.axis)

    def slab(self, w: jax.Array, block: jax.Array) -> jax.Array:
        """The weights of one block: the only ones of it that a tile reads."""
        return jax.lax.dynamic_slice_in_dim(w, block * self.size, self.size, axis=self.axis)

    def tiles(self, routed_NK: jax.Array) -> Tiles:
        # Calls that share a routing make the same tiles, and the compiler makes them once.
        found = tiled(routed_NK - self.blocks.shared, self.blocks.count - self.blocks.shared, self.tile)
        return found._replace(expert_M=found.expert_M + self.blocks.shared)

    def block_rows(self, x_ND: jax.Array, tiles: Tiles, i: jax.Array) -> jax.Array:
        """The block of tile `i` of its tokens, [T, I]; zeros in empty slots."""
        token_T, filled_T = (rows(x, i, self.tile) for x in (tiles.token_S, tiles.filled_S))
        x_NCI = x_ND.reshape(x_ND.shape[0], self.blocks.count, self.size)
        return jnp.where(filled_T[:, None], x_NCI[token_T, tiles.expert_M[i]], 0)

    def add_rows(self, y_NO: jax.Array, part_TO: jax.Array, tiles: Tiles, i: jax.Array) -> jax.Array:
        """`y_NO` with the rows of tile `i` added to those of its tokens."""
        token_T, filled_T = (rows(x, i, self.tile) for x in (tiles.token_S, tiles.filled_S))
        # No token is twice in a tile; empty slots point past the end, each to a place of its own, and are dropped.
        place_T = jnp.where(filled_T, token_T, y_NO.shape[0] + jnp.arange(self.tile, dtype=token_T.dtype))
        return y_NO.at[place_T].add(part_TO, mode="drop", unique_indices=True)

    def slots(self, tiles: Tiles, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((tiles.token_S.shape[0], self.size), dtype)


def _into(total_SI: jax.Array, part_TI: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(total_SI, part_TI, i * part_TI.shape[0], axis=0)


def _narrow_to_wide(x_ND, w, routed_NK, form: _Form, dtype) -> jax.Array:
    y_NO = _dot(x_ND[:, : form.shared_width], 1, form.shared(w), form.axis, dtype)
    if not routed_NK.shape[1]:
        return y_NO
    tiles = form.tiles(routed_NK)

    def body(i, y_NO):
        part_TO = _dot(form.block_rows(x_ND, tiles, i), 1, form.slab(w, tiles.expert_M[i]), form.axis, dtype)
        return form.add_rows(y_NO, part_TO, tiles, i)

    return jax.lax.fori_loop(0, tiles.count, body, y_NO)


def _wide_to_narrow(x_NO, w, routed_NK, form: _Form, dtype) -> jax.Array:
    y_NI = _dot(x_NO, 1, form.shared(w), 1 - form.axis, dtype)
    if not routed_NK.shape[1]:
        return _padded(y_NI, form.blocks.count * form.size)
    tiles = form.tiles(routed_NK)

    def body(i, y_SI):
        x_TO = x_NO[rows(tiles.token_S, i, form.tile)]
        return _into(y_SI, _dot(x_TO, 1, form.slab(w, tiles.expert_M[i]), 1 - form.axis, dtype), i)

    y_SI = jax.lax.fori_loop(0, tiles.count, body, form.slots(tiles, dtype))
    return jnp.concatenate([y_NI, _placed(y_SI[tiles.slot_NK], routed_NK, form.blocks)], axis=1)


def _weight_product(narrow: jax.Array, wide: jax.Array, form: _Form, dtype: jnp.dtype) -> jax.Array:
    """The gradient of one block or of the shared ones; the narrower side, which a CPU transposes, on the left."""
    if narrow.shape[1] <= wide.shape[1]:
        found_IO = _dot(narrow, 0, wide, 0, dtype)
        return found_IO if form.axis == 0 else found_IO.T
    found_OI = _dot(wide, 0, narrow, 0, dtype)
    return found_OI.T if form.axis == 0 else found_OI


def _backward(narrow_ND, wide_NO, w, routed_NK, form: _Form, *, into_narrow: bool) -> tuple[jax.Array, jax.Array]:
    """Gradients of the input and of the weight, for a product's input and the gradient of its result.

    Either may be the narrow side: `into_narrow` tells which of them is wanted as the input's gradient. One loop makes
    both, so that the wide rows of a tile are collected once.
    """
    # Sums over many tiles are float32 at least, also for bfloat16 parameters.
    wide_dtype = jnp.promote_types(w.dtype, jnp.float32)
    own = _weight_product(narrow_ND[:, : form.shared_width], wide_NO, form, wide_dtype)
    dw = jax.lax.dynamic_update_slice(jnp.zeros(w.shape, wide_dtype), own, (0, 0))
    dtype = w.dtype
    if into_narrow:
        shared = _dot(wide_NO, 1, form.shared(w), 1 - form.axis, dtype)
    else:
        shared = _dot(narrow_ND[:, : form.shared_width], 1, form.shared(w), form.axis, dtype)
    if not routed_NK.shape[1]:
        return (_padded(shared, narrow_ND.shape[1]) if into_narrow else shared), dw.astype(dtype)
    tiles = form.tiles(routed_NK)

    def body(i, carry):
        dx, dw = carry
        block = tiles.expert_M[i]
        slab, narrow_TI = form.slab(w, block), form.block_rows(narrow_ND, tiles, i)
        wide_TO = wide_NO[rows(tiles.token_S, i, form.tile)]
        if into_narrow:
            dx = _into(dx, _dot(wide_TO, 1, slab, 1 - form.axis, dtype), i)
        else:
            dx = form.add_rows(dx, _dot(narrow_TI, 1, slab, form.axis, dtype), tiles, i)
        added = form.slab(dw, block) + _weight_product(narrow_TI, wide_TO, form, wide_dtype)
        return dx, jax.lax.dynamic_update_slice_in_dim(dw, added, block * form.size, axis=form.axis)

    start = form.slots(tiles, dtype) if into_narrow else shared
    dx, dw = jax.lax.fori_loop(0, tiles.count, body, (start, dw))
    if into_narrow:
        dx = jnp.concatenate([shared, _placed(dx[tiles.slot_NK], routed_NK, form.blocks)], axis=1)
    return dx, dw.astype(dtype)


def _form(x_N: jax.Array, w: jax.Array, blocks: Blocks, axis: int, tile: int | None) -> _Form:
    # No block gets more rows than there are tokens: few tokens, as in decoding, don't fill up a whole tile.
    height = min(TILE, x_N.shape[0]) if tile is None else tile
    return _Form(blocks, axis, w.shape[axis] // blocks.count, height)


def loop_from_blocks(x_ND, routed_NK, w_DO, blocks: Blocks, dtype, tile: int | None = None) -> jax.Array:
    """Sort the assignments into tiles of one block each and loop over the tiles in use, there and back.

    A loop of so many rounds as the routing asks for has no derivative of its own: the backward pass is two such loops.
    """
    if blocks.shared == blocks.count:
        return matmul(x_ND, w_DO, dtype)
    y: Any = _from(x_ND, w_DO, routed_NK, _form(x_ND, w_DO, blocks, 0, tile), dtype or x_ND.dtype)
    return y


def loop_to_blocks(x_NO, routed_NK, w_OD, blocks: Blocks, dtype, tile: int | None = None) -> jax.Array:
    """As `loop_from_blocks`."""
    if blocks.shared == blocks.count:
        return matmul(x_NO, w_OD, dtype)
    y: Any = _to(x_NO, w_OD, routed_NK, _form(x_NO, w_OD, blocks, 1, tile), dtype or x_NO.dtype)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _from(x_ND, w, routed_NK, form: _Form, dtype):
    return _narrow_to_wide(x_ND, w, routed_NK, form, dtype)


def _from_forward(x_ND, w, routed_NK, form: _Form, dtype):
    return _from(x_ND, w, routed_NK, form, dtype), (x_ND, w, routed_NK)


def _from_backward(form: _Form, dtype, residuals, g_NO):
    x_ND, w, routed_NK = residuals
    return *_backward(x_ND, g_NO.astype(x_ND.dtype), w, routed_NK, form, into_narrow=True), None


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _to(x_NO, w, routed_NK, form: _Form, dtype):
    return _wide_to_narrow(x_NO, w, routed_NK, form, dtype)


def _to_forward(x_NO, w, routed_NK, form: _Form, dtype):
    return _to(x_NO, w, routed_NK, form, dtype), (x_NO, w, routed_NK)


def _to_backward(form: _Form, dtype, residuals, g_ND):
    x_NO, w, routed_NK = residuals
    return *_backward(g_ND.astype(x_NO.dtype), x_NO, w, routed_NK, form, into_narrow=False), None


_from.defvjp(_from_forward, _from_backward)
_to.defvjp(_to_forward, _to_backward)


def _sorted(routed_NK: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token and block of each assignment in the order of blocks, and the rows of each routed block."""
    flat_A = routed_NK.reshape(-1)
    order_A = jnp.argsort(flat_A, stable=True)
    sizes_C = jnp.bincount(flat_A - blocks.shared, length=blocks.count - blocks.shared)
    return order_A, flat_A[order_A], sizes_C


def _unsorted(y_A: jax.Array, order_A: jax.Array, k: int) -> jax.Array:
    return y_A[jnp.argsort(order_A)].reshape(-1, k, y_A.shape[1])


def ragged_from_blocks(x_ND, routed_NK, w_DO, blocks: Blocks, dtype) -> jax.Array:
    """Sort the assignments by block, multiply by `ragged_matmul`, put the rows back and add them up."""
    if blocks.shared == blocks.count:
        return matmul(x_ND, w_DO, dtype)
    x_NCI = x_ND.reshape(x_ND.shape[0], blocks.count, -1)
    w_CIO = w_DO.reshape(blocks.count, -1, w_DO.shape[1])
    width = blocks.shared * x_NCI.shape[2]
    y_NO = matmul(x_ND[:, :width], w_DO[:width], dtype)
    if routed_NK.shape[1]:
        order_A, block_A, sizes_C = _sorted(routed_NK, blocks)
        x_AI = x_NCI[order_A // routed_NK.shape[1], block_A]
        y_AO = ragged_matmul(x_AI, w_CIO[blocks.shared :], sizes_C, dtype)
        y_NO = y_NO + jnp.sum(_unsorted(y_AO, order_A, routed_NK.shape[1]), axis=1)
    return y_NO


def ragged_to_blocks(x_NO, routed_NK, w_OD, blocks: Blocks, dtype) -> jax.Array:
    """As `ragged_from_blocks`."""
    if blocks.shared == blocks.count:
        return matmul(x_NO, w_OD, dtype)
    size = w_OD.shape[1] // blocks.count
    y_NI = matmul(x_NO, w_OD[:, : blocks.shared * size], dtype)
    if not routed_NK.shape[1]:
        return _padded(y_NI, w_OD.shape[1])
    order_A, _, sizes_C = _sorted(routed_NK, blocks)
    w_COI = jnp.swapaxes(w_OD.reshape(-1, blocks.count, size), 0, 1)[blocks.shared :]
    x_AO = x_NO[order_A // routed_NK.shape[1]]
    y_AI = ragged_matmul(x_AO, w_COI, sizes_C, dtype)
    packed_NKI = _unsorted(y_AI, order_A, routed_NK.shape[1])
    return jnp.concatenate([y_NI, _placed(packed_NKI, routed_NK, blocks)], axis=1)
