"""The experts of BlockFFN, or of another mixture, for a few tokens: those that some token takes are read, each once.

Shapes: M tokens, D model width, E experts of W neurons.
"""

from __future__ import annotations

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
)

Scales = tuple[jax.Array | None, jax.Array | None, jax.Array | None]


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

    Args:
      x: [M, D], float32 or bfloat16.
      scores: [M, E] router scores, float32 or bfloat16; experts whose scores are all 0 are not read.
      up, down, gate: [E, W, D] in float32, bfloat16 or int8; gate may be None.
      activation: gelu_tanh, gelu, silu, relu or relu2.
      scales: float32 [E, W] of up, down and gate where these are int8.
      implementation: "xla" (a loop over active experts), "native", "pallas_gpu", "pallas_tpu", either of these with
        "_interpret" (see `dispatch`), or None: for up to 16 rows "native" on a CPU and the kernel on a GPU or TPU (not
        of exact gelu), else "xla".
      return_active: also return how many hidden units of a token's experts are not 0.

    Returns:
      [M, D] in the dtype of x, or that and int32 [M].

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.

    Source: BlockFFN (arXiv 2507.08771), sections 3.1 and 3.4.
    """
    (m, d), (experts, width, _) = x.shape, up.shape
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

    def flat(up, down, gate):
        arrays = [up, down] if gate is None else [gate, up, down]
        return [array.reshape(1, -1, d) for array in arrays]

    def xla(x, scores, up, down, gate, scales):
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
        nothing = jnp.zeros((m, d), jnp.float32), jnp.zeros(m, jnp.int32)
        y, count = sum_over_active(active, 1, nothing, add, (up, down, gate))
        return y.astype(x.dtype), count

    def cpp(x, scores, up, down, gate, scales):
        gates = jnp.zeros(0, up.dtype) if gate is None else gate
        factors = (or_empty(scales[2]), or_empty(scales[0]), or_empty(scales[1]))
        results, code = result_shapes((x.shape, x.dtype), ((m,), jnp.int32)), native.ACTIVATIONS[activation]
        return native.call("block_ffn", results, x, scores, gates, up, down, *factors, activation=code)

    def gpu(x, scores, up, down, gate, scales, *, interpret):
        y, count = rows_gpu.sum_over_experts(x, scores, up, down, gate, scales, act, interpret)
        return y.astype(x.dtype), count

    def tpu(x, scores, up, down, gate, scales, *, interpret):
        up_scale, down_scale, gate_scale = (None if scale is None else scale.reshape(-1) for scale in scales)
        weights = jnp.repeat(scores.astype(jnp.float32), width, axis=1)
        factors = [up_scale] if gate is None else [gate_scale, up_scale]
        factors_FS = [jnp.ones(experts * width) if scale is None else scale for scale in factors]
        y, count = weighted_rows.weighted_rows(
            x[None].astype(jnp.float32),
            (weights if down_scale is None else weights * down_scale)[None],
            flat(up, down, gate),
            lambda first, *second: act(first) * second[0] if second else act(first),
            None if gate_scale is None and up_scale is None else jnp.stack(factors_FS)[None],
            name="block_ffn_rows_kernel",
            interpret=interpret,
        )
        return y[0].astype(x.dtype), count[0]

    def tpu_refusal(interpret):
        return native_refusal(x=x, scores=scores) or _tpu_refusal(m, activation, flat(up, down, gate), interpret)

    few = m <= MOST_ROWS
    implementations = [
        plain(xla),
        native_cpu(cpp, native_refusal(x=x, scores=scores), default=few),
        *pallas("cuda", gpu, lambda interpret: rows_gpu.refusal(x, scores, activation)),
        *pallas("tpu", tpu, tpu_refusal, default=few),
    ]
    y, count = dispatch("block_ffn_rows", implementation, implementations)(x, scores, up, down, gate, scales)
    return (y, count) if return_active else y


def _tpu_refusal(m: int, activation: str, rows: list[jax.Array], interpret: bool) -> str | None:
    if activation == "gelu" and not interpret:
        return "has no error function for gelu"
    factors = any(array.dtype == jnp.int8 for array in rows)
    return weighted_rows.refusal(m, rows[-1].shape[-1], *rows, factors=factors, interpret=interpret)


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
