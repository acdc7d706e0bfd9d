"""Keeps Python's collector of reference cycles out of a command's start and end.

What a command imports, half a million objects, stays until it ends. By its usual thresholds the collector looks through
all of them several times on the way, and again at the exit: together a third of the time that `--help` takes.
"""

from __future__ import annotations

import gc

_usual: tuple[int, int, int] | None = gc.get_threshold()
gc.set_threshold(50_000, 20, 100)


def imports_are_done() -> None:
    """Leave all that there is out of further collections, which come as usual from now on; only the first call does."""
    global _usual
    if _usual is not None:
        gc.set_threshold(*_usual)
        gc.freeze()
        _usual = None
