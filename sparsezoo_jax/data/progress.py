"""How far preparing is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LINE_SECONDS = 10.0


class PreparationProgress:
    """Shows documents, tokens a second and the time that is left; a context manager.

    Args:
      title: what is prepared.
      raw_bytes: of all of it, and `done_bytes` of what is done already.
    """

    def __init__(self, title: str, raw_bytes: int, done_bytes: int = 0):
        self._title, self._total, self._done = title, raw_bytes, done_bytes
        self._first = done_bytes
        self.documents = self.tokens = 0
        self._started = self._shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> PreparationProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[now]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, now="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def advance(self, documents: int, tokens: int, raw_bytes: int) -> None:
        """Adds what was done since the last call."""
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        self._done += raw_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, now=self._now())
        elif now - self._shown >= _LINE_SECONDS:
            self._shown = now
            share = self._done / max(self._total, 1)
            print(f"{self._title}: {share:.1%}, {self._now()}", file=sys.stderr, flush=True)

    def _now(self) -> str:
        seconds = max(self.seconds, 1e-9)
        text = f"{self.documents:,} documents, {self.tokens / seconds:,.0f} tokens/s"
        worked = self._done - self._first
        if worked <= 0:
            return text
        left = (self._total - self._done) / worked * seconds
        return f"{text}, {duration(left)} left"


def duration(seconds: float) -> str:
    """A time for people: '95 s', '12 min', '3.4 h'."""
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
