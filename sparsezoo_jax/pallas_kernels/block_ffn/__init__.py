"""The BlockFFN layer's experts: fused two-matrix experts, each scaled by its router score; and their union form.

Expert e of width W owns columns e*W .. (e+1)*W - 1 of the input matrices and those rows of the output matrix.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.block_ffn import gpu, reference, tpu
from sparsezoo_jax.pallas_kernels.block_ffn.reference import union_of_experts
from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP, dispatch, pallas, plain, recomputed
from sparsezoo_jax.sharding import num_shards, shard_map, sum_shards

__all__ = ["block_ffn", "block_ffn_union", "union_of_experts"]


def block_ffn(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    *,
    expert_width: int,
    implementation: str | None = None,
) -> jax.Array:
    """`sum_e scores_e * down_e h_e`, h_e = SiLU(up_e x), or SiLU(gate_e x) * (up_e x) with a gate.

    Differentiable in all arrays. Experts whose score is 0 contribute nothing.

    Args:
      x: [..., D] normalised input.
      scores: [..., E] router scores; cast to the dtype of `x`.
      up: [D, F], F = E * expert_width.
      down: [F, D].
      gate: [D, F] or None.
      expert_width: neurons of one expert.
      implementation: "xla" (computes every expert), or None for the platform's default.

    Returns:
      [..., D] in the dtype of `x`.

    Raises:
      ConfigError: shapes that don't fit each other, or an unknown implementation.

    Source: BlockFFN (arXiv 2507.08771), section 3.1.
    """
    _check("block_ffn", x, scores, up, down, gate, expert_width)
    apply = dispatch("block_ffn", implementation, [plain(partial(reference.block_ffn, expert_width=expert_width))])
    return apply(x, scores, up, down, gate)


def block_ffn_union(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    *,
    expert_width: int,
    capacity: int | None = None,
    experts: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`block_ffn` of the tokens of one chunk, reading only the experts that some token activates; the same numbers.

    The experts of the union are computed for every token and scaled by the token's own score, so those that the token
    itself does not activate drop out. For several chunks use `jax.vmap`.

    On a mesh that divides the experts by "ffn" each device reads those of the union that it has, and their results are
    summed; it has all tokens, and all weights where the mesh divides neurons but not experts. How many of a union lie
    on one device is not known beforehand, so each has room for the whole capacity.

    Args:
      x: [N, D] the tokens of a chunk (or of a draft tree).
      scores: [N, E].
      up, down, gate, expert_width: as in `block_ffn`.
      capacity: most experts that a union may have, which is how many are read; None: E. If the union is larger, the
        result is NaN throughout: nothing is left out unnoticed.
      experts: int [U] distinct experts to compute, E marking unused places, instead of those found from `scores`. Any
        superset of the active ones gives the same result; one that misses an active expert gives NaN.
      implementation: "xla" (gathers the experts' weights first), "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret",
        "pallas_gpu_interpret" (see `dispatch`), or None: the kernels on TPUs (for experts of a multiple of 128 neurons
        that fit into VMEM) and GPUs (for up to 128 tokens), where everything is bfloat16 or all is float32; "xla"
        elsewhere. The gradient is that of "xla" over the same experts.

    Returns:
      [N, D] in the dtype of `x`.

    Raises:
      ConfigError: shapes that don't fit each other, a capacity outside 1..E, or an unknown implementation.

    Source: BlockFFN (arXiv 2507.08771), section 3.4 (kernels).
    """
    _check("block_ffn_union", x, scores, up, down, gate, expert_width)
    require(x.ndim == 2, "block_ffn_union.x", x.shape, "must be [tokens, width]; use jax.vmap over chunks")
    total = scores.shape[-1]
    capacity = total if capacity is None else capacity
    require(0 < capacity <= total, "block_ffn_union.capacity", capacity, f"must be between 1 and {total} experts")
    xla = partial(reference.block_ffn_union, expert_width=expert_width)

    def with_gradient_of_xla(union):
        def fwd(x, scores, up, down, gate, experts, *, interpret):
            y = union(x, scores, up, down, gate, experts, expert_width, interpret)
            y = jnp.where(reference.misses_an_expert(scores, experts), jnp.nan, y)
            return y, ()

        def bwd(arrays, residuals, cotangent, *, interpret):
            del interpret
            return recomputed(xla).bwd(arrays, residuals, cotangent)

        return CustomVJP(fwd, bwd)

    def on_shards(x, scores, up, down, gate, experts, split):
        over, own = split.get("ffn", ()), up.shape[1] // expert_width
        if over:
            first = jax.lax.axis_index(over) * own
            scores = jax.lax.dynamic_slice_in_dim(scores, first, own, axis=1)
            # Places of other devices' experts go unused; unused ones come last.
            experts = experts - first
            experts = jnp.sort(jnp.where((experts >= 0) & (experts < own), experts, own))[:own]
        implementations = [
            plain(xla),
            *pallas("tpu", with_gradient_of_xla(tpu.union), lambda interpret: tpu.refusal(x, up, gate, expert_width)),
            *pallas("cuda", with_gradient_of_xla(gpu.union), lambda interpret: gpu.refusal(x, up)),
        ]
        apply = dispatch("block_ffn_union", implementation, implementations)
        return sum_shards(apply(x, scores, up, down, gate, experts), over)

    experts = union_of_experts(scores, capacity) if experts is None else experts
    neurons = "ffn" if total % num_shards("ffn", total * expert_width) == 0 else None
    columns, rows, tokens = (None, neurons), (neurons, None), (None, None)
    return shard_map(
        on_shards,
        [x, scores, up, down, gate, experts],
        [tokens, tokens, columns, rows, columns, (None,)],
        tokens,
    )


def _check(operation: str, x, scores, up, down, gate, expert_width: int) -> None:
    width, total = x.shape[-1], scores.shape[-1] * expert_width
    for name, found, wanted in (
        ("scores", scores.shape[:-1], x.shape[:-1]),
        ("up", up.shape, (width, total)),
        ("down", down.shape, (total, width)),
        ("gate", up.shape if gate is None else gate.shape, up.shape),
    ):
        require(found == wanted, f"{operation}.{name}", found, f"must be {wanted} for x, scores and expert_width")
