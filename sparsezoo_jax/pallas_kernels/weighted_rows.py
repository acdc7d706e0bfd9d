"""Sums over the rows of a matrix that have a weight, on TPUs: memory tiles of other rows are not read.

A TPU's memory holds rows in tiles of 16 of bfloat16 (8 of float32, 32 of int8), the least that a transfer can take. The
kernel walks over a list of the tiles in use, with two buffers of several tiles: one is filled while the other is
multiplied.

Shapes: H matrices ("heads"), G tokens or queries that share one, S rows, A columns that a product is taken with, V that
are summed, U tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

#: Rows of a buffer: whole vectors of weights, and with long rows no more than that.
_LANES, _ROWS, _BUFFER = 128, 512, 2**20
#: Of VMEM, for two buffers, weights, queries and sums.
_VMEM = 12 * 2**20
_SUBLANES = 8
#: Bytes that memory delivers in the time that it takes to start one transfer.
_TRANSFER = 24 * 2**10


def _tile(dtype: Any) -> int:
    """Rows of a tile of memory."""
    return 32 // jnp.dtype(dtype).itemsize


def _buffered(rows_HSW: jax.Array) -> int:
    """Rows of a buffer."""
    rows, width = rows_HSW.shape[-2:]
    fitting = min(max(_BUFFER // (width * rows_HSW.dtype.itemsize), _LANES), _ROWS, pl.cdiv(rows, _LANES) * _LANES)
    sizes = range(fitting // _LANES * _LANES, 0, -_LANES)
    # One that divides the rows lets all of them be read in order.
    return next((size for size in sizes if rows % size == 0), sizes[0])


def _padded(x: jax.Array, to: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % to)
    return jnp.pad(x, widths)


def why_not(groups: int, part: int, rows: jax.Array, *, interpret: bool) -> str | None:
    """Why the kernel can't take so many queries of a head and `rows` [..., S, A + V], or None if it can.

    `part` is A.
    """
    count, width = rows.shape[-2:]
    if not interpret and (part % _LANES or width % _LANES):
        return f"takes rows in parts of whole tiles of 128 columns, not {part} and {width - part}"
    high = pl.cdiv(groups, _SUBLANES) * _SUBLANES
    buffers = 2 * _buffered(rows) * width * rows.dtype.itemsize
    needed = buffers + 4 * high * (2 * count + 3 * width)
    return None if needed <= _VMEM else f"needs {needed} bytes of VMEM, more than {_VMEM}"


def _pieces(x: jax.Array) -> jax.Array:
    """Three bfloat16 arrays, one below the other, whose sum is x in float32, exactly."""
    found = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        found.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        x = x - found[-1]
    return jnp.concatenate(found, axis=0).astype(jnp.bfloat16)


def _product(x: jax.Array, rows: jax.Array, contract: int) -> jax.Array:
    """The product of x in float32 with rows, over the given axis of them, as precise as in float32."""
    dimensions = (((1,), (contract,)), ((), ()))
    if rows.dtype == jnp.float32:
        return jax.lax.dot_general(
            x, rows, dimensions, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    # A matrix unit takes rows of bfloat16 once for all pieces of x; int8 is exact in it.
    high = x.shape[0]
    y = jax.lax.dot_general(_pieces(x), rows.astype(jnp.bfloat16), dimensions, preferred_element_type=jnp.float32)
    return y[:high] + (y[high : 2 * high] + y[2 * high :])


def _kernel(
    counts_ref, tiles_ref, q_ref, weights_ref, rows_ref, y_ref, buffer_ref, semaphores, *, part: int, tile: int, weigh
):
    """The rows in use of one head, or all of them where that is no slower."""
    head = pl.program_id(0)
    count = counts_ref[head]
    rows, buffered = rows_ref.shape[1], buffer_ref.shape[1]
    several, in_lanes = buffered // tile, _LANES // tile
    lanes = jax.lax.broadcasted_iota(jnp.int32, (weights_ref.shape[1], _LANES), 1)

    def copy(turn, source, place, size):
        slot = jax.lax.rem(turn, 2)
        source = rows_ref.at[head, pl.ds(pl.multiple_of(source * size, size), size)]
        return pltpu.make_async_copy(source, buffer_ref.at[slot, pl.ds(place * size, size)], semaphores.at[slot])

    def start_all(turn):
        copy(turn, turn, 0, buffered).start()

    def weights_of_all(turn):
        return weights_ref[0, :, pl.ds(pl.multiple_of(turn * buffered, buffered), buffered)]

    def start_used(turn):
        for i in range(several):
            copy(turn, tiles_ref[0, 0, turn * several + i], i, tile).start()

    def weights_of_used(turn):
        vectors = []
        for first in range(0, several, in_lanes):
            vector = jnp.zeros(lanes.shape, jnp.float32)
            for i in range(in_lanes):
                place = tiles_ref[0, 0, turn * several + first + i]
                whole = jax.lax.div(place, in_lanes)
                found = weights_ref[0, :, pl.ds(pl.multiple_of(whole * _LANES, _LANES), _LANES)]
                shift = jax.lax.rem((i + in_lanes) - (place - whole * in_lanes), in_lanes) * tile
                vector = jnp.where(lanes >= i * tile, pltpu.roll(found, shift, 1), vector)
            # A tile that is read again, to fill the buffer, counts once.
            vectors.append(jnp.where(lanes < count * tile - (turn * buffered + first * tile), vector, 0))
        return jnp.concatenate(vectors, axis=1)

    def add_up(turns, start, weights_of):
        def add(turn):
            weights = weights_of(turn)
            copy(turn, 0, 0, buffered).wait()  # for the bytes of all copies that were started
            slot = jax.lax.rem(turn, 2)
            if part:
                weights = weights * weigh(_product(q_ref[0], buffer_ref[slot, :, :part], 1))
            y_ref[0] += _product(weights, buffer_ref[slot, :, part:], 0)

        def body(turn, carry):
            start(turn + 1)
            add(turn)
            return carry

        start(0)
        jax.lax.fori_loop(0, turns - 1, body, 0)
        add(turns - 1)

    y_ref[...] = jnp.zeros_like(y_ref)
    bytes_of_tile = tile * rows_ref.shape[2] * jnp.dtype(rows_ref.dtype).itemsize
    most = pl.cdiv(rows * bytes_of_tile, tile * max(bytes_of_tile, _TRANSFER)) if rows % buffered == 0 else rows

    @pl.when((count > 0) & (count < most))
    def _():
        add_up(jax.lax.div(count + (several - 1), several), start_used, weights_of_used)  # `//` would ask for the sign

    if most < rows:

        @pl.when(count >= most)
        def _():
            add_up(rows // buffered, start_all, weights_of_all)


def weighted_rows(
    q_HGA: jax.Array,
    weights_HGS: jax.Array,
    rows_HSW: jax.Array,
    weigh: Callable[[jax.Array], jax.Array],
    *,
    name: str,
    interpret: Any,
) -> jax.Array:
    """`sum_s weights_s weigh(q . rows_s[:A]) rows_s[A:]`, [H, G, V] in float32; without a gradient.

    Args:
      q_HGA: float32; A may be 0, then nothing is weighed.
      weights_HGS: float32. Where it is 0 for all G of a tile's rows, the tile is not read, unless so many are in use
        that reading all in order is faster.
      rows_HSW: float32, bfloat16 or int8, W = A + V. Rows without a weight must be finite too.
      weigh: an elementwise function.
      name: the kernel's, in compiled programs.
      interpret: False, True, or `pltpu.InterpretParams`.
    """
    (heads, group, part), (_, count, width) = q_HGA.shape, rows_HSW.shape
    tile = _tile(rows_HSW.dtype)
    whole = count // tile * tile
    # A transfer can't take part of a tile: the rows of the last one, if it is not full, are the compiler's.
    last_HGV = _plain(q_HGA, weights_HGS[..., whole:], rows_HSW[:, whole:], weigh)
    if not whole:
        return last_HGV
    weights_HGS = weights_HGS[..., :whole]
    tiles = whole // tile
    used_HU = jnp.any(weights_HGS.reshape(heads, group, tiles, tile) != 0, axis=(1, 3))
    places_U = jnp.arange(tiles, dtype=jnp.int32)
    # Those in use, in order, and then the last of them again.
    last_H1 = jnp.max(jnp.where(used_HU, places_U, 0), axis=-1, keepdims=True)
    tiles_HU = jnp.minimum(jnp.sort(jnp.where(used_HU, places_U, tiles), axis=-1), last_H1)
    buffered = _buffered(rows_HSW)
    tiles_HU = jnp.pad(tiles_HU, ((0, 0), (0, -tiles % (buffered // tile))), mode="edge")
    counts_H = jnp.sum(used_HU, axis=-1, dtype=jnp.int32)
    weights_HGS = _padded(_padded(weights_HGS, _SUBLANES, 1), _LANES, 2)
    q_HGA = _padded(q_HGA, _SUBLANES, 1) if part else jnp.zeros((heads, _SUBLANES, _LANES), jnp.float32)
    high = weights_HGS.shape[1]

    def of_head(*shape: int, memory: Any = None) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda head, counts: (head, 0, 0), memory_space=memory)

    y_HGV = pl.pallas_call(
        partial(_kernel, part=part, tile=tile, weigh=weigh),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads,),
            in_specs=[
                of_head(1, tiles_HU.shape[1], memory=pltpu.SMEM),
                of_head(*q_HGA.shape[1:]),
                of_head(*weights_HGS.shape[1:]),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=of_head(high, width - part),
            scratch_shapes=[
                pltpu.VMEM((2, buffered, width), rows_HSW.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((heads, high, width - part), jnp.float32),
        # Tiles are numbered by a sort of what there is: checking each transfer would take longer than starting it.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        # Of all rows: how many are in use is known when it runs.
        cost_estimate=pl.CostEstimate(
            flops=2 * high * rows_HSW.size, transcendentals=0, bytes_accessed=rows_HSW.size * rows_HSW.dtype.itemsize
        ),
        interpret=interpret,
        name=name,
    )(counts_H, tiles_HU[:, None], q_HGA, weights_HGS, rows_HSW)
    return y_HGV[:, :group] + last_HGV


def _plain(q_HGA, weights_HGS, rows_HSW, weigh):
    """The definition."""
    part, rows_HSW = q_HGA.shape[-1], rows_HSW.astype(jnp.float32)
    if part:
        values_HGS = jnp.einsum("hga,hsa->hgs", q_HGA, rows_HSW[..., :part], precision="highest")
        weights_HGS = weights_HGS * weigh(values_HGS)
    return jnp.einsum("hgs,hsv->hgv", weights_HGS, rows_HSW[..., part:], precision="highest")
