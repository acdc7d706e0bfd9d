"""The parser of perturbations learns what is there, and nothing else."""

import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.parsing.parser import standardised, train_parser


def test_sizes_tell_nothing():
    changes = np.random.default_rng(0).standard_normal((3, 4, 4, 2))
    changes[2] = 0
    found = standardised(changes)
    np.testing.assert_allclose(np.mean(np.square(found[:2]), (1, 2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(standardised(changes * [[[[1e-4]]], [[[7.0]]], [[[1.0]]]]), found, rtol=1e-5)
    np.testing.assert_array_equal(found[2], 0)
    ratio = found[1] / changes[1]
    np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-5)  # signs and proportions stay


def test_it_tells_what_is_in_a_perturbation_and_nothing_else():
    draw = np.random.default_rng(0)

    def drawn(count):
        labels = {name: draw.integers(0, classes, count) for name, classes in (("pattern", 3), ("coin", 2))}
        changes = draw.standard_normal((count, 16, 16, 1))
        rows = np.where(np.arange(16) % 2, 1.0, -1.0)[:, None, None]
        changes[labels["pattern"] == 0] += rows
        changes[labels["pattern"] == 1] += rows.swapaxes(0, 1)
        return 1e-3 * changes, labels

    changes, labels = drawn(256)
    parser = train_parser(changes, labels, steps=40, batch_size=32, width=8)
    changes, labels = drawn(200)
    told = parser.tell(changes, batch_size=64)
    assert np.mean(told["pattern"] == labels["pattern"]) > 0.9
    assert np.mean(told["coin"] == labels["coin"]) < 0.65
    np.testing.assert_array_equal(parser.tell(5 * changes, batch_size=128)["pattern"], told["pattern"])


def test_sides_that_can_not_be_halved():
    with pytest.raises(ConfigError, match=r"shape=\(16, 24, 1\): sides must be multiples of 16"):
        train_parser(np.zeros((2, 16, 24, 1)), {"a": np.array([0, 1])}, steps=1)
