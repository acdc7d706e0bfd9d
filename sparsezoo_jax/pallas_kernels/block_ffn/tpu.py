"""BlockFFN's experts for few tokens on TPUs: one grid step an expert of the union, no other expert leaves HBM.

The experts' numbers are prefetched, and the pipeline reads the next expert's weights while one is computed. An unused
place repeats the number before it, for which nothing is read, and computes nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.lazy_pallas import pl, pltpu

#: Of VMEM, for double-buffered weights of an expert and the tokens' inputs and sums.
_VMEM = 12 * 2**20


def refusal(x: jax.Array, up: jax.Array, gate: jax.Array | None, expert_width: int) -> str | None:
    """Why the kernel can't take these arrays, or None if it can."""
    if {x.dtype, up.dtype} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        return f"takes bfloat16 or float32 throughout, not {x.dtype} and {up.dtype}"
    if expert_width % 128:
        return f"reads experts in whole tiles of 128 columns, which a width of {expert_width} does not fill"
    if not x.size:
        return "needs at least one token"
    size = x.dtype.itemsize
    needed = 2 * (2 if gate is None else 3) * x.shape[1] * expert_width * size + x.size * (4 * size + 4)
    return None if needed <= _VMEM else f"needs {needed} bytes of VMEM, more than {_VMEM}"


def _kernel(read_ref, used_ref, x_ref, scores_ref, up_ref, gate_ref, down_ref, y_ref, sums_ref):
    """Step i: add what the expert in place i of the union contributes to the sums; the last step writes them."""
    del read_ref  # the number of the expert, by which the block specs have chosen the weights
    i = pl.program_id(0)

    @pl.when(i == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(used_ref[i] != 0)
    def _():
        x = x_ref[...]
        up = jnp.dot(x, up_ref[...], preferred_element_type=jnp.float32)
        if gate_ref is None:
            hidden = jax.nn.silu(up)
        else:
            hidden = jax.nn.silu(jnp.dot(x, gate_ref[...], preferred_element_type=jnp.float32)) * up
        scores = scores_ref[...]
        own = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) == i
        hidden = hidden * jnp.sum(jnp.where(own, scores, 0), axis=1, keepdims=True)
        sums_ref[...] += jnp.dot(hidden.astype(x.dtype), down_ref[...], preferred_element_type=jnp.float32)

    @pl.when(i == pl.num_programs(0) - 1)
    def _():
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def union(x, scores, up, down, gate, experts, expert_width: int, interpret: Any) -> jax.Array:
    """The sum over `experts` [U] for x [N, D]; without a gradient of its own."""
    (n, d), total, places = x.shape, scores.shape[1], experts.shape[0]
    used = experts < total
    # The last used place at or before each; places before the first read expert 0, for nothing.
    last = jax.lax.cummax(jnp.where(used, jnp.arange(places), 0))
    read = jnp.clip(experts[last], 0, total - 1).astype(jnp.int32)
    taken_NU = jnp.take(scores, experts, axis=1, mode="fill", fill_value=0).astype(jnp.float32)

    columns = pl.BlockSpec((d, expert_width), lambda i, read, used: (0, read[i]))
    rows = pl.BlockSpec((expert_width, d), lambda i, read, used: (read[i], 0))
    matrices = 2 if gate is None else 3
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(places,),
            in_specs=[
                pl.BlockSpec((n, d), lambda i, read, used: (0, 0)),
                pl.BlockSpec((n, places), lambda i, read, used: (0, 0)),
                columns,
                None if gate is None else columns,
                rows,
            ],
            out_specs=pl.BlockSpec((n, d), lambda i, read, used: (0, 0)),
            scratch_shapes=[pltpu.VMEM((n, d), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((n, d), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * d * expert_width * places * matrices,
            transcendentals=n * expert_width * places,
            bytes_accessed=(places * expert_width * matrices + 2 * n) * d * x.dtype.itemsize,
        ),
        interpret=interpret,
        name="block_ffn_union",
    )(read, used.astype(jnp.int32), x, taken_NU, up, gate, down)
