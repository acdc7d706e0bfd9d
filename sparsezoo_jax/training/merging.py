"""Merging the checkpoints of a constant learning rate instead of decaying it (WSM, arXiv 2507.17634)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from sparsezoo_jax import storage
from sparsezoo_jax.errors import require
from sparsezoo_jax.training.parameters import restore_params, saved_steps
from sparsezoo_jax.training.schedules import MergeDecay
from sparsezoo_jax.training.state import PureDict


def merge_weights(decay: Sequence[float]) -> list[float]:
    """Weights c_0..c_k of k + 1 checkpoints that imitate a decay of the updates between them.

    `decay` is w_1 >= ... >= w_k in [0, 1], the factor on the updates between checkpoints j - 1 and j:
    c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k. The weights are at least 0 and sum to 1.

    Raises:
      ConfigError: the decay rises, or leaves [0, 1].
    """
    bounded = [1.0, *decay, 0.0]
    falls = all(a >= b for a, b in itertools.pairwise(bounded))
    require(len(decay) > 0 and falls, "merge.decay", tuple(decay), "must fall from at most 1 to at least 0")
    return [a - b for a, b in itertools.pairwise(bounded)]


def decay_values(kind: MergeDecay, count: int) -> list[float]:
    """The decay w_1..w_k for `count` = k + 1 checkpoints.

    linear: w_i = 1 - i / (k + 1), which makes all merging weights equal. 1-sqrt: w_i = 1 - sqrt(i / (k + 1)).
    """
    require(kind in ("linear", "1-sqrt"), "merge.decay", kind, "must be 'linear', '1-sqrt' or a sequence of factors")
    power = {"linear": 1.0, "1-sqrt": 0.5}[kind]
    return [1.0 - (i / count) ** power for i in range(1, count)]


def merge_params(
    directory: Path | str,
    *,
    steps: Sequence[int] | None = None,
    last: int | None = None,
    decay: MergeDecay | Sequence[float] = "1-sqrt",
    read: Callable[[Path, int], tuple[PureDict, PureDict]] = restore_params,
) -> tuple[PureDict, PureDict]:
    """Weighted average of the parameters of several checkpoints, summed in float32; one is in memory at a time.

    Args:
      directory: checkpoints of a run (keep them: train.keep_last).
      steps: the steps to merge, oldest first; or
      last: the number of newest ones. Exactly one of both.
      decay: the decay to imitate, by name or as its values (one fewer than checkpoints).
      read: gives parameters and model state of a step.

    Returns:
      Parameters in the type they were saved in, and the model state of the newest checkpoint.

    Raises:
      ConfigError: fewer than two checkpoints, or a decay that does not fit them.
      UserError: a step that does not exist.
      StorageError: a damaged checkpoint.
    """
    require((steps is None) != (last is None), "merge.steps", steps, "give either steps or last")
    if steps is None:
        found = saved_steps(directory)
        require(last is not None and 2 <= last <= len(found), "merge.last", last, f"must be 2 to {len(found)}")
        steps = found[-(last or 0) :]
    rising = all(a < b for a, b in itertools.pairwise(steps))
    require(len(steps) >= 2 and rising, "merge.steps", tuple(steps), "must be at least two steps, oldest first")
    values = decay_values(decay, len(steps)) if isinstance(decay, str) else list(decay)
    require(len(values) == len(steps) - 1, "merge.decay", tuple(values), f"must have {len(steps) - 1} values")

    total: PureDict | None = None
    params: PureDict = {}
    model_state: PureDict = {}
    for step, weight in zip(steps, merge_weights(values), strict=True):
        params, model_state = read(storage.path(directory), step)
        weighted = jax.tree.map(lambda x, w=weight: jnp.float32(w) * x.astype(jnp.float32), params)
        total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
    return jax.tree.map(lambda sum_, x: sum_.astype(x.dtype), total, params), model_state
