"""Where metrics go: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from sparsezoo_jax.errors import StorageError

Row = Mapping[str, float | np.ndarray]


class MetricWriter(Protocol):
    """A destination of metrics. Scalars are floats; per-layer statistics are arrays [L], NaN where there is none."""

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        """One row; `split` is None for a training step and the name of the data split for an evaluation."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...


def _finite_or_none(value: Any) -> Any:
    # NaN is no JSON; a reader gets null.
    if isinstance(value, np.ndarray) and value.ndim > 0:
        return [_finite_or_none(x) for x in value.tolist()]
    if isinstance(value, (int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


class JsonlWriter:
    """One JSON object a line, flushed: `step`, `split` for evaluations, metrics; arrays as lists, non-finite as null.

    On opening, rows after `resume_step` (and a last line cut short by a crash) are dropped, so no step appears twice.
    """

    def __init__(self, path: Path | str, *, resume_step: int = 0):
        self.path = Path(path)
        try:
            self._drop_rows_after(resume_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"writing {self.path} failed: {error.strerror}") from error

    def _drop_rows_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        # The old file stays whole until the new one is.
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        row: dict[str, Any] = {"step": step} if split is None else {"step": step, "split": split}
        row |= {name: _finite_or_none(value) for name, value in metrics.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"writing {self.path} failed: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events: scalars as '<split>/<name>', per-layer statistics as their mean and one scalar a layer.

    Values that are not finite leave a gap in the curve.
    """

    def __init__(self, directory: Path | str, *, resume_step: int = 0):
        # purge_step hides what an interrupted run wrote after the checkpoint.
        purge_step = resume_step + 1 if resume_step else None
        try:
            self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        except OSError as error:
            raise StorageError(f"writing {directory} failed: {error.strerror}") from error

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        prefix = split or "train"
        for name, value in metrics.items():
            if np.ndim(value) == 0:
                if not math.isfinite(value):
                    continue
                self._writer.add_scalar(f"{prefix}/{name}", float(value), step)
                continue
            layers = np.asarray(value, np.float64)
            present = np.isfinite(layers)
            if present.any():
                self._writer.add_scalar(f"{prefix}/{name}", float(layers[present].mean()), step)
            for layer in np.flatnonzero(present):
                self._writer.add_scalar(f"{prefix}_layers/{name}/{layer:03d}", float(layers[layer]), step)

    def close(self) -> None:
        self._writer.close()


def _density(metrics: Row) -> float | None:
    density = metrics.get("ffn_density")
    if density is None or np.isnan(density).all():
        return None
    return float(np.nanmean(density))


class ProgressWriter:
    """A progress bar with loss, tokens/s, FFN density and time left; plain lines when the output is no terminal."""

    def __init__(self, steps: int, *, start: int = 0, stream: TextIO | None = None):
        self._stream = stream if stream is not None else sys.stderr
        self._steps, self._start, self._started = steps, start, time.monotonic()
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling")
            self._bar.start()

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        text = f"loss {metrics['loss']:.4f}" if "loss" in metrics else ""
        if split is not None:
            self._line(f"step {step}/{self._steps}  {split} {text}")
            return
        if "tokens_per_second" in metrics:
            text += f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        density = _density(metrics)
        if density is not None:
            text += f"  FFN density {density:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        self._line(f"step {step}/{self._steps}  {text}  {self._seconds_left(step, metrics):.0f} s left")

    def _seconds_left(self, step: int, metrics: Row) -> float:
        # By the present speed where it is known: the time since the start has the compilation in it.
        if metrics.get("tokens_per_second") and "tokens" in metrics:
            return (self._steps - step) * float(metrics["tokens"]) / float(metrics["tokens_per_second"])
        return (time.monotonic() - self._started) / max(step - self._start, 1) * (self._steps - step)

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        for writer in self._writers:
            writer.write(step, metrics, split)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
