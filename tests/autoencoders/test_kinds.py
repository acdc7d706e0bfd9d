"""Gated and JumpReLU autoencoders and transcoders: every formula again in NumPy, and what one step does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.autoencoders import (
    GBASAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    SAETrainConfig,
    StandardSAE,
    TopKSAE,
    Trainer,
)
from sparsezoo_jax.autoencoders import training as loop
from sparsezoo_jax.autoencoders.jump import jump_relu, step
from sparsezoo_jax.errors import ConfigError

D, F, N = 6, 10, 32
TRAIN = SAETrainConfig(steps=50, batch_size=N, learning_rate=3e-3, warmup_steps=4)
TRANSCODER = dataclasses.replace(TRAIN, site="transcoder")


def rows(width=D, seed=0):
    return np.random.default_rng(seed).normal(size=(N, width)).astype(np.float32) + 0.3


def shaken(trainer, seed=1):
    """The trainer with parameters that no symmetry of the start hides mistakes in, and step 1 of 4 of the warm-up."""
    rng = np.random.default_rng(seed)
    moved = {name: x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for name, x in trainer.params.items()}
    if "threshold_F" in moved:
        moved["threshold_F"] = jnp.abs(moved["threshold_F"])
    trainer.params = {name: jnp.asarray(x) for name, x in moved.items()}
    trainer.state = trainer.state | {"step": jnp.int32(1)}
    return {name: np.asarray(x, np.float64) for name, x in trainer.params.items()}


def loss_of(trainer, x, y=None):
    """Loss, metrics and gradients of the loop's own loss for normalised inputs."""
    call = jax.value_and_grad(loop._loss, argnums=2, has_aux=True)
    y = None if y is None else jnp.asarray(y)
    (loss, (codes, metrics, _)), gradients = call(
        trainer.config, trainer.train, trainer.params, trainer.state, jnp.asarray(x), y
    )
    return float(loss), codes, metrics, gradients


# -------------------------------------------------------------------------------------------------- gated autoencoders


def test_gated_loss():
    config = GatedSAE(features=F, penalty=0.7, normalisation="none")
    x = rows()
    trainer = Trainer(config, TRAIN, x)
    p = shaken(trainer)
    gate = (x - p["b_dec_D"]) @ p["w_enc_DF"] + p["b_gate_F"]
    size = np.maximum((x - p["b_dec_D"]) @ (p["w_enc_DF"] * np.exp(p["r_mag_F"])) + p["b_mag_F"], 0)
    code = (gate > 0) * size
    opened = np.maximum(gate, 0)
    error = np.square(x - code @ p["w_dec_FD"] - p["b_dec_D"]).sum(-1).mean()
    gate_error = np.square(x - opened @ p["w_dec_FD"] - p["b_dec_D"]).sum(-1).mean()
    loss, codes, metrics, gradients = loss_of(trainer, x)
    np.testing.assert_allclose(codes.code_NF, code, atol=1e-5)
    assert loss == pytest.approx(error + 0.5 * 0.7 * opened.sum(-1).mean() + gate_error, rel=1e-5)
    assert float(metrics["l0"]) == pytest.approx((code > 0).sum(-1).mean(), rel=1e-6)
    np.testing.assert_allclose(trainer.autoencoder.encode(jnp.asarray(x)), code, atol=1e-5)
    # The gate learns from its penalty and its own reconstruction, whose decoder is frozen; the decoder from the codes.
    np.testing.assert_allclose(
        gradients["w_dec_FD"], code.T @ (code @ p["w_dec_FD"] + p["b_dec_D"] - x) * 2 / N, atol=1e-4
    )
    opening = (2 * (opened @ p["w_dec_FD"] + p["b_dec_D"] - x) @ p["w_dec_FD"].T + 0.5 * 0.7) * (gate > 0)
    np.testing.assert_allclose(gradients["b_gate_F"], opening.mean(0), atol=1e-4)


def test_gated_penalty_is_annealed():
    trainer = Trainer(GatedSAE(features=F, anneal_start=0, penalty=0.2, normalisation="none"), TRAIN, rows())
    p = shaken(trainer)
    trainer.state = trainer.state | {"p_index": jnp.int32(3), "step": jnp.int32(10)}
    x = rows(seed=5)
    opened = np.maximum((x - p["b_dec_D"]) @ p["w_enc_DF"] + p["b_gate_F"], 0)
    power = np.linspace(1, 0.2, 10)[3]
    alone = trainer.state | {"penalty": jnp.float32(0)}
    trainer_loss = loss_of(trainer, x)[0]
    trainer.state = alone
    expected = 0.2 * np.where(opened > 0, opened**power, 0).sum(-1).mean()
    assert trainer_loss - loss_of(trainer, x)[0] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ JumpReLU


def test_pseudo_derivatives_by_hand():
    z = jnp.array([[0.35, 0.5], [0.46, 0.61], [0.54, -0.5], [0.7, 0.39]])
    threshold, width = jnp.array([0.5, 0.5]), 0.2
    np.testing.assert_allclose(jump_relu(z, threshold, width), [[0, 0], [0, 0.61], [0.54, 0], [0.7, 0]])
    np.testing.assert_array_equal(step(z, threshold, width), [[0, 0], [0, 1], [1, 0], [1, 0]])
    weight = jnp.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]])
    by_z, by_threshold = jax.grad(lambda z, t: jnp.sum(weight * jump_relu(z, t, width)), argnums=(0, 1))(z, threshold)
    np.testing.assert_array_equal(by_z, weight * np.array([[0, 0], [0, 1], [1, 0], [1, 0]]))
    # Within 0.1 of the threshold are 0.46 and 0.54 of the first feature, of the second 0.5 itself alone.
    np.testing.assert_allclose(by_threshold, [-0.5 / 0.2 * (2 + 4), -0.5 / 0.2 * 10], rtol=1e-6)
    by_z, by_threshold = jax.grad(lambda z, t: jnp.sum(weight * step(z, t, width)), argnums=(0, 1))(z, threshold)
    np.testing.assert_array_equal(by_z, 0)
    np.testing.assert_allclose(by_threshold, [-(2 + 4) / 0.2, -10 / 0.2], rtol=1e-6)


def test_pseudo_derivatives_estimate_how_the_mean_moves():
    """Over many inputs they come to the true derivative of the expected values: -t p(t) and -p(t)."""
    z = jax.random.normal(jax.random.key(0), (200_000, 1))
    at = jnp.array([0.8])
    density = np.exp(-0.32) / np.sqrt(2 * np.pi)
    for function, expected in ((jump_relu, -0.8 * density), (step, -density)):
        found = jax.grad(lambda t, f=function: jnp.mean(f(z, t, 0.1)))(at)
        assert float(found[0]) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("target", [None, 2.0])
def test_jump_relu_loss(target):
    config = JumpReLUSAE(features=F, penalty=0.3, target_l0=target, bandwidth=0.2, normalisation="none")
    x = rows()
    trainer = Trainer(config, TRAIN, x)
    p = shaken(trainer)
    pre = (x - p["b_dec_D"]) @ p["w_enc_DF"] + p["b_enc_F"]
    code = np.where(pre > p["threshold_F"], pre, 0)
    error = code @ p["w_dec_FD"] + p["b_dec_D"] - x
    l0 = (pre > p["threshold_F"]).sum(-1).mean()
    counted = l0 if target is None else (l0 / target - 1) ** 2
    loss, codes, _, gradients = loss_of(trainer, x)
    np.testing.assert_allclose(codes.code_NF, code, atol=1e-5)
    assert loss == pytest.approx(np.square(error).sum(-1).mean() + 0.5 * 0.3 * counted, rel=1e-5)
    by_code = 2 * error @ p["w_dec_FD"].T
    near = np.abs(pre - p["threshold_F"]) < 0.1
    slope = 1 if target is None else 2 * (l0 / target - 1) / target
    expected = -(near * (p["threshold_F"] / 0.2 * by_code + 0.5 * 0.3 * slope / 0.2)).mean(0)
    np.testing.assert_allclose(gradients["threshold_F"], expected, atol=1e-4)
    np.testing.assert_allclose(gradients["b_enc_F"], (by_code * (code > 0)).mean(0), atol=1e-4)


def test_thresholds_stay_at_or_above_zero():
    config = JumpReLUSAE(features=F, threshold=0.001, penalty=0.0, bandwidth=0.4)
    trainer = Trainer(config, dataclasses.replace(TRAIN, learning_rate=0.05, warmup_steps=0), rows())
    for seed in range(3):
        trainer.step(rows(seed=seed))
    threshold = np.asarray(trainer.params["threshold_F"])
    assert threshold.min() == 0 < threshold.max()


# --------------------------------------------------------------------------------------------------------- transcoders


def test_transcoder_loss():
    x, y = rows(), rows(D, seed=7)
    train = dataclasses.replace(TRANSCODER, skip=True)
    trainer = Trainer(StandardSAE(features=F, penalty=0.3, normalisation="none"), train, np.concatenate([x, y], -1))
    np.testing.assert_array_equal(trainer.params["w_skip_DD"], 0)
    p = shaken(trainer)
    code = np.maximum(x @ p["w_enc_DF"] + p["b_enc_F"], 0)  # no centre is taken off
    error = np.square(y - code @ p["w_dec_FD"] - p["b_dec_D"] - x @ p["w_skip_DD"]).sum(-1).mean()
    loss, _, metrics, _ = loss_of(trainer, x, y)
    assert loss == pytest.approx(error + 0.5 * 0.3 * code.sum(-1).mean(), rel=1e-5)
    spread = np.square(y - y.mean(0)).sum(-1).mean()
    assert float(metrics["fvu"]) == pytest.approx(error / spread, rel=1e-5)


def test_a_transcoder_keeps_both_scales():
    x, y = 5 * rows(), 0.01 * rows(seed=7)
    trainer = Trainer(StandardSAE(features=F), TRANSCODER, np.concatenate([x, y], -1))
    p = shaken(trainer)
    a, b = np.sqrt(np.square(x).mean()), np.sqrt(np.square(y).mean())
    code = np.maximum(x / a @ p["w_enc_DF"] + p["b_enc_F"], 0)
    np.testing.assert_allclose(trainer.autoencoder.encode(jnp.asarray(x)), code, atol=1e-4)
    made = (code @ p["w_dec_FD"] + p["b_dec_D"]) * b
    np.testing.assert_allclose(trainer.autoencoder.reconstruct(jnp.asarray(x)), made, rtol=1e-3, atol=1e-6)


def test_a_transcoder_learns_a_linear_map_by_its_skip():
    matrix = np.random.default_rng(3).normal(size=(D, D)).astype(np.float32)

    def pairs():
        for seed in range(400):
            yield np.concatenate([x := rows(seed=seed), x @ matrix], -1)

    settings = dataclasses.replace(TRANSCODER, steps=300, learning_rate=0.01)
    fvu = {}
    for skip in (False, True):
        source = pairs()
        trainer = Trainer(TopKSAE(features=F, k=1), dataclasses.replace(settings, skip=skip), next(source))
        fvu[skip] = trainer.fit(source)["fvu"]
    assert fvu[True] < 0.05 < 0.2 < fvu[False]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GBASAE(features=F, groups=2), "sae.kind=gba: of a transcoder must have an encoder and a decoder of its own"),
        (TopKSAE(features=F, k=2, tied=True), "sae.kind=topk: of a transcoder must have"),
        (BatchTopKSAE(features=F, k=2, normalisation="token"), "sae.normalisation=token: must be mean or none"),
    ],
)
def test_what_no_transcoder_can_be(config, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(config, TRANSCODER, np.zeros((N, 2 * D)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAETrainConfig(skip=True), "train.skip=True: is for train.site=transcoder only"),
        (lambda: GatedSAE(penalty=-1), "sae.penalty=-1.0: must be at least 0"),
        (lambda: GatedSAE(anneal_end=0.0), "sae.anneal_end=0.0: must be above 0 and at most 1"),
        (lambda: JumpReLUSAE(bandwidth=0.0), "sae.bandwidth=0.0: must be above 0"),
        (lambda: JumpReLUSAE(threshold=-0.1), "sae.threshold=-0.1: must be at least 0"),
        (lambda: JumpReLUSAE(features=8, target_l0=9), "sae.target_l0=9.0: must be above 0 and at most 8 features"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
