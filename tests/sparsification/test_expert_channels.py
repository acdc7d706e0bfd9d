"""Experts of mixtures leave out channels of what they read, each for the tokens that it gets: restated in NumPy."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import evaluate, run_dir, sparsify
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation.meters import measure
from sparsezoo_jax.evaluation.sparsified import needed
from sparsezoo_jax.models.records import EXPERT_SCORES, SUBLAYER_INPUT
from sparsezoo_jax.models.sparsified import SparsifiedFFNConfig
from sparsezoo_jax.sparsification import METHODS
from sparsezoo_jax.sparsification.calibration import calibrate, thresholds
from sparsezoo_jax.sparsification.config import CalibrationConfig
from sparsezoo_jax.sparsification.conversion import sparsified_config, with_cuts, wrapped
from sparsezoo_jax.sparsification.methods import LINEAR_MAPS
from tests.models.conftest import CONFIGS, build, forward
from tests.sparsification.conftest import store
from tests.sparsification.test_experts import FORM
from tests.sparsification.test_formulas import D, call, kept_by_threshold, kept_largest, silu
from tests.sparsification.test_formulas import build as build_layer
from tests.sparsification.test_pruning import called

X = np.random.default_rng(0).standard_normal((2, 5, D)).astype(np.float32)
CUTS = {"gate": 0.4, "up": 0.9, "neurons": 0.2, "down": 0.05}
MIXTURE = dataclasses.replace(CONFIGS["moe"], ffn=FORM)


def sparse_layer(of, method, **changes):
    """A layer with the cuts above, or that leaves out a half of the channels."""
    maps = tuple(name for name in METHODS[method].maps if name in of.linear_maps(D))
    method = METHODS[method]._replace(maps=maps, weighted=maps if METHODS[method].weighted else ())
    layer = build_layer(SparsifiedFFNConfig(of=of, sparsity=method.sparsity(0.5, **changes)))
    half = method.gate == "top_k"
    cuts = [0.5 if half else CUTS[name.removeprefix("shared_")] for name in layer.masks.names]
    layer.masks.cut_P[...] = jnp.asarray(cuts, jnp.float32)
    return layer


def network(x, matrices, prefix, method, seen):
    """A gated network in NumPy, and into `seen` what its maps read of rows x [R, D]."""
    gate, up, down = matrices

    def read(name, x, weight=None):
        if prefix + name in method.maps:
            norms = np.ones(1) if weight is None else np.linalg.norm(weight, axis=1)
            x = kept_largest(x, norms, 0.5) if method.gate == "top_k" else kept_by_threshold(x, CUTS[name])
        seen.setdefault(prefix + name, []).append(np.mean(x != 0, axis=-1))
        return x

    gates = read("neurons", silu(read("gate", x, gate) @ gate))
    return read("down", gates * (read("up", x, up) @ up), down) @ down


@pytest.mark.parametrize("method", ["teal", "wina", "cats"])
@pytest.mark.parametrize("form", ["dense", "ragged", "loop", "remoe"])
def test_each_expert_reads_what_its_tokens_masks_leave(form, method):
    of = (
        dataclasses.replace(FORM, router="remoe") if form == "remoe" else dataclasses.replace(FORM, implementation=form)
    )
    layer = sparse_layer(of, method)
    y, aux = jax.jit(lambda: call(layer, X, record=frozenset({EXPERT_SCORES})))()
    inner = layer.inner
    routed = [np.asarray(w[...], np.float64) for w in (inner.gate_EDW, inner.up_EDW, inner.down_EWD)]
    fused = [np.asarray(w[...], np.float64) for w in (inner.shared_gate_DF, inner.shared_up_DF, inner.shared_down_FD)]
    weights = np.asarray(aux.records[EXPERT_SCORES], np.float64)[..., FORM.shared :].reshape(10, -1)
    rows, seen = X.reshape(10, D).astype(np.float64), {}
    expected = network(rows, fused, "shared_", METHODS[method], seen)
    for e in range(FORM.routed):
        taken = weights[:, e] != 0
        expected[taken] += weights[taken, e, None] * network(
            rows[taken], [w[e] for w in routed], "", METHODS[method], seen
        )
    np.testing.assert_allclose(np.asarray(y).reshape(10, D), expected, atol=1e-5)
    assert {name for name in seen if f"density_{name}" in aux.stats} == set(layer.masks.names)
    for name in layer.masks.names:
        shares = np.concatenate(seen[name])
        assert 0.1 < shares.mean() < 0.9
        assert aux.stats[f"density_{name}"] == pytest.approx(shares.mean(), abs=1e-6)


def test_gradients_pass_where_channels_are_kept():
    """The loop has a backward pass of its own; that of the dense form is made by jax."""
    found = []
    for form in ("dense", "loop"):
        layer = sparse_layer(dataclasses.replace(FORM, implementation=form), "wina")
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        def total(x, params, graphdef=graphdef, rest=rest):
            return jnp.sum(jnp.sin(call(nnx.merge(graphdef, params, rest), x)[0]))

        found.append(jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(X), params)))
    assert len(found[0]) == 8
    for one, other in zip(*found, strict=True):
        assert np.abs(one).max() > 0.01
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_first_tokens_read_everything():
    dense, mixed, cut = (
        jax.jit(lambda layer=layer: call(layer, X))()
        for layer in (
            sparse_layer(FORM, "teal", dense_tokens=9),
            sparse_layer(FORM, "teal", dense_tokens=2),
            sparse_layer(FORM, "teal"),
        )
    )
    np.testing.assert_allclose(dense[0], call(sparse_layer(FORM, "teal").inner, X)[0], atol=1e-6)
    np.testing.assert_allclose(mixed[0][:, :2], dense[0][:, :2], atol=1e-6)
    np.testing.assert_allclose(mixed[0][:, 2:], cut[0][:, 2:], atol=1e-6)
    assert np.abs(dense[0] - cut[0]).max() > 0.01
    assert cut[1].stats["density_down"] < mixed[1].stats["density_down"] < dense[1].stats["density_down"]


@pytest.fixture(scope="module")
def batch():
    """Two documents in the first row, and padding at the end of the last."""
    tokens = np.random.default_rng(0).integers(1, 61, (4, 40)).astype(np.int32)
    segments, positions = np.ones((4, 40), np.int32), np.tile(np.arange(40, dtype=np.int32), (4, 1))
    segments[0, 25:], positions[0, 25:], segments[3, 30:] = 2, positions[0, :15], 0
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}


@pytest.fixture(scope="module")
def models(batch):
    """A mixture over a dense layer of another width, the same with masks, and what these read but for first tokens."""
    model = build(MIXTURE)
    sparse = wrapped(model, sparsified_config(MIXTURE, METHODS["teal"].sparsity(0.5, 2)))
    return model, sparse, calibrate(sparse, [batch], 2)


def test_with_nothing_left_out_it_is_the_dense_one(models, batch):
    model, sparse, _ = models
    expected = forward(model)(batch["tokens"]).logits
    np.testing.assert_allclose(forward(sparse)(batch["tokens"]).logits, expected, atol=1e-6)
    of_dense, of_sparse = (measure(m, m.config, [batch]).sparsity(m.config).active_neurons for m in (model, sparse))
    assert None not in of_dense[1:]
    assert of_sparse == pytest.approx(of_dense)


def test_thresholds_are_quantiles_over_the_tokens_that_experts_get(models, batch):
    model, _, found = models
    records = called(model, record=(SUBLAYER_INPUT, EXPERT_SCORES))(batch).records
    counted = (batch["segment_ids"] > 0) & (batch["positions"] >= 2)
    x = np.asarray(records[SUBLAYER_INPUT][1][1], np.float64)[counted]
    taken = (np.asarray(records[EXPERT_SCORES][1]) != 0)[counted][:, FORM.shared :]
    ffn = model.segments[1].blocks[0].ffn
    gate, up, shared = (np.asarray(w[0], np.float64) for w in (ffn.gate_EDW, ffn.up_EDW, ffn.shared_up_DF))
    read = {"shared_up": x, "up": np.concatenate([x[taken[:, e]] for e in range(FORM.routed)])}
    read["down"] = np.concatenate(
        [silu(x[taken[:, e]] @ gate[e]) * (x[taken[:, e]] @ up[e]) for e in range(FORM.routed)]
    )
    read["shared_down"] = silu(x @ np.asarray(ffn.shared_gate_DF[0], np.float64)) * (x @ shared)
    cuts = thresholds(found, {name: np.full(3, 0.6) for name in found.maps})
    assert found.tokens == counted.sum()
    for name, inputs in read.items():
        map = found.maps[name]
        place = map.layers.index(1)
        assert map.counts[place].sum() == inputs.size
        width = inputs.shape[1]
        np.testing.assert_allclose(map.squares[place][:width], np.sum(np.square(inputs), axis=0), rtol=1e-4)
        assert not map.squares[place][width:].any()
        assert cuts[name][1] == pytest.approx(np.quantile(np.abs(inputs), 0.6), rel=5e-3)


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_a_run_leaves_out_its_share_and_decodes_as_it_computes(models, batch, method):
    model, _, found = models
    shares = {name: np.full(3, 0.4) for name in found.maps}
    cut = wrapped(model, sparsified_config(MIXTURE, METHODS[method].sparsity(0.4)))
    with_cuts(cut, thresholds(found, shares) if method == "teal" else shares)
    run = forward(cut)
    whole = run(batch["tokens"])
    figures = needed(cut.config, whole.stats)
    assert set(figures["left_out"]) == set(LINEAR_MAPS) - {"q_up"}
    for share in figures["left_out"].values():
        assert share == pytest.approx(0.4, abs=0.07)
    router = 2 * 24 * FORM.routed
    assert figures["weights"] - router == pytest.approx(0.6 * (figures["weights_dense"] - router), rel=0.05)
    assert np.abs(whole.logits - forward(model)(batch["tokens"]).logits).max() > 1e-3
    first = run(batch["tokens"][:, :39], cache=cut.init_cache(4, 40))
    last = run(batch["tokens"][:, 39:], cache=first.cache)
    np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, 39], atol=5e-5)


def test_accounting_counts_what_a_tokens_experts_are_left():
    """With D = 12: three maps of two routed experts and of a shared one, 96 weights each, and a router of 4 columns."""
    assert FORM.weights(D) == 48 + 9 * 96
    teal, cats = (SparsifiedFFNConfig(of=FORM, sparsity=METHODS[method].sparsity(0.5)) for method in ("teal", "cats"))
    assert (teal.weights(D), cats.weights(D)) == (48 + 9 * 48, 48 + 3 * 96 + 6 * 48)
    assert teal.flops(D) == 2 * teal.weights(D)
    assert cats.weights(D, 2 * 8) == 48 + 2 * 96 + 4 * 48  # of one routed expert
    plain = dataclasses.replace(FORM, gated=False)
    assert tuple(plain.linear_maps(D)) == ("up", "down", "shared_up", "shared_down")
    assert plain.weight_maps(D) == {"up": 12, "down": 8, "shared_up": 12, "shared_down": 8}


def planned(**fields):
    return sparsify.planned(sparsify.Sparsify(directory=Path("run"), out=Path("out"), **fields))


def test_what_can_not_be_treated_is_named():
    with pytest.raises(ConfigError, match=r"model.ffn.kind=moe: can't be rotated \(--rotate\).* gate, up, down; name"):
        planned(method="wina", rotate=True).check(MIXTURE)
    with pytest.raises(ConfigError, match=r"model.ffn.kind=moe: can't have low-rank maps \(--method rsparse"):
        planned(method="rsparse").check(MIXTURE)
    planned(method="rsparse", maps=("q", "k", "v", "o")).check(MIXTURE)
    plain = dataclasses.replace(MIXTURE, ffn=dataclasses.replace(FORM, gated=False))
    with pytest.raises(
        ConfigError, match=r"model.ffn.kind=moe: has the maps up, down, shared_up, shared_down; neurons"
    ):
        planned(method="cats").check(plain)
    with pytest.raises(ConfigError, match="can't have shared_neurons beside shared_up or shared_down"):
        planned(method="teal", maps=("shared_neurons", "shared_down"))


def test_a_run_is_made_and_evaluated(tmp_path, made):
    """Costs as measured count the experts that are active, and what their maps leave out once."""
    _, source, tokenizer = run_dir.load(made[0] / "dense")
    config = dataclasses.replace(source, model=dataclasses.replace(source.model, ffn=FORM))
    run = store(tmp_path / "mixture", config, tokenizer)
    calibration = CalibrationConfig(sequences=6)
    changes = {"directory": run, "out": tmp_path / "out", "sparsity": 0.4, "calibration": calibration}
    figures = sparsify.sparsify(dataclasses.replace(made[1], **changes))
    assert figures["weights"] / figures["weights_dense"] == pytest.approx(0.6, abs=0.03)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main([str(tmp_path / "out"), "--batches", "2", "--json"])
    found = json.loads(printed.getvalue())["parameters"]
    assert found["activated_layers_measured"] == pytest.approx(found["activated_layers"], abs=1)
