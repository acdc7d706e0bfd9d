"""Spark's feed-forward networks leave out channels and weights map by map: predictor, other dimensions, output."""

import dataclasses
import math
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.masks import ActivationSparsity
from sparsezoo_jax.models.spark import SparkFFNConfig
from sparsezoo_jax.models.sparsified import SparsifiedFFNConfig
from sparsezoo_jax.sparsification import pruning
from sparsezoo_jax.sparsification.calibration import calibrate, thresholds
from sparsezoo_jax.sparsification.conversion import maps_taken, sparsified_config, with_cuts, wrapped
from sparsezoo_jax.sparsification.methods import LINEAR_MAPS, METHODS
from tests.models.conftest import CONFIGS, build, forward
from tests.sparsification.test_formulas import build as build_layer
from tests.sparsification.test_formulas import call
from tests.sparsification.test_pruning import called

MAPS = ("gate", "up", "down")
D, F, R, K = 12, 20, 5, 4
CUTS = {"gate": 0.3, "up": 0.2, "down": 0.05}
FORM = SparkFFNConfig(d_ff=F, top_k=K, r=R)
X = np.random.default_rng(1).normal(size=(1, 6, D)).astype(np.float32)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def spark(x, k1, k2, v, kept=lambda name, x: x):
    """The layer in NumPy, with `kept` of each map's input."""
    scores = kept("gate", x[..., :R]) @ k1
    threshold = scores.mean(-1, keepdims=True) + scores.std(-1, ddof=1, keepdims=True) * NormalDist().inv_cdf(1 - K / F)
    gate = gelu(np.maximum(scores - threshold, 0))
    return kept("down", gate * (kept("up", x[..., R:]) @ k2)) @ v


def of(layer):
    return [np.asarray(matrix[...], np.float64) for matrix in (layer.k1_RF, layer.k2_DF, layer.v_FD)]


@pytest.mark.parametrize("weighted", [(), ("gate", "up", "down")])
def test_each_map_reads_what_its_threshold_leaves(weighted):
    sparsity = ActivationSparsity(maps=MAPS, target=0.5, weighted=weighted)
    layer = build_layer(SparsifiedFFNConfig(of=FORM, sparsity=sparsity))
    layer.masks.cut_P[...] = jnp.asarray([CUTS[name] for name in layer.masks.names])
    k1, k2, v = of(layer.inner)
    matrices = {"gate": k1, "up": k2, "down": v}

    def kept(name, x):
        score = np.abs(x) * (np.linalg.norm(matrices[name], axis=1) if name in weighted else 1)
        return np.where(score > CUTS[name], x, 0)

    y, aux = call(layer, X)
    np.testing.assert_allclose(y, spark(X.astype(np.float64), k1, k2, v, kept), atol=2e-6)
    assert 0 < float(aux.stats["density_up"]) < 1
    layer.masks.cut_P[...] = jnp.zeros(3)
    np.testing.assert_allclose(call(layer, X)[0], spark(X.astype(np.float64), k1, k2, v), atol=2e-6)


@pytest.fixture(scope="module")
def models():
    """A dense decoder and the same with masks on all maps."""
    model = build(CONFIGS["spark"])
    sparsity = METHODS["teal"].sparsity(0.5)
    return model, wrapped(model, sparsified_config(model.config, sparsity))


def test_with_nothing_left_out_it_is_the_dense_one(models):
    model, sparse = models
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 20)), jnp.int32)
    np.testing.assert_allclose(forward(sparse)(tokens).logits, forward(model)(tokens).logits, atol=2e-5)


def test_thresholds_leave_out_the_share_that_was_asked_for(models):
    model, sparse = models
    tokens = np.random.default_rng(0).integers(1, 61, (4, 40)).astype(np.int32)
    positions = np.broadcast_to(np.arange(40, dtype=np.int32), (4, 40))
    batch = {"tokens": tokens, "segment_ids": np.ones((4, 40), np.int32), "positions": positions}
    found = calibrate(sparse, [batch])
    assert found.maps["gate"].squares.shape == (2, 12)
    assert found.maps["up"].squares.shape == (2, 12)
    assert found.maps["down"].squares.shape == (2, 48)
    cut = wrapped(model, sparse.config)
    with_cuts(cut, thresholds(found, {name: np.full(2, 0.5) for name in found.maps}))
    stats = forward(cut)(jnp.asarray(tokens)).stats
    for name in ("gate", "up"):
        np.testing.assert_allclose(stats[f"density_{name}"], 0.5, atol=0.1)
    # Most of what the output reads is 0 already, so that its threshold is 0.
    np.testing.assert_array_equal(found.maps["down"].counts[:, 0, 0] > 0.5 * 4 * 40 * 48, True)


def test_weights_go_by_the_norms_of_what_each_map_reads(models):
    """Wanda on the first layer, whose input is that of the unpruned model."""
    model, _ = models
    tokens = np.random.default_rng(0).integers(1, 61, (2, 20)).astype(np.int32)
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20))
    batch = {"tokens": tokens, "segment_ids": np.ones((2, 20), np.int32), "positions": positions}
    score = lambda path, place, weight, norms: pruning.weight_scores(weight, norms)  # noqa: E731
    pruned = pruning.prune(model, MAPS, 0.5, score, "row", None, [batch])
    assert pruned.zeros == {name: [0.5, 0.5] for name in MAPS}
    x_BTD = np.asarray(called(model, record=("sublayer_input",))(batch).records["sublayer_input"][0][1])
    (before,), (after,) = (m.segments[0].blocks[:1] for m in (model, pruned.model))
    for path, part in (("k1_RF", x_BTD[..., :12]), ("k2_DF", x_BTD[..., 12:])):
        norms_I = np.sqrt(np.sum(np.square(part.astype(np.float64)), axis=(0, 1)) / 2)
        weight_IO = np.asarray(getattr(before.ffn, path)[0])
        kept_IO = pruning.kept_weights(np.abs(weight_IO) * norms_I[:, None], 0.5, "row")
        np.testing.assert_array_equal(getattr(after.ffn, path)[0], np.where(kept_IO, weight_IO, 0))


def test_what_is_saved_is_what_a_token_reads_otherwise():
    maps = FORM.linear_maps(D)
    assert sum(maps[name].weights * maps[name].read for name in MAPS) == FORM.weights(D) == R * F + (2 * D - R) * K
    half = SparsifiedFFNConfig(of=FORM, sparsity=ActivationSparsity(maps=("gate", "up"), target=0.5))
    # Half of the predictor, and half of the map of the others for the neurons that it selects.
    assert half.weights(D) == FORM.weights(D) - 0.5 * (R * F + (D - R) * K)


def test_parts_of_the_stream_are_not_rotated():
    config = CONFIGS["spark"]
    rotated = dataclasses.replace(METHODS["teal"].sparsity(0.5), rotate=True)
    message = r"model.ffn.kind=spark: can't be rotated \(--rotate\): its maps gate, up read a part of the stream each"
    with pytest.raises(ConfigError, match=message):
        sparsified_config(config, rotated)
    attention = dataclasses.replace(rotated, maps=("q", "k", "v", "o"))
    assert sparsified_config(config, attention).ffn == config.ffn
    assert maps_taken(config, LINEAR_MAPS)["ffn"] == MAPS
