"""The experts that some token takes on GPUs (Triton): their hidden state, then the sums over it. Others are not read.

Shapes: M tokens, D model width, E experts of W neurons, F = E * W neurons, T tiles and P parts of them.
"""

from __future__ import annotations

from collections.abc import Callable
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


def refusal(x: jax.Array, scores: jax.Array, activation: str) -> str | None:
    """Why the kernels can't take these tokens [M, D], scores and activation, or None if they can."""
    if x.shape[0] > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {x.shape[0]}"
    if activation == "gelu":
        return "has no error function for gelu"
    return native_refusal(x=x, scores=scores)


def _hidden_kernel(
    x_ref, scores_ref, weights, factors, hidden_ref, counts_ref, *, m: int, d: int, width: int, neurons: int, tiles, act
):
    """Activation times score, for all tokens, of a tile of neurons, and how many of the activations are not 0.

    `weights` are up and, for gated experts, gate; `factors` are those of the rows of each of them and of down, each a
    reference or None.
    """
    tile, (size, depth) = pl.program_id(0), tiles
    tokens, own = jnp.arange(height(m)), tile * size + jnp.arange(size)
    here = (tokens < m)[:, None] & (own < neurons)[None]
    scores = load(scores_ref, tokens, jax.lax.div(own, jnp.int32(width)), here).astype(jnp.float32)
    used = in_use(scores)

    def step(i, sums):
        terms = i * depth + jnp.arange(depth)
        more = terms < d
        x = load(x_ref, tokens, terms, (tokens < m)[:, None] & more[None])
        mask = used[:, None] & more[None]
        return tuple(
            s + times_weights(x, load(ref, own, terms, mask), transposed=True)
            for s, ref in zip(sums, weights, strict=True)
        )

    def scaled(values, factor_ref):
        return values if factor_ref is None else values * plgpu.load(factor_ref.at[own], mask=used, other=0)[None]

    zeros = jnp.zeros((tokens.size, size), jnp.float32)
    # No turns at all where no token takes any of the experts.
    turns = jnp.max(used.astype(jnp.int32)) * pl.cdiv(d, depth)
    up, *gate = map(scaled, jax.lax.fori_loop(0, turns, step, (zeros,) * len(weights)), factors)
    hidden = act(gate[0]) * up if gate else act(up)
    # A token without the expert gets nothing of it, whatever the product of its numbers is.
    hidden = jnp.where(scores != 0, hidden, 0)
    store(hidden_ref, tokens, own, here, scaled(scores * hidden, factors[-1]))
    count = jnp.sum((hidden != 0).astype(jnp.int32), axis=1)
    plgpu.store(counts_ref.at[tile, tokens], count, mask=tokens < m)


def _sum_kernel(hidden_ref, down_ref, y_ref, *, m: int, d: int, neurons: int, tiles: tuple[int, ...]):
    """A tile of columns of the result, summed over one part of the neurons."""
    turn, size, parts = tiles
    tokens, columns = jnp.arange(height(m)), pl.program_id(0) * size + jnp.arange(size)
    part = pl.program_id(1)

    def step(i, sums):
        # Parts take turns of neurons alternately, so that each has its share of every expert.
        own = (i * parts + part) * turn + jnp.arange(turn)
        hidden = load(hidden_ref, tokens, own, (tokens < m)[:, None] & (own < neurons)[None])
        mask = in_use(hidden)[:, None] & (columns < d)[None]
        return sums + times_weights(hidden, load(down_ref, own, columns, mask))

    turns = pl.cdiv(neurons, turn * parts)
    sums = jax.lax.fori_loop(0, turns, step, jnp.zeros((tokens.size, size), jnp.float32))
    store(y_ref, part * m + tokens, columns, (tokens < m)[:, None] & (columns < d)[None], sums)


def sum_over_experts(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None,
    scales: tuple[jax.Array | None, jax.Array | None, jax.Array | None],
    act: Callable[[jax.Array], jax.Array],
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """The sum over experts, [M, D] in float32, and hidden units that are not 0, int32 [M]; as `block_ffn_rows`."""
    (m, d), (experts, width, _) = x.shape, up.shape
    neurons = experts * width
    rows = lambda w: None if w is None else w.reshape(neurons, *w.shape[2:])  # noqa: E731
    up_scale, down_scale, gate_scale = map(rows, scales)
    in_memory = pl.BlockSpec(memory_space=pl.ANY)

    def call(kernel, launch, grid, results, *arrays, **options):
        return pl.pallas_call(
            partial(kernel, m=m, d=d, neurons=neurons, tiles=launch.tiles, **options),
            grid=grid,
            in_specs=jax.tree.map(lambda _: in_memory, arrays),
            out_specs=jax.tree.map(lambda _: in_memory, results),
            out_shape=results,
            compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
            interpret=interpret,
            name=f"block_ffn_rows{kernel.__name__}",
        )(*arrays)

    weights, factors = (rows(up),), (up_scale, down_scale)
    if gate is not None:
        weights, factors = (rows(up), rows(gate)), (up_scale, gate_scale, down_scale)
    launch = launch_of("block_ffn_rows_hidden", itemsize=up.dtype.itemsize)
    tiles = pl.cdiv(neurons, launch.tiles[0])
    results = (
        jax.ShapeDtypeStruct((m, neurons), jnp.float32),
        jax.ShapeDtypeStruct((tiles, m), jnp.int32),
    )
    arrays = x, scores, weights, factors
    hidden_MF, counts_TM = call(_hidden_kernel, launch, (tiles,), results, *arrays, width=width, act=act)
    launch = launch_of("block_ffn_rows_sum", itemsize=up.dtype.itemsize)
    _, columns, parts = launch.tiles
    sums = jax.ShapeDtypeStruct((parts * m, d), jnp.float32)
    y = call(_sum_kernel, launch, (pl.cdiv(d, columns), parts), sums, hidden_MF, rows(down))
    return jnp.sum(y.reshape(parts, m, d), axis=0), jnp.sum(counts_TM, axis=0)
