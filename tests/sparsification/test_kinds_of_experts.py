"""Experts of other kinds than `moe`: what their maps leave out, and which of their weights go, restated in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.deco import DECOConfig
from sparsezoo_jax.models.matrices import layer_matrices
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES, FFN_GATE, FFN_HIDDEN, SUBLAYER_INPUT
from sparsezoo_jax.models.sparsified import SparsifiedFFNConfig
from sparsezoo_jax.sparsification import METHODS, layers, pruning
from sparsezoo_jax.sparsification.calibration import calibrate
from sparsezoo_jax.sparsification.conversion import maps_taken, sparsified_config, wrapped
from sparsezoo_jax.sparsification.methods import LINEAR_MAPS
from tests.models.conftest import CONFIGS, build
from tests.sparsification.test_experts import score
from tests.sparsification.test_formulas import D, call, kept_by_threshold, kept_largest, silu
from tests.sparsification.test_formulas import build as build_layer
from tests.sparsification.test_pruning import called

X = np.random.default_rng(0).standard_normal((2, 5, D)).astype(np.float32)
E, W = 4, 6
FORMS = {
    "blockffn": BlockFFNConfig(experts=E, expert_width=W, gated=True, init_std=None),
    "deco": DECOConfig(experts=E, expert_width=W, shared_width=10),
    "moex": MoEXFFNConfig(experts=E, expert_width=W, k=2),
}
MAPS = {
    "blockffn": ("gate", "up", "down"),
    "deco": ("down", "shared_gate", "shared_up", "shared_down"),
    "moex": ("up", "down"),
}
CUT = 0.3


def by_expert(layer, path, rows):
    """A matrix of all experts in NumPy, [E, I, O]; `rows`: it maps from neurons."""
    w = np.asarray(getattr(layer, path)[...], np.float64)
    if w.ndim == 3:
        return w
    return w.reshape(E, W, -1) if rows else w.reshape(D, E, W).transpose(1, 0, 2)


def norm_silu(x, up, scale):
    """DECO's units [N, E, W]."""
    units = np.einsum("nd,edw->new", x, up)
    units -= units.mean((1, 2), keepdims=True)
    return silu(units / np.sqrt(np.mean(np.square(units), -1, keepdims=True) + 1e-5) * scale)


@pytest.mark.parametrize("method", ["teal", "wina"])
@pytest.mark.parametrize("kind", FORMS)
def test_each_map_reads_what_its_mask_leaves(kind, method):
    maps = MAPS[kind]
    setting = METHODS[method]._replace(maps=maps, weighted=maps if method == "wina" else ())
    layer = build_layer(SparsifiedFFNConfig(of=FORMS[kind], sparsity=setting.sparsity(0.5)))
    layer.masks.cut_P[...] = jnp.full(len(maps), 0.5 if method == "wina" else CUT)
    y, aux = jax.jit(lambda: call(layer, X, record=frozenset({EXPERT_SCORES, FFN_GATE, FFN_HIDDEN})))()
    inner, x = layer.inner, X.reshape(-1, D).astype(np.float64)
    weights = np.asarray(aux.records[EXPERT_SCORES], np.float64).reshape(len(x), E)
    seen = {name: [] for name in maps}

    def read(name, x, weight):
        kept = kept_largest(x, np.linalg.norm(weight, axis=1), 0.5) if method == "wina" else kept_by_threshold(x, CUT)
        seen[name].append(np.mean(kept != 0, axis=-1))
        return kept

    up, down = (by_expert(inner, inner.matrices[name], name == "down") for name in ("up", "down"))
    gate = by_expert(inner, "gate_DF", False) if kind == "blockffn" else None
    units = norm_silu(x, up, np.asarray(inner.norm_scale_W[...])) if kind == "deco" else None
    expected, hidden = np.zeros_like(x), np.zeros((len(x), E, W))
    for e in range(E):
        taken = weights[:, e] != 0
        own = x[taken]
        if units is not None:
            made = units[taken, e]
        elif gate is None:
            made = np.maximum(read("up", own, up[e]) @ up[e], 0)
        else:
            made = silu(read("gate", own, gate[e]) @ gate[e]) * (read("up", own, up[e]) @ up[e])
        hidden[taken, e] = weights[taken, e, None] * read("down", made, down[e])
        expected += hidden[:, e] @ down[e]
    if kind == "deco":
        gates, ups, downs = (
            np.asarray(getattr(inner.shared, n)[...], np.float64) for n in ("gate_DF", "up_DF", "down_FD")
        )
        made = silu(read("shared_gate", x, gates) @ gates) * (read("shared_up", x, ups) @ ups)
        expected += read("shared_down", made, downs) @ downs
    np.testing.assert_allclose(np.asarray(y).reshape(-1, D), expected, atol=2e-5)
    np.testing.assert_allclose(np.asarray(aux.records[FFN_HIDDEN]).reshape(len(x), E, W), hidden, atol=2e-5)
    # By gates neurons are counted, and then what masks leave out of these; so they are those before the mask.
    assert np.count_nonzero(aux.records[FFN_GATE]) > np.count_nonzero(hidden)
    for name in maps:
        assert aux.stats[f"density_{name}"] == pytest.approx(np.concatenate(seen[name]).mean(), abs=1e-6)


@pytest.fixture(scope="module", params=FORMS)
def model(request):
    config = CONFIGS[request.param]
    return build(dataclasses.replace(config, layers=2, first_layers=0, first_ffn=None))


@pytest.fixture(scope="module")
def batch():
    segments = np.ones((3, 20), np.int32)
    segments[2, 12:] = 0
    tokens = np.random.default_rng(0).integers(1, 61, (3, 20)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": np.tile(np.arange(20, dtype=np.int32), (3, 1))}


def test_each_experts_weights_go_by_the_tokens_that_it_gets(monkeypatch, model, batch):
    """Wanda in NumPy for every expert of the first layer."""
    monkeypatch.setattr(layers, "FEWEST", 1)
    records = called(model, record=(SUBLAYER_INPUT, EXPERT_SCORES, FFN_HIDDEN))(batch).records
    real, kind = batch["segment_ids"] > 0, model.config.ffn
    x = np.asarray(records[SUBLAYER_INPUT][0][1], np.float64)[real]
    weights = np.asarray(records[EXPERT_SCORES][0], np.float64)[real]
    hidden = np.asarray(records[FFN_HIDDEN][0], np.float64)[real].reshape(len(x), kind.experts, kind.expert_width)
    maps = maps_taken(model.config, LINEAR_MAPS, weights=True)["ffn"]
    pruned = pruning.prune(model, maps, 0.5, score, "row", None, [batch])
    assert all(shares == [0.5, 0.5] for shares in pruned.zeros.values())
    assert pruned.zeros.keys() == set(maps) == kind.weight_maps(24).keys()
    before, after = ({m.name: np.asarray(m.param[0]) for m in layer_matrices(one)} for one in (model, pruned.model))
    compared = 0
    for name in kind.expert_maps & set(maps):
        for e in range(kind.experts):
            taken = weights[:, e] != 0
            if not taken.any():
                continue
            read = hidden[taken, e] / weights[taken, e, None] if name == "down" else x[taken]
            norms = np.sqrt(np.sum(np.square(read), axis=0) / 3)
            own, left = (
                w[e] if w.ndim == 3 else np.split(w, kind.experts, 0 if name == "down" else 1)[e]
                for w in (before[name], after[name])
            )
            kept = pruning.kept_weights(np.abs(own) * norms[:, None].astype(np.float32), 0.5, "row")
            # Two scores that are equal to rounding may change places.
            assert np.mean((left != 0) != kept) < 0.02, (name, e)
            np.testing.assert_array_equal(left[left != 0], own[left != 0])
            compared += 1
    assert compared > kind.experts


def test_with_nothing_left_out_it_is_the_dense_one(model, batch):
    kind = model.config.ffn
    sparse = wrapped(model, sparsified_config(model.config, METHODS["teal"].sparsity(0.5)))
    expected = called(model, record=(EXPERT_SCORES,))(batch)
    found = called(sparse)(batch)
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-5)
    taken = np.asarray(expected.records[EXPERT_SCORES][0])[batch["segment_ids"] > 0] != 0
    statistics = calibrate(sparse, [batch])
    assert statistics.maps["down"].counts[0].sum() == taken.sum() * kind.expert_width


def test_statistics_of_attention_alone(model, batch):
    """Experts without masks are not looked at."""
    sparse = wrapped(model, sparsified_config(model.config, METHODS["teal"]._replace(maps=("k",)).sparsity(0.5)))
    assert calibrate(sparse, [batch]).maps.keys() == {"k"}


def test_what_is_saved_is_what_a_token_reads_otherwise():
    block, deco, moex = (FORMS[kind] for kind in ("blockffn", "deco", "moex"))
    half = {name: SparsifiedFFNConfig(of=of, sparsity=METHODS["teal"].sparsity(0.5)) for name, of in FORMS.items()}
    active = 0.2 * E * W
    assert half["blockffn"].weights(D) == pytest.approx(D * E + E + 1.5 * D * active)
    assert half["deco"].weights(D) == pytest.approx(deco.weights(D) - 0.5 * (D * active + 3 * D * 10))
    assert half["moex"].weights(D) == pytest.approx(moex.weights(D) - 0.5 * 2 * 2 * W * D)
    # Of 12 neurons 9 are 0: no channel of the second map is needed for these.
    assert half["moex"].weights(D, 3) == moex.weights(D, 3) - 0.5 * 2 * W * D
    assert block.weight_maps(D) == {"gate": D, "up": D, "down": W}


def test_the_map_to_units_with_a_common_mean_is_only_pruned():
    config = CONFIGS["deco"]
    assert "up" in maps_taken(config, LINEAR_MAPS, weights=True)["ffn"]
    with pytest.raises(ConfigError, match=r"model.ffn.kind=deco: has the maps down, shared_gate, .*; up can't"):
        sparsified_config(config, METHODS["teal"]._replace(maps=("up",)).sparsity(0.5), exact=True)
