"""The BlockFFN layer's experts: fused two-matrix experts, each scaled by its router score; and their union form.

Expert e of width W owns columns e*W .. (e+1)*W - 1 of the input matrices and those rows of the output matrix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.block_ffn import gpu, reference, tpu
from sparsezoo_jax.pallas_kernels.block_ffn.reference import union_of_experts
from sparsezoo_jax.pallas_kernels.dispatch import XLA, choose, run, settle

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
    apply = choose("block_ffn", implementation, {"xla": reference.block_ffn}, "xla")
    return apply(x, scores, up, down, gate, expert_width=expert_width)


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
        that fit into VMEM) and GPUs (for up to 128 tokens), where everything is bfloat16 or all is float32 and the
        compiler does not partition; "xla" elsewhere. The gradient is that of "xla" over the same experts.

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
    form = settle(
        "block_ffn_union",
        implementation,
        lambda interpret: tpu.why_not(x, up, gate, expert_width),
        kernel_by_default=True,
        gpu_why_not=lambda interpret: gpu.why_not(x, up),
        gpu_by_default=True,
    )
    experts = union_of_experts(scores, capacity) if experts is None else experts

    if form == XLA:
        return reference.block_ffn_union(x, scores, up, down, gate, experts=experts, expert_width=expert_width)
    y: Any = _union(x, scores, up, down, gate, experts, expert_width, form)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _union(x, scores, up, down, gate, experts, expert_width: int, form: str):
    def xla(x, scores, up, down, gate, experts):
        return reference.block_ffn_union(x, scores, up, down, gate, experts=experts, expert_width=expert_width)

    def checked(union):
        def kernel(x, scores, up, down, gate, experts, *, interpret):
            y = union(x, scores, up, down, gate, experts, expert_width, interpret)
            return jnp.where(reference.misses_an_expert(scores, experts), jnp.nan, y)

        return kernel

    return run(form, xla, checked(tpu.union), x, scores, up, down, gate, experts, gpu=checked(gpu.union))


def _union_forward(x, scores, up, down, gate, experts, expert_width, form):
    arrays = (x, scores, up, down, gate)
    return _union(*arrays, experts, expert_width, form), (arrays, experts)


def _union_backward(expert_width, form, residuals, g):
    del form
    arrays, experts = residuals
    plain = partial(reference.block_ffn_union, experts=experts, expert_width=expert_width)
    return (*jax.vjp(plain, *arrays)[1](g), None)


_union.defvjp(_union_forward, _union_backward)


def _check(operation: str, x, scores, up, down, gate, expert_width: int) -> None:
    width, total = x.shape[-1], scores.shape[-1] * expert_width
    for name, found, wanted in (
        ("scores", scores.shape[:-1], x.shape[:-1]),
        ("up", up.shape, (width, total)),
        ("down", down.shape, (total, width)),
        ("gate", up.shape if gate is None else gate.shape, up.shape),
    ):
        require(found == wanted, f"{operation}.{name}", found, f"must be {wanted} for x, scores and expert_width")
