"""The commands as a user runs them, on a small corpus of local files."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsezoo_jax
from sparsezoo_jax import cli, data, evaluate, generate, inference, report, sae, train
from sparsezoo_jax.config import read_config
from sparsezoo_jax.configs import PRESETS

SMALL = {
    "model.vocab-size": 320,
    "model.d-model": 32,
    "model.layers": 2,
    "model.max-seq-len": 64,
    "model.attention.heads": 2,
    "model.attention.kv-heads": 1,
    "model.attention.head-dim": 16,
    "model.attention.r": 8,
    "model.attention.top-k": 8,
    "model.attention.window": 16,
    "model.ffn.d-ff": 64,
    "model.ffn.top-k": 6,
    "model.ffn.r": 16,
    "data.bpe-vocab-size": 320,
    "data.seq-len": 32,
    "data.batch-size": 4,
    "data.validation-fraction": 0.2,
    "train.steps": 8,
    "train.log-every": 1,
    "train.checkpoint-every": 3,
    "train.keep-last": 5,
    "eval.batches": 2,
    "eval.meter-batches": 1,
}


def flags(corpus, **changes):
    values = {
        **SMALL,
        "data.dataset": corpus,
        **{k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()},
    }
    return ["--arch", "spark", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def call(command, args, monkeypatch):
    """Run a command's entry point; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    try:
        cli.run(command.main)
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_corpus):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*flags(small_corpus), "--workdir", str(workdir)])
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_run_directory(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "tokenizer.json", "checkpoints", "metrics.jsonl", "evaluation.json", "report.html"} <= names
    steps = [row for row in rows(trained) if "split" not in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all({"loss", "grad_norm", "lr", "ffn_density", "attended_keys"} <= set(row) for row in steps)
    for row in steps:  # 6 of 64 neurons and about 8 keys are aimed at, and stay the aim while the model trains
        assert all(0.05 < density < 0.14 for density in row["ffn_density"])
        assert all(keys <= 1.1 * 8 for keys in row["attended_keys"])
    evaluations = [row for row in rows(trained) if row.get("split") == "validation"]
    assert [row["step"] for row in evaluations] == [3, 6, 8]
    for row in evaluations:
        assert len(row["dead_neurons"]) == 2
        assert all(0 <= dead < 64 for dead in row["dead_neurons"])
        assert "dead_experts" not in row
    final = json.loads((trained / "evaluation.json").read_text())
    assert final["step"] == 8
    assert 0 < final["bigram_entropy"] < final["unigram_entropy"]


@pytest.mark.slow
def test_stop_and_resume_is_bitwise(trained, tmp_path, small_corpus, capsys):
    workdir = tmp_path / "halves"
    train.main([*flags(small_corpus, train__stop_at=4), "--workdir", str(workdir)])
    assert "after step 4" in capsys.readouterr().err
    assert not (workdir / "evaluation.json").exists()
    train.main([*flags(small_corpus), "--workdir", str(workdir)])
    assert "resuming from step 4" in capsys.readouterr().err

    def losses(run):
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run) if "split" not in row]

    assert losses(workdir) == losses(trained)
    a, b = (nnx.state(sparsezoo_jax.load(run).model, nnx.Param) for run in (workdir, trained))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)

    def replayed():
        train.main([*flags(small_corpus), "--workdir", str(workdir), "--debug.replay", "5:6"])
        return [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()[:2]]

    assert replayed() == ["as logged"] * 2
    log = (workdir / "metrics.jsonl").read_text()
    loss = rows(workdir)[[row.get("step") for row in rows(workdir)].index(6)]["loss"]
    (workdir / "metrics.jsonl").write_text(log.replace(f'"loss": {loss}', f'"loss": {loss + 1e-6}'))
    assert [found.partition(":")[0] for found in replayed()] == ["as logged", "NOT as logged"]


@pytest.mark.slow
def test_a_finished_run_stays_finished(trained, tmp_path, small_corpus, monkeypatch, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    before = rows(workdir)
    # A signal in the final evaluation ends it after the batch; started again, the command repeats it.
    (workdir / "evaluation.json").unlink()
    seen = []

    def signalled(*args):
        for batch in evaluation_batches(*args):
            seen.append(len(seen))
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        evaluation_batches = data.evaluation_batches
        patch.setattr(data, "evaluation_batches", signalled)
        assert call(train, [*flags(small_corpus), "--workdir", workdir], patch) == 0
    assert "stopped in the final evaluation; the same command" in capsys.readouterr().err
    assert seen == [0]
    assert not (workdir / "evaluation.json").exists()
    train.main([*flags(small_corpus), "--workdir", str(workdir)])
    assert (workdir / "evaluation.json").exists()
    assert "resuming from step 8" in capsys.readouterr().err
    assert [row for row in rows(workdir) if "split" not in row] == [row for row in before if "split" not in row]


@pytest.mark.slow
def test_load_needs_the_directory_alone(trained, tmp_path, shared_cache, monkeypatch):
    monkeypatch.setenv("SPARSEZOO_CACHE", str(tmp_path / "empty"))
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    model, config, tokenizer = sparsezoo_jax.load(moved)
    assert config.model.d_model == 32
    tokens = jnp.asarray([tokenizer.encode("The state of the union")])
    out = model(tokens)
    assert out.logits.shape == (*tokens.shape, 320)
    earlier = sparsezoo_jax.load(moved, step=3).model(tokens)
    assert not np.allclose(earlier.logits, out.logits)
    merged = sparsezoo_jax.load(moved, merge_last=3).model(tokens)
    assert not np.allclose(merged.logits, out.logits)


def test_the_python_of_the_quick_start(trained, capsys):
    page = Path(__file__).parents[1] / "docs" / "quickstart.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(code.replace("runs/spark-tiny", str(trained)), page.name, "exec"), {})
    assert re.match(r"\(1, \d+, 320\) \[0\.\d+ 0\.\d+\]", capsys.readouterr().out)


@pytest.mark.slow
def test_evaluate(trained, monkeypatch, capsys):
    assert call(evaluate, [trained, "--json"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    final = json.loads((trained / "evaluation.json").read_text())
    assert figures["loss"] == pytest.approx(final["loss"], rel=1e-6)
    assert figures["tokens"] == final["tokens"]
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
    assert len(figures["ffn_density"]) == len(figures["attended_keys"]) == 2
    # The batch size regroups the same tokens.
    assert call(evaluate, [trained, "--json", "--batch-size", "3"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert call(evaluate, [trained, "--split", "train", "--batches", "2"], monkeypatch) == 0
    table = capsys.readouterr().out
    assert "bits per byte" in table
    assert "attended keys" in table


@pytest.mark.slow
def test_a_run_from_elsewhere(trained, tmp_path, small_corpus, monkeypatch, capsys):
    """Its configuration runs nothing, and neither reads nor writes where it says."""
    run, ran, cache = tmp_path / "run", tmp_path / "ran", tmp_path / "cache"
    shutil.copytree(trained, run)
    program = tmp_path / "stockfish"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    values = json.loads((run / "config.json").read_text())
    values["data"] |= {"dataset": "chess", "cache_dir": str(cache)}
    values["data"]["chess"]["stockfish"] = str(program)
    (run / "config.json").write_text(json.dumps(values))
    short = ["--batches", 1, "--no-meters", "--json"]
    warnings.simplefilter("always")  # one process shows a warning once
    for command, args in (
        (evaluate, [run, *short]),
        (evaluate, [run, "--chess"]),
        (evaluate, [run, "--interpret"]),
        (report, [run]),
        (sae, [run]),
    ):
        assert call(command, args, monkeypatch) == 2
        warning, error = capsys.readouterr().err.splitlines()
        assert warning.startswith(f"warning: {run}/config.json: ignored, for it was not written by you")
        assert str(program) in warning
        assert error.startswith("error: data.dataset=None: must be named: --dataset")
    assert call(evaluate, [run, *short, "--dataset", small_corpus], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    assert call(evaluate, [trained, *short], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == figures["loss"]
    assert call(generate, [run, "--prompt", "The", "--max-new-tokens", 2], monkeypatch) == 0
    assert not ran.exists()
    assert not cache.exists()


@pytest.mark.slow
def test_calibration_of_the_split(trained, monkeypatch, capsys):
    assert call(evaluate, [trained, "--json", "--no-meters", "--batches", 2, "--calibration"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    found = figures["calibration"]
    assert found["predictions"] == sum(found["bins"]) == figures["tokens"]
    assert found["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert call(evaluate, [trained, "--no-meters", "--batches", 2, "--calibration"], monkeypatch) == 0
    assert f"{found['ece']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_number_formats_of_weights(trained, monkeypatch, capsys):
    args = [trained, "--json", "--no-meters", "--batches", 2]

    def figures(*formats):
        assert call(evaluate, [*args, *formats], monkeypatch) == 0
        return json.loads(capsys.readouterr().out)

    assert "packed" not in figures()
    same = figures("--weights", "float32")["packed"]
    assert same["formats"] == "weights float32"
    assert abs(same["change"]) < 1e-4
    rounded = figures("--weights", "int8")
    assert rounded["packed"]["loss"] == rounded["loss"] + rounded["packed"]["change"]
    assert 1e-6 < abs(rounded["packed"]["change"]) < 0.05
    part = figures("--predictor", "int8", "--head", "bfloat16")["packed"]
    assert part["formats"] == "weights model, predictor int8, head bfloat16"
    assert part["change"] != rounded["packed"]["change"]
    assert call(evaluate, [*args[:2], "--weights", "int8", "--chess"], monkeypatch) == 2
    assert "can't be given with number formats" in capsys.readouterr().err


def test_meters(trained, monkeypatch, capsys):
    args = [trained, "--json", "--batches", 1, "--meter-batches", 1, "--contexts", 64, 128]
    assert call(evaluate, args, monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    layers = figures["meters"]["layers"]
    assert [layer["ffn"]["density"] for layer in layers] == pytest.approx(figures["ffn_density"], rel=1e-5)
    keys = [layer["attention"]["attended"]["mean"] for layer in layers]
    assert keys == pytest.approx(figures["attended_keys"], rel=1e-5)
    assert all(0.5 < layer["ffn_selection"]["recall"] <= 1 for layer in layers)
    assert all(0 < flow["dims_50"] < flow["dims_90"] <= 32 for layer in layers for flow in layer["flow"].values())
    counts = figures["parameters"]
    assert counts["activated_layers"] < counts["non_embedding"] < counts["total"]
    assert counts["activated_head"] == 320 * 32
    variants = [(cost["context"], cost["variant"]) for cost in figures["costs"]]  # 64 neurons have no gated twin
    assert variants == [(context, name) for context in (64, 128) for name in ("configured", "measured")]
    assert call(evaluate, [trained, "--batches", 1, "--no-meters", "--json"], monkeypatch) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain == {name: value for name, value in figures.items() if name not in ("meters", "costs", "parameters")}
    for extra, message in (
        (["--meter-batches", 0], "--meter-batches=0: must be above 0"),
        (["--contexts", 64, 0], "--contexts=0: must be above 0"),
    ):
        assert call(evaluate, [trained, *extra], monkeypatch) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_activation_ratio(trained, monkeypatch, capsys):
    args = [trained, "--no-meters", "--batches", 1, "--meter-batches", 1, "--json"]
    assert call(evaluate, [*args, "--cett", "1%", "--cett-last", 2, "--cett-curve"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    found = figures["activation"]
    assert [row["step"] for row in found["checkpoints"]] == [6, 8]
    assert all(0 < ratio < 0.2 for row in found["checkpoints"] for ratio in row["activation_ratio"])
    # The same batch was calibrated on; one checkpoint may lose more than the other.
    increases = [row["increase"] for row in found["checkpoints"]]
    assert np.mean(increases) <= 0.01 + 1e-4
    assert found["loss"] - figures["loss"] == pytest.approx(np.log1p(increases[-1]), abs=1e-5)
    exact = found["curve"][0]
    assert exact["setting"] == 0
    assert exact["activation_ratio"] == pytest.approx(figures["ffn_density"], abs=1e-3)
    for extra, message in (
        (["--cett", "0%"], "--cett=0%: must be a percentage above 0% and below 100%, such as 1%"),
        (["--cett", "100%"], "--cett=100%: must be a percentage"),
        (["--cett", "1%", "--cett-last", 9], "--cett-last=9: "),
        (["--cett-last", 2], "--cett-last=2: must be given with --cett"),
        (["--cett-curve"], "--cett-curve=True: must be given with --cett"),
        (["--cett", "1%", "--cett-last", 2, "--merge-last", 2], "--cett-last=2: can't be given with --merge-last"),
    ):
        assert call(evaluate, [*args, *extra], monkeypatch) == 2
        assert message in capsys.readouterr().err
    assert call(evaluate, [*args[:-1], "--cett", "5%"], monkeypatch) == 0
    assert "loss of the split with it applied" in capsys.readouterr().out


def test_report(trained, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / name)
    (tmp_path / "a" / "report.html").unlink()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    args = ["--batches", 1, "--contexts", 64]
    assert call(report, [tmp_path / "a", *args, "--cett", "1%"], monkeypatch) == 0
    assert "Activation ratio over training" in (tmp_path / "a" / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "report.html")
    final = json.loads((trained / "evaluation.json").read_text())
    assert f"{final['loss']:.4f}" in (tmp_path / "a" / "report.html").read_text()
    monkeypatch.chdir(tmp_path)
    assert call(report, ["a", "b", *args], monkeypatch) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<h2>a</h2>" in page
    assert "1 lines of metrics.jsonl are no metrics" in page
    for bad, message in (
        (["a", "missing"], "missing: no run here"),
        (["a", "a"], "a: named twice"),
        (["a", "--output", tmp_path], "is a directory; name a file"),
        (["a", "--output", "no/such/report.html"], "there is no directory no/such"),
        (["a", "--batches", 0], "--batches=0: must be above 0"),
        (["a", "--contexts", 0], "--contexts=0: must be above 0"),
        (["a", "--cett", "1"], "--cett=1: must be a percentage above 0% and below 100%"),
        ([], "DIR"),
    ):
        assert call(report, bad, monkeypatch) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert "Traceback" not in captured
    assert (tmp_path / "report.html").read_text() == page
    (tmp_path / "b" / "evaluation.json").write_text("{")
    assert call(report, ["b", *args], monkeypatch) == 1
    assert "evaluation.json: can't be read" in capsys.readouterr().err


def test_bits_per_byte_is_what_it_says(trained, small_corpus):
    from sparsezoo_jax import data
    from sparsezoo_jax.config import read_config

    config = read_config(trained / "config.json").data
    documents = data.open_documents(config, "validation")
    size = sum(len(documents[i].text.encode()) for i in range(len(documents)))
    final = json.loads((trained / "evaluation.json").read_text())
    assert final["bits_per_byte"] == pytest.approx(final["loss"] * final["tokens"] / np.log(2) / size)


@pytest.mark.slow
def test_generate(trained, monkeypatch, capsys):
    read = []
    continued = inference.Engine.generate

    def spy(engine, prompts, **kwargs):
        read.extend(prompts)
        return continued(engine, prompts, **kwargs)

    monkeypatch.setattr(inference.Engine, "generate", spy)
    args = [trained, "--prompt", "The state", "--max-new-tokens", 12, "--temperature", 0]
    assert call(generate, args, monkeypatch) == 0
    text = capsys.readouterr().out
    assert text.startswith("The state")
    model, _, tokenizer = sparsezoo_jax.load(trained)
    ids = [tokenizer.bos_id, *tokenizer.encode("The state")]
    assert read == [ids]
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)
    for _ in range(12):
        padded = jnp.asarray([ids + [0] * (32 - len(ids))])
        token = int(jnp.argmax(forward(state, padded)[0, len(ids) - 1]))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    assert tokenizer.decode(ids[1:]).strip() == text.strip()

    drawn = []
    for seed in (1, 1, 2):
        sampled = [trained, "--prompt", "The", "--max-new-tokens", 12, "--top-p", 0.9, "--top-k", 50, "--seed", seed]
        assert call(generate, sampled, monkeypatch) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]

    both = [trained, "--prompt", "The state", "The", "--max-new-tokens", 12, "--temperature", 0, "--stats"]
    assert call(generate, both, monkeypatch) == 0
    output = capsys.readouterr()
    assert output.out.startswith(text.strip() + "\n\nThe")
    for said in ("tokens/s", "MB for each token", "active neurons, by layer", "attended keys, by layer"):
        assert said in output.err
    template = trained / "chat_template.jinja"
    template.write_text("{{ bos_token }}{{ messages[0].content }} {{ messages[1].content }}")
    chat = [trained, "--chat", "--system", "The", "--prompt", "state", "--max-new-tokens", 12, "--temperature", 0]
    assert call(generate, chat, monkeypatch) == 0
    assert capsys.readouterr().out.strip() == text.removeprefix("The state").strip()
    assert read[-1] == read[0]
    template.unlink()
    drafts = [trained, "--prompt", "The state", "--max-new-tokens", 12, "--temperature", 0, "--drafts", 3, "--stats"]
    assert call(generate, drafts, monkeypatch) == 0
    assert capsys.readouterr().out == text
    assert call(generate, [*drafts, "--stop-ids", 99999], monkeypatch) == 2
    assert "--stop-ids=99999: must be a token" in capsys.readouterr().err


def test_bad_corpora(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Café".encode("latin-1"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab"')
    for changes, message in (
        ({"data__dataset": empty}, "empty"),
        ({"data__dataset": latin}, "UTF-8"),
        ({"data__dataset": tmp_path / "missing.txt"}, "missing.txt"),
        ({"data__tokenizer": broken}, "tokenizer.json"),
    ):
        args = flags(str(small_text(tmp_path)), **changes)
        assert call(train, [*args, "--workdir", workdir], monkeypatch) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
        assert not workdir.exists()


def small_text(folder):
    path = folder / "text"
    path.mkdir(exist_ok=True)
    for i in range(4):
        (path / f"{i}.txt").write_text("peace and law " * 40)
    return path


def test_bad_directories(trained, tmp_path, small_corpus, monkeypatch, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*"))
    wider = flags(small_corpus, model__ffn__top_k=7)
    assert call(train, [*wider, "--workdir", trained], monkeypatch) == 2
    assert "another configuration: model.ffn.top_k is 6 there, 7 here" in capsys.readouterr().err
    assert call(train, [*flags(small_corpus), "--workdir", trained, "--fresh"], monkeypatch) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*")) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    assert call(train, [*flags(small_corpus), "--workdir", foreign], monkeypatch) == 2
    assert "holds files but no run (thesis.tex)" in capsys.readouterr().err
    assert call(train, [*flags(small_corpus), "--workdir", foreign / "thesis.tex"], monkeypatch) == 2
    assert "is a file" in capsys.readouterr().err
    for command, extra in ((evaluate, []), (generate, ["--prompt", "x"])):
        assert call(command, [foreign, *extra], monkeypatch) == 2
        assert "no run here" in capsys.readouterr().err
        assert call(command, [trained, "--step", 77, *extra], monkeypatch) == 2
        assert "step 77" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens=0: must be above 0"),
        (["--prompt", "x", "--max-new-tokens", "64"], "exceed model.max_seq_len=64"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature=-1.0: must be 0 or above"),
        (["--prompt", "x", "--top-p", "0"], "--top-p=0.0: must be above 0"),
        ([], "error: --prompt: needed; "),
        (["--prompt", "x", "--topk", "1"], "error: --topk: no such flag (did you mean --top-k?); "),
    ],
)
def test_bad_generation_flags(trained, extra, message, monkeypatch, capsys):
    assert call(generate, [trained, *extra], monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_prompt_with_characters_the_tokenizer_lacks(trained, tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "peace": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(run / "tokenizer.json"))
    assert call(generate, [run, "--prompt", "peace \u2603"], monkeypatch) == 2
    assert "\u2603" in capsys.readouterr().err


def test_a_run_from_another_one_has_its_model(trained, tmp_path, small_corpus, monkeypatch):
    run = tmp_path / "run"
    source = tmp_path / "source"
    source.mkdir()
    for path in trained.iterdir():
        (source / path.name).symlink_to(path)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    args = ["--train.init-from", source, "--workdir", run, "--data.dataset", small_corpus, "--data.batch-size", 2]
    args += ["--data.seq-len", 16, "--steps", 2, "--train.schedule.warmup-steps", 0, "--eval.no-report"]
    assert call(train, [*args, "--model.ffn.top-k", 5, "--train.stop-at", 1], monkeypatch) == 0
    of_both = [read_config(folder / "config.json").model for folder in (trained, run)]
    assert of_both[1] == dataclasses.replace(of_both[0], ffn=dataclasses.replace(of_both[0].ffn, top_k=5))
    assert (run / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    assert (run / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    # It goes on without that other run.
    shutil.rmtree(source)
    parsed = cli.parse_with_preset(
        train.Train, [*map(str, args), "--model.ffn.top-k", "5"], prog="train", description=""
    )
    assert parsed.model == of_both[1]
    assert call(train, [*args, "--model.ffn.top-k", 5], monkeypatch) == 0
    assert [row["step"] for row in rows(run) if "split" not in row] == [1, 2]
    other = cli.parse_with_preset(
        train.Train, ["--arch", "dense", "--train.init-from", str(trained)], prog="train", description=""
    )
    assert other.model == PRESETS["dense"]["tiny"].model
