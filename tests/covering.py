"""Small sets of test cases."""

import itertools
from collections.abc import Iterable
from typing import Any


def pairs(*settings: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases, each with one value of every setting, among which any two values of two settings occur together.

    For `pytest.mark.parametrize`, where all combinations are many and a fault shows in a value or in two that meet. The
    same in every run, and in the order of the full product.
    """
    values = [list(each) for each in settings]
    cases = list(itertools.product(*(range(len(each)) for each in values)))
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return [tuple(each[i] for each, i in zip(values, case, strict=True)) for case in sorted(chosen)]


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(case), 2))
