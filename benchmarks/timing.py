"""Interleaved timing: every variant once per round, so that a disturbance of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by variant, over `rounds` rounds after one that warms up."""
    return interleaved_by(variants, rounds, (time.perf_counter,))[0]


def interleaved_by(
    variants: Mapping[str, Callable[[], object]], rounds: int, clocks: Sequence[Callable[[], float]]
) -> list[dict[str, list[float]]]:
    """As `interleaved`, by each of several clocks."""
    for run in variants.values():
        jax.block_until_ready(run())
    times: list[dict[str, list[float]]] = [{name: [] for name in variants} for _ in clocks]
    for _ in range(rounds):
        for name, run in variants.items():
            started = [clock() for clock in clocks]
            jax.block_until_ready(run())
            for clock, begun, found in zip(clocks, started, times, strict=True):
                found[name].append(clock() - begun)
    return times


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, tuple[float, float, float]]:
    """Quartiles of the rounds' ratios to the baseline's time, by variant: lower, median, upper."""
    found = {}
    for name, values in times.items():
        quarters = statistics.quantiles([own / base for own, base in zip(values, times[baseline], strict=True)], n=4)
        found[name] = (quarters[0], quarters[1], quarters[2])
    return found


def print_ratios(times: Mapping[str, list[float]], baseline: str) -> None:
    """Print medians, their ratio to the baseline's, and the quartiles of the per-round ratios, as Markdown."""
    print("| variant | median ms | ratio | quartiles of the rounds' ratios |\n|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        ratios = [value / base for value, base in zip(values, times[baseline], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio = median / statistics.median(times[baseline])
        print(f"| {name} | {1e3 * median:.1f} | {ratio:.2f} | {low:.2f} .. {high:.2f} |")
