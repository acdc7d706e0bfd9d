"""Keeps Python's collector of reference cycles out of a command's start and end.

What a command imports, half a million objects, stays until it ends. By its usual thresholds the collector looks through
all of them several times on the way, and again at the exit: together a third of the time that `--help` takes.
"""

from __future__ import annotations

import gc

_usual = gc.get_threshold()
_is_frozen = False
gc.set_threshold(50_000, 20, 100)


def as_usual() -> None:
    """Collect as before this was imported: the large imports are done."""
    gc.set_threshold(*_usual)


def leave_imports_alone() -> None:
    """Keep all that there is out of further collections; for commands, whose imports stay. Only the first call does."""
    global _is_frozen
    if not _is_frozen:
        gc.freeze()
        _is_frozen = True
