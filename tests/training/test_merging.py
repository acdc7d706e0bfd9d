import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.checkpoint import Checkpointer
from sparsezoo_jax.training.merging import decay_values, merge_params, merge_weights
from sparsezoo_jax.training.parameters import restore_params, saved_steps

from .test_loop import run
from .test_step import assert_equal, setup


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three checkpoints with known, random parameters."""
    directory = tmp_path_factory.mktemp("checkpoints")
    _, state, _ = setup()
    checkpointer, params = Checkpointer(directory, keep_last=3), []
    for step in (10, 20, 30):
        rng = np.random.default_rng(step)
        params.append(jax.tree.map(lambda x, rng=rng: jnp.float32(rng.normal(size=x.shape)), state.params))
        model_state = {"tokens_seen": jnp.int32(step)}
        checkpointer.save(
            type(state)(**{**vars(state), "params": params[-1], "model_state": model_state}), {}, step=step
        )
    checkpointer.close()
    return directory, params


def test_linear_decay_is_a_plain_mean():
    np.testing.assert_allclose(merge_weights(decay_values("linear", 5)), [0.2] * 5)


def test_weights_telescope_to_the_decay():
    decay = decay_values("1-sqrt", 4)
    np.testing.assert_allclose(decay, [1 - np.sqrt(i / 4) for i in (1, 2, 3)])
    weights = merge_weights(decay)
    assert sum(weights) == pytest.approx(1)
    # Update j lies in checkpoints j..k, so it survives with the sum of their weights, which is to be w_j.
    np.testing.assert_allclose([sum(weights[j:]) for j in (1, 2, 3)], decay)


@pytest.mark.parametrize("decay", [(0.5, 0.6), (1.1, 0.5), (0.5, -0.1), ()])
def test_a_decay_that_rises_or_leaves_the_unit_interval_is_refused(decay):
    with pytest.raises(ConfigError, match=r"merge\.decay"):
        merge_weights(decay)


def test_merges_the_last_checkpoints(checkpoints):
    directory, params = checkpoints
    merged, model_state = merge_params(directory, last=3, decay=(0.75, 0.25))
    expected = jax.tree.map(lambda a, b, c: 0.25 * a + 0.5 * b + 0.25 * c, *params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, expected)
    assert model_state["tokens_seen"] == 30


def test_merges_chosen_steps(checkpoints):
    directory, params = checkpoints
    merged, _ = merge_params(directory, steps=(10, 30), decay="linear")
    expected = jax.tree.map(lambda a, c: 0.5 * a + 0.5 * c, params[0], params[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, expected)


def test_decay_zero_is_the_first_checkpoint(checkpoints):
    directory, params = checkpoints
    merged, _ = merge_params(directory, last=3, decay=(0.0, 0.0))
    assert_equal(merged, params[0])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "merge.steps"),
        ({"steps": (10, 20), "last": 2}, "merge.steps"),
        ({"last": 4}, "merge.last"),
        ({"last": 1}, "merge.last"),
        ({"steps": (20, 10)}, "merge.steps"),
        ({"steps": (10,)}, "merge.steps"),
        ({"last": 3, "decay": (0.5,)}, "merge.decay"),
        ({"last": 3, "decay": "cosine"}, "merge.decay"),
    ],
)
def test_impossible_merges_name_the_field(checkpoints, arguments, field):
    with pytest.raises(ConfigError) as caught:
        merge_params(checkpoints[0], **arguments)
    assert caught.value.field == field


ENDS = {"steps": 7, "checkpoint_every": 2, "keep_last": 1}


def test_a_run_ends_as_the_average_of_its_last_checkpoints(tmp_path, capsys):
    whole = run(tmp_path / "whole", merge_last=3, **ENDS)
    assert "the run ends as the average of steps 4, 6, 7" in capsys.readouterr().err
    assert saved_steps(tmp_path / "whole" / "checkpoints") == [4, 6, 7]
    at = np.sqrt(np.arange(4) / 3)  # by the steps' own checkpoints: c_j = sqrt((j + 1) / 3) - sqrt(j / 3)
    saved = [restore_params(tmp_path / "whole" / "checkpoints", step) for step in (4, 6, 7)]
    expected = jax.tree.map(lambda *x: sum(np.diff(at)[j] * x[j] for j in range(3)), *[params for params, _ in saved])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), whole.state.params, expected)
    assert_equal(whole.state.model_state, saved[-1][1])
    assert_equal(run(tmp_path / "whole", merge_last=3, **ENDS).state.params, whole.state.params)

    stopped = run(tmp_path / "halves", merge_last=3, stop_at=5, **ENDS)
    assert saved_steps(tmp_path / "halves" / "checkpoints") == [4, 5]
    assert_equal(stopped.state.params, restore_params(tmp_path / "halves" / "checkpoints", 5)[0])
    assert_equal(run(tmp_path / "halves", merge_last=3, **ENDS).state.params, whole.state.params)
    assert saved_steps(tmp_path / "halves" / "checkpoints") == [4, 6, 7]


def test_a_run_whose_checkpoints_are_gone_is_not_gone_on_with(tmp_path):
    run(tmp_path, stop_at=6, **ENDS)
    with pytest.raises(ConfigError, match=r"train\.merge_last=3: averages checkpoints that .* no longer has: 4"):
        run(tmp_path, merge_last=3, **ENDS)
    assert run(tmp_path, merge_last=2, **ENDS).finished
