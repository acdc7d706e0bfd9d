"""Target tokens a second, without compilation, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class SpeedMeter:
    """Speed since the first step, and since the last row of metrics."""

    def __init__(self):
        self.tokens_per_second = float("nan")
        """Over all steps counted; NaN before the first."""
        self._total, self._window = _Count(), _Count()

    def start(self) -> None:
        """Start the clock, once what is not to be counted is over."""
        self._total, self._window = _Count(), _Count()

    def add(self, tokens: float) -> None:
        """Count a step that is done."""
        for count in (self._total, self._window):
            count.tokens += tokens
        self.tokens_per_second = self._total.per_second()

    def take(self) -> dict[str, float]:
        """`tokens_per_second` since the last call, for a row of metrics; empty if no step was counted."""
        window, self._window = self._window, _Count()
        return {"tokens_per_second": window.per_second()} if window.tokens else {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out."""
        start = time.monotonic()
        yield
        for count in (self._total, self._window):
            count.since += time.monotonic() - start


class _Count:
    def __init__(self):
        self.tokens, self.since = 0.0, time.monotonic()

    def per_second(self) -> float:
        return self.tokens / max(time.monotonic() - self.since, 1e-9) if self.tokens else float("nan")
