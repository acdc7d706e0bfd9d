"""Interleaved timing: every variant once per round, so that a disturbance of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by variant, over `rounds` rounds after one that warms up."""
    for run in variants.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - started)
    return times


def print_ratios(times: Mapping[str, list[float]], baseline: str) -> None:
    """Print medians, their ratio to the baseline's, and the quartiles of the per-round ratios, as Markdown."""
    print("| variant | median ms | ratio | quartiles of the rounds' ratios |\n|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        ratios = [value / base for value, base in zip(values, times[baseline], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio = median / statistics.median(times[baseline])
        print(f"| {name} | {1e3 * median:.1f} | {ratio:.2f} | {low:.2f} .. {high:.2f} |")
