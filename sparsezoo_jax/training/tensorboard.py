"""TensorBoard events of a run."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary as summaries
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from sparsezoo_jax import storage
from sparsezoo_jax.training.writers import Histogram, MetricWriter, Row

#: The figures that the table of hyperparameters shows beside them.
SHOWN = ("validation/loss", "train/loss")


class TensorBoardWriter(MetricWriter):
    """TensorBoard events: scalars as '<split>/<name>', per-layer statistics as their mean and one scalar a layer.

    A run that starts at step 0 begins with its hyperparameters, if they are given. Values that are not finite leave a
    gap in the curve. After a failure the next row goes to a new file: readers stop at a record that is cut short.
    """

    def __init__(
        self, directory: Path | str, *, resume_step: int = 0, hyperparameters: Mapping[str, Any] | None = None
    ):
        self._mirror, self._files = storage.Mirror(storage.path(directory)), 0
        # What an interrupted run wrote after the checkpoint is hidden from this step on.
        self._purge_step = resume_step + 1 if resume_step else None
        self._events: EventsWriter | None = None
        self._hyperparameters = dict(hyperparameters or {}) if resume_step == 0 else {}

    def _open(self) -> EventsWriter:
        # SummaryWriter's thread dies of its first failed write, and whoever adds to its full queue then waits for ever.
        if self._events is None:
            self._mirror.local.mkdir(parents=True, exist_ok=True)
            self._files += 1
            # File names have a time in seconds.
            self._events = EventsWriter(str(self._mirror.local / "events"), f".{os.getpid()}.{self._files}")
            if self._purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(wall_time=time.time(), step=self._purge_step, session_log=start))
                self._purge_step = None
            if self._hyperparameters:
                plain = {name: _plain(value) for name, value in self._hyperparameters.items()}
                for found in summaries.hparams(plain, dict.fromkeys(SHOWN)):
                    self._events.write_event(Event(wall_time=time.time(), step=0, summary=found))
                self._hyperparameters = {}
        return self._events

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        """Write and flush the events of a row.

        Raises:
          OSError: they could not be written.
        """
        prefix = split or "train"
        scalars: dict[str, float] = {}
        for name, value in metrics.items():
            if np.ndim(value) == 0:
                scalars[f"{prefix}/{name}"] = float(value)
                continue
            layers = np.asarray(value, np.float64)
            if np.isfinite(layers).any():
                scalars[f"{prefix}/{name}"] = float(layers[np.isfinite(layers)].mean())
            scalars |= {f"{prefix}_layers/{name}/{layer:03d}": float(x) for layer, x in enumerate(layers)}
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items() if math.isfinite(x)]
        self._add(step, Summary(value=values))

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write and flush histograms.

        Raises:
          OSError: they could not be written.
        """
        values = []
        for name, found in histograms.items():
            low, high, count = found.edges[0], found.edges[-1], found.counts.sum()
            figures = (low, high, count, found.total, found.squares)
            values += summaries.histogram_raw(name, *figures, found.edges[1:], found.counts).value
        self._add(step, Summary(value=values))

    def add_text(self, step: int, name: str, text: str) -> None:
        """Write and flush a text as it is: TensorBoard would read it as Markdown.

        Raises:
          OSError: it could not be written.
        """
        code = "\n".join(f"    {line}" for line in text.splitlines())
        self._add(step, summaries.text(name, code))

    def _add(self, step: int, summary: Summary) -> None:
        try:
            events = self._open()
            events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            events.flush()
        except Exception:
            self._events = None
            raise
        self._mirror.send()

    def rewind(self, step: int) -> None:
        """Hide what was written after `step`."""
        self._purge_step, self._events = step + 1, None

    def close(self) -> None:
        """Close the file."""
        if self._events is not None:
            self._events.close()
        self._mirror.close()


def _plain(value: Any) -> str | bool | float | None:
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
