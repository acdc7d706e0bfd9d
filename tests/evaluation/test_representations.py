"""Formulas of sparse distributed representations, and signatures of active units."""

import itertools
import math

import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError, DataError
from sparsezoo_jax.evaluation.representations import (
    false_match,
    least_sample,
    least_threshold,
    measure_active_sets,
    missed_match,
    overlaps,
    simulated_false_match,
    union_density,
    union_false_match,
)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((10_000, 300, 24, 12), 8.376e-13),
        ((200_000, 2_000, 10, 10), 9.8e-21),
        ((200_000, 2_000, 20, 10), 1.65e-15),
    ],
)
def test_published_chances(numbers, expected):
    assert false_match(*numbers) == pytest.approx(expected, rel=5e-3)


def test_chances_by_enumeration():
    n, a, s, t = 9, 4, 3, 2
    patterns = [set(x) for x in itertools.combinations(range(n), a)]
    known = {0, 1, 2}
    matches = [len(known & x) for x in patterns]
    assert false_match(n, a, s, t) == sum(m >= t for m in matches) / len(patterns)
    assert overlaps(n, s, a, 1) == sum(m == 1 for m in matches)
    assert sum(overlaps(n, s, a, b) for b in range(s + 1)) == math.comb(n, a)
    # The detector knows 3 of the units 0 to 3, of which one, whichever it is, is another now.
    samples = list(itertools.combinations(range(a), s))
    missed = sum(len(set(x) - {0}) < t + 1 for x in samples) / len(samples)
    assert missed_match(a, s, t + 1, 1) == missed == 0.75
    assert missed_match(a, s, t, 0) == 0


def test_unions():
    assert union_density(100, 10, 1) == pytest.approx(0.1)
    assert union_density(100, 10, 3) == pytest.approx(1 - 0.9**3)
    assert union_density(10, 10, 2) == 1
    d = union_density(100, 10, 3)
    assert union_false_match(100, 10, 2, 2, 3) == pytest.approx(d**2)
    assert union_false_match(100, 10, 2, 1, 3) == pytest.approx(1 - (1 - d) ** 2)


def test_least_numbers():
    t = least_threshold(10_000, 300, 24, 1e-9)
    assert t is not None
    assert false_match(10_000, 300, 24, t) <= 1e-9 < false_match(10_000, 300, 24, t - 1)
    assert least_threshold(10, 5, 2, 1e-9) is None
    s, t = least_sample(10_000, 300, 1e-9, 0.5) or (0, 0)
    assert (s, t) == (17, 9)
    assert false_match(10_000, 300, s - 1, math.ceil((s - 1) / 2)) > 1e-9
    assert least_sample(10, 5, 1e-9, 0.0) is None


def test_simulation_tends_to_the_chance():
    chance = false_match(60, 20, 6, 3)
    assert simulated_false_match(60, 20, 6, 3, 4000, seed=1) == pytest.approx(chance, abs=4 * math.sqrt(chance / 4000))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((10, 11, 2, 1), r"--active=11: must be from 1 to --population 10"),
        ((10, 5, 11, 1), r"--sampled=11: must be from 1 to --population 10"),
        ((10, 5, 3, 4), r"--threshold=4: must be from 1 to --sampled 3"),
        ((0, 1, 1, 1), r"--population=0: must be at least 1"),
    ],
)
def test_impossible_numbers_are_named(numbers, message):
    with pytest.raises(ConfigError, match=message):
        false_match(*numbers)


def test_signatures_of_random_and_of_repeated_patterns():
    draw = np.random.default_rng(0)
    n, tokens, active = 64, 2000, 8
    sets = np.zeros((tokens, n), bool)
    for row in sets:
        row[draw.choice(n, active, replace=False)] = True
    found = measure_active_sets(sets, np.arange(tokens), (1, 2), draws=400)
    assert (found.active, found.used) == (active, n)
    assert found.effective == pytest.approx(n, rel=0.05)
    for s in found.signatures:
        assert s.uniform == pytest.approx(false_match(n, active, s.sampled, s.sampled))
        assert s.measured == s.unlike == pytest.approx(s.uniform, rel=0.1)
    # Every second token is a repetition of one word: these match one another, and no other word.
    sets[::2] = False
    sets[::2, :4] = True
    sets[1::2, :4] = False
    ids = np.where(np.arange(tokens) % 2 == 0, -1, np.arange(tokens))
    repeated = measure_active_sets(sets[::2], ids[::2], (2,), draws=20).signatures[0]
    assert (repeated.measured, repeated.unlike, repeated.alone) == (1.0, 0.0, 0.0)
    with pytest.raises(DataError, match="fewer than two tokens have 9 active units"):
        measure_active_sets(sets, ids, (9,))
