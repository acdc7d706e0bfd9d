"""Choices of edges under a budget, and Zipf budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.autoencoders.selection import (
    feature_choice,
    mutual_choice,
    token_choice,
    whole_budgets,
    zipf_shares,
)

CODES = jnp.array([[0.90, 0.80, 0.70, 0.60], [0.50, 0.10, 0.05, 0.02], [0.40, 0.30, 0.85, 0.01]])
MUTUAL = [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("mask", "expected", "affinity"),
    [
        (token_choice(CODES, 2), [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], 3.55),
        (mutual_choice(CODES, 6), MUTUAL, 4.35),
        (feature_choice(CODES, jnp.array([2, 1, 2, 1])), MUTUAL, 4.35),
        (feature_choice(CODES, jnp.ones(4, int)), [[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], 3.15),
    ],
)
def test_masks_by_hand(mask, expected, affinity):
    np.testing.assert_array_equal(mask, np.array(expected, bool))
    assert float(jnp.sum(CODES * mask)) == pytest.approx(affinity)


@pytest.mark.parametrize("seed", range(4))
def test_what_always_holds(seed):
    codes = jax.random.uniform(jax.random.key(seed), (24, 16))
    budgets = whole_budgets(zipf_shares(16), 3 * 24, 24)
    tokens, mutual, features = token_choice(codes, 3), mutual_choice(codes, 72), feature_choice(codes, budgets)
    np.testing.assert_array_equal(tokens.sum(1), 3)
    np.testing.assert_array_equal(features.sum(0), budgets)
    assert mutual.sum() == 72
    best = jnp.sort(codes.reshape(-1))[-72]
    np.testing.assert_array_equal(mutual, codes >= best)
    equal = feature_choice(codes, jnp.full(16, 72 // 16))
    affinity = [float(jnp.sum(codes * mask)) for mask in (mutual, tokens, equal)]
    assert affinity[0] >= max(affinity)


def test_ties_go_to_the_first():
    codes = jnp.ones((3, 4))
    np.testing.assert_array_equal(token_choice(codes, 2), [[1, 1, 0, 0]] * 3)
    np.testing.assert_array_equal(mutual_choice(codes, 5), [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(feature_choice(codes, jnp.array([2, 1, 3, 1])).sum(1), [4, 2, 1])


def test_zipf_budgets_by_hand():
    expected = [23.54796, 11.77398, 7.84932, 5.88699, 4.70959, 3.92466, 3.36399, 2.94350]
    np.testing.assert_allclose(64 * zipf_shares(8), expected, atol=1e-5)
    np.testing.assert_array_equal(whole_budgets(zipf_shares(8), 64, 1000), [23, 12, 8, 6, 5, 4, 3, 3])
    shifted = 64 * zipf_shares(8, offset=2.0)
    np.testing.assert_allclose(shifted[[0, -1]], [14.92919, 4.47876], atol=1e-5)
    capped = whole_budgets(zipf_shares(8), 64, 10)
    assert (capped.max(), capped.min()) == (10, 3)
    assert whole_budgets(zipf_shares(50), 20, 10).min() == 1
