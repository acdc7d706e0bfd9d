"""The rows of active neurons on GPUs (Triton): their hidden state, then the sums over them. Other rows are not read.

Shapes: M tokens, A value width of the inputs, D model width, F neurons, P parts of the neurons.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.rows import native_refusal
from sparsezoo_jax.pallas_kernels.triton import height, in_use, load, store, times_weights
from sparsezoo_jax.pallas_kernels.tuning import launch_of

#: Most tokens: their sums are in registers.
MOST_TOKENS = 16


def refusal(x: jax.Array) -> str | None:
    """Why the kernels can't take these tokens [M, D], or None if they can."""
    if x.shape[0] > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {x.shape[0]}"
    return native_refusal(x=x)


def _hidden_kernel(x_ref, gate_ref, rows_ref, hidden_ref, *, m: int, width: int, neurons: int, tiles: tuple[int, ...]):
    """Gate times the product with K2, for all tokens, of a tile of neurons."""
    size, depth = tiles
    tokens, own = jnp.arange(height(m)), pl.program_id(0) * size + jnp.arange(size)
    here = (tokens < m)[:, None] & (own < neurons)[None]
    gate = load(gate_ref, tokens, own, here)
    used = in_use(gate)

    def step(i, sums):
        terms = i * depth + jnp.arange(depth)
        more = terms < width
        x = load(x_ref, tokens, terms, (tokens < m)[:, None] & more[None])
        return sums + times_weights(x, load(rows_ref, own, terms, used[:, None] & more[None]), transposed=True)

    zeros = jnp.zeros((tokens.size, size), jnp.float32)
    store(hidden_ref, tokens, own, here, gate * jax.lax.fori_loop(0, pl.cdiv(width, depth), step, zeros))


def _sum_kernel(hidden_ref, rows_ref, y_ref, *, m: int, d: int, width: int, neurons: int, tiles: tuple[int, ...]):
    """A tile of columns of the result, summed over one part of the neurons."""
    turn, size, parts = tiles
    tokens, columns = jnp.arange(height(m)), pl.program_id(0) * size + jnp.arange(size)
    part, turns = pl.program_id(1), pl.cdiv(pl.cdiv(neurons, turn), parts)

    def step(i, sums):
        own = (part * turns + i) * turn + jnp.arange(turn)
        hidden = load(hidden_ref, tokens, own, (tokens < m)[:, None] & (own < neurons)[None])
        mask = in_use(hidden)[:, None] & (columns < d)[None]
        return sums + times_weights(hidden, load(rows_ref, own, width + columns, mask))

    sums = jax.lax.fori_loop(0, turns, step, jnp.zeros((tokens.size, size), jnp.float32))
    store(y_ref, part * m + tokens, columns, (tokens < m)[:, None] & (columns < d)[None], sums)


def sum_over_active(
    values: jax.Array,
    gate: jax.Array,
    rows: jax.Array,
    scale: jax.Array | None,
    interpret: Any,
) -> jax.Array:
    """`sum_f gate_f (values . K2_f) V_f`, [M, D] in float32.

    Args:
      values: [M, A], float32 or bfloat16.
      gate: [M, F] float32; a neuron whose gate is 0 for all tokens is not read.
      rows: [F, A + D], in float32, bfloat16 or int8.
      scale: float32 [F, 2], factors of the two parts of int8 rows; None for others.
      interpret: whether to run it without a GPU.
    """
    (m, width), neurons = values.shape, gate.shape[1]
    d = rows.shape[1] - width
    if scale is not None:
        gate = gate * (scale[:, 0] * scale[:, 1])
    in_memory = pl.BlockSpec(memory_space=pl.ANY)

    def call(kernel, launch, grid, shape, *arrays, **sizes):
        return pl.pallas_call(
            partial(kernel, m=m, width=width, neurons=neurons, tiles=launch.tiles, **sizes),
            grid=grid,
            in_specs=[in_memory] * len(arrays),
            out_specs=in_memory,
            out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
            interpret=interpret,
            name=f"spark_ffn_rows{kernel.__name__}",
        )(*arrays)

    launch = launch_of("spark_ffn_rows_hidden", itemsize=rows.dtype.itemsize)
    hidden = call(_hidden_kernel, launch, (pl.cdiv(neurons, launch.tiles[0]),), (m, neurons), values, gate, rows)
    launch = launch_of("spark_ffn_rows_sum", itemsize=rows.dtype.itemsize)
    _, columns, parts = launch.tiles
    y = call(_sum_kernel, launch, (pl.cdiv(d, columns), parts), (parts * m, d), hidden, rows, d=d)
    return jnp.sum(y.reshape(parts, m, d), axis=0)
