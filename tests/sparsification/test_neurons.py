"""Neurons that are removed: scores and widths restated in NumPy, and what smaller models compute."""

import dataclasses

import numpy as np
import pytest

from sparsezoo_jax import evaluate, run_dir, sparsify, train
from sparsezoo_jax.config import read_config, with_changes
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.sparsification import neurons
from sparsezoo_jax.sparsification.config import CalibrationConfig, NeuronConfig
from sparsezoo_jax.sparsification.layers import LayerInputs, MapInputs
from sparsezoo_jax.training.lora import proportional_ranks
from tests.models.conftest import CONFIGS
from tests.sparsification.test_pruning import called

D, F = 6, 10
DRAW = np.random.default_rng(0)
MATRICES = {name: DRAW.standard_normal((D, F)) for name in ("gate", "up")} | {"down": DRAW.standard_normal((F, D))}
HIDDEN = DRAW.standard_normal((4, 9, F)) * np.linspace(0.2, 2, F) + 0.3
INPUTS = LayerInputs(36, 4, {"down": MapInputs(HIDDEN.sum((0, 1)), np.square(HIDDEN).sum((0, 1)))}, 0.1)
NORMS = np.sqrt(np.mean([np.sum(sequence**2, axis=0) for sequence in HIDDEN], axis=0))


def scores(method, **flags):
    return neurons.neuron_scores(method, MATRICES, INPUTS, **flags)


def test_scores_by_output_weights():
    down = MATRICES["down"]
    np.testing.assert_allclose(scores("magnitude-sp"), [np.sqrt(sum(down[j] ** 2)) for j in range(F)])
    np.testing.assert_allclose(scores("wanda-sp"), [np.mean(np.abs(down[j]) * NORMS[j]) for j in range(F)])
    variance = np.var(HIDDEN.reshape(-1, F), axis=0)
    np.testing.assert_allclose(scores("flap"), [variance[j] * sum(down[j] ** 2) for j in range(F)])


def cfsp(axis):
    """In PyTorch's layout, with i over D and j over F as the paper has them."""
    down, up, gate = MATRICES["down"].T, MATRICES["up"], MATRICES["gate"]
    total = sum(np.abs(m) / np.abs(m).sum(axis=axis, keepdims=True) for m in (down * NORMS, up, gate))
    return total.mean(axis=0) * NORMS


def test_cfsp():
    np.testing.assert_allclose(scores("cfsp"), cfsp(axis=1))
    released = scores("cfsp", released=True)
    np.testing.assert_allclose(released, cfsp(axis=0))
    np.testing.assert_allclose(released, 3 / D * NORMS)  # the weights cancel
    assert np.any(np.argsort(scores("cfsp")) != np.argsort(NORMS))


def test_layers_keep_by_their_importance():
    """`Z = sigmoid(a (sum of angles - their mean) / 10^4)` over 128 x 1024 tokens, and `Z / mean Z (1 - p)`."""
    angles = np.array([0.3, 0.1, 0.05, 0.15])
    sums = angles * 128 * 1024
    z = 1 / (1 + np.exp(-(sums - sums.mean()) / 1e4))
    np.testing.assert_allclose(neurons.layer_importance(angles), z)
    np.testing.assert_allclose(neurons.kept_shares(z, 0.6), z / z.mean() * 0.4)
    # At 10 % the first layer would keep more than it has: all are drawn to the mean.
    assert z.max() / z.mean() * 0.9 > 1
    room = (1 / 0.9 - 1) * z.mean() / (z.max() - z.mean()) / 1.05
    kept = neurons.kept_shares(z, 0.1)
    np.testing.assert_allclose(kept, (z.mean() + (z - z.mean()) * room) / z.mean() * 0.9)
    assert kept.max() < 1
    assert kept.mean() == pytest.approx(0.9)
    np.testing.assert_allclose(neurons.kept_shares(np.ones(3), 0.0), np.ones(3))


def test_widths():
    kept = np.array([0.05, 0.5, 0.62, 1.0])
    np.testing.assert_array_equal(neurons.widths(kept, 1100, 1), [55, 550, 682, 1100])
    rounded = [int((1100 * k + 64) / 128) * 128 for k in kept]
    np.testing.assert_array_equal(neurons.widths(kept, 1100, 128), [128, *rounded[1:3], 1100])
    np.testing.assert_array_equal(neurons.widths(np.array([0.7]), 10, 1), [7])


def test_scores_are_compared_after_standardising_each_layer():
    kept = neurons.standardised_shares(np.array([[1.0, 2, 3, 4], [100, 100, 100, 500]]), 0.5)
    standard = np.array([[-1.34, -0.45, 0.45, 1.34], [-0.58, -0.58, -0.58, 1.73]])
    np.testing.assert_allclose(kept, np.mean(standard >= np.sort(standard, axis=None)[4], axis=1))
    np.testing.assert_allclose(kept, [0.75, 0.25])


def places(before, after):
    """Where columns of `after` are among those of `before`."""
    (rows,) = np.nonzero(np.all(before.T[:, None] == after.T[None], axis=-1).any(axis=1))
    return rows


def test_without_the_removed_neurons_the_model_computes_the_same(dense, batches):
    """Gathered equals the dense model with zeros in the rows of the neurons that are gone; each layer keeps its own."""
    shrunk = neurons.shrink(dense, "wanda-sp", 0.5, batches, multiple=8)
    assert shrunk.widths == [24, 24]
    assert shrunk.model.config.ffn == dataclasses.replace(dense.config.ffn, d_ff=24)
    ffn, smaller = (model.segments[0].blocks[0].ffn for model in (dense, shrunk.model))
    before, after = np.asarray(ffn.up_DF[...]), np.asarray(smaller.up_DF[...])
    kept = [places(before[layer], after[layer]) for layer in range(2)]
    assert [len(k) for k in kept] == [24, 24]
    down = np.asarray(ffn.down_FD[...])
    for layer in range(2):
        np.testing.assert_array_equal(smaller.gate_DF[layer], ffn.gate_DF[layer][:, kept[layer]])
        np.testing.assert_array_equal(smaller.down_FD[layer], down[layer][kept[layer]])
    masked = np.zeros_like(down)
    for layer in range(2):
        masked[layer, kept[layer]] = down[layer, kept[layer]]
    try:
        ffn.down_FD[...] = masked
        expected = called(dense)(batches[0]).logits
    finally:
        ffn.down_FD[...] = down
    np.testing.assert_allclose(called(shrunk.model)(batches[0]).logits, expected, atol=2e-5)


def test_the_bias_is_what_removed_neurons_give_on_average(dense, batches):
    """The mean output over the calibration text of the first layer, whose input is the same, does not change."""
    shrunk = neurons.shrink(dense, "flap", 0.75, batches, per_layer=True, bias=True)
    assert sum(shrunk.widths) == 24
    means = []
    for model in (dense, shrunk.model):
        call, total, tokens = called(model, record=("ffn_output",)), 0, 0
        for batch in batches:
            real = batch["segment_ids"] > 0
            total = total + np.sum(np.where(real[..., None], call(batch).records["ffn_output"][0], 0), axis=(0, 1))
            tokens += real.sum()
        means.append(total / tokens)
    # The inputs of the first layer's FFN are the same in both.
    np.testing.assert_allclose(means[1], means[0], atol=1e-5)
    ffn = shrunk.model.segments[0].blocks[0].ffn
    assert not np.any(ffn.gate_bias[...])
    assert np.all(np.any(ffn.down_bias[...], axis=-1))


def test_nothing_changes_at_a_sparsity_of_0(dense, batches):
    shrunk = neurons.shrink(dense, "cfsp", 0.0, batches, per_layer=True)
    assert shrunk.widths == [48, 48]
    for matrix in ("gate_DF", "up_DF", "down_FD"):
        before, after = (getattr(model.segments[0].blocks[0].ffn, matrix)[...] for model in (dense, shrunk.model))
        np.testing.assert_array_equal(before, after)


@pytest.fixture(scope="module")
def smaller(made):
    """A run with layers of their own widths by CFSP."""
    folder, command, _ = made
    config = NeuronConfig(widths="by-layer", spread=3.0)
    changes = {"out": folder / "cfsp", "method": "cfsp", "sparsity": 0.4, "neurons": config}
    changes["calibration"] = CalibrationConfig(sequences=6)
    return folder / "cfsp", sparsify.sparsify(dataclasses.replace(command, **changes))


def test_a_smaller_run_is_filled_up_to_its_widest_layer(smaller, capsys):
    run, figures = smaller
    model, config, _ = run_dir.load(run)
    widths = figures["widths"]
    assert widths[0] != widths[1]
    kept = neurons.kept_shares(np.array(figures["importance"]), 0.4)
    assert widths == [int(48 * k) for k in kept]
    assert config.model.ffn.d_ff == max(widths)
    for layer, width in enumerate(widths):
        used = np.any(np.asarray(model.segments[0].blocks[0].ffn.up_DF[layer]) != 0, axis=0)
        np.testing.assert_array_equal(used, np.arange(max(widths)) < width)
    gone = 3 * 32 * (2 * 48 - sum(widths))
    for name, each in (("weights", 1), ("flops", 2), ("bytes", 4)):
        assert figures[f"{name}_dense"] - figures[name] == each * gone
    evaluate.main([str(run), "--no-meters", "--batches", str(figures["batches"])])
    shown = capsys.readouterr().out
    assert "neurons" in shown
    assert f"{figures['flops'] / figures['flops_dense']:.2%}" in shown
    assert f"{figures['loss']:.4f} at this sparsity" in shown


@pytest.mark.slow
def test_adapters_have_ranks_by_the_importance_of_layers(smaller, tmp_path):
    """Also when the run goes on, and merged they need no other run."""
    run, figures = smaller
    asked = {
        "train.init_from": str(run),
        "train.lora.rank": 4,
        "train.lora.ranks": "importance",
        "train.steps": 2,
        "train.stop_at": 1,
        "train.schedule.warmup_steps": 0,
        "eval.report": False,
        "eval.final_batches": 1,
    }
    config = with_changes(read_config(run / "config.json"), asked)
    train.train(config, tmp_path / "adapters")
    ranks = read_config(tmp_path / "adapters" / "config.json").train.lora.layer_ranks
    assert ranks == proportional_ranks(figures["importance"], 4)
    assert ranks[0] != ranks[1]
    assert sum(ranks) == 8
    train.train(with_changes(config, {"train.stop_at": None}), tmp_path / "adapters")
    run_dir.merge_adapters(tmp_path / "adapters", tmp_path / "whole")
    models = (run_dir.load(place).model for place in (run, tmp_path / "whole"))
    before, after = (np.asarray(model.segments[0].blocks[0].ffn.gate_DF[...]) for model in models)
    found = [np.linalg.matrix_rank(x, tol=1e-6) for x in after - before]
    assert all(0 < rank <= allowed for rank, allowed in zip(found, ranks, strict=True))


def test_importance_is_known_of_layers_of_one_width(dense, batches):
    shrunk = neurons.shrink(dense, "cfsp", 0.0, batches)
    whole = neurons.shrink(dense, "cfsp", 0.0, batches, per_layer=True)
    np.testing.assert_allclose(shrunk.importance, whole.importance)
    assert neurons.shrink(dense, "wanda-sp", 0.0, batches).importance is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spark", r"model.ffn.kind=spark: has no neurons that can be removed; gated and plain have"),
        ("deco", r"model.ffn.kind=deco: has no neurons"),
        ("mohd", r"model.residual.kind=mohd: has a residual stream whose width is routed"),
    ],
)
def test_layers_without_neurons_to_remove_are_named(name, message):
    with pytest.raises(ConfigError, match=message):
        neurons.check_neurons(CONFIGS[name], bias=False)


def test_other_neurons_of_the_decoder_are_named(dense):
    for changes, message in (
        ({"mtp_layers": 1}, r"model.mtp_layers=1: must be 0"),
        ({"first_layers": 1, "first_ffn": PlainFFNConfig(d_ff=8)}, r"model.first_layers=1: must be 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            neurons.check_neurons(dataclasses.replace(dense.config, **changes), bias=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "wanda-sp", "neurons": NeuronConfig(widths="by-layer")},
            r"--neurons.widths=by-layer: is for --method",
        ),
        ({"method": "flap", "neurons": NeuronConfig(spread=2.0)}, r"--neurons.spread=2.0: is for --method cfsp"),
        (
            {"method": "teal", "neurons": NeuronConfig(multiple=8)},
            r"--neurons.multiple=8: is for --method magnitude-sp",
        ),
        ({"method": "flap", "maps": ("up",)}, r"--maps=\('up',\): is for --method"),
        ({"method": "flap", "released": True}, r"--released=True: is for --method"),
        (
            {"method": "flap", "calibration": CalibrationConfig(skip=10_000)},
            r"has 0 tokens, less than a sequence of 32",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(made, tmp_path, changes, message):
    with pytest.raises(sparsify.UserError, match=message):
        sparsify.sparsify(dataclasses.replace(made[1], out=tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()
