"""Fits of the law of features' densities."""

import numpy as np
import pytest

from sparsezoo_jax.evaluation.zipf import zipf_fit


@pytest.mark.parametrize(("exponent", "offset"), [(1.0, 0.0), (0.7, 4.0), (1.8, 25.0)])
def test_a_law_is_found_again(exponent, offset):
    ranks = np.arange(1, 513)
    density = 0.3 * (ranks + offset) ** -exponent
    found = zipf_fit(np.random.default_rng(0).permutation(density))
    assert found.exponent == pytest.approx(exponent, rel=1e-3)
    assert found.offset == pytest.approx(offset, rel=1e-2, abs=1e-3)
    assert found.ranks == 460
    assert found.r_squared == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found(ranks[:460]), np.sort(density)[::-1][:460], rtol=1e-3)


def test_the_rarest_and_the_dead_are_left_out():
    density = 0.2 * np.arange(1, 101.0) ** -0.9
    density[90:] *= 1e-3  # what no law goes through
    found = zipf_fit(np.concatenate([density, np.zeros(40)]))
    assert (found.ranks, found.exponent) == (90, pytest.approx(0.9, rel=1e-3))
    assert zipf_fit(density, share=1.0).exponent > 1.1


def test_without_an_offset_it_is_the_line_of_least_squares():
    rng = np.random.default_rng(0)
    ranks = np.arange(1, 301)
    density = np.sort(np.exp(-1.1 * np.log(ranks) + 0.05 * rng.normal(size=300)))[::-1]
    density[0] *= 3  # steeper at the top than a power law: no offset
    found = zipf_fit(density, share=1.0)
    slope, intercept = np.polyfit(np.log(ranks + found.offset), np.log(density), 1)
    assert found.exponent == pytest.approx(-slope)
    assert found.log_scale == pytest.approx(intercept)
    errors = np.log(density) - np.log(found(ranks))
    assert found.r_squared == pytest.approx(1 - errors.var() / np.log(density).var())
    for offset in (0, 0.5, 5):
        other = np.polynomial.Polynomial.fit(np.log(ranks + offset), np.log(density), 1)
        assert np.square(other(np.log(ranks + offset)) - np.log(density)).sum() >= np.square(errors).sum() - 1e-9


def test_densities_that_fall_exponentially():
    """A has more digits than a float64 then."""
    density = 0.4 * np.exp(-0.1 * np.arange(1, 201.0))
    found = zipf_fit(density, share=1.0)
    assert found.log_scale > 800
    assert found.r_squared > 0.99
    np.testing.assert_allclose(found(np.arange(1, 201)), density, rtol=0.2)


@pytest.mark.parametrize("density", [[], [0.0] * 50, [0.1] * 50, np.geomspace(1e-3, 1, 10)])
def test_too_little_to_fit(density):
    assert zipf_fit(density) is None
