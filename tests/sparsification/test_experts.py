"""Weights of experts go by what each expert reads of the tokens that it gets."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sparsezoo_jax import sparsify
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.matrices import layer_matrices
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES, SUBLAYER_INPUT
from sparsezoo_jax.sparsification import layers, pruning
from sparsezoo_jax.sparsification.config import PruningConfig
from sparsezoo_jax.sparsification.conversion import maps_taken
from sparsezoo_jax.sparsification.progress import Progress, Stage
from tests.models.conftest import CONFIGS, build
from tests.sparsification.test_pruning import called
from tests.sparsification.test_resuming import KilledError, Sequences, assert_same, dying

FORM = MoEFFNConfig(experts=5, expert_width=8, k=3, router="deepseek", shared_experts=1, gated=True, router_std=1.0)
MAPS = ("gate", "up", "down", "shared_gate", "shared_up", "shared_down")


@pytest.fixture(scope="module")
def model():
    config = CONFIGS["moe"]
    return build(dataclasses.replace(config, layers=2, first_layers=0, first_ffn=None, ffn=FORM))


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(0).integers(1, 61, (2, 3, 20)).astype(np.int32)
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), (3, 20))
    segments = np.ones((3, 20), np.int32)
    segments[2, 12:] = 0
    return Sequences({"tokens": rows, "segment_ids": segments, "positions": positions} for rows in tokens)


@pytest.fixture(scope="module")
def read(model, text):
    """Of the first layer: its matrices, and what each expert reads of its tokens, by map."""
    call = called(model, record=(SUBLAYER_INPUT, EXPERT_SCORES))
    records = [call(batch).records for batch in text]
    real = np.concatenate([batch["segment_ids"] > 0 for batch in text])
    x = np.concatenate([np.asarray(one[SUBLAYER_INPUT][0][1], np.float64) for one in records])[real]
    taken = np.concatenate([np.asarray(one[EXPERT_SCORES][0]) != 0 for one in records])[real][:, FORM.shared :]
    maps = {matrix.name: np.asarray(matrix.param[0], np.float64) for matrix in layer_matrices(model)}
    inputs = {}
    for e in range(FORM.routed):
        own = x[taken[:, e]]
        gates = own @ maps["gate"][e]
        hidden = gates / (1 + np.exp(-gates)) * (own @ maps["up"][e])
        inputs |= {("gate", e): own, ("up", e): own, ("down", e): hidden}
    return maps, inputs, taken.sum(axis=0)


def score(path, place, weight, norms):
    return pruning.weight_scores(weight, norms)


def test_each_expert_by_the_tokens_that_it_gets(monkeypatch, model, text, read):
    """Wanda in NumPy for every expert of the first layer; one with too few tokens goes by magnitudes, and is named."""
    maps, inputs, tokens = read
    monkeypatch.setattr(layers, "FEWEST", int(tokens.min()) + 1)
    pruned = pruning.prune(model, MAPS, 0.5, score, "row", None, text)
    assert all(shares == [0.5, 0.5] for shares in pruned.zeros.values())
    assert pruned.zeros.keys() == set(MAPS)
    few = {e for layer, e in pruned.few["up"] if layer == 0}
    assert few == set(np.flatnonzero(tokens <= tokens.min()))
    assert len(few) < FORM.routed
    after = {matrix.name: np.asarray(matrix.param[0]) for matrix in layer_matrices(pruned.model)}
    for (name, e), x in inputs.items():
        norms = np.ones(x.shape[1]) if e in few else np.sqrt(np.sum(np.square(x), axis=0) / 6)
        weight = maps[name][e].astype(np.float32)
        kept = pruning.kept_weights(np.abs(weight) * norms[:, None].astype(np.float32), 0.5, "row")
        # Two scores that are equal to rounding may change places.
        assert np.mean((after[name][e] != 0) != kept) < 0.01, (name, e)
        np.testing.assert_array_equal(after[name][e][after[name][e] != 0], weight[after[name][e] != 0])


def test_with_a_share_of_0_nothing_changes(model, text):
    assert_same(pruning.prune(model, MAPS, 0.0, score, "row", None, text).model, model)


def test_gradients_are_those_of_the_expert(monkeypatch, model, text):
    """GBLM with norms that hardly count leaves the weights of the largest |W| G, of each layer and expert by itself."""
    draw = np.random.default_rng(3)

    def drawn(model, batches, paths, norm, progress):
        shape = model.segments[0].blocks[0].ffn.up_EDW[...].shape
        return {path: draw.random(shape).astype(np.float32) for path in paths}

    found = {}
    monkeypatch.setattr(pruning, "gradient_norms", lambda *args: found.setdefault("norms", drawn(*args)))
    command = sparsify.Sparsify(
        directory=Path("run"),
        out=Path("out"),
        method="gblm",
        maps=("up",),
        sparsity=0.5,
        pruning=PruningConfig(gradient_weight=1e9),
    )
    made = sparsify.planned(command).make(model, text)
    (path,) = found["norms"]
    before, after = (np.asarray(one.segments[0].blocks[0].ffn.up_EDW[...]) for one in (model, made.model))
    for layer in range(2):
        for e in range(FORM.routed):
            kept = pruning.kept_weights(np.abs(before[layer, e]) * found["norms"][path][layer, e], 0.5, "row")
            np.testing.assert_array_equal(after[layer, e] != 0, kept)


@pytest.mark.parametrize("method", ["teal", "wina", "wanda"])
def test_what_is_cut_off_goes_on_with_the_layer_where_it_was(monkeypatch, tmp_path, model, text, method):
    """What experts have read is kept with the layer's: the same is made, bit for bit."""
    plan = sparsify.planned(sparsify.Sparsify(directory=Path("run"), out=Path("out"), method=method))
    expected = plan.make(model, text)
    with monkeypatch.context() as patch:
        dying(patch, Stage, "keep", 2)
        with pytest.raises(KilledError):
            plan.make(model, text, Progress(tmp_path))
    with monkeypatch.context() as patch:
        calls = dying(patch, Stage, "keep", None)
        made = plan.make(model, text, Progress(tmp_path))
    assert len(calls) == 1
    assert made.record == expected.record
    assert_same(made.model, expected.model)
    if method != "wanda":
        for name, map in expected.calibration.maps.items():
            np.testing.assert_array_equal(made.calibration.maps[name].counts, map.counts)
            np.testing.assert_array_equal(made.calibration.maps[name].squares, map.squares)


def test_what_can_not_be_treated_is_named(model):
    assert maps_taken(model.config, pruning.PRUNED_MAPS, weights=True)["ffn"] == MAPS
    with pytest.raises(ConfigError, match=r"model.ffn.kind=delta: has no maps"):
        maps_taken(CONFIGS["delta"], ("down",), weights=True)
    with pytest.raises(ConfigError, match=r"--pattern=3:7: must divide the 8 inputs of the map down"):
        pruning.check_matrices(model.config, {"ffn": ("down",)}, pruning.Pattern(3, 7))
