import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparsezoo_jax.data import DataConfig, evaluation_batches, load_prepared, open_documents, preparation, prepare
from sparsezoo_jax.errors import DataError, StorageError


def with_cache(config, path):
    return replace(config, cache_dir=str(path))


def test_counts(config, prepared, tokenizer):
    documents = open_documents(config, "train")
    texts = [documents[i].text for i in range(len(documents))]
    assert prepared.num_documents == len(texts)
    assert prepared.num_bytes == sum(len(text.encode()) for text in texts)
    # <bos> is never a target and <eos> always is.
    assert prepared.num_targets == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert (prepared.seq_len, prepared.vocab_size, prepared.pad_id) == (16, tokenizer.vocab_size, 0)


def test_records_decode_to_the_documents(config, prepared, tokenizer):
    documents = open_documents(config, "train")
    (batch,) = evaluation_batches(prepared, prepared.num_records)
    real = batch["segment_ids"] > 0
    stream = batch["tokens"][real].tolist()
    expected = [i for n in range(len(documents)) for i in [1, *tokenizer.encode(documents[n].text), 2]]
    assert stream in (expected, expected[:-1])  # the last token may be a target only
    assert prepared.dtype == np.dtype("<u2")


def test_wide_records_for_large_vocabularies(prepared):
    assert dataclasses.replace(prepared, vocab_size=2**16 + 1).dtype == np.dtype("<u4")
    assert dataclasses.replace(prepared, seq_len=2**16).dtype == np.dtype("<u4")
    assert dataclasses.replace(prepared, vocab_size=2**16).dtype == np.dtype("<u2")


def test_chunking_does_not_change_records(config, tokenizer, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_CHUNK_DOCUMENTS", 3)
    again = prepare(with_cache(config, tmp_path), "train", tokenizer)
    assert again.fingerprint == prepared.fingerprint
    assert Path(again.records_path).read_bytes() == Path(prepared.records_path).read_bytes()


def test_found_again_without_writing(config, tokenizer, prepared):
    before = Path(prepared.records_path).stat()
    assert prepare(config, "train", tokenizer) == prepared
    after = Path(prepared.records_path).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_fingerprint_depends_on_every_input(config, tokenizer, prepared, tmp_path):
    other_tokenizer = type("Other", (), {})()
    other_tokenizer.__dict__.update(tokenizer.__dict__)
    other_tokenizer.fingerprint = "other"
    other_tokenizer.encode_batch = tokenizer.encode_batch
    fingerprints = [
        prepared.fingerprint,
        prepare(with_cache(config, tmp_path), "validation", tokenizer).fingerprint,
        prepare(with_cache(replace(config, seq_len=8), tmp_path), "train", tokenizer).fingerprint,
        prepare(with_cache(replace(config, validation_fraction=0), tmp_path), "train", tokenizer).fingerprint,
        prepare(with_cache(config, tmp_path), "train", other_tokenizer).fingerprint,
    ]
    assert len(set(fingerprints)) == 5


def test_corpus_without_text(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    config = DataConfig(dataset=str(tmp_path / "x.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="no text"):
        prepare(config, "train", tokenizer)
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_damaged_files_are_reported(config, tokenizer, tmp_path):
    made = prepare(with_cache(config, tmp_path), "train", tokenizer)
    os.truncate(made.records_path, made.file_bytes // 2)
    with pytest.raises(StorageError, match=r"damaged prepared corpus.*delete the directory"):
        prepare(with_cache(config, tmp_path), "train", tokenizer)
    (Path(made.path) / "meta.json").write_text(json.dumps({"seq_len": 3}))
    with pytest.raises(StorageError, match="damaged prepared corpus"):
        load_prepared(made.path)


def test_flipped_bits_are_reported(config, tokenizer, tmp_path):
    made = prepare(with_cache(config, tmp_path), "train", tokenizer)
    content = bytearray(Path(made.records_path).read_bytes())
    content[1000:1200] = bytes(200)
    Path(made.records_path).write_bytes(content)
    with pytest.raises(StorageError, match="damaged prepared corpus"):
        list(evaluation_batches(made, 4))


def test_cache_that_can_not_be_written(config, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write the prepared corpus"):
        prepare(with_cache(config, tmp_path / "file"), "train", tokenizer)


PREPARE = """
import resource, signal, sys, time
from sparsezoo_jax.data import *
from sparsezoo_jax.data import preparation
corpus, tokenizer_dir, cache, mode = sys.argv[1:]
config = DataConfig(dataset=corpus, seq_len=16, validation_fraction=0.2, cache_dir=cache)
tokenizer = load_tokenizer(tokenizer_dir)
if mode == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
if mode == "slow":
    check = preparation._check_written
    preparation._check_written = lambda *a: (print("written", flush=True), time.sleep(60))
try:
    print(prepare(config, "train", tokenizer).fingerprint)
except Exception as error:
    print(type(error).__name__, error)
"""


def start(corpus, tokenizer, tmp_path, mode):
    tokenizer.save(tmp_path / "tokenizer")
    arguments = [corpus, tmp_path / "tokenizer", tmp_path / "cache", mode]
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_full_disk_leaves_nothing(corpus, tokenizer, tmp_path):
    output, _ = start(corpus, tokenizer, tmp_path, "full").communicate(timeout=60)
    assert output.startswith("StorageError")
    assert "File too large" in output
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_killed_preparation_leaves_nothing_that_looks_finished(
    config, corpus, tokenizer, prepared, tmp_path, monkeypatch
):
    process = start(corpus, tokenizer, tmp_path, "slow")
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    root = tmp_path / "cache" / "prepared"
    (left,) = root.iterdir()
    assert left.name.startswith(".")
    made = prepare(with_cache(config, tmp_path / "cache"), "train", tokenizer)
    assert Path(made.records_path).read_bytes() == Path(prepared.records_path).read_bytes()
    assert left.exists()  # too young to be called abandoned
    old = time.time() - 3600
    os.utime(left, (old, old))
    prepare(with_cache(replace(config, seq_len=8), tmp_path / "cache"), "train", tokenizer)
    assert not left.exists()


def test_a_directory_in_use_is_not_removed(tmp_path):
    busy = tmp_path / ".busy-1"
    busy.mkdir()
    os.utime(busy, (0, 0))
    with preparation._lock(busy):
        preparation._remove_abandoned(tmp_path)
        assert busy.exists()
    preparation._remove_abandoned(tmp_path)
    assert not busy.exists()


def test_two_processes_at_once(corpus, tokenizer, prepared, tmp_path):
    processes = [start(corpus, tokenizer, tmp_path, "normal") for _ in range(2)]
    outputs = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert outputs == {prepared.fingerprint}
    assert [p.name for p in (tmp_path / "cache" / "prepared").iterdir()] == [prepared.fingerprint]


def test_losing_the_race_keeps_the_winner(config, tokenizer, tmp_path, monkeypatch):
    winner = {}
    check = preparation._check_written

    def overtaken(path, count):
        check(path, count)
        if not winner:
            winner["made"] = True
            winner["made"] = prepare(with_cache(config, tmp_path), "train", tokenizer)

    monkeypatch.setattr(preparation, "_check_written", overtaken)
    assert prepare(with_cache(config, tmp_path), "train", tokenizer) == winner["made"]
    assert len(list((tmp_path / "prepared").iterdir())) == 1
