"""What stops a run whose numbers went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.training.checkpoint import Checkpointer


class TrainingDiverged(UserError):  # noqa: N818
    """Too many steps in a row had a non-finite loss or gradient. Exit status 1."""

    exit_status = 1


def stop_if_diverging(step: int, metrics: Mapping[str, Any], limit: int, checkpointer: Checkpointer) -> None:
    """Raise `TrainingDiverged`, naming the steps and the newest checkpoint, after `limit` skipped steps in a row."""
    skipped = int(metrics["consecutive_skipped"])
    if skipped < limit:
        return
    checkpointer.wait()
    steps = checkpointer.steps()
    saved = f"the last checkpoint is step {steps[-1]} in {checkpointer.directory}" if steps else "no checkpoint"
    raise TrainingDiverged(
        f"loss or gradient was not finite in steps {step - skipped + 1} to {step} (train.max_skipped_steps={limit}); "
        f"{saved}; lower the learning rate or grad_clip, or look at the data of these steps"
    )
