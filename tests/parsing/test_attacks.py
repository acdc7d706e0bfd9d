"""Attacks: their balls, their steps, and the range of pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.parsing.attacks import ATTACKS, AttackConfig, ascent, perturbations, projected

DRAW = np.random.default_rng(0)
MAPS = DRAW.standard_normal((48, 3)).astype(np.float32)
MIDDLE = DRAW.uniform(0.3, 0.7, (5, 4, 4, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1, 0])


def linear(x):
    return x.reshape(len(x), -1) @ MAPS


def squared(x):
    return jnp.square(jnp.tanh(linear(x)) @ MAPS[:3]) - x.reshape(len(x), -1) @ MAPS


def gradients(scores, x):
    def loss(x_HWC, label):
        return -jax.nn.log_softmax(scores(x_HWC[None])[0])[label]

    return jax.vmap(jax.grad(loss))(x, LABELS)


def norms(x):
    return np.sqrt(np.sum(np.square(np.asarray(x, np.float64)), axis=(1, 2, 3)))


def test_fgsm_is_a_step_by_the_signs_of_each_image():
    found = perturbations(squared, MIDDLE, LABELS, ATTACKS["fgsm"])
    expected = 8 / 255 * np.sign(gradients(squared, MIDDLE))
    np.testing.assert_allclose(found, expected, atol=1e-7)  # an ulp of a pixel
    assert set(np.unique(np.sign(found))) == {-1, 1}


def test_steps_of_l2_follow_the_gradient():
    config = AttackConfig(norm="l2", radius=0.2)
    slope = gradients(squared, MIDDLE)
    expected = 0.2 * slope / norms(slope)[:, None, None, None]
    np.testing.assert_allclose(perturbations(squared, MIDDLE, LABELS, config), expected, atol=1e-6)
    # Two steps: the second from where the first ended.
    two = perturbations(squared, MIDDLE, LABELS, AttackConfig(norm="l2", radius=9.0, steps=2, step_size=0.1))
    again = gradients(squared, MIDDLE + expected / 2)
    expected = expected / 2 + 0.1 * again / norms(again)[:, None, None, None]
    np.testing.assert_allclose(two, expected, atol=1e-6)


def test_small_gradients_have_directions_and_none_has_none():
    slope = np.zeros((2, 1, 2, 1), np.float32)
    slope[0, 0, :, 0] = 3e-30, -4e-30
    np.testing.assert_allclose(ascent(jnp.asarray(slope), "l2")[0, 0, :, 0], [0.6, -0.8], rtol=1e-6)
    for norm in ("l2", "linf"):
        np.testing.assert_array_equal(ascent(jnp.asarray(slope), norm)[1], 0)


def test_projection():
    images = jnp.full((2, 1, 2, 1), 0.5)
    changes = jnp.asarray([[3.0, -4.0], [0.03, 0.04]]).reshape(2, 1, 2, 1)
    found = projected(changes, images, AttackConfig(norm="l2", radius=0.1)).reshape(2, 2)
    np.testing.assert_allclose(found, [[0.06, -0.08], [0.03, 0.04]], atol=1e-7)
    found = projected(changes, images, AttackConfig(norm="linf", radius=0.035)).reshape(2, 2)
    np.testing.assert_allclose(found, [[0.035, -0.035], [0.03, 0.035]], atol=1e-7)
    # Beside the ends of the range a perturbation is cut off after it was brought into the ball.
    found = projected(changes, jnp.asarray([[0.98, 0.05]] * 2).reshape(2, 1, 2, 1), AttackConfig(norm="l2", radius=0.1))
    np.testing.assert_allclose(found.reshape(2, 2), [[0.02, -0.05], [0.02, 0.04]], atol=1e-7)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_stay_in_their_balls_and_among_pixels_and_raise_the_loss(name):
    config = ATTACKS[name]
    rounding = 2e-7  # of a pixel and a perturbation that are added and subtracted again
    for images in (MIDDLE, np.round(MIDDLE), DRAW.random(MIDDLE.shape).astype(np.float32)):
        changes = np.asarray(perturbations(squared, images, LABELS, config))
        attacked = images + changes
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        size = np.abs(changes).max((1, 2, 3)) if config.norm == "linf" else norms(changes)
        assert np.all(size <= config.radius + rounding * (1 if config.norm == "linf" else np.sqrt(48)))
        if images is MIDDLE:  # steps that add up to more than the radius end on the ball
            np.testing.assert_allclose(size, config.radius, rtol=1e-4)
        of = [-jax.nn.log_softmax(squared(x))[np.arange(5), LABELS] for x in (images, attacked)]
        assert float(jnp.mean(of[1])) > float(jnp.mean(of[0]))


def test_more_steps_raise_the_loss_further():
    loss = {}
    for steps in (1, 10):
        config = AttackConfig(norm="linf", radius=0.1, steps=steps, step_size=0.1 if steps == 1 else 0.02)
        attacked = MIDDLE + perturbations(squared, MIDDLE, LABELS, config)
        loss[steps] = float(-jnp.mean(jax.nn.log_softmax(squared(attacked))[np.arange(5), LABELS]))
    assert loss[10] > loss[1]


@pytest.mark.parametrize(("field", "value"), [("radius", 0.0), ("steps", 0), ("step_size", -1.0), ("step_size", 0.0)])
def test_numbers_that_are_none(field, value):
    with pytest.raises(ConfigError, match=rf"attack\.{field}={value}: must be"):
        AttackConfig(**{"norm": "l2", "radius": 1.0, field: value})
