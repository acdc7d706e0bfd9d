"""Turning the first SIGTERM or SIGINT into a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, remembers the first SIGINT or SIGTERM instead of dying of it; a second one acts as it always does.

    Outside the main thread, where Python allows no signal handlers, it never asks to stop.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def agreed(self) -> bool:
        """Whether any process was asked to stop; with several processes, all must call this at the same step."""
        asked = self.signal is not None
        if jax.process_count() == 1:
            return asked
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(asked))))
