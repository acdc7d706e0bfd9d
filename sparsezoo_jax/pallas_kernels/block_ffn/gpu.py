"""BlockFFN's experts for few tokens on GPUs (Triton): the hidden state of the union, then the sums over its experts.

Programs load the number of their expert and read its weights where they lie; those of an unused place read nothing.

Shapes: N tokens, U places of the union, W expert width, D model width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, plgpu
from sparsezoo_jax.pallas_kernels.triton import height, load, store, times_weights
from sparsezoo_jax.pallas_kernels.tuning import launch_of

#: Most tokens: their sums are in registers.
_MOST_TOKENS = 128


def refusal(x: jax.Array, up: jax.Array) -> str | None:
    """Why the kernels can't take these arrays, or None if they can."""
    if {x.dtype, up.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        return f"takes bfloat16 or float32 throughout, not {x.dtype} and {up.dtype}"
    if not 0 < x.shape[0] <= _MOST_TOKENS:
        return f"takes from 1 to {_MOST_TOKENS} tokens, not {x.shape[0]}"
    return None


def _hidden_kernel(
    experts_ref, x_ref, scores_ref, up_ref, gate_ref, hidden_ref, *, n: int, d: int, width: int, total: int, tiles
):
    """Activation times score, for all tokens, of a tile of neurons of the expert in one place of the union."""
    tile, depth = tiles
    place, start = pl.program_id(0), pl.program_id(1) * tile
    expert = experts_ref[place]
    used = expert < total
    tokens, terms, neurons = jnp.arange(height(n)), jnp.arange(depth), jnp.arange(tile)
    own = start + neurons < width
    first = jnp.where(used, expert, 0) * width + start

    def step(i, sums):
        here = i * depth + terms
        more = here < d
        x = load(x_ref, tokens, here, (tokens < n)[:, None] & more[None])
        weights = (up_ref,) if gate_ref is None else (up_ref, gate_ref)
        mask = more[:, None] & (own & used)[None]
        return tuple(
            s + times_weights(x, load(ref, here, first + neurons, mask)) for s, ref in zip(sums, weights, strict=True)
        )

    zero = jnp.zeros((tokens.size, tile), jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(d, depth), step, (zero,) * (1 if gate_ref is None else 2))
    hidden = jax.nn.silu(sums[0]) if gate_ref is None else jax.nn.silu(sums[1]) * sums[0]
    scores = plgpu.load(scores_ref.at[tokens, place], mask=tokens < n, other=0)
    mask = (tokens < n)[:, None] & own[None]
    store(hidden_ref, tokens, place * width + start + neurons, mask, hidden * scores[:, None])


def _sum_kernel(
    experts_ref, hidden_ref, down_ref, y_ref, *, n: int, d: int, width: int, total: int, tiles, places: int
):
    """A tile of columns of the result, summed over all places of the union."""
    tile, depth = tiles
    start = pl.program_id(0) * tile
    tokens, terms, columns = jnp.arange(height(n)), jnp.arange(depth), jnp.arange(tile)
    own = start + columns < d
    steps = jnp.int32(pl.cdiv(width, depth))

    def step(i, sums):
        place, within = jax.lax.div(i, steps), jax.lax.rem(i, steps) * depth + terms
        expert = experts_ref[place]
        used = expert < total
        more = within < width
        hidden = load(hidden_ref, tokens, place * width + within, (tokens < n)[:, None] & (more & used)[None])
        rows = jnp.where(used, expert, 0) * width + within
        down = load(down_ref, rows, start + columns, (more & used)[:, None] & own[None])
        return sums + times_weights(hidden, down)

    sums = jax.lax.fori_loop(0, places * pl.cdiv(width, depth), step, jnp.zeros((tokens.size, tile), jnp.float32))
    mask = (tokens < n)[:, None] & own[None]
    store(y_ref, tokens, start + columns, mask, sums)


def union(x, scores, up, down, gate, experts, expert_width: int, interpret: Any) -> jax.Array:
    """The sum over `experts` [U] for x [N, D]; without a gradient of its own."""
    (n, d), total, places = x.shape, scores.shape[1], experts.shape[0]
    taken_NU = jnp.take(scores, experts, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
    experts = experts.astype(jnp.int32)
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    sizes = {"n": n, "d": d, "width": expert_width, "total": total}

    def call(kernel, launch, grid, columns, *arrays):
        return pl.pallas_call(
            partial(kernel, **sizes, tiles=launch.tiles),
            grid=grid,
            in_specs=jax.tree.map(lambda _: in_memory, list(arrays)),
            out_specs=in_memory,
            out_shape=jax.ShapeDtypeStruct((n, columns), x.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
            interpret=interpret,
        )(*arrays)

    launch = launch_of("block_ffn_union_hidden", itemsize=up.dtype.itemsize)
    grid = (places, pl.cdiv(expert_width, launch.tiles[0]))
    hidden_NF = call(_hidden_kernel, launch, grid, places * expert_width, experts, x, taken_NU, up, gate)
    launch = launch_of("block_ffn_union_sum", itemsize=up.dtype.itemsize)
    grid = (pl.cdiv(d, launch.tiles[0]),)
    return call(partial(_sum_kernel, places=places), launch, grid, d, experts, hidden_NF, down)
