"""Rows of results: printed as they come, kept in a file that a killed run leaves whole, skipped when they are there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

#: What a row says: all is well; values are off; an exception; a library has no such form here; the time was up.
OK, WRONG, FAILED, ABSENT, LEFT_OUT = "ok", "wrong", "failed", "absent", "no time"


@dataclass(frozen=True)
class Row:
    """One line."""

    stage: str
    name: str
    status: str
    figures: dict[str, Any] = field(default_factory=dict)
    """Numbers and words by name; the unit is the last word of a name."""
    note: str = ""
    """Why it is not ok."""
    job: str = ""
    """The job that made it, where that has another name."""

    def shown(self) -> str:
        """The line that is printed."""
        figures = "  ".join(f"{name} {_number(value)}" for name, value in self.figures.items())
        return f"{self.stage:9} {self.status:7} {self.name}  {figures}{self.note and '  ' + self.note}".rstrip()


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class Clock:
    """The time that is left of a number of seconds."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, negative when they are over."""
        return self.end - time.monotonic()

    def part(self, share: float) -> Clock:
        """A clock for a share of what is left."""
        return Clock(self.left() * share)


class Report:
    """The rows of a run."""

    def __init__(self, machine: dict[str, Any], path: Path | None, resumed: Path | None, only: Sequence[str]):
        self.machine, self.path, self.only = machine, path, only
        found = [] if resumed is None else read(resumed)[1]
        # What went wrong is tried again, with all that was measured beside it.
        again = {_job_of(row) for row in found if row.status not in (OK, ABSENT)}
        self.rows = [row for row in found if _job_of(row) not in again]
        self.kept = {_job_of(row) for row in self.rows}
        self.good = True

    def wanted(self, stage: str, name: str) -> bool:
        """Whether a row is asked for and not there yet."""
        asked = not self.only or any(word == stage or word in name for word in self.only)
        return asked and (stage, name) not in self.kept

    def add(self, row: Row) -> None:
        """Print and keep a row."""
        print(row.shown(), flush=True)
        self.rows.append(row)
        self.good &= row.status in (OK, ABSENT, LEFT_OUT)
        if self.path is not None:
            # Written beside it and renamed: whoever reads the file at any moment, or after a crash, finds it whole.
            text = json.dumps({"machine": self.machine, "rows": [asdict(row) for row in self.rows]}, indent=1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(self.path.name + ".partial")
            beside.write_text(text + "\n", encoding="utf-8")
            os.replace(beside, self.path)

    @contextmanager
    def failing(self, stage: str, name: str) -> Iterator[None]:
        """Make an exception within a row."""
        try:
            yield
        except Exception as error:
            self.add(Row(stage, name, FAILED, note=first_line(error)))


def _job_of(row: Row) -> tuple[str, str]:
    return row.stage, row.job or row.name


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["machine"], [Row(**row) for row in found["rows"]]


def first_line(error: BaseException) -> str:
    """What an exception says, in one line that is not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Job(NamedTuple):
    """A part of a stage."""

    name: str
    compiled: Callable[[], Callable[[], Iterable[Row]]]
    """Compiles, possibly while other jobs run, and returns what makes the rows."""


def run_jobs(report: Report, stage: str, jobs: Sequence[Job], clock: Clock, ahead: int = 3) -> None:
    """Make the rows of the jobs in order until the time is up, compiling `ahead` of the one that runs."""
    jobs = [job for job in jobs if report.wanted(stage, job.name)]
    pool = ThreadPoolExecutor(max_workers=max(1, min(ahead, (os.cpu_count() or 2) - 1)))
    begun: list[Future] = []
    try:
        for i, job in enumerate(jobs):
            begun += [pool.submit(later.compiled) for later in jobs[len(begun) : i + ahead]]
            wait([begun[i]], timeout=max(clock.left(), 0))
            if clock.left() <= 0:
                left = [job.name for job in jobs[i:]]
                report.add(Row(stage, f"{len(left)} left out", LEFT_OUT, note="; ".join(left)))
                return
            with report.failing(stage, job.name):
                run = begun[i].result()
                begun[i] = Future()  # what was compiled and its arrays are given up after the run
                for row in run():
                    report.add(row)
            run = None
    finally:
        # A compiler can't be interrupted: it is left to itself.
        pool.shutdown(wait=False, cancel_futures=True)
