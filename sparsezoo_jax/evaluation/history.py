"""The course of training as a run's metrics.jsonl holds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparsezoo_jax import storage
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.untrusted import parse_json, require_regular

#: Bytes of a row of metrics, and lists within each other there; a thousand layers are 20 kB for each statistic.
MAX_ROW_BYTES, MAX_ROW_DEPTH = 1 << 22, 4
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
    rows, lines = _read(directory / METRICS)
    train, evaluation = ([row for row in rows if ("split" in row) == evaluated] for evaluated in (False, True))
    return History(_course(train), _course(evaluation), lines - len(rows))


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` as they are; lines that hold none are left out.

    Raises:
      StorageError: the file can't be read.
    """
    return _read(directory / METRICS)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file, and how many lines it has that are not empty."""
    lines, rows = 0, list[dict[str, Any]]()
    try:
        require_regular(path)
        with storage.open_read(path) as file:
            # A line without an end is read in pieces, none of which is a row.
            while line := file.readline(MAX_ROW_BYTES):
                lines += bool(line.strip())
                row = _row(line)
                if row is not None:
                    rows.append(row)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return rows, lines


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line, max_depth=MAX_ROW_DEPTH)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _course(rows: list[dict[str, Any]]) -> Course:
    layers = {name: [_numbers(row.get(name)) for row in rows] for name in PER_LAYER}
    return Course([row["step"] for row in rows], [_number(row.get("loss")) for row in rows], layers)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in values] if isinstance(values, list) else []


def last_evaluation(directory: Path, step: int) -> dict[str, Any]:
    """The last row of `metrics.jsonl` that evaluates this step; empty without one.

    Raises:
      StorageError: the file can't be read.
    """
    return next((row for row in reversed(read_rows(directory)) if row["step"] == step and "split" in row), {})
