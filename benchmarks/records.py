"""Results that are kept in one JSON file, by name, so that long tables need not be made in one go or on one machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any


def read(record: Path) -> dict[str, dict[str, Any]]:
    """All results of a record; none where there is no file."""
    return json.loads(record.read_text()) if record.exists() else {}


def write(record: Path, name: str, found: dict[str, Any]) -> None:
    """Put a result into the record, with the versions that it was made by, in place of an older one of that name."""
    with locked(record):  # another process may have added its own
        kept = {**read(record), name: {**found, "commit": commit(), "jax": version("jax")}}
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        partial.replace(record)


def recorded(record: Path, name: str, figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run in the record, where they are added if it has none."""
    if name not in read(record):
        write(record, name, figures())
    return read(record)[name]


def commit() -> str | None:
    """The commit of the checkout that this runs in, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def locked(record: Path) -> Iterator[None]:
    """Other processes that write the record wait meanwhile."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(record.parent / f".{record.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
