"""The metric writers that a run has, by its configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.tensorboard import TensorBoardWriter
from sparsezoo_jax.training.trackers import TrackerWriter
from sparsezoo_jax.training.writers import JsonlWriter, MetricWriter, ProgressWriter

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def check_writers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a writer whose library is not installed."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            allowed = f"needs the extra of that name: pip install 'sparsezoo-jax[{name}]'"
            raise ConfigError("train.writers", name, allowed)


def open_writers(
    names: Sequence[str],
    workdir: Path,
    last: int,
    first: int,
    unlogged: Sequence[str],
    hyperparameters: Mapping[str, Any],
) -> tuple[tuple[MetricWriter, ...], int]:
    """The writers, and how many steps after the checkpoint the log had: those are made again.

    Args:
      names: see `TrainConfig.writers`.
      last: step at which the run ends.
      first: step that it goes on from.
      unlogged: rows that the checkpoint has and the log may not (see `JsonlWriter`).
      hyperparameters: of the run, by name.

    Raises:
      StorageError: metrics.jsonl can't be written.
    """
    log = JsonlWriter(workdir / METRICS, resume_step=first, unlogged=unlogged)
    writers: list[MetricWriter] = [log, ProgressWriter(last, start=first)]
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            folder = workdir / TENSORBOARD
            writers.append(TensorBoardWriter(folder, resume_step=first, hyperparameters=hyperparameters))
        else:
            writers.append(TrackerWriter(name, workdir, hyperparameters=hyperparameters))
    return tuple(writers), max(log.last_step - first, 0)
