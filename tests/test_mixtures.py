"""Training, evaluating and preparing a mixture of corpora, as a user does."""

import json
import shlex

import jax
import numpy as np
import pytest
from flax import nnx

import sparsezoo_jax
from sparsezoo_jax import data, evaluate, prepare, train
from sparsezoo_jax.config import differences, from_json, read_config, to_json
from tests.test_commands import SMALL, call, rows


@pytest.fixture(scope="module")
def mixture(small_corpus, tmp_path_factory):
    """A mixture as JSON, of files and of a field of another file."""
    path = tmp_path_factory.mktemp("codes") / "codes.jsonl"
    lines = ({"meta": {"text": f"QXJ {n} " + "WVK ZZZ " * (20 + n % 9)}} for n in range(40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [
        {"dataset": str(small_corpus), "weight": 3, "name": "texts"},
        {"dataset": str(path), "weight": 1, "text_field": "meta.text", "epochs": 2},
    ]
    return json.dumps(parts)


def flags(mixture, **changes):
    values = {**SMALL, "data.mixture": mixture} | {
        k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()
    }
    return ["--arch", "spark", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def trained(mixture, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "mixed"
    train.main([*flags(mixture), "--workdir", str(workdir)])
    return workdir


@pytest.mark.slow
def test_shares_and_losses_of_each_corpus_are_logged(trained):
    steps = [row for row in rows(trained) if "split" not in row]
    for row in steps:
        assert row["shares/texts"] + row["shares/codes"] == pytest.approx(1)
        assert row["shares/codes"] == pytest.approx(0.25, abs=0.02)
    evaluations = [row for row in rows(trained) if row.get("split") == "validation"]
    assert evaluations
    for row in evaluations:
        assert row["loss"] == pytest.approx(0.75 * row["texts/loss"] + 0.25 * row["codes/loss"])
        assert row["texts/loss"] != row["codes/loss"]
        assert row["codes/bits_per_byte"] > 0
    final = json.loads((trained / "evaluation.json").read_text())
    assert final["corpora"]["codes"]["weight"] == 0.25
    assert 0 < final["bigram_entropy"] < final["unigram_entropy"]


@pytest.mark.slow
def test_stop_and_resume_is_bitwise(trained, mixture, tmp_path, capsys):
    workdir = tmp_path / "halves"
    train.main([*flags(mixture, train__stop_at=4), "--workdir", str(workdir)])
    train.main([*flags(mixture), "--workdir", str(workdir)])
    assert "resuming from step 4" in capsys.readouterr().err

    def course(run):
        names = ("step", "loss", "grad_norm", "shares/texts")
        return [[row[name] for name in names] for row in rows(run) if "split" not in row]

    assert course(workdir) == course(trained)
    a, b = (nnx.state(sparsezoo_jax.load(run).model, nnx.Param) for run in (workdir, trained))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_evaluate_says_it_of_each_corpus(trained, monkeypatch, capsys):
    final = json.loads((trained / "evaluation.json").read_text())
    assert call(evaluate, [trained, "--json"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["corpora"].keys() == {"texts", "codes"}
    for name, found in figures["corpora"].items():
        assert found["loss"] == pytest.approx(final["corpora"][name]["loss"], rel=1e-5)
    assert figures["loss"] == pytest.approx(final["loss"], rel=1e-5)
    assert figures["tokens"] == sum(found["tokens"] for found in figures["corpora"].values())
    assert call(evaluate, [trained, "--no-meters", "--batches", "1"], monkeypatch) == 0
    assert "loss of codes, weight 0.2500" in capsys.readouterr().out


@pytest.mark.slow
def test_another_mixture_is_another_run(trained, mixture, monkeypatch, capsys):
    assert call(train, [*flags(mixture.replace('"weight": 3', '"weight": 4')), "--workdir", trained], monkeypatch) == 2
    assert (
        "holds a run of another configuration: data.mixture[texts].weight is 3.0 there, 4.0 here;"
        in capsys.readouterr().err
    )
    # Where a corpus lies is free.
    config = read_config(trained / "config.json")
    moved = from_json(to_json(config).replace("codes.jsonl", "elsewhere/codes.jsonl"))
    assert moved != config
    assert differences(config, moved) == {}


def test_a_run_that_is_longer_than_its_corpora(mixture, tmp_path, monkeypatch, capsys):
    parts = [{**part, "epochs": 1} for part in json.loads(mixture)]
    args = [*flags(json.dumps(parts), train__steps=100_000), "--workdir", tmp_path / "run"]
    assert call(train, args, monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: train.steps=100000: all corpora of data.mixture have ended after")
    assert not (tmp_path / "run").exists()


def test_every_corpus_is_prepared(mixture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparsezoo_jax.cli.print_table", lambda *_, **__: None)
    own = ["--data.seq-len", "32", "--data.bpe-vocab-size", "300", "--data.validation-fraction", "0.2"]
    prepare.main(["--data.mixture", mixture, "--out", str(tmp_path), *own])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(last.removeprefix("Train on it with "))
    assert [words[0], *words[2:]] == ["--data.mixture", "--data.seq-len", "32"]
    assert [(part["name"], part["weight"], part.get("epochs")) for part in json.loads(words[1])] == [
        ("texts", 3, None),
        ("codes", 1, 2),
    ]
    for name in ("texts", "codes"):
        for split in ("train", "validation"):
            assert data.load_prepared(tmp_path / name / split).split == split
    # Training takes them as they are.
    parts = tuple(data.Component(**part) for part in json.loads(words[1]))
    config = data.DataConfig(dataset=None, mixture=parts, seq_len=32)
    made = data.prepare(config, "train", data.open_tokenizer(config))
    assert [part.split.path for part in made.components] == [str(tmp_path / n / "train") for n in ("texts", "codes")]
    assert call(prepare, ["--data.mixture", words[1], *own], monkeypatch) == 2
    assert "is prepared already" in capsys.readouterr().err
