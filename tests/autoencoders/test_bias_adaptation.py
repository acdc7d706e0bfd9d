"""Group bias adaptation by hand, and what holds while it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.autoencoders import GBASAE, SAETrainConfig, TopKSAE, Trainer
from sparsezoo_jax.autoencoders.bias_adaptation import adapted_biases, assign_groups, target_frequencies
from sparsezoo_jax.autoencoders.model import training_codes


def test_target_frequencies():
    targets = target_frequencies(10, 0.1, 1e-4)
    np.testing.assert_allclose(targets[1:] / targets[:-1], 0.46415888, rtol=1e-7)
    expected = [0.1, 0.0464159, 0.0215443, 0.01, 0.00464159, 0.00215443, 0.001, 0.000464159, 0.000215443, 0.0001]
    np.testing.assert_allclose(targets, expected, rtol=1e-5)
    targets = target_frequencies(10, 0.5, 1e-3)
    np.testing.assert_allclose(targets[1:] / targets[:-1], 0.50131932, rtol=1e-7)


Y = np.array([[0.5, -0.2, -0.3, 0.1], [0.2, -0.1, -0.4, -0.6], [-0.3, -0.5, -0.2, 0.4], [0.7, -0.9, -0.1, -0.2]])


def adapted(bias, pre, target=0.25):
    pre = jnp.asarray(pre)
    frequency, largest = jnp.mean(pre > 0, axis=0), jnp.maximum(jnp.max(pre, axis=0), 0)
    groups = jnp.zeros(pre.shape[1], int)
    return adapted_biases(jnp.asarray(bias), frequency, largest, groups, jnp.array([target]))


def test_a_step_by_hand():
    new = adapted([-0.10, -0.20, -0.995, -0.003], Y)
    np.testing.assert_allclose(new, [-0.107, -0.1945, -0.9895, -0.007], atol=1e-6)
    # Between never and its target's frequency a feature is left alone.
    np.testing.assert_allclose(adapted([-0.1, -0.2, -0.3, -0.4], Y, 0.75)[jnp.array([0, 3])], [-0.1, -0.4], atol=1e-7)


def test_bounds():
    assert adapted([-0.995], [[0.7], [0.7]])[0] == -1
    assert adapted([-0.003, -0.5], [[-0.1, 0.55]] * 4, 1.0)[0] == 0
    # A group without a firing feature has no size to move by.
    np.testing.assert_array_equal(adapted([-0.4, -0.5], [[-0.1, -0.2]]), jnp.array([-0.4, -0.5]))


def test_groups_have_their_own_mean():
    groups, targets = jnp.array([0, 0, 1, 1]), jnp.array([1.0, 1.0])
    largest, frequency = jnp.array([0.8, 0.0, 0.2, 0.0]), jnp.array([0.5, 0.0, 0.5, 0.0])
    new = adapted_biases(jnp.full(4, -0.5), frequency, largest, groups, targets)
    np.testing.assert_allclose(new, [-0.5, -0.492, -0.5, -0.498], atol=1e-6)
    assigned = assign_groups(40, 10, 0)
    np.testing.assert_array_equal(np.bincount(assigned), 4)
    assert (assigned != np.sort(assigned)).any()
    assert set(np.bincount(assign_groups(4096, 10, 0))) == {409, 410}


def batches(rows=64, d=16):
    key = jax.random.key(3)
    while True:
        key, sub = jax.random.split(key)
        yield jax.random.normal(sub, (rows, d))


@pytest.mark.slow
def test_frequencies_settle_below_their_targets():
    """With a dictionary that does not learn and inputs of one law, whoever fires too often ends at the target."""
    config = GBASAE(features=40, groups=4, highest=0.3, lowest=0.05, interval=5)
    stream = batches(256)
    trainer = Trainer(config, SAETrainConfig(learning_rate=1e-12, warmup_steps=0, batch_size=256), next(stream))
    targets = target_frequencies(4, 0.3, 0.05)[np.asarray(trainer.state["group_F"])]
    fires = lambda: np.stack(  # noqa: E731
        [np.asarray(trainer.autoencoder.encode(next(stream)) > 0).mean(0) for _ in range(10)]
    ).mean(0)
    before = fires()
    assert (before > targets + 0.1).all()
    for _ in range(1000):
        trainer.step(next(stream))
        assert -1 <= float(trainer.state["bias_F"].min()) <= float(trainer.state["bias_F"].max()) <= 0
    # Within a step of the bias, and the error of 2,560 samples.
    after = fires()
    assert (after < targets + 0.05).all()
    assert (after > 0).all()


def test_biases_have_no_gradient():
    config = GBASAE(features=20, groups=2, activation="relu")
    trainer = Trainer(config, SAETrainConfig(), next(batches()))
    state = trainer.state | {"bias_F": jnp.full(20, -0.1)}
    total = lambda state, bias: jnp.sum(  # noqa: E731
        training_codes(config, trainer.params, state | {"bias_F": bias}, next(batches())).code_NF
    )
    np.testing.assert_array_equal(jax.grad(total, argnums=1)(state, state["bias_F"]), 0)
    # A jump ReLU's code is the projection itself, whatever the bias that lets it fire.
    jump = GBASAE(features=20, groups=2)
    codes = training_codes(jump, trainer.params, state, next(batches())).code_NF
    plain = training_codes(config, trainer.params, state, next(batches())).code_NF
    fired = np.asarray(plain) > 0
    np.testing.assert_allclose(np.asarray(codes)[fired], np.asarray(plain)[fired] + 0.1, atol=1e-5)
    with pytest.raises(Exception, match=r"sae.groups=21: must be from 1 to 20 features"):
        GBASAE(features=20, groups=21)


@pytest.mark.slow
def test_recovery_of_known_features():
    """Features that fire for 9 % of the samples are found by targets down from there, and by a small enough k.

    The set is that of arXiv 2506.14002: 128 features in 42 dimensions, 3 of them in half of the samples and 20 in the
    others. Coefficients are not published, and neither are the sizes of the dictionaries.
    """
    n, d = 128, 42
    dictionary = np.random.default_rng(0).normal(size=(n, d))
    dictionary /= np.linalg.norm(dictionary, axis=-1, keepdims=True)

    def samples(rows, spread):
        rng = np.random.default_rng(1)
        while True:
            sizes = np.where(np.arange(rows) % 2, 20, 3)
            ranks = rng.random((rows, n)).argsort(-1).argsort(-1)
            coefficients = rng.uniform(1 - spread, 1 + spread, (rows, n)) * (ranks < sizes[:, None])
            yield (coefficients @ dictionary).astype(np.float32)

    def recovered(config, steps, rows, spread):
        stream = samples(rows, spread)
        trainer = Trainer(config, SAETrainConfig(steps=steps, learning_rate=3e-3, batch_size=rows), next(stream))
        trainer.fit(stream)
        cosines = dictionary @ np.asarray(trainer.params["w_dec_FD"]).T
        return (cosines.max(-1) >= 0.9).mean()

    # Three thousand steps are few: the paper's full recovery by gba is not reached in them.
    covering = recovered(GBASAE(features=256, highest=0.1, lowest=1e-3, interval=8), 3000, 128, 0.5)
    above = recovered(GBASAE(features=256, highest=0.9, lowest=0.3, interval=8), 1000, 128, 0.5)
    assert covering > above + 0.5

    # Of a reconstruction that is fitted, dense dictionaries make less error than the true one in 42 dimensions.
    apart = {"features": 512, "tied": True, "output_scale": 0.01, "normalisation": "token"}
    twenty, fifty = (recovered(TopKSAE(k=k, **apart), 800, 256, 0.0) for k in (20, 50))
    assert twenty > 0.9
    assert fifty < 0.2
