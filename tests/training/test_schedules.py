import math

import numpy as np
import pytest

from sparsezoo_jax.training.schedules import WSD, WSDC, Constant, Cosine, build_schedule

LR = 2.0


def values(config, steps, at):
    schedule = build_schedule(config, steps)
    return [float(schedule(t)) for t in at]


def test_cosine_warms_up_and_ends_at_the_minimum_at_the_last_step():
    config = Cosine(learning_rate=LR, warmup_steps=10, min_ratio=0.1)
    middle = 0.2 + 1.8 * 0.5
    np.testing.assert_allclose(values(config, 110, [0, 5, 10, 60, 110]), [0, 1, 2, middle, 0.2], rtol=1e-6)


def test_constant_stays():
    config = Constant(learning_rate=LR, warmup_steps=4)
    np.testing.assert_allclose(values(config, 50, [0, 1, 4, 30, 49, 50]), [0, 0.5, 2, 2, 2, 2])


@pytest.mark.parametrize(
    ("shape", "half"),
    [
        ("linear", 0.1 + 0.9 * 0.5),
        ("1-sqrt", 0.1 + 0.9 * (1 - math.sqrt(0.5))),
        ("cosine", 0.1 + 0.9 * 0.5),
        ("exponential", 0.1**0.5),
        ("halving", 0.1 + 0.9 * (math.sqrt(2) - 1)),
    ],
)
def test_wsd_decays_over_its_last_steps(shape, half):
    config = WSD(learning_rate=LR, warmup_steps=10, decay_steps=40, decay=shape, min_ratio=0.1)
    found = values(config, 100, [5, 10, 60, 80, 100])
    np.testing.assert_allclose(found, [1, 2, 2, 2 * half, 0.2], rtol=1e-5)


def test_wsdc_has_a_constant_tail():
    config = WSDC(learning_rate=LR, warmup_steps=10, stable_steps=20, decay_steps=40)
    quarter = 0.2 + 1.8 * (1 - math.sqrt(0.25))
    np.testing.assert_allclose(
        values(config, 100, [0, 9, 10, 30, 40, 70, 99]), [0, 1.8, 2, 2, quarter, 0.2, 0.2], rtol=1e-5
    )


def test_a_decay_of_no_steps_is_a_drop():
    config = WSDC(learning_rate=LR, warmup_steps=0, stable_steps=5, decay_steps=0)
    np.testing.assert_allclose(values(config, 10, [0, 4, 5, 9]), [2, 2, 0.2, 0.2], rtol=1e-6)
