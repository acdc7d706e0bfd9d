"""Attention's kernels as implementations of an operation: on each device's part of the arrays, and with gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsezoo_jax.pallas_kernels.checkpoint_names import ATTENTION
from sparsezoo_jax.pallas_kernels.dispatch import BLOCKED, NATIVE, Implementation, pallas
from sparsezoo_jax.pallas_kernels.spark_attention import (
    blocked,
    gpu,
    gpu_arrays,
    gpu_backward,
    native_tiles,
    tpu,
    tpu_backward,
    zigzag,
)
from sparsezoo_jax.pallas_kernels.spark_attention.reference import Problem
from sparsezoo_jax.pallas_kernels.spark_attention.tpu_grid import by_sequences
from sparsezoo_jax.pallas_kernels.spark_attention.visibility import Visibility
from sparsezoo_jax.sharding import shard_map

#: Queries for which a kernel is the default: a tile of them is computed whole.
_FEWEST_QUERIES = 128
#: Queries for which a CPU works in blocks, in plain JAX or natively: with fewer all pairs at once take no longer.
_FEWEST_IN_BLOCKS, _FEWEST_NATIVE = 256, 64


def kernels(
    p: Problem, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any
) -> list[Implementation[tuple[jax.Array, jax.Array]]]:
    """The implementations beside "xla", of q, k, v and mask, with the results of `spark_attention`."""

    def of_platform(
        platform: Literal["tpu", "cuda"], attend: Callable[..., Any], refusal: Callable[..., str | None]
    ) -> tuple[Implementation[tuple[jax.Array, jax.Array]], ...]:
        return pallas(
            platform,
            partial(_sharded, partial(attend, p)),
            lambda interpret: refusal(interpret=interpret),
            default=q.shape[1] >= _FEWEST_QUERIES,
            sharded=True,
        )

    def of_cpu(name: str, form: Any, fewest: int) -> Implementation[tuple[jax.Array, jax.Array]]:
        return Implementation(
            name,
            partial(_sharded, partial(_attend_on_cpu, p, form)),
            "cpu",
            partial(form.refusal, q, k, v, mask, p.selection),
            default=q.shape[1] >= fewest,
            kernel=True,
            sharded=True,
        )

    return [
        # Of two defaults of a platform the last one counts that can be taken.
        of_cpu(BLOCKED, blocked, _FEWEST_IN_BLOCKS),
        of_cpu(NATIVE, native_tiles, _FEWEST_NATIVE),
        *of_platform("tpu", _attend_on_tpu, partial(tpu.refusal, q, k, v, mask, p)),
        *of_platform("cuda", _attend_on_gpu, partial(gpu.refusal, q, k, v, mask, p.selection)),
    ]


def _sharded(attend: Callable[..., Any], q, k, v, visibility: Visibility, **options):
    """`attend` on each device's sequences, queries and heads; each has all keys of its sequences.

    Under a causal mask late queries see more keys than early ones. Devices that split a sequence therefore exchange
    halves of their queries, so that each has an early and a late piece, and give the results back (`zigzag`).
    """
    group = q.shape[2] // k.shape[2]

    def on_shards(q, k, v, *rest):
        *arrays, split = rest
        if split["heads"] != split["kv_heads"]:
            # The mesh divides the queries' heads but not the keys': take those that serve this device's queries.
            own = q.shape[2]
            served = 1 if group % own == 0 else own
            first = jax.lax.axis_index(split["heads"]) * own
            wanted = (first + jnp.arange(served) * (own // served)) // group
            k, v = (jnp.take(x, wanted, axis=2) for x in (k, v))
        shard = visibility.replaced(*arrays, ordered=visibility.ordered and not split["length"])
        if not visibility.ordered or not split["length"]:
            return attend(q, k, v, shard, **options)
        (axis,), window = split["length"], visibility.window
        layout = zigzag.Layout(axis, jax.lax.axis_size(axis), q.shape[1])
        if not layout.even or (window is not None and window <= layout.length // 2):
            # Within a short window all queries see as many keys.
            return attend(q, k, v, shard.part_of(layout.contiguous, jax.lax.axis_index(axis)), **options)
        q, positions, segments = (layout.exchanged(x) for x in (q, shard.query_positions_BT, shard.query_segments_BT))
        shard = shard.replaced(positions, shard.key_positions_BS, segments, shard.key_segments_BS, ordered=False)
        results = attend(q, k, v, shard.part_of(layout.zigzag, jax.lax.axis_index(axis)), **options)
        return tuple(layout.returned(x) for x in results)

    queries, keys = ("batch", "length", "heads", None), ("batch", None, "kv_heads", None)
    return shard_map(
        on_shards,
        [q, k, v, *visibility.arrays],
        [queries, keys, keys, ("batch", "length"), ("batch", None), ("batch", "length"), ("batch", None)],
        (queries, queries[:3]),
    )


def _named(q, k, v, visibility, y, attended, statistics):
    """Results and residuals, of which rematerialisation can keep those that only the kernel can make."""
    y, statistics = checkpoint_name((y, statistics), ATTENTION)
    return (y, attended), (q, k, v, visibility, y, statistics)


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _attend_on_tpu(p: Problem, q, k, v, visibility, interpret):
    return _forward_on_tpu(p, q, k, v, visibility, interpret)[0]


def _forward_on_tpu(p: Problem, q, k, v, visibility, interpret):
    forward = partial(tpu.forward, p=p, interpret=interpret)
    return _named(q, k, v, visibility, *by_sequences(forward, p, q, k, v, visibility))


def _backward_on_tpu(p: Problem, interpret, residuals, g):
    backward = partial(tpu_backward.backward, p=p, interpret=interpret)
    return (*by_sequences(backward, p, *residuals, g[0]), None)


_attend_on_tpu.defvjp(_forward_on_tpu, _backward_on_tpu)


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _attend_on_gpu(p: Problem, q, k, v, visibility, interpret):
    return _forward_on_gpu(p, q, k, v, visibility, interpret)[0]


def _forward_on_gpu(p: Problem, q, k, v, visibility, interpret):
    q = gpu_arrays.scaled(q, p)  # once for both passes
    return _named(q, k, v, visibility, *gpu.forward(q, k, v, visibility, p, interpret))


def _backward_on_gpu(p: Problem, interpret, residuals, g):
    q, k, v, visibility, y, statistics = residuals
    return (*gpu_backward.backward(q, k, v, visibility, y, statistics, g[0], p, interpret), None)


_attend_on_gpu.defvjp(_forward_on_gpu, _backward_on_gpu)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_on_cpu(p: Problem, form: Any, q, k, v, visibility):
    return _forward_on_cpu(p, form, q, k, v, visibility)[0]


def _forward_on_cpu(p: Problem, form: Any, q, k, v, visibility):
    return _named(q, k, v, visibility, *form.forward(q, k, v, visibility, p))


def _backward_on_cpu(p: Problem, form: Any, residuals, g):
    q, k, v, visibility, y, statistics = residuals
    return (*form.backward(q, k, v, visibility, y, statistics, g[0], p), None)


_attend_on_cpu.defvjp(_forward_on_cpu, _backward_on_cpu)
