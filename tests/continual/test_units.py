"""Ages, chosen units and rewired connections; the contrastive loss, the vote and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.continual.losses import contrastive_loss, nearest_vote
from sparsezoo_jax.continual.memory import kept_of, quantised
from sparsezoo_jax.continual.units import (
    chosen_units,
    covered_share,
    frozen_units,
    older,
    rewired,
    with_candidates,
)


def test_share_that_falls_along_a_cosine():
    assert [covered_share(t, 30, 0.1) for t in (0, 10, 15, 30)] == pytest.approx([1, 0.75, 0.5, 0.1])


def test_the_fewest_units_that_cover_a_share():
    activation = np.array([1.0, 5.0, 0.0, 3.0, 1.0])
    for share, expected in ((0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.9, [0, 1, 3]), (1.0, [0, 1, 3, 4])):
        assert np.flatnonzero(chosen_units(activation, share)).tolist() == expected
    assert not chosen_units(np.zeros(4), 1.0).any()


def test_ages():
    ages = with_candidates(np.array([0, 0, 1, 1, 2, 3]), np.array([True, False, True, False, False, True]))
    assert ages.tolist() == [1, 0, 1, 0, 2, 3]
    assert older(ages).tolist() == [2, 0, 2, 0, 3, 4]
    assert frozen_units(older(ages), 1).tolist() == [False, False, False, False, True, True]
    assert frozen_units(older(ages), 2).tolist() == [False, False, False, False, False, True]


@pytest.mark.parametrize("density", [0.05, 0.4, 0.9])
def test_rewiring_keeps_the_number_of_connections(density):
    draw = np.random.default_rng(0)
    connected = draw.random((40, 30)) < density
    plastic_inputs, ages = draw.random(40) < 0.5, draw.integers(0, 4, 30)
    made, new = rewired(connected, plastic_inputs, ages, draw)
    assert made.sum() == connected.sum()
    shielded = plastic_inputs[:, None] & (ages > 0)
    assert not (new & connected).any()
    assert (new <= made).all()
    assert not (new & shielded).any()
    left = (made & shielded).sum()
    free = (~connected & ~shielded).sum()
    assert left == max(0, (connected & shielded).sum() - free)
    if density < 0.5:
        assert left == 0
        assert (ages[np.nonzero(new)[1]] == 0).all()
    # Whatever was not shielded stays.
    assert (made & ~shielded)[connected & ~shielded].all()


def test_contrastive_loss():
    x = jax.random.normal(jax.random.key(0), (7, 5))
    labels = jnp.array([0, 1, 0, 2, 1, 0, 3])
    z = np.asarray(x / jnp.linalg.norm(x, axis=1, keepdims=True))
    terms = []
    for i in range(7):
        alike = [p for p in range(7) if p != i and labels[p] == labels[i]]
        total = sum(np.exp(z[i] @ z[a] / 0.5) for a in range(7) if a != i)
        if alike:
            terms.append(-np.mean([np.log(np.exp(z[i] @ z[p] / 0.5) / total) for p in alike]))
    assert float(contrastive_loss(x, labels, 0.5)) == pytest.approx(np.mean(terms), rel=1e-5)
    apart = contrastive_loss(x, jnp.arange(7), 0.5)
    assert float(apart) == 0
    silent = jax.grad(lambda x: contrastive_loss(x, labels, 0.5))(jnp.zeros((7, 5)))
    assert np.isfinite(silent).all()


def test_the_vote_of_the_nearest():
    kept = np.array([[1, 0, 9], [0.9, 0.1, 0], [0, 1, 0], [0.1, 0.9, 0], [0.2, 0.8, 0]], np.float32)
    labels, units = np.array([4, 4, 7, 7, 7]), np.array([True, True, False])
    x = np.array([[2, 0, 0], [0, 3, 0]], np.float32)
    assert nearest_vote(x, kept, labels, units, 3).tolist() == [4, 7]
    assert nearest_vote(x, kept, labels, units, 5).tolist() == [7, 7]
    # Two votes each: the class of the nearest. By all units the first kept example is far away.
    assert nearest_vote(x[:1], kept[:4], labels[:4], units, 4).tolist() == [4]
    assert nearest_vote(x[:1], kept[:4], labels[:4], np.ones(3, bool), 1).tolist() == [4]
    assert nearest_vote(x[:1], kept[[0, 2]], labels[[0, 2]], np.array([False, True, True]), 1).tolist() == [4]


def test_eight_bits_of_activations():
    hidden = np.random.default_rng(0).exponential(size=(20, 6)).astype(np.float32)
    codes, scale = quantised(hidden)
    assert (codes.dtype, codes.max()) == (np.uint8, 255)
    np.testing.assert_allclose(codes * scale, hidden, atol=scale / 2 * 1.001)
    assert quantised(np.zeros((2, 3), np.float32))[1] == 1
    labels = np.arange(20) % 2
    kept = kept_of(hidden, labels, 4, np.random.default_rng(1))
    assert np.bincount(kept.labels).tolist() == [4, 4]
    assert (kept.values.dtype, kept.nbytes) == (np.float32, 48)
    images = kept_of(codes, labels, 30, np.random.default_rng(1))
    assert len(images.labels) == 20
    np.testing.assert_array_equal(np.sort(images.values, axis=0), np.sort(codes, axis=0))
