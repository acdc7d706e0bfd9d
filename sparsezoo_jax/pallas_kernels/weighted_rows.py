"""Sums over the rows of a matrix that have a weight, on TPUs: memory tiles of other rows are not read.

A TPU's memory holds rows in tiles of 16 of bfloat16 (8 of float32, 32 of int8), the least that a transfer can take. The
kernel walks over a list of the tiles in use, with two buffers of several tiles: one is filled while the other is
multiplied.

Shapes: H matrices ("heads"), G tokens or queries that share one, S rows, A columns that a product is taken with, V that
are summed, U tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, pltpu

#: A buffer has a multiple of `_LANES` rows, `_ROWS` at most and, if more than `_LANES`, no more than `_BUFFER` bytes.
_LANES, _ROWS, _BUFFER = 128, 512, 2**20
#: Bytes of VMEM for two buffers, weights, queries and sums.
_VMEM = 12 * 2**20
_SUBLANES = 8
#: Bytes that memory delivers in the time that it takes to start one transfer.
_TRANSFER = 24 * 2**10


def _tile(rows: Sequence[jax.Array]) -> int:
    """Rows of a tile of memory; with arrays of several dtypes those of the largest tile, a multiple of the others."""
    return max(32 // array.dtype.itemsize for array in rows)


def _bytes_of_row(rows: Sequence[jax.Array]) -> int:
    return sum(array.shape[-1] * array.dtype.itemsize for array in rows)


def _buffer_rows(rows: Sequence[jax.Array]) -> int:
    """How many rows a buffer holds."""
    count = rows[0].shape[-2] // _tile(rows) * _tile(rows)
    fitting = min(max(_BUFFER // _bytes_of_row(rows), _LANES), _ROWS, max(pl.cdiv(count, _LANES), 1) * _LANES)
    sizes = range(fitting // _LANES * _LANES, 0, -_LANES)
    # If the size divides the number of rows, all of them can be read in order.
    return next((size for size in sizes if count % size == 0), sizes[0])


def _padded(x: jax.Array, to: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % to)
    return jnp.pad(x, widths)


def refusal(groups: int, part: int, *rows: jax.Array, factors: bool = False, interpret: bool) -> str | None:
    """Why the kernel can't take these arguments of `weighted_rows`, or None if it can.

    Args:
      groups: queries of a head, G.
      part: columns that a product is taken with, A.
      rows: the arrays of rows.
      factors: whether products have factors.
      interpret: whether the kernel is interpreted.
    """
    count, widths = rows[0].shape[-2], [part, *(array.shape[-1] for array in rows)]
    if not interpret and any(width % _LANES for width in widths):
        return f"takes rows in parts of whole tiles of 128 columns, not {' and '.join(map(str, widths))}"
    high = pl.cdiv(groups, _SUBLANES) * _SUBLANES
    needed = 2 * _buffer_rows(rows) * _bytes_of_row(rows)
    needed += 4 * (2 * (high + _SUBLANES * factors) * count + 3 * high * max(widths))
    return None if needed <= _VMEM else f"needs {needed} bytes of VMEM, more than {_VMEM}"


def _bfloat16_terms(x: jax.Array) -> jax.Array:
    """Three bfloat16 arrays, stacked along axis 0, whose sum is exactly x, which is float32."""
    terms = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        terms.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        x = x - terms[-1]
    return jnp.concatenate(terms, axis=0).astype(jnp.bfloat16)


def _product(x: jax.Array, rows: jax.Array, contract: int) -> jax.Array:
    """The product of x, which is float32, with rows of any dtype over their axis `contract`, to float32's precision."""
    dimensions = (((1,), (contract,)), ((), ()))
    if rows.dtype == jnp.float32:
        return jax.lax.dot_general(
            x, rows, dimensions, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    # The matrix unit loads the rows once and multiplies all three terms of x by them. (bfloat16 holds int8 exactly.)
    high = x.shape[0]
    y = jax.lax.dot_general(
        _bfloat16_terms(x), rows.astype(jnp.bfloat16), dimensions, preferred_element_type=jnp.float32
    )
    return y[:high] + (y[high : 2 * high] + y[2 * high :])


class _Sizes(NamedTuple):
    """What a kernel is compiled for."""

    part: int
    """Columns that a product is taken with, A."""
    high: int
    """Rows of weights in `weights_ref`; rows of factors follow them."""
    factors: int
    """How many rows of factors there are."""
    tile: int
    """Rows of a tile of memory."""
    rows: int
    """Rows of all tiles."""
    buffered: int
    """Rows of a buffer."""
    most: int
    """If so many tiles are in use, or more, all tiles are read in order. More than there are: never."""


def _kernel(
    counts_ref,
    tiles_ref,
    q_ref,
    weights_ref,
    rows_refs: Sequence[Any],
    y_ref,
    active_ref,
    buffer_refs: Sequence[Any],
    semaphores,
    *,
    sizes: _Sizes,
    weigh: Callable[..., jax.Array],
):
    """Sum up the tiles in use of one head, or all of its tiles where that is no slower."""
    part, high, factors, tile, rows, buffered, most = sizes
    arrays = len(rows_refs)
    head = pl.program_id(0)
    count = counts_ref[head]
    several, in_lanes = buffered // tile, _LANES // tile
    lanes = jax.lax.broadcasted_iota(jnp.int32, (weights_ref.shape[1], _LANES), 1)

    def copies(turn, source, place, size):
        slot = jax.lax.rem(turn, 2)
        places = pl.ds(pl.multiple_of(source * size, size), size), pl.ds(place * size, size)
        for ref, buffer_ref in zip(rows_refs, buffer_refs, strict=True):
            yield pltpu.make_async_copy(ref.at[head, places[0]], buffer_ref.at[slot, places[1]], semaphores.at[slot])

    def start_all(turn):
        for copy in copies(turn, turn, 0, buffered):
            copy.start()

    def weights_of_all(turn):
        return weights_ref[0, :, pl.ds(pl.multiple_of(turn * buffered, buffered), buffered)]

    def start_used(turn):
        for i in range(several):
            for copy in copies(turn, tiles_ref[0, 0, turn * several + i], i, tile):
                copy.start()

    def weights_of_used(turn):
        vectors = []
        for first in range(0, several, in_lanes):
            vector = jnp.zeros(lanes.shape, jnp.float32)
            for i in range(in_lanes):
                place = tiles_ref[0, 0, turn * several + first + i]
                lane_tile = jax.lax.div(place, in_lanes)
                found = weights_ref[0, :, pl.ds(pl.multiple_of(lane_tile * _LANES, _LANES), _LANES)]
                shift = jax.lax.rem((i + in_lanes) - (place - lane_tile * in_lanes), in_lanes) * tile
                vector = jnp.where(lanes >= i * tile, pltpu.roll(found, shift, 1), vector)
            # The last tile is read again and again to fill the buffer: only its first copy has weights.
            vectors.append(jnp.where(lanes < count * tile - (turn * buffered + first * tile), vector, 0))
        return jnp.concatenate(vectors, axis=1)

    def add_up(turns, start, weights_of):
        def add(turn):
            found = weights_of(turn)
            for copy in copies(turn, 0, 0, buffered):
                copy.wait()  # for the bytes of all copies that were started
            slot, weights = jax.lax.rem(turn, 2), found[:high]
            *to_multiply, (last_ref, skipped) = [(ref, 0) for ref in buffer_refs]
            if arrays == 1 and part:
                to_multiply, skipped = [(last_ref, 0)], part
            values = [_product(q_ref[0], ref[slot, :, :part], 1) for ref, _ in to_multiply]
            if factors:
                values = [value * found[high + i : high + i + 1] for i, value in enumerate(values)]
            if values:
                hidden = weigh(*values)
                active = (hidden != 0) & (weights != 0)
                active_ref[0] += jnp.sum(active.astype(jnp.float32), axis=1, keepdims=True)
                # A product that is not finite must not matter where the weight is 0.
                weights = jnp.where(weights != 0, weights * hidden, 0)
            y_ref[0] += _product(weights, last_ref[slot, :, skipped:], 0)

        def body(turn, carry):
            start(turn + 1)
            add(turn)
            return carry

        start(0)
        jax.lax.fori_loop(0, turns - 1, body, 0)
        add(turns - 1)

    y_ref[...] = jnp.zeros_like(y_ref)
    active_ref[...] = jnp.zeros_like(active_ref)

    @pl.when((count > 0) & (count < most))
    def _():
        add_up(jax.lax.div(count + (several - 1), several), start_used, weights_of_used)  # `//` would check signs

    if most <= rows // tile:

        @pl.when(count >= most)
        def _():
            add_up(rows // buffered, start_all, weights_of_all)


def weighted_rows(
    q_HGA: jax.Array,
    weights_HGS: jax.Array,
    rows: Sequence[jax.Array],
    weigh: Callable[..., jax.Array],
    factors_HFS: jax.Array | None = None,
    *,
    name: str,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """`sum_s weights_s weigh(q . rows_s) v_s`, without a gradient.

    Args:
      q_HGA: float32; A may be 0, then nothing is weighed.
      weights_HGS: float32. Where it is 0 for all G of a tile's rows, the tile is not read, unless so many are in use
        that reading all in order is faster.
      rows: one array [H, S, A + V], of whose rows the first A columns are multiplied with q and the others summed; or
        several, all but the last [H, S, A], that one [H, S, V]. In float32, bfloat16 or int8. Where a tile has any
        weight, its other rows must be finite in V too.
      weigh: an elementwise function of the products [G, S], of as many as there are arrays to multiply.
      factors_HFS: float32 factors of the products, for each of them; None: 1.
      name: the kernel's, in compiled programs.
      interpret: False, True, or `pltpu.InterpretParams`.

    Returns:
      [H, G, V] in float32, and the number of rows with a weight for which `weigh` is not 0, int32 [H, G]; with A = 0 it
      is 0.
    """
    (heads, group, part), count, tile = q_HGA.shape, rows[0].shape[1], _tile(rows)
    tiled = count // tile * tile
    # A transfer can't take a part of a tile: if the last tile is not full, its rows are left to XLA.
    rest = [array[:, tiled:] for array in rows]
    last = _plain(
        q_HGA, weights_HGS[..., tiled:], rest, weigh, None if factors_HFS is None else factors_HFS[..., tiled:]
    )
    if not tiled:
        return last
    weights_HGS = weights_HGS[..., :tiled]
    tiles = tiled // tile
    used_HU = jnp.any(weights_HGS.reshape(heads, group, tiles, tile) != 0, axis=(1, 3))
    places_U = jnp.arange(tiles, dtype=jnp.int32)
    # The tiles in use in ascending order; after them, to the end of the list, the last of them again.
    last_H1 = jnp.max(jnp.where(used_HU, places_U, 0), axis=-1, keepdims=True)
    tiles_HU = jnp.minimum(jnp.sort(jnp.where(used_HU, places_U, tiles), axis=-1), last_H1)
    buffered = _buffer_rows(rows)
    tiles_HU = jnp.pad(tiles_HU, ((0, 0), (0, -tiles % (buffered // tile))), mode="edge")
    counts_H = jnp.sum(used_HU, axis=-1, dtype=jnp.int32)
    weights_HGS = _padded(weights_HGS, _SUBLANES, 1)
    high, factors = weights_HGS.shape[1], 0
    if factors_HFS is not None:
        factors = factors_HFS.shape[1]
        factors_HFS = _padded(factors_HFS[..., :tiled], _SUBLANES, 1)
        weights_HGS = jnp.concatenate([weights_HGS, factors_HFS], axis=1)
    weights_HGS = _padded(weights_HGS, _LANES, 2)
    q_HGA = _padded(q_HGA, _SUBLANES, 1) if part else jnp.zeros((heads, high, _LANES), jnp.float32)
    transfer = tile * _bytes_of_row(rows) // len(rows)
    most = pl.cdiv(tiles * transfer, max(transfer, _TRANSFER)) if tiled % buffered == 0 else tiles + 1
    width = rows[-1].shape[-1] - (part if len(rows) == 1 else 0)

    def of_head(*shape: int, memory: Any = None) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda head, counts: (head, 0, 0), memory_space=memory)

    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    size = sum(array.size * array.dtype.itemsize for array in rows)
    y_HGV, active_HGL = pl.pallas_call(
        partial(_kernel, sizes=_Sizes(part, high, factors, tile, tiled, buffered, most), weigh=weigh),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads,),
            in_specs=[
                of_head(1, tiles_HU.shape[1], memory=pltpu.SMEM),
                of_head(*q_HGA.shape[1:]),
                of_head(*weights_HGS.shape[1:]),
                [in_memory] * len(rows),
            ],
            out_specs=[of_head(high, width), of_head(high, _LANES)],
            scratch_shapes=[
                [pltpu.VMEM((2, buffered, array.shape[-1]), array.dtype) for array in rows],
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((heads, high, columns), jnp.float32) for columns in (width, _LANES)],
        # The numbers of tiles are within bounds by construction, and checking a transfer takes longer than starting it.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        # As if all rows were read: how many are in use is known only when the kernel runs.
        cost_estimate=pl.CostEstimate(
            flops=2 * high * sum(array.size for array in rows), transcendentals=0, bytes_accessed=size
        ),
        interpret=interpret,
        name=name,
    )(counts_H, tiles_HU[:, None], q_HGA, weights_HGS, list(rows))
    return y_HGV[:, :group] + last[0], active_HGL[:, :group, 0].astype(jnp.int32) + last[1]


def _plain(q_HGA, weights_HGS, rows, weigh, factors_HFS):
    """`weighted_rows` in plain JAX, its definition."""
    part, rows = q_HGA.shape[-1], [array.astype(jnp.float32) for array in rows]
    *multiplied, summed = [rows[0][..., :part], rows[0][..., part:]] if len(rows) == 1 else rows
    active = jnp.zeros(q_HGA.shape[:2], jnp.int32)
    if part:
        values = [jnp.einsum("hga,hsa->hgs", q_HGA, array, precision="highest") for array in multiplied]
        if factors_HFS is not None:
            values = [value * factors_HFS[:, i, None] for i, value in enumerate(values)]
        hidden = weigh(*values)
        active = jnp.sum((hidden != 0) & (weights_HGS != 0), axis=-1, dtype=jnp.int32)
        weights_HGS = jnp.where(weights_HGS != 0, weights_HGS * hidden, 0)
    return jnp.einsum("hgs,hsv->hgv", weights_HGS, summed, precision="highest"), active
