"""DEFT's loss of density: its gradient, its way from an objective into the layers, and its annealing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation.cross_entropy import call_model
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig, smooth_density
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.objectives import Deft
from sparsezoo_jax.training.state import first_device
from tests.models.conftest import CONFIGS
from tests.training.toy import config


def context(valid, eps):
    """A call on one row of tokens; those that are not `valid` are padding."""
    valid = jnp.asarray([valid], jnp.int32)
    return CallContext(jnp.zeros_like(valid), valid, density_eps=eps)


def test_value_and_gradient_in_closed_form():
    eps = 1e-6
    a = np.concatenate([[0.0], np.geomspace(1e-9, 30, 41), -np.geomspace(1e-4, 1, 6)])
    x = jnp.asarray(np.stack([a, a[::-1], np.ones_like(a)])[None], jnp.float32)

    def loss(x, dtype=jnp.float32):
        return smooth_density(x.astype(dtype), context([1, 2, 0], jnp.float32(eps)))["smooth_density"]

    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    exact = np.asarray(x, np.float64)[0, :2]
    np.testing.assert_allclose(value, np.mean(exact**2 / (exact**2 + eps)), rtol=1e-6)
    expected = 2 * exact * eps / (exact**2 + eps) ** 2 / exact.size
    # Relative, also where a^2 is 1e9 times eps.
    np.testing.assert_allclose(gradient[0, :2], expected, rtol=1e-5)
    np.testing.assert_array_equal(gradient[0, 2], 0)
    # The sums are float32 whatever the activations are: 1 - 1e-3 is no number of bfloat16.
    ones = jnp.ones((1, 3, 4), jnp.bfloat16)
    found = smooth_density(ones, context([1, 1, 1], jnp.float32(1e-3)))["smooth_density"]
    np.testing.assert_allclose(found, 1 / 1.001, rtol=1e-6)


def test_the_steepest_place():
    """0.65 / sqrt(eps) at sqrt(eps / 3): 2054 at 1.8e-4 for the published 1e-7."""

    def slope(a):
        return jax.grad(lambda a: smooth_density(a[None, None, None], context([1], 1e-7))["smooth_density"])(a)

    a = jnp.linspace(1e-5, 1e-3, 991)
    slopes = jax.vmap(slope)(a)
    assert a[jnp.argmax(slopes)] == pytest.approx((1e-7 / 3) ** 0.5, rel=6e-3)
    assert jnp.max(slopes) == pytest.approx(2054, rel=1e-3)


def test_eps_falls_geometrically():
    objective = Deft(weight=0.5, eps=1e-2, final_eps=1e-6, anneal_start=10, anneal_end=30)
    values = [float(objective.arguments(jnp.int32(step))["density_eps"]) for step in (0, 10, 20, 25, 30, 99)]
    np.testing.assert_allclose(values, [1e-2, 1e-2, 1e-4, 1e-5, 1e-6, 1e-6], rtol=1e-5)
    assert objective.coefficient({}, jnp.int32(7)) == 0.5


@pytest.mark.parametrize(
    ("ffn", "scan", "remat"),
    [
        (PlainFFNConfig(d_ff=32, activation="relu"), True, "full"),
        pytest.param(GatedFFNConfig(d_ff=32, activation="silu"), False, "none", marks=pytest.mark.slow),
    ],
)
def test_eps_of_each_step_reaches_the_layers(ffn, scan, remat):
    model_config = dataclasses.replace(CONFIGS["llama"], ffn=ffn, scan_layers=scan, remat=remat, max_seq_len=16)
    objective = Deft(weight=0.25, eps=1.0, final_eps=1e-4, anneal_end=4)
    settings = config(objectives=(objective,), accumulation=2)
    prepared = prepare_step(settings, lambda rngs: Decoder(model_config, rngs=rngs), (4, 16), first_device)
    state = prepared.first_state(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (4, 17)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        # As many real tokens in each micro-batch, rows 0 and 2 in one and 1 and 3 in the other.
        "segment_ids": (np.arange(16) < [[16], [12], [8], [12]]).astype(np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16)),
        "mask": np.arange(16) < [[16], [12], [8], [12]],
    }
    model = prepared.model(state)
    gates = nnx.jit(lambda model, batch: call_model(model, batch, record=("ffn_gate",)).records["ffn_gate"])(
        model, batch
    )
    real = batch["segment_ids"] > 0
    squares = np.square(np.asarray(jnp.stack(gates), np.float64)[:, real])
    for step, eps in ((0, 1.0), (2, 1e-2), (9, 1e-4)):
        at_step = jax.tree.map(jnp.copy, dataclasses.replace(state, step=jnp.int32(step)))
        _, metrics = prepared.train_step(at_step, batch)
        assert metrics["density_eps"] == pytest.approx(eps, rel=1e-5)
        assert metrics["losses/smooth_density"] == pytest.approx(np.mean(squares / (squares + eps)), rel=1e-5)
        assert metrics["coefficients/smooth_density"] == 0.25
    assert "smooth_density" not in jax.eval_shape(call_model, model, batch).losses


def test_a_model_without_such_units_is_refused():
    settings = config(objectives=(Deft(anneal_end=4),))
    with pytest.raises(ConfigError, match=r"loss=smooth_density: the model's auxiliary losses are: none"):
        prepare_step(settings, lambda rngs: Decoder(CONFIGS["spark"], rngs=rngs), (4, 16), first_device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anneal_end": 0}, "anneal_end=0: must be above anneal_start"),
        ({"anneal_start": -1}, "anneal_start=-1: must be at least 0"),
        ({"weight": -0.1}, "weight=-0.1: must be at least 0"),
        ({"eps": 1e-7}, "eps=1e-07: must be at least final_eps"),
        ({"final_eps": 0.0}, "final_eps=0.0: must be at least 1e-12"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ConfigError, match=f"train.objectives.{message}"):
        Deft(**{"anneal_end": 10, **changes})
