"""Where the time of a run goes, over all its starts."""

from __future__ import annotations

import dataclasses

from sparsezoo_jax.training.checkpoint import RunRecord
from sparsezoo_jax.training.phases import Phases, goodput


class Account:
    """Adds the phases of this process to what the run's record holds of earlier ones."""

    def __init__(self, phases: Phases, record: RunRecord):
        self.record = record
        """What the run has been through, without the phases of this process."""
        self._phases = phases
        self._row = phases.totals()

    def take(self, step: int) -> dict[str, float]:
        """For a row of metrics: seconds by phase since the last call, and the goodput of the whole run so far."""
        now = self._phases.totals()
        row = {f"seconds/{name}": now[name] - self._row[name] for name in now if now[name] > self._row[name]}
        self._row = now
        return {**row, "goodput": self._goodput(step)}

    def snapshot(self, losses: list[list[float]], unlogged: list[str]) -> RunRecord:
        """The record to keep with a checkpoint."""
        return dataclasses.replace(self.record, seconds=self._seconds(), losses=losses, unlogged=unlogged)

    def rewound(self, saved: RunRecord, *, steps: int, batches: int) -> None:
        """Count a rewind by `steps`, to a checkpoint with the record `saved`, that passed over `batches`."""
        self.record = dataclasses.replace(
            self.record,
            lost_steps=self.record.lost_steps + steps,
            passed_over=saved.passed_over + batches,
            rewinds=self.record.rewinds + 1,
        )

    def summary(self, step: int) -> str:
        """One line for the end of a run."""
        seconds = self._seconds()
        parts = ", ".join(f"{name} {s:,.1f} s" for name, s in sorted(seconds.items(), key=lambda x: -x[1]) if s >= 0.05)
        starts = f" in {self.record.starts} starts" if self.record.starts > 1 else ""
        lost = f"; {self.record.lost_steps:,} steps made again" if self.record.lost_steps else ""
        return f"goodput {self._goodput(step):.1%}{starts}: {parts}{lost}"

    def _seconds(self) -> dict[str, float]:
        now = self._phases.totals()
        return {name: round(now[name] + self.record.seconds.get(name, 0.0), 3) for name in now}

    def _goodput(self, step: int) -> float:
        seconds, lost = self._seconds(), self.record.lost_steps
        return goodput(seconds, lost * seconds["step"] / max(step + lost, 1))
