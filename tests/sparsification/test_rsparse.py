"""R-Sparse: exact channels and the low-rank map of the others, restated in NumPy; budgets; the search."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import evaluate, run_dir, sparsify
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation import evaluate_model
from sparsezoo_jax.inference import packed
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.masks import ActivationSparsity
from sparsezoo_jax.models.sparsified import SparsifiedFFNConfig
from sparsezoo_jax.sparsification import METHODS, calibrate, rsparse, sparsified_config, wrapped
from sparsezoo_jax.sparsification.config import CalibrationConfig, RSparseConfig
from tests.models.conftest import forward
from tests.sparsification.test_formulas import D, F, X, build, call, silu, weights

MAPS = ("gate", "up", "down")


@pytest.mark.parametrize("ranks", [(3, 0, 2), (D, D, D)])
def test_channels_left_out_go_through_a_low_rank_map(ranks):
    """`y = (x m) W + ((x (1 - m)) A) B`, m = |x| ||W_i|| > t; with the full rank that is `x W`."""
    sparsity = ActivationSparsity(maps=MAPS, target=0.5, weighted=MAPS, ranks=ranks)
    layer = build(SparsifiedFFNConfig(of=GatedFFNConfig(d_ff=F, activation="silu"), sparsity=sparsity))
    cuts = {"gate": 0.6, "up": 0.9, "down": 0.02}
    layer.masks.cut_P[...] = jnp.asarray([cuts[name] for name in layer.masks.names], jnp.float32)
    matrices = dict(zip(MAPS, weights(layer), strict=True))
    low = {name: rsparse.low_rank(matrices[name], rank) for name, rank in zip(MAPS, ranks, strict=True) if rank}
    assert set(layer.bypass) == set(low)
    for name, (a, b) in low.items():
        layer.bypass[name].a_IR[...], layer.bypass[name].b_RO[...] = jnp.asarray(a), jnp.asarray(b)

    def mapped(name, x):
        w = matrices[name]
        m = np.abs(x) * np.linalg.norm(w, axis=1) > cuts[name]
        assert 0.1 < m.mean() < 0.9
        rest = (x * ~m) @ low[name][0] @ low[name][1] if name in low else 0
        return (x * m) @ w + rest

    hidden = silu(mapped("gate", X)) * mapped("up", X)
    y, aux = call(layer)
    np.testing.assert_allclose(y, mapped("down", hidden), atol=2e-5)
    assert aux.stats["density_up"] < 1
    if ranks == (D, D, D):
        gate, up, down = (matrices[name] for name in MAPS)
        np.testing.assert_allclose(y, (silu(X @ gate) * (X @ up)) @ down, atol=2e-5)


def test_low_rank_maps_are_the_closest():
    w = np.random.default_rng(3).standard_normal((7, 4))
    a, b = rsparse.low_rank(w, 2)
    singular = np.linalg.svd(w, compute_uv=False)
    assert np.linalg.norm(w - a @ b) == pytest.approx(np.linalg.norm(singular[2:]))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
def test_exact_channels_and_low_rank_map_share_the_budget(alpha):
    for inputs, outputs in ((512, 512), (512, 128), (300, 1100)):
        rank, kept = rsparse.rank_of(inputs, outputs, 0.6, alpha), 1 - rsparse.left_out(0.6, alpha)
        assert kept == pytest.approx(0.4 * alpha)
        read = kept * inputs * outputs + rank * (inputs + outputs)
        assert 0.4 * inputs * outputs - (inputs + outputs) <= read <= 0.4 * inputs * outputs + 1e-6
    assert rsparse.rank_of(8, 8, 0.9, 0.99) == 1
    assert rsparse.rank_of(8, 8, 0.9, 1.0) == 0


def test_the_search_finds_what_loses_less():
    best = np.array([0.25, 1.0, 0.6])
    start = [{"q": np.full(3, alpha), "k": np.array([alpha, np.nan, alpha])} for alpha in (1.0, 0.9)]
    seen = []

    def loss(alphas):
        seen.append(alphas)
        assert np.isnan(alphas["k"][1])
        return float(np.sum((alphas["q"] - best) ** 2) + np.nansum((alphas["k"] - 0.5) ** 2))

    config = RSparseConfig(population=16, generations=12)
    found = rsparse.search(start, loss, config)
    assert len(seen) == 16 + 12 * 12
    assert loss(found) < 0.3 * min(loss(alphas) for alphas in start)
    again = rsparse.search(start, loss, config)
    np.testing.assert_array_equal(again["q"], found["q"])


def test_the_search_measures_what_is_built(dense, batches, monkeypatch):
    """Settings are tried in a model of the highest ranks; that of the chosen one has no more than it needs."""
    tried = {}

    def chosen(start, loss, config):
        alphas = {name: np.array([0.5, 1.0]) if name in ("q", "down") else np.ones(2) for name in start[0]}
        tried["loss"], tried["other"] = loss(alphas), loss(start[-1])
        return alphas

    monkeypatch.setattr(rsparse, "search", chosen)
    sparsity = METHODS["rsparse"].sparsity(0.4)
    calibration = calibrate(wrapped(dense, sparsified_config(dense.config, sparsity)), batches)
    found = rsparse.rsparse(dense, sparsity, calibration, batches, RSparseConfig())
    assert evaluate_model(found.model, batches).loss == pytest.approx(tried["loss"], abs=1e-6)
    assert abs(tried["other"] - tried["loss"]) > 1e-4
    assert {name: list(ranks) for name, ranks in found.ranks.items() if any(ranks)} == {"q": [4, 0], "down": [5, 0]}
    ffn = found.model.config.ffn.sparsity
    assert dict(zip(ffn.maps, ffn.ranks, strict=True)) == {"gate": 0, "up": 0, "down": 5}


def test_a_run_reads_its_budget_and_decodes_as_it_computes(made):
    folder, command, _ = made
    run = folder / "rsparse"
    changes = {"out": run, "method": "rsparse", "sparsity": 0.4, "rsparse": RSparseConfig(alpha=0.7)}
    changes["calibration"] = CalibrationConfig(sequences=6)
    figures = sparsify.sparsify(dataclasses.replace(command, **changes))
    model, config, _ = run_dir.load(run)
    sparsity = config.model.ffn.sparsity
    assert all(sparsity.ranks)
    for name in sparsity.maps:
        assert sparsity.rank(name) == max(figures["ranks"][name])
        for layer in range(2):
            kept = 0.6 * 0.7
            assert figures["left_out_by_layer"][name][layer] == pytest.approx(1 - kept, abs=0.06)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        evaluate.main([str(run), "--no-meters", "--batches", str(figures["batches"])])
    assert f"{figures['loss']:.4f} at this sparsity" in shown.getvalue()
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 320)
    expected, laid_out = forward(model)(tokens).logits, packed(model)
    cache, step = laid_out.init_cache(1, 12), forward(laid_out)
    for start, length in ((0, 11), (11, 1)):
        out = step(tokens[:, start : start + length], cache=cache)
        np.testing.assert_allclose(out.logits, expected[:, start : start + length], atol=2e-4)
        cache = out.cache


def test_all_of_the_budget_for_exact_channels_is_a_threshold(made, tmp_path):
    """With alpha 1 the run is that of TEAL with WINA's scores."""
    shared = {"sparsity": 0.4, "calibration": CalibrationConfig(sequences=6)}
    changes = {"out": tmp_path / "one", "method": "rsparse", "rsparse": RSparseConfig(alpha=1.0)}
    one = sparsify.sparsify(dataclasses.replace(made[1], **shared, **changes))
    maps = ("q", "k", "v", "o", "gate", "up", "down")
    changes = {"out": tmp_path / "two", "method": "teal", "weighted": maps}
    two = sparsify.sparsify(dataclasses.replace(made[1], **shared, **changes))
    assert one["cuts"] == two["cuts"]
    assert one["loss"] == two["loss"]
    assert run_dir.load(tmp_path / "one").config.model == run_dir.load(tmp_path / "two").config.model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"maps": ("q", "k"), "ranks": (3,)}, r"sparsity.ranks=3: must be one for each of the 2 maps"),
        ({"maps": ("q",), "ranks": (-1,)}, r"sparsity.ranks=-1: must be one for each of the 1 maps, at least 0"),
        ({"maps": ("neurons",), "ranks": (2,)}, r"sparsity.ranks=2: must be 0 for neurons"),
    ],
)
def test_ranks_that_say_nothing_sensible(fields, message):
    with pytest.raises(ConfigError, match=message):
        ActivationSparsity(target=0.5, **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "teal", "rsparse": RSparseConfig(alpha=0.5)}, r"--rsparse.alpha=0.5: is for --method rsparse"),
        ({"method": "rsparse", "gate": "top_k"}, r"--gate=top_k: is for --method cats, teal, wina"),
    ],
)
def test_flags_of_other_methods_are_refused(made, tmp_path, changes, message):
    with pytest.raises(sparsify.UserError, match=message):
        sparsify.sparsify(dataclasses.replace(made[1], out=tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_alphas_are_shares():
    with pytest.raises(ConfigError, match=r"--rsparse.alpha=1.5: must be in \[0, 1\]"):
        RSparseConfig(alpha=1.5)
