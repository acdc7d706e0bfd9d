"""What steers DECO's router entropy, and its learning rate: the rules of the released training code."""

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import cli
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.objectives import DensityTarget, check_objectives
from sparsezoo_jax.training.schedules import build_schedule
from sparsezoo_jax.training.writers import ProgressWriter

(CONTROL,) = preset("deco", "0_1b").train.objectives


def weights_after(percents, start):
    """The weight after each of the steps in which this share of the routed experts was active."""

    def step(state, percent):
        # The dense layer has no such share.
        density = jnp.stack([jnp.full_like(percent, jnp.nan), percent / 100])
        state = CONTROL.update(state, {"routed_density": density}, 0)
        return state, state["weight"]

    return jax.jit(lambda *a: jax.lax.scan(step, *a)[1])({"weight": start}, percents)


# The released controller, in float64: 25 % active for 8,000 steps, then 15 %, then exactly what is aimed at.
TRACE = {
    1: 1.002e-8,
    2: 1.004004e-8,
    100: 1.22115883e-8,
    1000: 7.37431239e-8,
    8000: 0.0874525042,
    8001: 0.0872779483,
    9000: 0.0118590723,
    12000: 2.95723696e-5,
    12001: 2.95133429e-5,
}
PERCENTS = np.repeat([25.0, 15.0, 20.0], [8000, 4000, 1])


def test_the_controllers_trace():
    assert CONTROL.coefficient(CONTROL.init(), 0) == jnp.float32(1e-8)
    steps = np.array(list(TRACE)) - 1
    with jax.enable_x64(True):
        found = weights_after(jnp.asarray(PERCENTS), jnp.float64(1e-8))
        np.testing.assert_allclose(found[steps], list(TRACE.values()), rtol=1e-6)
    # Training has float32, in which the factor is 3e-8 off: 2e-4 after 8,000 steps.
    found = weights_after(jnp.float32(PERCENTS), CONTROL.init()["weight"])
    np.testing.assert_allclose(found[steps], list(TRACE.values()), rtol=1e-3)


def test_rounding_and_the_floor():
    start = jnp.float32(1e-6)
    up, same, down = (
        weights_after(jnp.float32([20.006]), start),
        *(weights_after(jnp.float32([p]), start) for p in (20.004, 19.99)),
    )
    assert up[0] == start * jnp.float32(1.002), "20.01 is above"
    assert same[0] == down[0] == start / jnp.float32(1.002), "20.00 is not"
    assert weights_after(jnp.float32([15.0]), jnp.float32(1e-8))[0] == jnp.float32(1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 0.0}, "train.objectives.target=0.0: must be above 0 and below 1"),
        ({"target": 20.0}, "train.objectives.target=20.0: must be above 0 and below 1"),
        (
            {"floor": 0.5},
            "train.objectives.floor=0.5: must be above 0 and at most the weight at the start (0.1), or None",
        ),
        ({"factor": 1.0}, "train.objectives.factor=1.0: must be above 1"),
        ({"decimals": -1}, "train.objectives.decimals=-1: must be from 0 to 4, or None"),
    ],
)
def test_impossible_controllers(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DensityTarget(**{"loss": "router_entropy", "target": 0.2, "weight": 0.1, **change})


def test_a_statistic_that_no_layer_has():
    with pytest.raises(ConfigError, match="statistic=routed_density: the model's statistics are: ffn_density"):
        check_objectives((CONTROL,), ["router_entropy"], ["ffn_density"])


def test_learning_rate():
    train = preset("deco", "0_1b").train
    rate = build_schedule(train.schedule, train.steps)
    np.testing.assert_allclose([rate(t) for t in (0, 50, 100, 14_000)], np.array([0, 0.5, 1, 1]) * 1.1175e-3, rtol=1e-6)
    np.testing.assert_allclose(rate(14_500), 0.41421356 * 1.1175e-3, rtol=1e-5)
    assert rate(15_000) == 0


def test_a_dense_layer_has_no_share_of_experts(capsys):
    figures = {"ffn_density": [1.0, 0.2, 0.3], "attended_keys": [9.0] * 3, "routed_density": [float("nan"), 0.2, 0.3]}
    cli.print_layers(figures)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["0", "100.00%", "9.0", "-"] in rows
    assert ["mean", "50.00%", "9.0", "25.00%"] in rows
    assert json.loads(json.dumps(cli.without_nan(figures), allow_nan=False))["routed_density"] == [None, 0.2, 0.3]
    stream = io.StringIO()
    ProgressWriter(10, stream=stream).write(5, {name: np.array(values) for name, values in figures.items()})
    assert "active experts 25.0%" in stream.getvalue()
    assert "FFN" not in stream.getvalue()
