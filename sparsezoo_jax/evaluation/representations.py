"""Sparse distributed representations: how surely a few active units tell one pattern from all others.

A pattern is a set of `active` out of `population` units, such as the neurons that a token makes active. A detector
knows `sampled` units of one pattern, and matches a pattern that has at least `threshold` of them.

Source: Ahmad and Hawkins, "How do neurons operate on sparse distributed representations?" (arXiv 1601.00720). The
chances are sums of binomial coefficients, which are computed as integers: no rounding but that of the last division.
The union's formulas are from memory of the authors' other texts; they are derived in the docstrings.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from sparsezoo_jax.errors import DataError, require


def _check(population: int, active: int, sampled: int, threshold: int, *, own: bool = True) -> None:
    require(population >= 1, "--population", population, "must be at least 1")
    require(1 <= active <= population, "--active", active, f"must be from 1 to --population {population}")
    most, name = (active, "--active") if own else (population, "--population")
    require(1 <= sampled <= most, "--sampled", sampled, f"must be from 1 to {name} {most}")
    require(1 <= threshold <= sampled, "--threshold", threshold, f"must be from 1 to --sampled {sampled}")


def overlaps(population: int, given: int, active: int, overlap: int) -> int:
    """Patterns with `active` units of which exactly `overlap` are among `given` ones: `C(g, b) C(n - g, a - b)`."""
    if overlap > active:
        return 0
    return math.comb(given, overlap) * math.comb(population - given, active - overlap)


def false_match(population: int, active: int, sampled: int, threshold: int) -> float:
    """The chance that a random pattern has at least `threshold` of `sampled` units.

    `P = sum over b from theta to s of C(s, b) C(n - s, a - b) / C(n, a)`; the units may be more than those of one
    pattern, for instance s times M of M patterns.
    """
    _check(population, active, sampled, threshold, own=False)
    tail = sum(overlaps(population, sampled, active, b) for b in range(threshold, min(sampled, active) + 1))
    return tail / math.comb(population, active)


def missed_match(active: int, sampled: int, threshold: int, changed: int) -> float:
    """The chance that the detector's own pattern is missed when `changed` of its active units are others.

    Those that are still active among the sampled ones: at most `threshold - 1` of `active - changed`, drawn from
    `active` without replacement.
    """
    _check(active, active, sampled, threshold)
    require(0 <= changed <= active, "--changed", changed, f"must be from 0 to --active {active}")
    few = sum(
        math.comb(active - changed, b) * math.comb(changed, sampled - b)
        for b in range(threshold)
        if sampled - b <= changed
    )
    return few / math.comb(active, sampled)


def union_density(population: int, active: int, patterns: int) -> float:
    """Expected share of the units that are in at least one of some random patterns: `1 - (1 - a/n)^M`."""
    _check(population, active, 1, 1)
    require(patterns >= 1, "--stored", patterns, "must be at least 1")
    return -math.expm1(patterns * math.log1p(-active / population)) if active < population else 1.0


def union_false_match(population: int, active: int, sampled: int, threshold: int, patterns: int) -> float:
    """The chance that a detector of another pattern matches the union of `patterns` random ones.

    Each of its units is in the union with the chance d of `union_density`: a binomial tail, `d^s` where all must be.
    """
    _check(population, active, sampled, threshold)
    d = union_density(population, active, patterns)
    return min(
        1.0, math.fsum(math.comb(sampled, b) * d**b * (1 - d) ** (sampled - b) for b in range(threshold, sampled + 1))
    )


def least_threshold(population: int, active: int, sampled: int, error: float) -> int | None:
    """The lowest threshold whose `false_match` is at most `error`; None if all of `sampled` are too few."""
    require(0 < error < 1, "--error", error, "must be in (0, 1)")
    found = (t for t in range(1, sampled + 1) if false_match(population, active, sampled, t) <= error)
    return next(found, None)


def least_sample(population: int, active: int, error: float, noise: float) -> tuple[int, int] | None:
    """The fewest units to sample, and the threshold, that lose no pattern of which a share of `noise` is gone.

    The threshold is `ceil((1 - noise) s)`, and `false_match` at most `error`. None: not even all active units do.
    """
    require(0 < error < 1, "--error", error, "must be in (0, 1)")
    require(0 <= noise < 1, "--noise", noise, "must be in [0, 1)")
    for sampled in range(1, active + 1):
        threshold = max(1, math.ceil((1 - noise) * sampled - 1e-9))
        if false_match(population, active, sampled, threshold) <= error:
            return sampled, threshold
    return None


def simulated_false_match(
    population: int, active: int, sampled: int, threshold: int, trials: int, seed: int = 0
) -> float:
    """The share of `trials` random patterns that match; `false_match` is what it tends to."""
    _check(population, active, sampled, threshold)
    require(trials >= 1, "--simulate", trials, "must be at least 1")
    draw = np.random.default_rng(seed)
    matches = 0
    for _ in range(trials):
        # By symmetry the detector's units may be the first ones.
        pattern = draw.choice(population, active, replace=False, shuffle=False)
        matches += np.count_nonzero(pattern < sampled) >= threshold
    return matches / trials


class Signature(NamedTuple):
    """How surely some active units of a token tell its set of active units from those of other tokens."""

    sampled: int
    uniform: float
    """Chance that another token has all of them, if its active units, as many as they are, were drawn at random."""
    by_use: float
    """The same from how often each unit is active, but still independently."""
    measured: float
    """Share of other tokens that have them all."""
    unlike: float
    """Share of those tokens of another id that have them all."""
    alone: float
    """Share of the tokens that no other token is taken for."""


@dataclasses.dataclass(frozen=True)
class ActiveSets:
    """The active units of many tokens in one layer."""

    tokens: int
    population: int
    """Units of the layer."""
    active: float
    """Mean number of active units of a token."""
    used: int
    """Units that are active for some token."""
    effective: float
    """Units with which uniform use would make two tokens share as many: `(sum p)^2 / sum p^2` over the units' shares p
    of tokens."""
    signatures: tuple[Signature, ...]

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return {**dataclasses.asdict(self), "signatures": [s._asdict() for s in self.signatures]}


def measure_active_sets(
    active_NF: np.ndarray, ids_N: np.ndarray, sampled: tuple[int, ...], *, draws: int = 500, seed: int = 0
) -> ActiveSets:
    """Compare what the formulas say of signatures with what the active units of real tokens do.

    Args:
      active_NF: booleans, tokens by units.
      ids_N: the tokens' ids.
      sampled: numbers of units in a signature; all of them must be active (the threshold is the number).
      draws: signatures that are tried for each number, of tokens drawn at random that have enough active units.
      seed: of the draws.

    Raises:
      DataError: fewer than two tokens have as many active units as a signature needs.
    """
    tokens, population = active_NF.shape
    draw = np.random.default_rng(seed)
    counts_N, shares_F = active_NF.sum(axis=1), active_NF.mean(axis=0)
    effective = float(shares_F.sum() ** 2 / max(np.square(shares_F).sum(), np.finfo(float).tiny))
    found = []
    for s in sampled:
        able = np.flatnonzero(counts_N >= s)
        if len(able) < 2:
            raise DataError(f"fewer than two tokens have {s} active units")
        others = unlike = by_use = 0.0
        alone = 0
        for token in draw.choice(able, draws):
            units = draw.choice(np.flatnonzero(active_NF[token]), s, replace=False)
            matches_N = np.asarray(active_NF[:, units].all(axis=1))
            matches = int(matches_N.sum()) - 1  # without itself
            others, alone = others + matches / (tokens - 1), alone + (matches == 0)
            unlike_N = np.not_equal(ids_N, ids_N[token])
            unlike += float(matches_N[unlike_N].mean()) if unlike_N.any() else 0.0
            by_use += float(np.prod(shares_F[units]))
        steps = np.arange(s)
        uniform_N = np.prod(np.maximum(counts_N[:, None] - steps, 0) / (population - steps), axis=1)
        chances = (float(uniform_N.mean()), *(total / draws for total in (by_use, others, unlike, alone)))
        found.append(Signature(s, *chances))
    used = int((shares_F > 0).sum())
    return ActiveSets(tokens, population, float(counts_N.mean()), used, effective, tuple(found))
