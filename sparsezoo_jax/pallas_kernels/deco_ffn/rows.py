"""DECO's experts for a few tokens: those that some token takes are read, each once.

The mean over the units of all experts is one dot product, of the token with the mean of the rows of all experts, so
that inactive experts need not be read for it. Shapes: M tokens, D model width, E experts of W neurons, F = E * W.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsezoo_jax import native
from sparsezoo_jax.pallas_kernels.deco_ffn.activation import NORMALISE, REMOVE_MEAN, ExpertActivation, norm_silu
from sparsezoo_jax.pallas_kernels.dispatch import XLA, dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.grouped_linear.reference import Blocks
from sparsezoo_jax.pallas_kernels.grouped_linear.rows import from_blocks_rows, to_blocks_rows
from sparsezoo_jax.pallas_kernels.rows import (
    MOST_ROWS,
    check_shapes,
    check_weights,
    native_refusal,
    or_empty,
    result_shapes,
)

Scales = tuple[jax.Array | None, jax.Array | None]


def deco_ffn_rows(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    down: jax.Array,
    mean_row: jax.Array,
    scale: jax.Array | None,
    *,
    expert_width: int,
    eps: float = 1e-5,
    activation: ExpertActivation = "norm_silu",
    scales: Scales = (None, None),
    implementation: str | None = None,
) -> jax.Array:
    """`sum_e scores_e * down_e^T NormSiLU(up_e x)` over the experts whose score is not 0, in float32; no gradient.

    Args:
      x: [M, D], float32 or bfloat16.
      scores: [M, E], float32 or bfloat16; experts whose scores are all 0 are not read.
      up, down: [F, D] in float32, bfloat16 or int8: a row of each for every neuron.
      mean_row: [D], the mean over the rows of `up` as they are stored, factors applied.
      scale, expert_width: as in `deco_ffn`.
      eps: added to the mean square.
      activation: as in `deco_ffn`.
      scales: float32 [F] of up and down where these are int8.
      implementation: "xla" (a loop over active experts for each map), "native", or None: "native" on a CPU for up to 16
        rows.

    Returns:
      [M, D] in the dtype of x.

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that can't take them.

    Source: DECO (arXiv 2605.10933); the mean row is its inference engine's.
    """
    (m, d), experts = x.shape, scores.shape[1]
    shape = (experts * expert_width, d)
    normed = (expert_width,) if activation in NORMALISE else None
    found = {"scores": (scores.shape[:1], (m,)), "up": (up.shape, shape), "down": (down.shape, shape)}
    found["scale"] = (None if scale is None else scale.shape, normed)
    check_shapes("deco_ffn_rows", {**found, "mean_row": (mean_row.shape, (d,))})
    for name, w, factors in zip(("up", "down"), (up, down), scales, strict=True):
        check_weights("deco_ffn_rows", name, w, factors, shape[:1])

    def xla(x, scores, up, down, mean_row, scale, scales: Scales):
        # Experts play the part of blocks of a width, of which no token shares any; -1 is no block.
        blocks = Blocks(count=experts, shared=0)
        routed = jnp.where(scores != 0, jnp.arange(experts), -1)
        units = to_blocks_rows(x, routed, up, blocks, scales[0], dtype=jnp.float32, implementation=XLA)
        if activation in REMOVE_MEAN:
            wide = x.astype(jnp.float32)
            units = units - jnp.matmul(wide, mean_row.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)[:, None]
        # Units of inactive experts are no products; `from_blocks_rows` reads none of them.
        hidden = norm_silu(units.reshape(m, experts, expert_width), scale, eps, activation)
        hidden = (hidden * scores[..., None].astype(jnp.float32)).reshape(m, -1)
        return from_blocks_rows(hidden, routed, down, blocks, scales[1], dtype=x.dtype, implementation=XLA)

    def cpp(x, scores, up, down, mean_row, scale, scales: Scales):
        factors = (or_empty(scales[0]), or_empty(scales[1]))
        removed = or_empty(mean_row.reshape(1, d) if activation in REMOVE_MEAN else None)
        arrays = (x, scores, up, down, *factors, removed, or_empty(scale), or_empty(None))
        return native.call("deco_ffn", result_shapes((x.shape, x.dtype)), *arrays, eps=eps)[0]

    implementations = [plain(xla), native_cpu(cpp, native_refusal(x=x, scores=scores), default=m <= MOST_ROWS)]
    return dispatch("deco_ffn_rows", implementation, implementations)(x, scores, up, down, mean_row, scale, scales)
