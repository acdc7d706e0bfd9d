import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.models.mtp import Ahead, same_document
from sparsezoo_jax.training.config import ParameterGroup
from sparsezoo_jax.training.objectives import AdaptiveFactor, FixedObjective
from sparsezoo_jax.training.optimizer import build_optimizer
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.state import ModelTemplate, flatten, initial_state, nested, state_shardings
from sparsezoo_jax.training.step import build_train_step

from .toy import BATCH, LAYERS, ToyData, ToyModel, config


def setup(build=ToyModel, **changes):
    train_config = config(**changes)
    template = ModelTemplate(build)
    optimizer = build_optimizer(train_config, template.parameters)
    initialise = partial(initial_state, template, build, optimizer, train_config.objectives)
    state = jax.jit(initialise)(jax.random.key(0))
    return template, state, jax.jit(build_train_step(train_config, template, optimizer))


def batch_number(n=0):
    data = ToyData()
    data.set_state({"n": n})
    return {name: jnp.asarray(x) for name, x in next(data).items()}


def assert_equal(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_split_and_merge_keep_values_names_and_random_streams():
    class Noisy(ToyModel):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    template = ModelTemplate(Noisy)
    model = Noisy(nnx.Rngs(3))
    params, model_state = template.split(model)
    assert set(flatten(params)) == {"embedding", "layers/0/norm", "up", "router", "down"} == set(template.parameters)
    assert "tokens_seen" in model_state
    assert all(not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(model_state))
    assert template.parameters["up"].full_axes == ("layers", "embed", "ffn")
    x = jnp.ones(64)
    merged = template.merge(params, model_state)
    np.testing.assert_array_equal(model.dropout(x), merged.dropout(x))
    np.testing.assert_array_equal(model.dropout(x), merged.dropout(x))


@pytest.mark.slow
def test_first_loss_is_the_models_and_metrics_are_complete():
    template, state, step = setup(z_loss=1e-3, objectives=(FixedObjective(loss="activation", weight=0.5),))
    batch = batch_number()
    out = template.merge(state.params, state.model_state)(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
    )
    log_probs = jax.nn.log_softmax(out.logits)
    expected = -jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0][batch["mask"]].mean()
    new_state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["losses/activation"], out.losses["activation"], rtol=1e-6)
    np.testing.assert_allclose(metrics["ffn_density"], out.stats["ffn_density"], rtol=1e-6)
    assert metrics["coefficients/activation"] == 0.5
    assert metrics["tokens"] == batch["mask"].sum()
    assert metrics["ffn_density"].shape == (LAYERS,)
    assert {"z_loss", "lr", "grad_norm", "param_norm", "skipped"} <= set(metrics)
    assert new_state.step == 1
    assert new_state.model_state["tokens_seen"] == batch["mask"].sum()


class PredictingModel(ToyModel):
    """Predicts two further tokens, by its logits times 2 and 3."""

    mtp = (None, None)

    def __init__(self, rngs):
        super().__init__(rngs)
        self.deterministic = True

    def __call__(self, tokens_BT, *, segment_ids, positions, logits=True):
        out = super().__call__(tokens_BT, segment_ids=segment_ids, positions=positions)
        ahead = tuple(Ahead((1 + depth) * out.logits, same_document(segment_ids, depth)) for depth in (1, 2))
        return PredictingOutput(*out, out.logits, None, ahead)

    def logits_of(self, hidden_BTV, tables):
        return hidden_BTV


class PredictingOutput(NamedTuple):
    logits: jax.Array
    losses: dict
    stats: dict
    hidden: jax.Array
    tables: None
    ahead: tuple


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "count", "loss"), [(ToyModel, 2, "activation"), (PredictingModel, 4, "mtp")], ids=["2", "4 ahead"]
)
def test_accumulation_equals_one_large_batch(build, count, loss):
    # Adam's first update hides the scale of the gradient; eps = 1 and no clipping show it.
    changes = {
        "z_loss": 1e-2,
        "grad_clip": None,
        "objectives": (FixedObjective(loss=loss, weight=0.3),),
        "optimizer": AdamW(eps=1.0),
    }
    _, state, one = setup(build, **changes)
    _, _, many = setup(build, accumulation=count, **changes)
    batch = batch_number()
    # Some tokens have no target: losses of layers are means over all tokens, the cross-entropy is over targets.
    batch["mask"] = batch["mask"].at[0, 0].set(False)
    for name in ("mask", "segment_ids"):
        counts = batch[name].reshape(BATCH // count, count, -1).sum((0, 2))
        assert len(set(counts.tolist())) > 1, "micro-batches of equal size could not tell tokens from micro-batches"
    state_one, metrics_one = one(state, batch)
    state_many, metrics_many = many(state, batch)
    for name in metrics_one:
        np.testing.assert_allclose(metrics_many[name], metrics_one[name], rtol=2e-5, err_msg=name)
    a, b = flatten(state_one), flatten(state_many)
    for path in a:
        np.testing.assert_allclose(b[path], a[path], rtol=2e-4, atol=1e-7, err_msg=path)


class Observed(nnx.Variable):
    """Moved by `after_step`."""


class ObservingModel(ToyModel):
    """Reports its tokens' mean, and keeps the last one."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.seen = Observed(jnp.zeros(()))

    def __call__(self, tokens_BT, *, segment_ids, positions):
        out = super().__call__(tokens_BT, segment_ids=segment_ids, positions=positions)
        real = segment_ids > 0
        mean = jnp.sum(tokens_BT * real) / jnp.maximum(jnp.sum(real), 1)
        return ObservingOutput(*out, {"mean": mean})

    def after_step(self, observed, key):
        self.seen[...] = observed["mean"]


class ObservingOutput(NamedTuple):
    logits: jax.Array
    losses: dict
    stats: dict
    observed: dict


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_observed_is_a_mean_over_all_real_tokens(count):
    batch = batch_number()
    real = batch["segment_ids"] > 0
    assert len(set(real.sum(axis=1).tolist())) > 1, "equal micro-batches could not tell tokens from batches"
    batch["mask"] = batch["mask"].at[0, 0].set(False)
    _, state, step = setup(ObservingModel, accumulation=count)
    after, _ = step(state, batch)
    np.testing.assert_allclose(after.model_state["seen"], batch["tokens"][real].mean(), rtol=1e-6)


class Revived(ToyModel):
    """Draws part of a parameter anew after each step, and counts."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.seen = Observed(jnp.zeros(()))

    def __call__(self, tokens_BT, *, segment_ids, positions):
        out = super().__call__(tokens_BT, segment_ids=segment_ids, positions=positions)
        return ObservingOutput(*out, {"one": jnp.ones(())})

    def after_step(self, observed, key):
        self.seen[...] += observed["one"]
        self.router[...] = self.router[...] + jax.random.normal(key, self.router[...].shape)


def test_what_is_drawn_after_a_step_depends_on_its_number_alone():
    """It comes on top of the optimizer's update, from the same key in every run of one seed."""
    frozen = {"groups": (ParameterGroup(pattern="router", lr_multiplier=0.0),)}
    _, state, step = setup(Revived, **frozen)
    first, _ = step(state, batch_number(0))
    second, _ = step(first, batch_number(1))
    drawn = [np.asarray(b.params["router"] - a.params["router"]) for a, b in ((state, first), (first, second))]
    assert all(0.8 < x.std() < 1.2 for x in drawn)
    assert not np.allclose(*drawn)
    again, _ = step(first, batch_number(5))
    np.testing.assert_array_equal(again.params["router"], second.params["router"])
    assert second.model_state["seen"] == 2
    # A skipped step draws nothing.
    skipped, _ = step(first, batch_number(1), jnp.float32(0))
    assert_equal(skipped.params, first.params)
    _, _, other = setup(Revived, seed=1, **frozen)
    assert not np.allclose(other(first, batch_number(1))[0].params["router"], second.params["router"])


def test_loss_falls():
    _, state, step = setup(steps=60)
    losses = []
    for n in range(60):
        state, metrics = step(state, batch_number(n % 4))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3


def test_an_objective_pushes_its_loss_down():
    def after(weight):
        _, state, step = setup(objectives=(FixedObjective(loss="activation", weight=weight),))
        for n in range(30):
            state, metrics = step(state, batch_number(n))
        return float(metrics["losses/activation"])

    assert after(5.0) < 0.5 * after(0.0)


def test_a_non_finite_step_changes_nothing_but_counters():
    objectives = (AdaptiveFactor(loss="activation", weight=0.1, start=2, interval=1),)
    _, state, step = setup(objectives=objectives)
    state, _ = step(state, batch_number(0))
    poisoned = jax.tree.map(lambda x: x, state)
    poisoned.params["layers"]["0"]["norm"] = poisoned.params["layers"]["0"]["norm"].at[0, 0].set(jnp.nan)
    after, metrics = step(poisoned, batch_number(1))
    assert not np.isfinite(metrics["loss"])
    for field in ("params", "model_state", "opt_state", "objectives"):
        assert_equal(getattr(after, field), getattr(poisoned, field))
    assert (after.step, after.skipped, after.consecutive_skipped) == (2, 1, 1)
    after, _ = step(after, batch_number(1))
    assert (after.step, after.skipped, after.consecutive_skipped) == (3, 2, 2)
    healed, _ = step(type(after)(**{**vars(after), "params": state.params}), batch_number(1))
    assert (healed.skipped, healed.consecutive_skipped) == (2, 0)
    # Adam's counter did not move in the skipped steps.
    assert flatten(healed.opt_state)["0/count"] == 2


def test_a_batch_without_targets_is_harmless():
    _, state, step = setup(optimizer=AdamW(weight_decay=0.0))
    batch = batch_number()
    after, metrics = step(state, {**batch, "mask": jnp.zeros_like(batch["mask"])})
    assert metrics["tokens"] == 0
    assert metrics["loss"] == 0
    assert_equal(after.params, state.params)


def test_the_step_uses_clip_and_groups():
    groups = (ParameterGroup(pattern="router", lr_multiplier=0.0),)
    _, state, step = setup(groups=groups, grad_clip=1e-3, optimizer=AdamW(eps=1.0, weight_decay=0.0))
    after, metrics = step(state, batch_number())
    np.testing.assert_array_equal(after.params["router"], state.params["router"])
    assert not np.array_equal(after.params["up"], state.params["up"])
    assert metrics["grad_norm"] > 1e-3
    # With eps = 1 the update is nearly proportional to the clipped gradient.
    assert np.abs(np.asarray(after.params["up"] - state.params["up"])).max() < 1e-2 * 1e-3


def test_optimizer_moments_are_placed_like_their_parameters():
    template, state, _ = setup()

    class Axes:
        def __init__(self, axes, shape):
            self.axes = axes

    placed = state_shardings(template, state, Axes)
    moments = placed.opt_state[0].mu
    assert moments["up"].axes == placed.params["up"].axes == ("layers", "embed", "ffn")
    assert moments["layers"]["0"]["norm"].axes == ("layers", "embed")
    assert placed.step.axes == placed.opt_state[0].count.axes == ()


def test_zeros_of_matrices_stay_where_they_are_to_be_kept():
    """Vectors and embeddings move all the same; without the flag all weights do."""
    for keep in (True, False):
        _, state, step = setup(keep_zeros=keep)
        flat = flatten(state.params)
        zeros = {path: np.arange(x.size).reshape(x.shape) % 3 == 0 for path, x in flat.items()}
        params = nested({path: jnp.where(zeros[path], 0, x) for path, x in flat.items()})
        after = flatten(step(dataclasses.replace(state, params=params), batch_number())[0].params)
        for path in ("up", "down"):
            assert np.all((after[path] == 0) == zeros[path]) == keep, path
        for path in ("embedding", "layers/0/norm"):
            assert np.any(after[path][zeros[path]] != 0), path
