"""DECO's routed experts (arXiv 2605.10933): NormSiLU of one map, each expert times its router score, the map back.

Expert e of width W owns columns e*W .. (e+1)*W - 1 of the input matrix and those rows of the output matrix.
Shapes: D model width, E experts, W expert width, F = E * W.
"""

from __future__ import annotations

import jax

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.deco_ffn.activation import NORMALISE, ExpertActivation, centred, norm_silu
from sparsezoo_jax.pallas_kernels.matmul import from_stream, to_stream
from sparsezoo_jax.sharding import constrain

__all__ = ["NORMALISE", "ExpertActivation", "deco_ffn", "hidden_units", "scaled_hidden"]


def deco_ffn(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    down: jax.Array,
    scale: jax.Array | None,
    *,
    expert_width: int,
    eps: float = 1e-5,
    activation: ExpertActivation = "norm_silu",
) -> jax.Array:
    """`sum_e scores_e * down_e NormSiLU(up_e x)`, every expert computed; differentiable in all arrays.

    NormSiLU removes the mean of the units of *all* experts of a token, active or not, divides those of an expert by
    their root mean square, multiplies by `scale` and takes SiLU. The gradient of the mean reaches every column of
    `up`, those of inactive experts too, with one and the same vector.

    Args:
      x: [..., D] normalised input.
      scores: [..., E] router scores; cast to the dtype of `x`.
      up: [D, F], F = E * expert_width.
      down: [F, D].
      scale: [W], shared by all experts; None where the activation normalises nothing.
      expert_width: neurons of one expert.
      eps: added to the mean square.
      activation: "norm_silu", or a part of it, see `ExpertActivation`.

    Returns:
      [..., D] in the dtype of `x`.

    Raises:
      ConfigError: shapes that don't fit each other.

    Source: DECO (arXiv 2605.10933), and its released code for what the abstract leaves open.
    """
    width, total = x.shape[-1], scores.shape[-1] * expert_width
    for name, found, wanted in (
        ("scores", scores.shape[:-1], x.shape[:-1]),
        ("up", up.shape, (width, total)),
        ("down", down.shape, (total, width)),
        ("scale", None if scale is None else scale.shape, (expert_width,) if activation in NORMALISE else None),
    ):
        require(found == wanted, f"deco_ffn.{name}", found, f"must be {wanted} for x, scores and expert_width")
    form = {"expert_width": expert_width, "eps": eps, "activation": activation}
    return to_stream(scaled_hidden(x, scores, up, scale, **form), down)


def hidden_units(
    x: jax.Array,
    up: jax.Array,
    scale: jax.Array | None,
    *,
    expert_width: int,
    eps: float = 1e-5,
    activation: ExpertActivation = "norm_silu",
) -> jax.Array:
    """Units of all experts after NormSiLU, [..., E, W]; arguments as of `deco_ffn`."""
    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), "ffn")
    units = constrain(from_stream(x, up), names)
    # The mean over all units, by the units: cheaper than by a mean column of `up`, for they exist already.
    per_expert = centred(units, activation).reshape(*x.shape[:-1], -1, expert_width)
    return norm_silu(per_expert, scale, eps, activation).astype(x.dtype)


def scaled_hidden(
    x: jax.Array,
    scores: jax.Array,
    up: jax.Array,
    scale: jax.Array | None,
    *,
    expert_width: int,
    eps: float = 1e-5,
    activation: ExpertActivation = "norm_silu",
) -> jax.Array:
    """Units of all experts after NormSiLU, each times its score, [..., F]; exactly 0 where the score is."""
    names = (*("batch", "length")[: x.ndim - 1], *(None,) * (x.ndim - 3), "ffn")
    hidden = hidden_units(x, up, scale, expert_width=expert_width, eps=eps, activation=activation)
    hidden = hidden * scores[..., None].astype(x.dtype)
    return constrain(hidden.reshape(*x.shape[:-1], -1), names)
