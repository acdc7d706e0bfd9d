"""Calibration by hand."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError, DataError
from sparsezoo_jax.evaluation.calibration import Calibration, bin_sums, calibrate

#: Probabilities of three tokens at five places; the last place has no target.
PROBABILITIES = [[0.9, 0.07, 0.03], [0.15, 0.75, 0.1], [0.2, 0.25, 0.55], [0.34, 0.33, 0.33], [0.98, 0.01, 0.01]]
TARGETS = jnp.array([[0, 2, 2, 1, 0]])
MASK = jnp.array([[True, True, True, True, False]])
LOGITS = jnp.log(jnp.array([PROBABILITIES])) + 3  # any constant


def test_error_by_hand():
    """Right, wrong, right, wrong at 0.9, 0.75, 0.55, 0.34."""
    found = Calibration.of(bin_sums(LOGITS, TARGETS, MASK, bins=5))
    assert found.predictions == 4
    assert found.loss == pytest.approx(-np.log([0.9, 0.1, 0.55, 0.33]).mean(), rel=1e-5)
    assert found.accuracy == pytest.approx(2 / 4)
    assert found.confidence == pytest.approx((0.9 + 0.75 + 0.55 + 0.34) / 4)
    assert found.bins == [0, 1, 1, 1, 1]
    assert found.bin_accuracy == [None, 0, 1, 0, 1]
    assert found.bin_confidence[1:] == pytest.approx([0.34, 0.55, 0.75, 0.9])
    assert found.ece == pytest.approx((0.34 + 0.45 + 0.75 + 0.1) / 4)
    # In one half there are three, of which two are right: errors within a bin cancel out.
    halves = Calibration.of(bin_sums(LOGITS, TARGETS, MASK, bins=2))
    assert halves.ece == pytest.approx((abs(2 - (0.9 + 0.75 + 0.55)) + 0.34) / 4)


def test_a_bin_has_its_upper_end():
    """Two equal logits are a confidence of exactly a half; certainty is in the last bin."""
    logits = jnp.array([[[0.0, 0.0], [200.0, 0.0]]])
    sums = bin_sums(logits, jnp.zeros((1, 2), int), jnp.ones((1, 2), bool), bins=2)
    np.testing.assert_array_equal(sums.count, [1, 1])
    np.testing.assert_array_equal(sums.confidence, [0.5, 1])


class Fixed(nnx.Module):
    """Has the same logits for every sequence."""

    def __call__(self, tokens, segment_ids, positions):
        return types.SimpleNamespace(logits=jnp.broadcast_to(LOGITS, (len(tokens), *LOGITS.shape[1:])))


def batch(mask):
    places = np.zeros((1, 5), np.int32)
    return {"tokens": places, "segment_ids": places, "positions": places, "targets": TARGETS, "mask": mask}


def test_batches_add_up():
    first, rest = MASK & (jnp.arange(5) < 1), MASK & (jnp.arange(5) >= 1)
    found = calibrate(Fixed(), [batch(first), batch(rest)])
    whole = Calibration.of(bin_sums(LOGITS, TARGETS, MASK))
    assert (found.bins, found.accuracy) == (whole.bins, whole.accuracy)
    assert (found.loss, found.ece) == pytest.approx((whole.loss, whole.ece))
    assert len(found.bins) == 15
    with pytest.raises(DataError, match="no token to predict"):
        calibrate(Fixed(), [batch(MASK & False)])
    with pytest.raises(ConfigError, match="bins=0"):
        calibrate(Fixed(), [], bins=0)
