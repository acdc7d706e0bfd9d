"""Where metrics go: what all writers have in common, metrics.jsonl and the terminal."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsezoo_jax import storage
from sparsezoo_jax.errors import StorageError

Row = Mapping[str, float | np.ndarray]


class Histogram(NamedTuple):
    """How often values fell into each of some neighbouring bins."""

    counts: np.ndarray
    """int [N]."""
    edges: np.ndarray
    """float [N + 1]."""
    total: float
    """Sum of the values."""
    squares: float
    """Sum of their squares."""

    @classmethod
    def of(cls, values: Any, bins: int = 64) -> Histogram:
        """The histogram of an array in bins of equal width; values that are not finite are left out."""
        values = np.asarray(values, np.float64).ravel()
        values = values[np.isfinite(values)]
        counts, edges = np.histogram(values, bins)
        return cls(counts, edges, float(values.sum()), float(np.square(values).sum()))


class MetricWriter:
    """A destination of metrics; subclasses have `write`, and what else they can do.

    All calls come from one thread, which is not the one that trains. An exception is reported and does not stop the run
    (see `Writers`).
    """

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        """One row; `split` is None for a training step and the name of the data split for an evaluation.

        Scalars are floats; per-layer statistics are arrays [L], NaN where there is none.
        """
        raise NotImplementedError

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Histograms by name."""

    def rewind(self, step: int) -> None:
        """Take back what came after `step`: these steps will be made again."""

    def close(self) -> None:
        """Write out what is held back."""


def _finite_or_none(value: Any) -> Any:
    # NaN is no JSON; a reader gets null.
    if isinstance(value, np.ndarray) and value.ndim > 0:
        return [_finite_or_none(x) for x in value.tolist()]
    if isinstance(value, (int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


class JsonlWriter(MetricWriter):
    """One JSON object a line: `step`, `split` for evaluations, metrics; arrays as lists, non-finite as null.

    On opening, rows after `resume_step` are dropped, so that no step appears twice, and so is what is no row: a line
    cut short by a crash, or damaged; how many of those is reported on stderr.

    Rows that can't be written (a full disk) stay in memory, the newest `HELD_BYTES` of them, and are written in order
    once there is space: the file is always a beginning of what it should be, or has a gap that is counted. A checkpoint
    takes them along; `unlogged` are those of the checkpoint that a run goes on from, and what the file lacks of them is
    added.
    """

    HELD_BYTES = 1 << 23

    def __init__(self, path: Path | str, *, resume_step: int = 0, unlogged: Sequence[str] = ()):
        self.path = storage.path(path)
        self._mirror = storage.Mirror(self.path.parent)
        self.last_step = 0
        """Last training step of the rows found on opening, dropped ones included."""
        self.dropped = 0
        """Rows that were never written."""
        self._held: collections.deque[bytes] = collections.deque()
        self._held_bytes, self._torn, self._row = 0, b"", b""
        self._unsent: collections.deque[bytes] = collections.deque()  # written here, not yet in the store
        self._unsent_bytes = 0
        self._descriptor: int | None = None
        try:
            self._file = self._mirror.local / self.path.name
            self._mirror.fetch(self.path.name)
            present = self._drop_rows_after(resume_step)
            self._open()
        except OSError as error:
            raise StorageError(f"writing {self.path} failed: {error.strerror}") from error
        for line in (text.encode() for text in unlogged):
            if step_of(line) not in present:
                self._held.append(line)
                self._held_bytes += len(line)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = storage.open_append(self._file)
        return self._descriptor

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`.

        Raises:
          OSError: they could not be dropped.
        """
        self.flush()
        self._drop_rows_after(step)
        self._close_descriptor()  # of a file that was replaced

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _drop_rows_after(self, step: int) -> set[tuple[int, str | None] | None]:
        """Drop rows of later steps; gives step and split of the others."""
        kept: set[tuple[int, str | None] | None] = set()
        if not self._file.exists():
            return kept
        later = bad = 0
        # The old file stays whole until the new one is.
        with storage.open_read(self._file) as old, storage.rewritten(self._file) as new:
            for line in old:
                found = step_of(line)
                if found is None:
                    bad += bool(line.strip())
                    continue
                number, split = found
                self.last_step = max(self.last_step, number if split is None else 0)
                if number <= step:
                    kept.add(found)
                    new.write(line if line.endswith(b"\n") else line + b"\n")
                else:
                    later += 1
            new.keep = bool(later or bad)
        if bad:
            print(f"warning: {self.path}: {bad} lines are no metrics and were dropped", file=sys.stderr)
        return kept

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        """Append a row, after those that are held back.

        Raises:
          OSError: it could not be written; it is held back.
        """
        row: dict[str, Any] = {"step": step} if split is None else {"step": step, "split": split}
        row |= {name: _finite_or_none(value) for name, value in metrics.items()}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self._held.append(line)
        self._held_bytes += len(line)
        while self._held_bytes > self.HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= len(self._held.popleft())
            self.dropped += 1
        self._write_held()
        self._send()

    def flush(self) -> None:
        """Write what is held back, and copy it to the store that the file is in.

        Raises:
          OSError: it could not be written.
        """
        self._write_held()
        self._send(now=True)

    def _send(self, *, now: bool = False) -> None:
        if self._mirror.send(now=now):
            self._unsent.clear()
            self._unsent_bytes = 0

    def _write_held(self) -> None:
        try:
            while self._torn or self._held:
                if not self._torn:
                    self._row = self._torn = self._held.popleft()
                    self._held_bytes -= len(self._torn)
                # A write that fails may have written a part: it goes on there.
                self._torn = self._torn[os.write(self._open(), self._torn) :]
                if not self._torn and self._mirror.is_remote:
                    self._unsent.append(self._row)
                    self._unsent_bytes += len(self._row)
                    while self._unsent_bytes > self.HELD_BYTES:  # they are in the file that will be copied all the same
                        self._unsent_bytes -= len(self._unsent.popleft())
        except OSError:
            self._close_descriptor()  # it may be the reason: a file server that came back
            raise

    def held(self) -> list[str]:
        """Rows that are not written, or not to their end, or not yet in the store that the file is in."""
        return [line.decode() for line in [*self._unsent, *([self._row] if self._torn else []), *self._held]]

    def close(self) -> None:
        """Write what is held back and close the file.

        Raises:
          OSError: rows could not be written; they are counted in `dropped`.
        """
        try:
            self.flush()
        except OSError:
            self.dropped += len(self._held) + bool(self._torn)
            raise
        finally:
            self._close_descriptor()
        self._mirror.close()


def step_of(line: bytes) -> tuple[int, str | None] | None:
    """Step and split of a line of metrics.jsonl; None if it is none."""
    try:
        row = json.loads(line)
        step, split = row["step"], row.get("split")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    is_row = type(step) is int and step >= 0 and (split is None or isinstance(split, str))
    return (step, split) if is_row else None


def has_steps(path: Path) -> bool:
    """Whether a metrics.jsonl has a row of a training step.

    Raises:
      StorageError: it can't be read.
    """
    try:
        with storage.open_read(path) as file:
            return any(found is not None and found[1] is None for found in map(step_of, file))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def _density(metrics: Row) -> str:
    """The share that is active over the layers that have one; of routed experts where dense layers are beside them."""
    for name, title in (("routed_density", "active experts"), ("ffn_density", "FFN density")):
        density = metrics.get(name)
        if density is not None and not np.isnan(density).all():
            return f"  {title} {float(np.nanmean(density)):.1%}"
    return ""


class ProgressWriter(MetricWriter):
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
        text += _density(metrics)
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
    """Several writers as one that never blocks its caller and never raises.

    Each has a thread and a queue of rows. What a writer can't write is reported once, and again only after it worked in
    between; rows that do not fit into the queue of a writer that hangs are dropped and counted.
    """

    QUEUE = 1000
    """Rows that may wait for a writer."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._workers = tuple(_Worker(writer, self.QUEUE) for writer in writers)

    def write(self, step: int, metrics: Row, split: str | None = None) -> None:
        """Hand a row to every writer."""
        for worker in self._workers:
            worker.put((step, dict(metrics), split))

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Hand histograms to every writer."""
        for worker in self._workers:
            worker.put(_Histograms(step, dict(histograms)))

    def rewind(self, step: int) -> None:
        """Take back the rows after `step`, where a writer can: its steps will be made again."""
        for worker in self._workers:
            worker.put(step)

    def flush(self, timeout: float = 10.0) -> list[str]:
        """Wait until the rows handed over are written, but no longer than `timeout` seconds; gives lines of
        metrics.jsonl that could not be written.
        """
        return [line for worker in self._workers for line in worker.flush(timeout)]

    def close(self, timeout: float = 10.0) -> None:
        """Write what waits, but no longer than `timeout` seconds a writer, and close."""
        for worker in self._workers:
            worker.close(timeout)


class _Histograms(NamedTuple):
    step: int
    histograms: Mapping[str, Histogram]


#: A row, histograms, a step to go back to, or an event to set.
_Item = tuple[int, Row, str | None] | _Histograms | int | threading.Event


class _Worker:
    """A writer, its thread and its queue."""

    def __init__(self, writer: MetricWriter, size: int):
        self._writer = writer
        self._queue: queue.Queue[_Item | None] = queue.Queue(size)
        self._dropped, self._failing, self._hanging = 0, False, False
        self._held: list[str] = []
        self._thread = threading.Thread(target=self._run, name=f"write {type(writer).__name__}", daemon=True)
        self._thread.start()

    def put(self, item: _Item) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._dropped += 1
            if not self._hanging:
                self._hanging = True
                self._warn("hangs; rows are dropped until it goes on")

    def flush(self, timeout: float) -> list[str]:
        if self._hanging and self._queue.full():  # it was waited for once
            return []
        done = threading.Event()
        deadline = time.monotonic() + timeout
        with contextlib.suppress(queue.Full):
            self._queue.put(done, timeout=timeout)
            if done.wait(max(deadline - time.monotonic(), 0.0)):
                self._hanging = False
                return self._held
        self._hanging = True
        return []

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + (0.0 if self._hanging else timeout)
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=max(deadline - time.monotonic(), 0.001))
            self._thread.join(max(deadline - time.monotonic(), 0.001))
        dropped = self._dropped + getattr(self._writer, "dropped", 0)
        if self._thread.is_alive():
            self._warn(f"hangs; {dropped + self._queue.qsize()} rows or more were not written")
        elif dropped:
            self._warn(f"{dropped} rows were not written")

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                self._attempt(self._writer.close)
                return
            if isinstance(item, threading.Event):
                if isinstance(self._writer, JsonlWriter):
                    self._attempt(self._writer.flush)  # rows held back are tried again
                    self._held = self._writer.held()
                item.set()
            elif isinstance(item, int):
                self._attempt(self._writer.rewind, item)
            elif isinstance(item, _Histograms):
                self._attempt(self._writer.write_histograms, *item)
            else:
                self._attempt(self._writer.write, *item)

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if not self._failing:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                self._warn(f"writing failed ({reason}); the run goes on without it until it works again")
            self._failing = True
        else:
            self._failing = False

    def _warn(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            name = getattr(self._writer, "name", type(self._writer).__name__)
            print(f"warning: {name}: {text}", file=sys.stderr, flush=True)
