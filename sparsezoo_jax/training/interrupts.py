"""Requests by signal: stop after the current step, or save a checkpoint now."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NamedTuple

from sparsezoo_jax.training.processes import any_of

STOPS = (signal.SIGINT, signal.SIGTERM)
SAVES = signal.SIGUSR1


class Asked(NamedTuple):
    """What any process of the run was asked for."""

    stop: bool
    save: bool


class Requests:
    """While entered, remembers signals instead of dying of them.

    The first SIGINT or SIGTERM asks to stop; a second one acts as it always does. SIGUSR1 asks for a checkpoint.
    Outside the main thread, where Python allows no signal handlers, nothing is ever asked for.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        """The signal that asks to stop."""
        self._save = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in STOPS}
            self._previous[SAVES] = signal.signal(SAVES, self._remember_save)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*STOPS, SAVES)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore(*STOPS)

    def _remember_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def agreed(self, *, save: bool = False) -> Asked:
        """What any process was asked for since the last call; with several, all must call this at the same step.

        Args:
          save: another reason of this process to save.
        """
        save, self._save = save or self._save, False
        flags = any_of(int(self.signal is not None) + 2 * int(save))
        return Asked(stop=bool(flags & 1), save=bool(flags & 2))
