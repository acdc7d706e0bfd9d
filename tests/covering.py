"""Small sets of test cases."""

import itertools
from collections.abc import Sequence
from typing import Any


def pairs(*settings: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases, each with one value of every setting, among which any two values of two settings occur together.

    For `pytest.mark.parametrize`, where all combinations are many and a fault shows in a value or in two that meet. The
    same in every run, and in the order of the full product.
    """
    cases = list(itertools.product(*(range(len(values)) for values in settings)))
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return [tuple(values[i] for values, i in zip(settings, case, strict=True)) for case in sorted(chosen)]


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(case), 2))
