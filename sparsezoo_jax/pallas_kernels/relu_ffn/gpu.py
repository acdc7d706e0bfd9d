"""Products of the sparse feed-forward layer over unions, for GPUs (Triton).

A block of tokens has a list of the neurons that its tokens use. Neurons are rows of all weights here, which are read
where they lie; what is made of a block's neurons lies in the order of its list, in as many of its columns as that is
long. A block of neurons likewise has a list of tokens, for the gradients of its weights.

Shapes: M tokens, D model width, F neurons, P blocks of tokens, Q blocks of neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.triton import height, load, product, store
from sparsezoo_jax.pallas_kernels.tuning import SMALLEST, Launch, launch_of, target


def refusal(x: jax.Array, up: jax.Array) -> str | None:
    """Why the kernels can't take these arrays, or None if they can."""
    if {x.dtype, up.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        return f"takes bfloat16 or float32 throughout, not {x.dtype} and {up.dtype}"
    return None if x.size and up.size else "needs at least one token and one neuron"


def tokens_of_a_block(dtype: Any) -> int:
    """Tokens that share a list of neurons."""
    return launch_of("relu_ffn_hidden", itemsize=jnp.dtype(dtype).itemsize).tiles[0]


def neurons_of_a_block(dtype: Any) -> int:
    """Neurons that share a list of tokens."""
    return launch_of("relu_ffn_weights", itemsize=jnp.dtype(dtype).itemsize).tiles[0]


def _listed(places_ref: Any, count: Any, block: Any, start: Any, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slots of a block's list from `start` on, what they hold (past its end: no column), and which hold something."""
    slots = start + jnp.arange(size, dtype=jnp.int32)
    own = slots < count
    return slots, plgpu.load(places_ref.at[block, slots], mask=own, other=places_ref.shape[1]), own


def _program(tiles_across: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of the program's block and of its tile across."""
    index, across = pl.program_id(0), jnp.int32(tiles_across)
    return jax.lax.div(index, across), jax.lax.rem(index, across)


def _rows_times(x_ref: Any, w_ref: Any, rows: Any, neurons: Any, masks: Any, depth: int, used: Any) -> jax.Array:
    """Rows [R, D] of x times those of the weights of neurons [N, D]: [R, N] in float32; nothing is read if not used."""
    d = x_ref.shape[1]
    filled, own = masks

    def step(i, sums):
        here = i * depth + jnp.arange(depth, dtype=jnp.int32)
        more = here < d
        x = load(x_ref, rows, here, filled[:, None] & more[None])
        return sums + product(x, load(w_ref, neurons, here, own[:, None] & more[None]), (1, 1))

    steps = jnp.where(used, jnp.int32(pl.cdiv(d, depth)), 0)
    return jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((rows.size, neurons.size), jnp.float32))


def _hidden_kernel(places_ref, count_ref, x_ref, z_ref, up_ref, hidden_ref, *, tiles: tuple[int, ...]):
    """A tile of a block's hidden units: ReLU of the scores, times the other map if there is one."""
    size, width, depth = tiles
    block, across = _program(pl.cdiv(z_ref.shape[1], width))
    count = count_ref[block]
    slots, neurons, own = _listed(places_ref, count, block, across * width, width)
    tokens = block * size + jnp.arange(size, dtype=jnp.int32)
    filled = tokens < x_ref.shape[0]
    mask = filled[:, None] & own[None]
    hidden = jnp.maximum(load(z_ref, tokens, neurons, mask).astype(jnp.float32), 0)
    if up_ref is not None:
        sums = _rows_times(x_ref, up_ref, tokens, neurons, (filled, own), depth, across * width < count)
        hidden *= sums.astype(z_ref.dtype).astype(jnp.float32)
    store(hidden_ref, tokens, slots, mask, hidden)


def _sum_kernel(places_ref, count_ref, values_refs, weights_refs, y_ref, l1_ref=None, *, tiles: tuple[int, ...]):
    """A tile of columns of the sum over a block's neurons of values times weights, for one or two pairs of both."""
    size, width, depth = tiles
    d = y_ref.shape[1]
    block, across = _program(pl.cdiv(d, width))
    count = count_ref[block]
    tokens = block * size + jnp.arange(size, dtype=jnp.int32)
    columns = across * width + jnp.arange(width, dtype=jnp.int32)
    filled, own = tokens < y_ref.shape[0], columns < d

    def step(i, sums):
        total, l1 = sums
        slots, neurons, listed = _listed(places_ref, count, block, i * depth, depth)
        for values_ref, weights_ref in zip(values_refs, weights_refs, strict=True):
            values = load(values_ref, tokens, slots, filled[:, None] & listed[None])
            total += product(values, load(weights_ref, neurons, columns, listed[:, None] & own[None]), (1, 0))
            if l1_ref is not None:
                l1 += jnp.sum(jnp.abs(values.astype(jnp.float32)), axis=1)
        return total, l1

    zero = jnp.zeros((size, width), jnp.float32), jnp.zeros((size,), jnp.float32)
    steps = jax.lax.div(count + (depth - 1), jnp.int32(depth))
    total, l1 = jax.lax.fori_loop(jnp.int32(0), steps, step, zero)
    store(y_ref, tokens, columns, filled[:, None] & own[None], total)
    if l1_ref is not None:
        plgpu.store(l1_ref.at[tokens], l1, mask=filled & (across == 0))


def _gradients_kernel(
    places_ref, count_ref, x_ref, z_ref, up_ref, down_ref, dy_ref, dl1_ref, *results, tiles: tuple[int, ...]
):
    """A tile of a block's hidden units, and of the gradients of what they are made of.

    `results`: those gradients in the order of the list, for the input's gradient; and they and the hidden units in the
    neurons' own columns, for the weights' gradients. The gradient of the other map comes first, where there is one.
    """
    size, width, depth = tiles
    block, across = _program(pl.cdiv(z_ref.shape[1], width))
    count = count_ref[block]
    slots, neurons, own = _listed(places_ref, count, block, across * width, width)
    tokens = block * size + jnp.arange(size, dtype=jnp.int32)
    filled = tokens < x_ref.shape[0]
    mask, used = filled[:, None] & own[None], across * width < count
    z = load(z_ref, tokens, neurons, mask).astype(jnp.float32)
    gate = jnp.maximum(z, 0)
    d_l1 = plgpu.load(dl1_ref.at[tokens], mask=filled, other=0)[:, None]
    d_hidden = _rows_times(dy_ref, down_ref, tokens, neurons, (filled, own), depth, used)
    if up_ref is None:
        found = [jnp.where(z > 0, d_hidden + d_l1, 0)]
        hidden = gate
    else:
        other = _rows_times(x_ref, up_ref, tokens, neurons, (filled, own), depth, used)
        other = other.astype(z_ref.dtype).astype(jnp.float32)
        hidden = gate * other
        d_hidden += jnp.where(hidden > 0, d_l1, jnp.where(hidden < 0, -d_l1, 0))
        found = [d_hidden * gate, jnp.where(z > 0, d_hidden * other, 0)]
    for ref, values in zip(results, found, strict=False):
        store(ref, tokens, slots, mask, values)
    for ref, values in zip(results[len(found) :], [*found, hidden], strict=True):
        store(ref, tokens, neurons, mask, values)


def _weights_kernel(places_ref, count_ref, z_ref, x_ref, values_refs, *result_refs, tiles: tuple[int, ...]):
    """A tile of `values^T x` for a block of neurons, over the tokens in its list; for one or two arrays of values.

    A value counts where its token uses the neuron; elsewhere it may never have been written.
    """
    size, width, depth = tiles
    d, total = x_ref.shape[1], z_ref.shape[1]
    block, across = _program(pl.cdiv(d, width))
    count = count_ref[block]
    neurons = block * size + jnp.arange(size, dtype=jnp.int32)
    columns = across * width + jnp.arange(width, dtype=jnp.int32)
    exist, own = neurons < total, columns < d

    def step(i, sums):
        _, tokens, listed = _listed(places_ref, count, block, i * depth, depth)
        x = load(x_ref, tokens, columns, listed[:, None] & own[None])
        mask = listed[:, None] & exist[None]
        mask &= load(z_ref, tokens, neurons, mask).astype(jnp.float32) > 0
        return tuple(
            s + product(load(ref, tokens, neurons, mask), x, (0, 0)) for s, ref in zip(sums, values_refs, strict=True)
        )

    zero = jnp.zeros((size, width), jnp.float32)
    steps = jax.lax.div(count + (depth - 1), jnp.int32(depth))
    sums = jax.lax.fori_loop(jnp.int32(0), steps, step, (zero,) * len(values_refs))
    for ref, found in zip(result_refs, sums, strict=True):
        store(ref, neurons, columns, exist[:, None] & own[None], found)


def _fitted(kernel: str, dtype: Any, block: int, pairs: int, width: int, terms: int) -> Launch:
    """The table's line for a kernel, narrowed to what the arrays have and the target's shared memory holds.

    `pairs` of tiles of rows and of columns are loaded in a turn. The first tile is the block that lists are made for,
    whatever the line says.
    """
    itemsize = jnp.dtype(dtype).itemsize
    launch = launch_of(kernel, itemsize=itemsize)
    _, across, depth = launch.tiles
    across, depth, stages = min(across, height(width)), min(depth, height(terms)), launch.stages
    while 4096 + stages * pairs * (block + across) * depth * itemsize > target().shared and (
        stages > 1 or depth > SMALLEST
    ):
        stages, depth = (stages - 1, depth) if stages > 1 else (stages, depth // 2)
    return Launch((block, across, depth), launch.warps, stages)


def _run(name: str, kernel: Callable, launch: Launch, grid: int, inputs: Sequence[Any], results: Any, flops: int, how):
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    arrays = (*jax.tree.leaves(list(inputs)), *jax.tree.leaves(results))
    return pl.pallas_call(
        partial(kernel, tiles=launch.tiles),
        grid=(grid,),
        in_specs=jax.tree.map(lambda _: in_memory, list(inputs)),
        out_specs=jax.tree.map(lambda _: in_memory, results),
        out_shape=results,
        compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        # Of all neurons: how many a union has is not known before it runs.
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays)
        ),
        interpret=how,
        name=f"{name}_kernel",
    )(*inputs)


def forward(x_MD, z_MF, up_FD, down_FD, places_PF, count_P, *, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """The output [M, D] and the L1 norms of the hidden units, float32 [M]; `up_FD` is None without a gate."""
    (tokens, d), neurons, blocks = x_MD.shape, z_MF.shape[1], count_P.size
    hidden = jax.ShapeDtypeStruct((tokens, neurons), x_MD.dtype)
    flops = 2 * tokens * d * neurons
    block = tokens_of_a_block(x_MD.dtype)
    launch = _fitted("relu_ffn_hidden", x_MD.dtype, block, 1, neurons, d)
    grid = blocks * pl.cdiv(neurons, launch.tiles[1])
    inputs = [places_PF, count_P, x_MD, z_MF, up_FD]
    hidden = _run("relu_ffn_hidden", _hidden_kernel, launch, grid, inputs, hidden, flops, interpret)
    launch = _fitted("relu_ffn_sum", x_MD.dtype, block, 1, d, neurons)
    grid = blocks * pl.cdiv(d, launch.tiles[1])
    results = [jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype), jax.ShapeDtypeStruct((tokens,), jnp.float32)]
    inputs = [places_PF, count_P, [hidden], [down_FD]]
    y, l1 = _run("relu_ffn_sum", _sum_kernel, launch, grid, inputs, results, flops, interpret)
    return y, l1


def backward(x_MD, z_MF, first_FD, second_FD, down_FD, dy_MD, dl1_M, unions, tokens, *, interpret: Any) -> tuple:
    """Gradients of x [M, D], of the map before the ReLU and of the other one (None without), and of down, [F, D].

    Args:
      x_MD, z_MF: the layer's input and its scores before the ReLU.
      first_FD, second_FD, down_FD: the weights, a neuron a row.
      dy_MD, dl1_M: cotangents.
      unions: neurons of blocks of tokens, [P, F] and [P].
      tokens: tokens of blocks of neurons, [Q, M] and [Q].
      interpret: as `pallas_call` has it.
    """
    (count, d), neurons, dtype = x_MD.shape, z_MF.shape[1], x_MD.dtype
    blocks, maps = unions[1].size, 1 if second_FD is None else 2
    flops = 2 * count * d * neurons
    like_z = jax.ShapeDtypeStruct((count, neurons), dtype)
    block = tokens_of_a_block(dtype)
    launch = _fitted("relu_ffn_gradients", dtype, block, 1, neurons, d)
    inputs = [*unions, x_MD, z_MF, second_FD, down_FD, dy_MD, dl1_M.astype(jnp.float32)]
    grid = blocks * pl.cdiv(neurons, launch.tiles[1])
    name = "relu_ffn_gradients"
    made = _run(name, _gradients_kernel, launch, grid, inputs, [like_z] * (2 * maps + 1), maps * flops, interpret)
    listed, (*own, hidden) = made[:maps], made[maps:]

    launch = _fitted("relu_ffn_sum", dtype, block, maps, d, neurons)
    grid = blocks * pl.cdiv(d, launch.tiles[1])
    weights = [first_FD] if second_FD is None else [second_FD, first_FD]
    inputs = [*unions, listed, weights]
    results = [jax.ShapeDtypeStruct(x_MD.shape, dtype)]
    (dx,) = _run("relu_ffn_sum", _sum_kernel, launch, grid, inputs, results, maps * flops, interpret)

    def of_weights(x, values):
        launch = _fitted("relu_ffn_weights", dtype, neurons_of_a_block(dtype), len(values), d, count)
        grid = tokens[1].size * pl.cdiv(d, launch.tiles[1])
        results = [jax.ShapeDtypeStruct((neurons, d), dtype)] * len(values)
        inputs = [*tokens, z_MF, x, values]
        work = len(values) * flops
        return _run("relu_ffn_weights", _weights_kernel, launch, grid, inputs, results, work, interpret)

    *d_second, d_first = of_weights(x_MD, own)
    (d_down,) = of_weights(dy_MD, [hidden])
    return dx, d_first, d_second[0] if d_second else None, d_down
