import math

import pytest

from sparsezoo_jax.training.config import SpikeConfig
from sparsezoo_jax.training.guards import SpikeGuard

CONFIG = SpikeConfig(mode="skip", window=30, threshold=4.0)


def filled(steps=range(1, 41), config=CONFIG):
    guard = SpikeGuard(config)
    for step in steps:
        assert not guard.is_spike(step, 2.0 + 0.1 * (step % 5))
    return guard


def test_the_limit_is_the_median_and_robust_deviations_of_the_window():
    # Losses 2.0 to 2.4, six of each: median 2.2, absolute deviations 0, 0.1, 0.1, 0.2, 0.2 with median 0.1.
    assert filled().limit(42) == pytest.approx(2.2 + 4 * 1.4826 * 0.1)
    assert filled(range(1, 20)).limit(21) == math.inf, "too few steps"
    same = SpikeGuard(CONFIG, [[step, 3.0] for step in range(1, 41)])
    assert same.limit(42) == pytest.approx(3.0 + 4 * 3e-3), "losses that do not differ"
    assert filled(config=SpikeConfig(mode="off")).limit(42) == math.inf


def test_a_limit_does_not_depend_on_when_the_step_before_was_read():
    falling = [[step, 3.0 - 0.01 * step] for step in range(1, 41)]
    early, late = SpikeGuard(CONFIG, falling), SpikeGuard(CONFIG, falling)
    assert not late.is_spike(41, 2.59)
    assert late.limit(42) == early.limit(42)
    assert late.limit(43) != early.limit(43)


def test_spikes_and_losses_that_are_not_finite_are_not_remembered():
    guard = filled()
    before = guard.state()
    assert guard.is_spike(41, 9.0)
    assert not guard.is_spike(42, math.nan)
    assert guard.state() == before
    guard.forget_after(30)
    assert guard.state()[-1][0] == 30
