"""Which corpus of a mixture each sequence comes from.

Sequences are numbered through the whole run. Each corpus gets its share of every stretch of them, to within a sequence
or two, by counting alone: of the first y sequences the first corpus has floor(y w_1 / (w_1 + w_2 + ...) + 1/2), the
second has as much of the rest by its own weight, and so on. In whole numbers this is exact for ever, and both which
corpus has sequence y and how many it had before are known without looking at any other.

A corpus that is read a number of times at most ends at a sequence that is known beforehand. From there on the others
share as their weights are to each other.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class _Phase(NamedTuple):
    """A stretch of sequences that the same corpora share."""

    start: int
    corpora: tuple[int, ...]
    weights: tuple[int, ...]
    """Of these corpora, as whole numbers."""
    taken: tuple[int, ...]
    """Sequences of every corpus before `start`."""


class Schedule:
    """Assigns sequences 0, 1, 2, ... to corpora.

    Args:
      weights: of the corpora, above 0. A float stands for the shortest decimal number that it is written as.
      limits: sequences that each corpus has at most; None has no end.

    Attributes:
      length: sequences until all corpora have ended; infinity if one has no end.
      ends: the sequence at which each corpus has ended; infinity for one that has no end.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None] | None = None):
        exact = [Fraction(repr(float(weight))) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * unit) for weight in exact]
        limits = [None] * len(whole) if limits is None else limits
        self._phases: list[_Phase] = []
        self.ends: list[float] = [math.inf] * len(whole)
        self.length: float = math.inf
        start, taken, active = 0, [0] * len(whole), list(range(len(whole)))
        while active:
            phase = _Phase(start, tuple(active), tuple(whole[c] for c in active), tuple(taken))
            self._phases.append(phase)
            left = {i: limit - taken[c] for i, c in enumerate(active) if (limit := limits[c]) is not None}
            if not left:
                return
            # Each sequence has one corpus, so one corpus ends first.
            size = min(_position_of(phase, i, count) for i, count in left.items())
            start += size
            for c, count in zip(active, _counts(phase.weights, size), strict=True):
                taken[c] += count
            for c in [c for c in active if taken[c] == limits[c]]:
                self.ends[c] = start
                active.remove(c)
        self.length = start

    def at(self, position: int) -> tuple[int, int]:
        """The corpus that has this sequence, and how many sequences it had before; raises `IndexError` after the
        end.
        """
        if not 0 <= position < self.length:
            raise IndexError(f"sequence {position} of {self.length}")
        phase = self._phase(position)
        rest, total = position - phase.start, sum(phase.weights)
        for corpus, weight in zip(phase.corpora, phase.weights, strict=True):
            before = _share(rest, weight, total)
            if _share(rest + 1, weight, total) > before:
                return corpus, phase.taken[corpus] + before
            rest, total = rest - before, total - weight
        raise AssertionError("the last corpus has what no other has")

    def counts(self, position: int) -> list[int]:
        """Sequences of each corpus before this one."""
        position = int(min(position, self.length))
        phase = self._phase(position)
        counts = list(phase.taken)
        for corpus, count in zip(phase.corpora, _counts(phase.weights, position - phase.start), strict=True):
            counts[corpus] += count
        return counts

    def _phase(self, position: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._phases, position, key=lambda phase: phase.start) - 1]


def _share(count: int, weight: int, total: int) -> int:
    """Of `count` sequences, those of a corpus with this weight: rounded to the nearest."""
    return (count * weight + total // 2) // total


def _counts(weights: Sequence[int], size: int) -> list[int]:
    """Of `size` sequences, those of each corpus."""
    counts, total = [], sum(weights)
    for weight in weights:
        counts.append(_share(size, weight, total))
        size, total = size - counts[-1], total - weight
    return counts


def _position_of(phase: _Phase, index: int, count: int) -> int:
    """Sequences of a phase until one of its corpora has had `count`."""
    low, high = count - 1, 2 * count
    while _counts(phase.weights, high)[index] < count:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _counts(phase.weights, middle)[index] < count:
            low = middle
        else:
            high = middle
    return high


def row_order(batch_size: int, seed: int, batch: int) -> list[int]:
    """Which of the `batch_size` sequences of a batch each of its rows has.

    Without it corpora of weights 1 : 1 would alternate, so that each device, and each micro-batch of an accumulation,
    would see one of them only.
    """
    # Sorted raw bits, because NumPy promises only those to be the same in every version. The key is none that orders
    # of records have.
    bits = np.random.Philox(key=[(1 << 32) + seed, batch]).random_raw(batch_size)
    return np.argsort(bits, kind="stable").tolist()


def seed_of(seed: int, corpus: int) -> int:
    """The seed of the order of one corpus: two that are parallel, line by line, don't come in the same order."""
    return (seed + corpus * 2_654_435_761) % 2**32
