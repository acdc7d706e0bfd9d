"""The experts of BlockFFN, or of another mixture, for a few tokens: those that some token takes are read, each once.

Shapes: M tokens, D model width, E experts of W neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels import weighted_rows
from sparsezoo_jax.pallas_kernels.activations import ACTIVATIONS
from sparsezoo_jax.pallas_kernels.block_ffn import rows_gpu
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, pallas, plain
from sparsezoo_jax.pallas_kernels.rows import (
    MOST_ROWS,
    check_shapes,
    check_weights,
    combination,
    dequantised,
    native_refusal,
    or_empty,
    product,
    result_shapes,
    sum_over_active,
    sum_over_devices,
)
from sparsezoo_jax.sharding import shard_map

Scales = tuple[jax.Array | None, jax.Array | None, jax.Array | None]
Activation = Callable[[jax.Array], jax.Array]


def block_ffn_rows(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    *,
    activation: str = "silu",
    scales: Scales = (None, None, None),
    implementation: str | None = None,
    return_active: bool = False,
) -> Any:
    """`sum_e s_e down_e^T act(up_e x)` over the experts whose score s_e is not 0, in float32; no gradient.

    With `gate`, `act(gate_e x) * (up_e x)` takes the place of `act(up_e x)`. Natively and on GPUs, rows of `down` whose
    hidden unit is 0 for all tokens are not read either.

    On a mesh a device has its part of the tokens ("batch"), of the experts ("experts") and of their neurons ("ffn").
    Where one mesh axis splits tokens and experts, its devices exchange tokens: each computes what its experts make of
    the tokens of all. What the devices' experts and neurons add up to is summed.

    Args:
      x: [M, D], float32 or bfloat16.
      scores: [M, E] router scores, float32 or bfloat16; experts whose scores are all 0 are not read.
      up, down, gate: [E, W, D] in float32, bfloat16 or int8; gate may be None.
      activation: gelu_tanh, gelu, silu, relu or relu2.
      scales: float32 [E, W] of up, down and gate where these are int8.
      implementation: "xla" (a loop over active experts), "native", "pallas_gpu", "pallas_tpu", either of these with
        "_interpret" (see `dispatch`), or None: for up to 16 rows "native" on a CPU and the kernel on a GPU or TPU (not
        of exact gelu), else "xla". Limits are those of a device's part, exchanged tokens counted.
      return_active: also return how many hidden units of a token's experts are not 0.

    Returns:
      [M, D] in the dtype of x, or that and int32 [M].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.

    Source: BlockFFN (arXiv 2507.08771), sections 3.1 and 3.4.
    """
    m, (experts, width, d) = len(x), up.shape
    shape = (experts, width, d)
    check_shapes(
        "block_ffn_rows",
        {
            "scores": (scores.shape, (m, experts)),
            "up": (up.shape, shape),
            "down": (down.shape, shape),
            "gate": (shape if gate is None else gate.shape, shape),
        },
    )
    for name, w, scale in zip(("up", "down", "gate"), (up, down, gate), scales, strict=True):
        if w is not None:
            check_weights("block_ffn_rows", name, w, scale, shape[:2])
    allowed = ", ".join(ACTIVATIONS)
    require(activation in ACTIVATIONS, "block_ffn_rows.activation", activation, f"must be one of {allowed}")
    act = ACTIVATIONS[activation]

    def on_shards(x, scores, up, down, gate, up_scale, down_scale, gate_scale, split):
        dtype, summed = x.dtype, split["experts"] + split["ffn"]
        exchanging = tuple(axis for axis in split["experts"] if axis in split["batch"])
        for axis in exchanging:
            x, scores = (jax.lax.all_gather(array, axis, tiled=True) for array in (x, scores))
        if split["experts"]:
            first = jax.lax.axis_index(split["experts"]) * len(up)
            scores = jax.lax.dynamic_slice_in_dim(scores, first, len(up), axis=1)
        few, cpp_refusal = len(x) <= MOST_ROWS, native_refusal(x=x, scores=scores)
        tpu_refusal = partial(_tpu_refusal, activation, x, scores, up, down, gate)
        implementations = [
            plain(partial(_in_a_loop, act)),
            native_cpu(partial(_natively, activation, bool(summed)), cpp_refusal, default=few),
            *pallas("cuda", partial(_on_gpu, act), lambda interpret: rows_gpu.refusal(x, scores, activation)),
            *pallas("tpu", partial(_on_tpu, act), tpu_refusal, default=few),
        ]
        apply = dispatch("block_ffn_rows", implementation, implementations)
        y, count = apply(x, scores, up, down, gate, (up_scale, down_scale, gate_scale))
        for axis in exchanging:
            y, count = (jax.lax.psum_scatter(array, axis, tiled=True) for array in (y, count))
        y, count = sum_over_devices(y, count, tuple(axis for axis in summed if axis not in exchanging))
        return y.astype(dtype), count

    weights, factors = ("experts", "ffn", None), ("experts", "ffn")
    y, count = shard_map(
        on_shards,
        [x, scores, up, down, gate, *scales],
        [("batch", None), ("batch", None), *[weights] * 3, *[factors] * 3],
        (("batch", None), ("batch",)),
    )
    return (y, count) if return_active else y


# The implementations return sums in float32 and the number of hidden units that are not 0.


def _in_a_loop(act: Activation, x, scores, up, down, gate, scales: Scales):
    def of_expert(array: jax.Array | None, expert: jax.Array) -> Any:
        return None if array is None else jax.lax.dynamic_index_in_dim(array, expert, keepdims=False)

    def add(total, places, valid, weights):
        (expert,) = places
        up_e, down_e, gate_e = (of_expert(a, expert) for a in weights)
        factors = [of_expert(a, expert) for a in scales]
        hidden = product(x, up_e, factors[0])
        hidden = act(hidden) if gate is None else act(product(x, gate_e, factors[2])) * hidden
        # A token without the expert gets nothing of it, whatever the product of its numbers is.
        score = scores[:, expert, None].astype(jnp.float32)
        y, count = total
        count += jnp.sum((hidden != 0) & (score != 0), axis=-1, dtype=jnp.int32)
        return y + combination(jnp.where(score != 0, score * hidden, 0), down_e, factors[1]), count

    active = jnp.any(scores != 0, axis=0)
    nothing = jnp.zeros(x.shape, jnp.float32), jnp.zeros(len(x), jnp.int32)
    return sum_over_active(active, 1, nothing, add, (up, down, gate))


def _natively(activation: str, summed: bool, x, scores, up, down, gate, scales: Scales):
    # Results have the dtype of x, to which those that devices add up must not be rounded.
    x = x.astype(jnp.float32) if summed else x
    gates = jnp.zeros(0, up.dtype) if gate is None else gate
    factors = (or_empty(scales[2]), or_empty(scales[0]), or_empty(scales[1]))
    results, code = result_shapes((x.shape, x.dtype), ((len(x),), jnp.int32)), native.ACTIVATIONS[activation]
    y, count = native.call("block_ffn", results, x, scores, gates, up, down, *factors, activation=code)
    return y.astype(jnp.float32), count


def _on_gpu(act: Activation, x, scores, up, down, gate, scales: Scales, *, interpret):
    return rows_gpu.sum_over_experts(x, scores, up, down, gate, scales, act, interpret)


def _on_tpu(act: Activation, x, scores, up, down, gate, scales: Scales, *, interpret):
    experts, width, _ = up.shape
    up_scale, down_scale, gate_scale = (None if scale is None else scale.reshape(-1) for scale in scales)
    weights = jnp.repeat(scores.astype(jnp.float32), width, axis=1)
    factors = [up_scale] if gate is None else [gate_scale, up_scale]
    factors_FS = [jnp.ones(experts * width) if scale is None else scale for scale in factors]
    y, count = weighted_rows.weighted_rows(
        x[None].astype(jnp.float32),
        (weights if down_scale is None else weights * down_scale)[None],
        _flat(up, down, gate),
        lambda first, *second: act(first) * second[0] if second else act(first),
        None if gate_scale is None and up_scale is None else jnp.stack(factors_FS)[None],
        name="block_ffn_rows_kernel",
        interpret=interpret,
    )
    return y[0], count[0]


def _flat(up: jax.Array, down: jax.Array, gate: jax.Array | None) -> list[jax.Array]:
    """The maps as one list of all experts' neurons each, in the order of `weighted_rows`."""
    arrays = [up, down] if gate is None else [gate, up, down]
    return [array.reshape(1, -1, array.shape[-1]) for array in arrays]


def _tpu_refusal(activation: str, x, scores, up, down, gate, interpret: bool) -> str | None:
    if activation == "gelu" and not interpret:
        return "has no error function for gelu"
    rows = _flat(up, down, gate)
    factors = any(array.dtype == jnp.int8 for array in rows)
    return native_refusal(x=x, scores=scores) or weighted_rows.refusal(
        len(x), rows[-1].shape[-1], *rows, factors=factors, interpret=interpret
    )


def reference(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    *,
    activation: str = "silu",
    scales: Scales = (None, None, None),
) -> tuple[jax.Array, jax.Array]:
    """The definition: every expert, with weights in float32; and the number of units that are not 0."""
    act = ACTIVATIONS[activation]
    x_float32 = x.astype(jnp.float32)
    hidden = jnp.einsum("md,ewd->mew", x_float32, dequantised(up, scales[0]))
    if gate is not None:
        hidden = act(jnp.einsum("md,ewd->mew", x_float32, dequantised(gate, scales[2]))) * hidden
    else:
        hidden = act(hidden)
    scaled = scores.astype(jnp.float32)[..., None] * hidden
    active = jnp.sum((hidden != 0) & (scores != 0)[..., None], axis=(1, 2), dtype=jnp.int32)
    return jnp.einsum("mew,ewd->md", scaled, dequantised(down, scales[1])).astype(x.dtype), active
