"""What guards a run against numbers that go wrong: too many steps that are not finite, and spikes of the loss."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.training.checkpoint import Checkpointer
from sparsezoo_jax.training.config import SpikeConfig


class TrainingDiverged(UserError):  # noqa: N818
    """Too many steps in a row were skipped, or too many rewinds did not help. Exit status 1."""

    exit_status = 1


def stop_if_diverging(step: int, metrics: Mapping[str, Any], limit: int, checkpointer: Checkpointer) -> None:
    """Raise `TrainingDiverged`, naming the steps and the newest checkpoint, after `limit` skipped steps in a row."""
    skipped = int(metrics["consecutive_skipped"])
    if skipped < limit:
        return
    what = "loss or gradient was not finite" if not math.isfinite(metrics["loss"]) else "steps were skipped"
    raise TrainingDiverged(
        f"{what} in steps {step - skipped + 1} to {step} (train.max_skipped_steps={limit}); {_saved(checkpointer)}; "
        "lower the learning rate or grad_clip, or look at the data of these steps"
    )


def stop_if_rewound_too_often(step: int, rewinds: int, limit: int, checkpointer: Checkpointer) -> None:
    """Raise `TrainingDiverged` when a rewind is due at `step` and there were `limit` already."""
    if rewinds >= limit:
        raise TrainingDiverged(
            f"the loss spiked again at step {step} after {rewinds} rewinds (train.spike.max_rewinds={limit}); "
            f"{_saved(checkpointer)}; lower the learning rate, or look at the data before this step"
        )


def _saved(checkpointer: Checkpointer) -> str:
    checkpointer.wait()
    steps = checkpointer.steps()
    return f"the last checkpoint is step {steps[-1]} in {checkpointer.directory}" if steps else "no checkpoint"


class SpikeGuard:
    """Tells spikes of the loss by a robust z-score over the newest good steps.

    The limit of a step is median + threshold * scale of the losses of a window, where scale is 1.4826 times their
    median absolute deviation: the standard deviation, if they were normal, that spikes in the window hardly move. The
    window of step n ends at step n - 2: metrics are read one step late, and what a step is compared with must not
    depend on when.
    """

    def __init__(self, config: SpikeConfig, losses: Sequence[Sequence[float]] = ()):
        self._config = config
        self._losses = deque(((int(step), loss) for step, loss in losses), maxlen=config.window + 2)

    def limit(self, step: int) -> float:
        """The largest loss of `step` that is no spike; infinite while there are too few steps to tell."""
        losses = [loss for done, loss in self._losses if done <= step - 2][-self._config.window :]
        if self._config.mode == "off" or len(losses) < min(self._config.window, MIN_LOSSES):
            return math.inf
        median = statistics.median(losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
        # Losses that hardly differ would make a spike of the smallest difference.
        return median + self._config.threshold * max(deviation, 1e-3 * abs(median))

    def is_spike(self, step: int, loss: float) -> bool:
        """Whether `loss` is above the limit of its step; otherwise it is remembered, if it is finite."""
        if loss > self.limit(step):
            return True
        if math.isfinite(loss):
            self._losses.append((step, loss))
        return False

    def forget_after(self, step: int) -> None:
        """Drop the losses of steps that will be made again."""
        while self._losses and self._losses[-1][0] > step:
            self._losses.pop()

    def state(self) -> list[list[float]]:
        """What to keep with a checkpoint."""
        return [] if self._config.mode == "off" else [[step, loss] for step, loss in self._losses]


MIN_LOSSES = 20
"""Steps before which nothing is called a spike."""
