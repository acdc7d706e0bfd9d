"""The course of training as a run's metrics.jsonl holds it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sparsezoo_jax.errors import StorageError

METRICS = "metrics.jsonl"
PER_LAYER = ("ffn_density", "attended_keys")


@dataclasses.dataclass(frozen=True)
class Course:
    """Loss and sparsity at some steps."""

    steps: list[int]
    loss: list[float | None]
    """Nats per token; None where it was not finite."""
    layers: dict[str, list[list[float | None]]]
    """Per-layer statistics by name: one list over layers for each step, empty at steps without it."""


@dataclasses.dataclass(frozen=True)
class History:
    """Training rows and evaluation rows of a run."""

    train: Course
    evaluation: Course
    unreadable: int
    """Lines that hold no metrics (cut short by a crash, say) and were left out."""

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return dataclasses.asdict(self)


def read_history(directory: Path) -> History:
    """Read `metrics.jsonl` of a run; without that file (a converted checkpoint) there are no rows.

    Raises:
      StorageError: the file can't be read.
    """
    path = directory / METRICS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    rows = [row for line in lines if (row := _row(line)) is not None]
    train, evaluation = ([row for row in rows if ("split" in row) == evaluated] for evaluated in (False, True))
    return History(_course(train), _course(evaluation), len([line for line in lines if line.strip()]) - len(rows))


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _course(rows: list[dict[str, Any]]) -> Course:
    layers = {name: [_numbers(row.get(name)) for row in rows] for name in PER_LAYER}
    return Course([row["step"] for row in rows], [_number(row.get("loss")) for row in rows], layers)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in values] if isinstance(values, list) else []
