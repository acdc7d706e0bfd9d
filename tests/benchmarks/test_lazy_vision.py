"""The noise of the benchmark of vision models is what its tables say it is."""

import numpy as np
import pytest

from benchmarks.lazy_vision import corrupted
from sparsezoo_jax.data import Batch


def test_noise_is_normal_and_on_pixels_alone():
    ones = np.ones((8, 64), np.int32)
    grey = np.full((8, 64, 16), 128, np.uint8)
    batch = Batch(tokens=grey, targets=ones, segment_ids=ones, positions=ones, mask=ones > 0)
    noisy = corrupted(batch, 0.1, np.random.default_rng(0))
    assert noisy["tokens"].dtype == np.uint8
    assert noisy["tokens"].std() == pytest.approx(25.5, rel=0.02)
    assert noisy["tokens"].mean() == pytest.approx(128, abs=1)
    for name in ("targets", "segment_ids", "positions", "mask"):
        np.testing.assert_array_equal(noisy[name], batch[name])
    np.testing.assert_array_equal(corrupted(batch, 0.0, np.random.default_rng(0))["tokens"], grey)
