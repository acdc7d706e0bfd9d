"""Training mixtures of experts: every router, its controller or bias, and both in checkpoints."""

import dataclasses
from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.routers import RouterName
from sparsezoo_jax.training.checkpoint import Checkpointer
from sparsezoo_jax.training.objectives import DensityTarget, FixedObjective
from sparsezoo_jax.training.optimizers import matrix_axes
from sparsezoo_jax.training.state import ModelTemplate, flatten

from .test_checkpoint import restore
from .test_step import assert_equal, setup

BALANCE = (FixedObjective(loss="balance", weight=1e-2),)
REGULARISER = (DensityTarget(loss="l1_balance", target=3 / 8),)


def model_config(router, **changes):
    """The tiny preset, smaller still; of one segment, but for Ling, whose biases are in the state of two."""
    model = preset("moe").model
    layers, pattern = (3, ("local", "global")) if router == "ling" else (2, ("global",))
    ffn = MoEFFNConfig(experts=8, expert_width=4, k=3, router=router, bias_rate=0.01, **changes)
    return dataclasses.replace(
        model,
        vocab_size=17,
        d_model=16,
        layers=layers,
        max_seq_len=32,
        layer_pattern=pattern,
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=8, window=8),
        ffn=ffn,
        scan_layers=True,
    )


def batch_of(rows=4, length=20, padding=5):
    tokens = jax.random.randint(jax.random.key(2), (rows, length + 1), 1, 17)
    mask = jnp.broadcast_to(jnp.arange(length) < length - padding, (rows, length))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": mask.astype(jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
        "mask": mask,
    }


@cache
def trained(router, accumulation=1):
    """The states before and after three steps, the metrics of these, and the compiled step."""
    objectives = REGULARISER if router == "remoe" else BALANCE
    config = model_config(router)
    _, state, step = setup(lambda rngs: Decoder(config, rngs=rngs), objectives=objectives, accumulation=accumulation)
    states, metrics = [state], []
    for _ in range(3):
        state, row = step(state, batch_of())
        states.append(state)
        metrics.append(row)
    return states, metrics, step


@pytest.fixture(
    scope="module",
    params=[name if name == "ling" else pytest.param(name, marks=pytest.mark.slow) for name in get_args(RouterName)],
)
def run(request):
    states, metrics, _ = trained(request.param)
    return request.param, states, metrics


def bias_of(state):
    return np.concatenate([np.ravel(x) for path, x in flatten(state.model_state).items() if path.endswith("bias_E")])


def noise_count(state):
    return {path: int(x) for path, x in flatten(state.model_state).items() if path.endswith("count")}


@pytest.mark.slow
def test_three_steps(run):
    router, states, metrics = run
    assert all(np.isfinite(row["loss"]) for row in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert int(states[-1].skipped) == 0
    routers = {path: x for path, x in flatten(states[-1].params).items() if path.endswith("router_DE")}
    before = flatten(states[0].params)
    assert all((np.abs(x - before[path]) > 0).any() for path, x in routers.items()), f"{router} learns no routing"


def test_state_that_is_no_parameter(run):
    router, states, metrics = run
    if router == "ling":
        rates = bias_of(states[1])
        assert rates.size == 3 * 8
        by_layer = rates.reshape(3, 8)
        np.testing.assert_allclose(by_layer.mean(axis=-1), 0, atol=1e-7)
        np.testing.assert_allclose(np.ptp(by_layer, axis=-1), 0.02, rtol=1e-5)
        assert (np.abs(bias_of(states[3])) <= 0.06 + 1e-6).all()
    elif router == "grin":
        assert list(noise_count(states[3]).values()) == [3]
    elif router == "remoe":
        # ReLU starts with half of the experts on, above 3 of 8.
        found = [float(state.objectives[0]["weight"]) for state in states]
        np.testing.assert_allclose(found, 1e-8 * 1.05 ** np.arange(4), rtol=1e-5)
        np.testing.assert_allclose(metrics[1]["coefficients/l1_balance"], 1.05e-8, rtol=1e-5)
    else:
        assert flatten(states[3].model_state) == {}


def test_checkpoints_hold_it(run, tmp_path):
    _, states, _ = run
    checkpointer = Checkpointer(tmp_path / "saved")
    checkpointer.save(states[3], {"n": 3}, step=3)
    checkpointer.close()
    assert_equal(restore(tmp_path / "saved", states[0])[0].state, states[3])


@pytest.mark.slow
def test_accumulated_loads_move_the_bias_like_one_batch():
    (_, once, *_), *_ = trained("ling")
    (_, split, *_), *_ = trained("ling", accumulation=2)
    np.testing.assert_array_equal(bias_of(once), bias_of(split))


@pytest.mark.slow
def test_a_skipped_step_leaves_the_bias():
    (state, *_), _, step = trained("ling")
    broken = dataclasses.replace(state, params=jax.tree.map(lambda x: np.full_like(x, np.nan), state.params))
    after, _ = step(broken, batch_of())
    assert int(after.skipped) == 1
    np.testing.assert_array_equal(bias_of(after), 0)


def test_muon_takes_the_experts_one_by_one():
    config = model_config("topk")
    parameters = ModelTemplate(lambda rngs: Decoder(config, rngs=rngs)).parameters
    maps = {path: matrix_axes(variable) for path, variable in parameters.items() if path.endswith(("_EDW", "_EWD"))}
    assert maps
    assert set(maps.values()) == {((-2,), (-1,))}


def test_density_target_by_hand():
    objective = DensityTarget(loss="l1_balance", target=10 / 48)
    # 10 / 48 is 20.8333 %, which the rule rounds to 20.83 %: exactly on budget counts as over it.
    above, on, below = ({"ffn_density": jnp.array([d, jnp.nan])} for d in (0.3, 10 / 48, 0.2))
    state = objective.init()
    assert objective.coefficient(state, 0) == jnp.float32(1e-8)
    once = objective.update(state, above, 0)
    np.testing.assert_allclose(once["weight"], 1.05e-8, rtol=1e-6)
    np.testing.assert_allclose(objective.update(once, on, 1)["weight"], 1.05e-8 * 1.05, rtol=1e-6)
    np.testing.assert_allclose(objective.update(once, below, 1)["weight"], 1e-8, rtol=1e-6)
    assert objective.update(state, below, 0)["weight"] == jnp.float32(1e-8)
