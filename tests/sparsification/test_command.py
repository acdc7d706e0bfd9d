"""The command on a small run that is made once: what it writes, what that computes, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sparsezoo_jax import evaluate, huggingface, run_dir, sparsify
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.evaluation.decode_times import compared
from sparsezoo_jax.evaluation.report.page import sparsity_after_training
from sparsezoo_jax.evaluation.sparsified import recorded
from sparsezoo_jax.evaluation_tables import print_sparsified
from sparsezoo_jax.inference import packed
from sparsezoo_jax.inference.sparsified import PackedSparsifiedFFN
from sparsezoo_jax.inference.sparsified_attention import PackedSparsifiedAttention
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.sparsification.config import CalibrationConfig
from tests.models.conftest import forward
from tests.sparsification.conftest import store


def test_the_run_leaves_out_what_was_asked_for(made):
    folder, _, figures = made
    assert figures["calibration_tokens"] == 6 * 32
    assert figures["left_out"].keys() == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, shares in figures["left_out_by_layer"].items():
        np.testing.assert_allclose(shares, 0.4, atol=0.04, err_msg=name)
    assert figures["weights"] / figures["weights_dense"] == pytest.approx(0.6, abs=0.02)
    assert figures["loss"] != figures["loss_dense"]
    assert json.loads((folder / "teal" / "sparsify.json").read_text()) == figures
    with np.load(folder / "teal" / "calibration.npz") as stored:
        assert stored["q/counts"].sum() == 2 * 6 * 32 * 32
        assert stored["down/squares"].shape == (2, 48)


def test_the_run_is_one_of_its_own(made):
    """Loaded from its directory alone, with the thresholds where they belong and the weights of the dense run."""
    folder, _, figures = made
    model, config, tokenizer = run_dir.load(folder / "teal")
    assert tokenizer is not None
    assert (config.model.ffn.kind, config.model.attention.kind) == ("sparsified", "sparsified")
    (segment,) = model.segments
    (block,) = segment.blocks
    for part in (block.attention, block.ffn):
        for place, name in enumerate(part.masks.names):
            np.testing.assert_array_equal(part.masks.cut_P[:, place], np.float32(figures["cuts"][name]))
    dense = run_dir.load(folder / "dense").model.segments[0].blocks[0]
    np.testing.assert_array_equal(block.ffn.inner.up_DF[...], dense.ffn.up_DF[...])
    np.testing.assert_array_equal(block.attention.inner.projections.o_NHD[...], dense.attention.projections.o_NHD[...])


def test_evaluation_shows_what_was_recorded_and_what_is_measured(made, capsys):
    folder, _, figures = made
    evaluate.main([str(folder / "teal"), "--no-meters", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(figures["loss"], abs=1e-6)
    assert found["sparsified"]["left_out"] == pytest.approx(figures["left_out"])
    assert found["sparsified"]["bytes"] == 4 * found["sparsified"]["weights"]
    record = {name: figures[name] for name in ("method", "sparsity", "loss_dense", "loss", "tokens")}
    assert found["sparsified"]["made"] == record
    print_sparsified(found["sparsified"])
    shown = capsys.readouterr().out
    assert "Channels left out (teal at 0.4)" in shown
    assert f"{figures['loss_dense']:.4f} dense, {figures['loss']:.4f} at this sparsity" in shown


def test_decoding_is_timed_by_turns_with_the_dense_run(made, capsys):
    folder, _, _ = made
    flags = ["--no-meters", "--batches", "1", "--beside", str(folder / "dense"), "--beside-context", "20"]
    evaluate.main([str(folder / "teal"), *flags, "--beside-rounds", "2", "--json"])
    found = json.loads(capsys.readouterr().out)["decoding"]
    assert (found["beside"], found["context"], found["rounds"]) == (str(folder / "dense"), 20, 2)
    assert 0 < found["milliseconds"] < 1000
    assert 0 < found["milliseconds_beside"] < 1000
    assert found["ratio_quartiles"][0] <= found["ratio"] <= found["ratio_quartiles"][1]
    for wrong, message in (
        (["--beside-rounds", "2"], "--beside-rounds=2: must be given with --beside"),
        ([*flags, "--beside-rounds", "0"], "--beside-rounds=0: must be above 0"),
        ([*flags, "--beside-context", "33"], "--beside-context=33: must be at most a sequence, 32 tokens"),
        (["--no-meters", "--batches", "1", "--beside", str(folder / "nowhere")], "nowhere: no run here"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([str(folder / "teal"), *wrong])


def test_a_model_that_takes_half_as_long_is_twice_as_fast():
    found = compared({"own": [1.0, 2.0, 3.0], "other": [2.0, 4.0, 3.0]}, "own", "other")
    assert found == {"milliseconds": 2.0, "milliseconds_beside": 3.0, "ratio": 2.0, "ratio_quartiles": [1.5, 2.0]}
    assert compared({"a": [2.0], "b": [1.0]}, "a", "b")["ratio_quartiles"] == [0.5, 0.5]


def test_reports_show_quality_needs_and_time_apart(made):
    folder, _, figures = made
    shown = sparsity_after_training(recorded(folder / "teal"))
    assert "Sparsity after training: teal at 0.4" in shown
    assert f"{figures['loss']:.4f} ({figures['loss'] - figures['loss_dense']:+.4f})" in shown
    for name in ("weights", "flops", "bytes"):
        assert f"{figures[name]:,.0f}</td><td>{figures[name] / figures[f'{name}_dense']:.2%}" in shown
    assert "evaluate --beside times a token" in shown
    assert sparsity_after_training(recorded(folder / "dense")) == ""
    names = ("sparsity", "loss_dense", "loss", "tokens")
    pruned = {name: figures[name] for name in names} | {"method": "<wanda>", "zeros": {"q": 0.5}}
    shown = sparsity_after_training(pruned)
    assert "&lt;wanda&gt; at 0.4" in shown
    assert "<td>q</td><td>50.00%</td>" in shown
    assert "save neither memory nor time" in shown


def test_records_that_hold_something_else_are_refused(tmp_path):
    good = {"method": "teal", "sparsity": 0.5, "loss_dense": 2.0, "loss": 2.1, "tokens": 10}
    for changes, message in (({"loss": "2"}, "loss must be a number"), ({"flops_dense": []}, "flops_dense must be a")):
        (tmp_path / "sparsify.json").write_text(json.dumps(good | changes))
        with pytest.raises(UserError, match=message):
            recorded(tmp_path)


def test_packed_decoding_computes_the_masked_form(made):
    """A prompt, then single tokens, over one cache; every layer has a layout of its own."""
    folder, _, _ = made
    model = run_dir.load(folder / "teal").model
    laid_out = packed(model)
    for segment in laid_out.segments:
        assert type(segment.blocks[0].attention) is PackedSparsifiedAttention
        assert type(segment.blocks[0].ffn) is PackedSparsifiedFFN
    tokens = jax.random.randint(jax.random.key(1), (1, 24), 0, 320)
    expected, step, cache, start = forward(model)(tokens).logits, forward(laid_out), laid_out.init_cache(1, 24), 0
    for length in (21, 1, 1, 1):
        out = step(tokens[:, start : start + length], cache=cache)
        np.testing.assert_allclose(out.logits, expected[:, start : start + length], atol=2e-4)
        cache, start = out.cache, start + length


def test_a_layout_without_thresholds_is_refused(made):
    folder, _, _ = made
    with pytest.raises(UserError, match=r"model.*kind=sparsified: has no PyTorch form"):
        huggingface.to_hf(folder / "teal", folder / "hf")
    assert not (folder / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"--sparsity=1.0: must be in \[0, 1\)"),
        ({"sparsity": -0.1}, r"--sparsity=-0.1: must be in \[0, 1\)"),
        ({"maps": ("q", "neurons", "up")}, "can't have neurons beside up or down"),
        ({"gate": "top_k", "quantile": "grid"}, "--quantile=grid: is for --gate threshold"),
        ({"out": "dense"}, "dense: is not empty; name another directory"),
        ({"directory": "teal"}, "teal: is sparsified already; take the run that it was made of"),
        ({"directory": "nowhere"}, "nowhere: no run here"),
        ({"step": 4}, "no step 4"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(made, changes, message):
    folder, command, _ = made
    changes = {name: folder / value if name in ("out", "directory") else value for name, value in changes.items()}
    command = dataclasses.replace(command, **changes)
    with pytest.raises(UserError, match=message) as error:
        sparsify.sparsify(command)
    assert "\n" not in str(error.value)
    assert not (folder / "new").exists()


def test_text_shorter_than_a_sequence_is_refused(made, tmp_path):
    folder, command, _ = made
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("peace")
    short = CalibrationConfig(dataset=str(tmp_path))
    with pytest.raises(UserError, match=r"has \d+ tokens?, less than a sequence of 32"):
        sparsify.sparsify(dataclasses.replace(command, calibration=short))
    assert not (folder / "new").exists()


def test_layers_that_the_method_does_not_know_are_named(made, tmp_path):
    folder, command, _ = made
    _, config, tokenizer = run_dir.load(folder / "dense")
    config = with_values(config, {"model.ffn": PlainFFNConfig(d_ff=48)})
    plain = store(tmp_path / "plain", config, tokenizer)
    with pytest.raises(UserError, match=r"model.ffn.kind=plain: has the maps up, down; neurons,shared_neurons can't"):
        sparsify.sparsify(dataclasses.replace(command, directory=plain, out=tmp_path / "new", method="cats"))
    assert not (tmp_path / "new").exists()
