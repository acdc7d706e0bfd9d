"""The Spark FFN: a predictor on the first r input dimensions selects the neurons, the other dimensions value them."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.dispatch import Implementation, dispatch
from sparsezoo_jax.pallas_kernels.spark_ffn import reference
from sparsezoo_jax.pallas_kernels.statistical_topk import statistical_topk
from sparsezoo_jax.sharding import num_shards

Selection = Literal["statistical", "exact", "approximate", "relu", "none"]

__all__ = ["Selection", "exact_topk", "select_neurons", "spark_ffn"]


def exact_topk(x: jax.Array, k: int, *, approximate: bool = False) -> jax.Array:
    """Soft-threshold rows of `x` at their (k+1)-th largest entry, so that exactly `k` survive (ties aside).

    The control for statistical top-k: the same shrinkage with the sorted threshold. `approximate` takes the top by
    `jax.lax.approx_max_k` at its default recall of 0.95.
    """
    top = jax.lax.approx_max_k(x, k + 1)[0] if approximate else jax.lax.top_k(x, k + 1)[0]
    return jnp.maximum(x - jnp.min(top, axis=-1, keepdims=True), 0)


def select_neurons(
    scores: jax.Array,
    k: float,
    selection: Selection = "statistical",
    *,
    ddof: int = 1,
    huber_delta: float = 0.0,
    shift: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Thin out pre-activations `scores` [..., F] to about `k` positive entries, by the named rule.

    "statistical" is the Spark rule; "exact" and "approximate" sort; "relu" keeps what is positive, whatever its count;
    "none" passes all through. The last four are the controls of the paper's ablations. `shift` and `implementation` are
    those of statistical top-k, the latter by default "xla" on every platform: what a layer does with the gate fuses
    with its threshold.
    """
    if selection == "statistical":
        options = {"ddof": ddof, "huber_delta": huber_delta, "shift": shift}
        return statistical_topk(scores, k, **options, implementation=implementation or "xla")
    if selection in ("exact", "approximate"):
        return exact_topk(scores, round(k), approximate=selection == "approximate")
    return jax.nn.relu(scores) if selection == "relu" else scores


def spark_ffn(
    x: jax.Array,
    k1: jax.Array,
    k2: jax.Array,
    v: jax.Array,
    *,
    top_k: float,
    ddof: int = 1,
    huber_delta: float = 0.0,
    selection: Selection = "statistical",
    return_gate: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`V [GELU(StatTop_k(K1^T x[:r])) * (K2^T x[r:])]`, differentiable in all four arrays.

    Args:
      x: [..., D] normalised input. Its first r dimensions select, the remaining D - r value.
      k1: [r, F] predictor.
      k2: [D - r, F] value branch; only columns of active neurons matter.
      v: [F, D] down-projection; only rows of active neurons matter.
      top_k: target number of active neurons, below F.
      ddof, huber_delta: as in `statistical_topk`.
      selection: the rule that picks neurons; see `select_neurons`.
      return_gate: also return the gate [..., F] (zero exactly where a neuron is inactive).
      implementation: "xla" is the definition, whose statistics read the scores twice after they are made. "one_pass"
        takes them as it makes the scores, shifted by the mean of a sample of neurons (see `statistical_topk`), for
        selection by "statistical" alone. None: "one_pass" where that sample is small beside F, else "xla".

    Returns:
      [..., D], or that and the gate.

    Raises:
      ConfigError: shapes that don't fit each other, or no such implementation of the selection.

    Source: Spark Transformer (arXiv 2506.06644), section 2, Spark-FFN.
    """
    r, width = k1.shape
    require(
        k2.shape == (x.shape[-1] - r, width),
        "spark_ffn.k2",
        k2.shape,
        f"must be {(x.shape[-1] - r, width)} for x and k1",
    )
    require(
        v.shape == (width, x.shape[-1]),
        "spark_ffn.v",
        v.shape,
        f"must be {(width, x.shape[-1])} for x and k1",
    )

    def apply(x, k1, k2, v, *, one_pass: bool):
        shift = reference.sampled_mean(x, k1) if one_pass and top_k < width else None
        select = partial(select_neurons, k=top_k, selection=selection, ddof=ddof, huber_delta=huber_delta, shift=shift)
        return reference.spark_ffn(x, k1, k2, v, select=select)

    statistical = selection == "statistical"
    refusal = None if statistical else f'is for selection "statistical", not "{selection}"'
    one_pass = statistical and width >= 16 * reference.SAMPLE * num_shards("ffn", width)
    implementations = [
        Implementation("xla", partial(apply, one_pass=False), default=not one_pass),
        Implementation("one_pass", partial(apply, one_pass=True), None, lambda: refusal, default=one_pass),
    ]
    y, gate = dispatch("spark_ffn", implementation, implementations)(x, k1, k2, v)
    return (y, gate) if return_gate else y
