"""Target tokens a second, and their share of what the chips could do; no compilation, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsezoo_jax.chips import chip_of


@dataclass(frozen=True)
class Yardstick:
    """What a speed is compared with."""

    chips: int
    """Chips that train together."""
    flops: float
    """Peak FLOP/s of all of them, dense, in bfloat16."""
    per_token: Mapping[str, float] = field(default_factory=dict)
    """FLOPs of a train step per token, by the name of the metric that is their share of the peak."""

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """The metrics."""
        shares = {name: flops * tokens_per_second / self.flops for name, flops in self.per_token.items()}
        return {"tokens_per_second_per_chip": tokens_per_second / self.chips, **shares}


def yardstick(devices: Collection[Any], per_token: Mapping[str, float]) -> Yardstick | None:
    """For devices of one kind; None where its datasheet is not known, as that of CPUs."""
    chip = chip_of(next(iter(devices)).device_kind)
    if chip is None:
        return None
    chips = max(1, len(devices) // chip.devices)
    return Yardstick(chips, len(devices) * chip.bf16_flops / chip.devices, per_token)


class SpeedMeter:
    """Speed since the first step, and since the last row of metrics."""

    def __init__(self, compared_with: Yardstick | None = None):
        self._yardstick = compared_with
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
        """`tokens_per_second` since the last call, and what it is compared with; empty if no step was counted."""
        window, self._window = self._window, _Count()
        if not window.tokens:
            return {}
        speed = window.per_second()
        return {"tokens_per_second": speed, **(self._yardstick.of(speed) if self._yardstick else {})}

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
