"""Fine-tuning that leaves out blocks of tokens: settings, what is measured before the first step, and a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import train
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError, StorageError
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.elimination import Network, predicted_scores
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.lemo import AscentConfig, Fitted, LeMoConfig, PredictorConfig, read_fitted
from sparsezoo_jax.training.lemo_fitting import (
    Observed,
    ascended,
    capacities,
    fit_predictors,
    mean_importance,
    pruned_network,
    recalls,
)
from sparsezoo_jax.training.lora import LoRAConfig
from sparsezoo_jax.training.parameters import restore_params
from sparsezoo_jax.training.state import first_device
from tests.models.conftest import CONFIGS
from tests.test_commands import call
from tests.training.test_lora import flags
from tests.training.test_step import assert_equal
from tests.training.toy import config

SEQUENCES, BLOCKS, BLOCK, WIDTH, LAYERS = 12, 6, 4, 16, 2
SEGMENTS = np.ones((SEQUENCES, BLOCKS * BLOCK), np.int32)
SEGMENTS[0, 10:] = 0


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def observed_of(scores, ffn, means=None):
    means = drawn(LAYERS, 2, SEQUENCES, BLOCKS, WIDTH) if means is None else means
    return Observed(means, scores, ffn, SEGMENTS)


def test_capacities_are_shares_above_the_mean():
    scores, ffn = np.abs(drawn(LAYERS, SEQUENCES, BLOCKS, BLOCKS)), drawn(LAYERS, SEQUENCES, BLOCKS, seed=1)
    observed = observed_of(scores, ffn)
    valid = SEGMENTS.reshape(SEQUENCES, BLOCKS, BLOCK).any(-1)
    found = capacities(observed, BLOCK, mean_importance(observed, BLOCK))
    for name, importance in (("attention", scores.sum(2)), ("ffn", ffn)):
        expected = [np.mean(own[valid] > own[valid].mean()) for own in importance]
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_thresholds_climb_the_slope_of_accuracy():
    """t += rate (a(t + e) - a(t - e)) / 2e, in units of the mean; all from the same thresholds."""
    means = {"attention": np.array([2.0, 4.0]), "ffn": np.array([1.0])}

    def accuracy(thresholds):
        assert all(own.dtype == np.float32 for own in thresholds.values())
        return float(3 * thresholds["attention"][0] - thresholds["attention"][1] ** 2 / 16 + thresholds["ffn"][0])

    config = LeMoConfig(profile=True, ascent=AscentConfig(rounds=2, probe=0.5, rate=0.25))
    found = ascended(config, accuracy, means)
    # In units u of the means accuracy is 6 u_0 - u_1^2 + u_2.
    u = np.array([1.0, 1.0])
    for _ in range(2):
        u = u + 0.25 * np.array([6.0, -2 * u[1]])
    np.testing.assert_allclose(found["attention"], means["attention"] * u, rtol=1e-5)
    np.testing.assert_allclose(found["ffn"], [1.5], rtol=1e-5)
    still = ascended(dataclasses.replace(config, ascent=AscentConfig()), accuracy, means)
    assert_equal(still, means)


@pytest.fixture(scope="module")
def fitted():
    """Predictors of scores that networks of their form make, and what they were fitted to."""
    means = drawn(LAYERS, 2, SEQUENCES, BLOCKS, WIDTH)
    shapes = [(LAYERS, WIDTH, 3), (LAYERS, 3, WIDTH), (LAYERS, WIDTH, 3)]
    pair = {
        part: Network(*(jnp.asarray(np.abs(drawn(*shape, seed=seed + i)) / 3) for i, shape in enumerate(shapes)))
        for seed, part in ((2, "query"), (5, "key"))
    }
    scores = np.asarray(jax.vmap(predicted_scores)(pair, means[:, 0]))
    ffn = np.abs(means[:, 1] @ drawn(WIDTH, seed=9))
    observed = observed_of(scores, ffn, means)
    settings = LeMoConfig(
        capacity=(0.5,),
        block=BLOCK,
        scores="predicted",
        predictor=PredictorConfig(rank=12, epochs=1200, rate=1e-2, prune=0.5),
    )
    return settings, observed, fit_predictors(settings, observed, jax.random.key(0))


def test_predictors_find_the_important_blocks(fitted):
    settings, observed, predictors = fitted
    elimination = settings.elimination(BLOCKS * BLOCK)
    for name in ("attention", "ffn"):
        found = recalls(settings, predictors, observed, name, elimination)
        assert min(found) > 0.85
        flat = jax.tree.map(jnp.zeros_like, predictors)
        # Blocks that all count the same are taken in order, half of which are right by chance.
        assert max(recalls(settings, flat, observed, name, elimination)) < 0.75


def test_predictors_become_smaller_as_they_are_fitted(fitted):
    _, _, predictors = fitted
    for network in (predictors["attention"]["query"], predictors["attention"]["key"]):
        assert [x.shape for x in network] == [(LAYERS, WIDTH, 6), (LAYERS, 6, 8), (LAYERS, 8, 12)]
    assert [x.shape for x in predictors["ffn"]] == [(LAYERS, WIDTH, 6), (LAYERS, 6, 8), (LAYERS, 8, 1)]


def test_neurons_that_are_zero_most_often_go():
    shapes = [(LAYERS, WIDTH, 6), (LAYERS, 6, 4), (LAYERS, 4, 1)]
    network = Network(*(drawn(*shape, seed=i) for i, shape in enumerate(shapes)))
    means, valid = drawn(LAYERS, SEQUENCES, BLOCKS, WIDTH, seed=4), np.ones((SEQUENCES, BLOCKS), bool)
    valid[0, 2:] = False
    found = pruned_network(Network(*map(jnp.asarray, network)), jnp.asarray(means), jnp.asarray(valid), 3, 2)
    for layer in range(LAYERS):
        first = np.maximum(means[layer][valid] @ network.inner[layer], 0)
        second = np.maximum(first @ network.middle[layer], 0)
        rows, columns = (
            np.sort(np.argsort((x == 0).sum(0), kind="stable")[: x.shape[1] // 2]) for x in (first, second)
        )
        np.testing.assert_array_equal(found.inner[layer], network.inner[layer][:, rows])
        np.testing.assert_array_equal(found.middle[layer], network.middle[layer][rows][:, columns])
        np.testing.assert_array_equal(found.outer[layer], network.outer[layer][columns])


def test_what_was_measured_is_stored(fitted, tmp_path):
    _, _, predictors = fitted
    stored = Fitted({"attention": (0.5, 0.25), "ffn": (1.0, 0.125)}, predictors, {"attention": (0.5,), "ffn": (1.0,)})
    stored.save(tmp_path / "lemo.npz")
    found = read_fitted(tmp_path / "lemo.npz")
    assert (found.capacity, found.recall) == (stored.capacity, stored.recall)
    assert_equal(found.predictors, predictors)
    Fitted({"attention": (0.5,), "ffn": (1.0,)}).save(tmp_path / "lemo.npz")
    assert read_fitted(tmp_path / "lemo.npz").predictors is None
    (tmp_path / "lemo.npz").write_bytes(b"PK")
    with pytest.raises(StorageError, match=r"lemo.npz: can't be read .*; the run can't go on without it"):
        read_fitted(tmp_path / "lemo.npz")


def test_blocks_kept_of_a_sequence():
    settings = LeMoConfig(capacity=(0.5, 0.01), ffn_capacity=(0.3,), block=8)
    assert settings.elimination(80).kept == {"attention": (5, 1), "ffn": (3,)}
    assert LeMoConfig(capacity=(0.25,)).elimination(640).kept == {"attention": (3,), "ffn": (3,)}
    measured = Fitted({"attention": (0.41, 1.0), "ffn": (0.2, 0.0)})
    assert LeMoConfig(profile=True, block=8).elimination(80, measured).kept == {"attention": (5, 10), "ffn": (2, 1)}
    assert LeMoConfig().elimination(80) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": (0.0,)}, r"train.lemo.capacity=\(0.0,\): must be in \(0, 1\]"),
        ({"ffn_capacity": (0.5,)}, r"train.lemo.ffn_capacity=.*: works together with train.lemo.capacity or"),
        ({"scores": "predicted"}, r"train.lemo.scores=predicted: works together with train.lemo.capacity or"),
        ({"profile": True, "capacity": (0.5,)}, r"train.lemo.profile=True: can't be given with capacities"),
        ({"capacity": (0.5,), "ascent": AscentConfig(rounds=1)}, r"train.lemo.ascent.rounds=1: works together with"),
        ({"capacity": (0.5,), "block": 48}, r"train.lemo.block=48: must divide data.seq_len=256"),
        ({"capacity": (0.5,) * 3}, r"train.lemo.capacity=.*: must be one number, or one for each of the \d layers"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    run = preset("dense", "tiny")

    def changed():
        lemo = LeMoConfig(**changes)
        return dataclasses.replace(run, train=dataclasses.replace(run.train, lora=LoRAConfig(rank=2), lemo=lemo))

    with pytest.raises(ConfigError, match=message):
        changed()


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("dense", r"train.lemo.capacity=\(0.5,\): needs adapters to train, by train.lora.rank"),
        ("spark", r"can't score blocks with model.attention.kind=spark"),
        ("moe", r"can't score blocks with model.attention.kind=mla"),
        ("mohd", r"can't be used with model.residual.kind=mohd"),
    ],
)
def test_runs_that_it_can_not_be_done_in(arch, message):
    run: RunConfig = preset(arch, "tiny")
    lora = LoRAConfig(rank=None if arch == "dense" else 2)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(run, train=dataclasses.replace(run.train, lora=lora, lemo=LeMoConfig(capacity=(0.5,))))


MODEL = dataclasses.replace(CONFIGS["llama"], layers=2)
SHAPE = (2, 32)


def stepped(**changes):
    """Two steps of adapters of a small decoder: the state and the last metrics."""
    settings = config(lora=LoRAConfig(rank=2), **changes)
    prepared = prepare_step(settings, lambda rngs: Decoder(MODEL, rngs=rngs), SHAPE, first_device)
    state = jax.jit(prepared.initialise)(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1, 61, (SHAPE[0], SHAPE[1] + 1)), jnp.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": jnp.ones(SHAPE, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(SHAPE[1], dtype=jnp.int32), SHAPE),
        "mask": jnp.ones(SHAPE, bool),
    }
    for _ in range(2):
        state, metrics = prepared.step(state, batch)
    return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def plain():
    return stepped()


def test_nothing_left_out_is_plain_fine_tuning(plain):
    found = stepped(lemo=LeMoConfig(capacity=(1.0,), block=8))
    assert_equal(found[0], plain[0])
    assert_equal(found[1], plain[1])


def test_a_step_that_leaves_blocks_out(plain):
    (state, metrics), (_, whole) = stepped(lemo=LeMoConfig(capacity=(0.5,), block=8), accumulation=2), plain
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 0
    # Of 32 tokens 16 see each other.
    np.testing.assert_allclose(metrics["attended_keys"], [8.5, 8.5])
    np.testing.assert_allclose(whole["attended_keys"], [16.5, 16.5])
    assert metrics["loss"] != whole["loss"]
    assert all(np.any(x != 0) for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_a_run(small_corpus, tmp_path, monkeypatch, capsys):
    """Capacities measured, predictors fitted: once, for interrupted and resumed runs, too."""
    base = tmp_path / "base"
    assert call(train, flags(small_corpus, base, train__steps=2), monkeypatch) == 0
    lemo = {
        "train__init_from": base,
        "train__lora__rank": 4,
        "train__steps": 4,
        "train__checkpoint_every": 2,
        "train__lemo__block": 2,
        "train__lemo__scores": "predicted",
        "train__lemo__predictor__epochs": 8,
        "train__lemo__predictor__batches": 2,
        "train__lemo__ascent__rounds": 1,
    }
    run, straight = tmp_path / "run", tmp_path / "straight"
    args = [*flags(small_corpus, run, **lemo), "--train.lemo.profile"]
    capsys.readouterr()
    assert call(train, [*args, "--train.stop-at", "2"], monkeypatch) == 0
    err = capsys.readouterr().err
    assert "blocks of attention above the threshold, by layer: " in err
    assert "of the kept ones predictors find" in err
    measured = (run / "lemo.npz").read_bytes()
    assert call(train, args, monkeypatch) == 0
    assert "above the threshold" not in capsys.readouterr().err
    assert (run / "lemo.npz").read_bytes() == measured
    assert call(train, [*flags(small_corpus, straight, **lemo), "--train.lemo.profile"], monkeypatch) == 0
    assert_equal(*(restore_params(directory / "checkpoints")[0] for directory in (run, straight)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "split" not in row][-1] == 4
    capsys.readouterr()
    assert call(train, [*args, "--debug.replay", "3:4"], monkeypatch) == 0
    assert "step 4 " in (out := capsys.readouterr().out)
    assert out.count("  as logged") == 1  # the log has a row every ten steps and at the end

    (run / "lemo.npz").unlink()
    assert call(train, args, monkeypatch) == 1
    assert "lemo.npz: can't be read" in capsys.readouterr().err
