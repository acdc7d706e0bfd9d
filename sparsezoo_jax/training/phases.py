"""Which phase a run is in, how long each phase took, and a watchdog that ends a run whose phase never ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

PHASES = ("other", "data", "step", "save", "evaluation", "barrier", "compilation")
"""Names of the phases; `other` is what comes before the first step and after the last one."""
UNLIMITED = ("other", "compilation")
"""Phases that no timeout ends: a large program may compile for hours, a corpus may take a day to prepare."""


class Phases:
    """The phase that the main thread is in, and the seconds spent in each.

    A phase inside another one interrupts it: a second is counted once. Any thread may read.
    """

    def __init__(self):
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        """Seconds by phase, of phases and parts of them that are over."""
        self.beats = 0
        """Rises with every sign of progress."""
        self._current, self._since = "other", time.monotonic()

    @property
    def current(self) -> str:
        """The phase that the run is in."""
        return self._current

    def enter(self, name: str) -> None:
        """Leave the current phase for `name`."""
        now = time.monotonic()
        self.seconds[self._current] += now - self._since
        self._current, self._since = name, now
        self.beats += 1

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Be in phase `name`, then in the one before again."""
        outer = self._current
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def beat(self) -> None:
        """Say that the current phase makes progress."""
        self.beats += 1

    def totals(self) -> dict[str, float]:
        """Seconds by phase up to now."""
        return {**self.seconds, self._current: self.seconds[self._current] + time.monotonic() - self._since}


def goodput(seconds: Mapping[str, float], lost: float = 0.0) -> float:
    """Share of the time that went into steps whose result was kept; NaN before any time has passed.

    Args:
      seconds: by phase, over all starts of a run.
      lost: seconds of steps that were made again because the process ended before a checkpoint.
    """
    total = sum(seconds.values())
    return max(seconds["step"] - lost, 0.0) / total if total else float("nan")


class Watchdog:
    """While entered, ends the process with status 1 when a phase shows no progress for `timeout` seconds.

    It prints one line that names the phase, then the stacks of all threads. Only time in which this process ran is
    counted, so a process that was stopped and continued, or a machine that slept, is not taken for a hang.

    Args:
      phases: what it watches.
      timeout: seconds; None or 0 never ends anything.
      explain: what else is known when a phase is stuck, such as which other process is missing; called in the
        watchdog's thread.
    """

    def __init__(self, phases: Phases, timeout: float | None, explain: Callable[[], str] | None = None):
        self._phases, self._timeout, self._explain = phases, timeout, explain
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout:
            self._thread = threading.Thread(target=self._watch, args=(self._timeout,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, timeout: float) -> None:
        interval = min(timeout / 20, 5.0)
        seen, stuck, last = self._phases.beats, 0.0, time.monotonic()
        while not self._ended.wait(interval):
            # Where the interpreter's lock is never released this thread can't run; a timer in C then ends the process.
            faulthandler.dump_traceback_later(4 * timeout, file=_standard_error(), exit=True)
            now = time.monotonic()
            passed, last = min(now - last, 2 * interval), now
            if self._phases.beats != seen or self._phases.current in UNLIMITED:
                seen, stuck = self._phases.beats, 0.0
                continue
            stuck += passed
            if stuck >= timeout:
                more = self._explain() if self._explain else ""
                end_process(
                    f"phase '{self._phases.current}' made no progress for {timeout:,.0f} s (train.hang_timeout)"
                    f"{f'; {more}' if more else ''}; stacks of all threads follow",
                    stacks=True,
                )


def _standard_error() -> int:
    """The descriptor of standard error; in a notebook `sys.stderr` has none, and the process's own one is meant."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


def end_process(message: str, *, stacks: bool = False, status: int = 1) -> NoReturn:
    """Print one line of error and end the process whatever its other threads do."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    if stacks:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=_standard_error(), all_threads=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)
