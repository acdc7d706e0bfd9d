"""Metrics to experiment trackers: Weights & Biases, and trackio, whose functions have the same names."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsezoo_jax import storage
from sparsezoo_jax.training.local_checkpoints import read_run_id
from sparsezoo_jax.training.writers import Histogram, MetricWriter, Row

PROJECT = "sparsezoo"
"""Where WANDB_PROJECT or TRACKIO_PROJECT name none."""


class TrackerError(Exception):
    """A tracker that did not start."""


class TrackerWriter(MetricWriter):
    """A run of a tracker: rows under '<split>/<name>', with a mean and one number a layer for per-layer statistics.

    The run is opened with the first row, on the writer's thread, for that may wait for a network; one that can't be is
    tried again after `RETRY` seconds, and the rows in between are counted. A run directory that is gone on with goes on
    with the tracker's run. Trackers take nothing back, so rows of steps that are made again come twice.
    """

    RETRY = 60.0

    def __init__(self, library: str, workdir: Path, *, hyperparameters: Mapping[str, Any]):
        self.name = library
        self.dropped = 0
        """Rows that were never written."""
        self._workdir, self._hyperparameters = storage.path(workdir), dict(hyperparameters)
        self._module: Any = None
        self._run: Any = None
        self._failed_at: float | None = None

    def _open(self) -> Any:
        if self._run is None:
            if self._failed_at is not None and time.monotonic() - self._failed_at < self.RETRY:
                raise TrackerError("it did not start")
            self._failed_at = time.monotonic()
            self._module = importlib.import_module(self.name)
            self._run = self._module.init(
                project=os.environ.get(f"{self.name.upper()}_PROJECT", PROJECT),
                name=self._workdir.name,
                config={name: _plain(value) for name, value in self._hyperparameters.items()},
                resume="allow",
                **self._own_settings(),
            )
            if self.name == "wandb":
                self._run.define_metric("*", step_metric="step")  # its own count of steps never goes back
        return self._run

    def _own_settings(self) -> dict[str, Any]:
        if self.name != "wandb":
            return {}
        # It would wrap the terminal's streams, and ask there for a key.
        settings: dict[str, Any] = {
            "settings": {"console": "off", "login_timeout": 1},
            "id": read_run_id(self._workdir),
        }
        return settings if storage.is_object(self._workdir) else {**settings, "dir": str(self._workdir)}

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        """Hand a row to the tracker.

        Raises:
          Exception: whatever the tracker raises; the row is lost.
        """
        prefix = split or "train"
        values: dict[str, Any] = {}
        for name, value in metrics.items():
            if np.ndim(value) == 0:
                values[f"{prefix}/{name}"] = float(value)
                continue
            layers = np.asarray(value, np.float64)
            known = layers[np.isfinite(layers)]
            if known.size:
                values[f"{prefix}/{name}"] = float(known.mean())
            values |= {f"{prefix}_layers/{name}/{layer:03d}": float(x) for layer, x in enumerate(layers)}
        self._log(step, {name: x for name, x in values.items() if np.isfinite(x)})

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Hand histograms to Weights & Biases.

        Raises:
          Exception: whatever the tracker raises.
        """
        if self.name == "wandb":
            run, shape = self._open(), self._module.Histogram
            found = {name: shape(np_histogram=(one.counts, one.edges)) for name, one in histograms.items()}
            run.log({"step": step, **found})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        try:
            run = self._open()
            if self.name == "wandb":
                run.log({"step": step, **values})
            else:
                run.log(values, step=step)
        except Exception:
            self.dropped += 1
            raise

    def close(self) -> None:
        """End the tracker's run, which waits until it has what it was given."""
        if self._run is not None:
            self._run.finish()


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
