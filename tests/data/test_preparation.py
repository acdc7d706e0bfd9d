import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from sparsezoo_jax.data import (
    DataConfig,
    evaluation_batches,
    load_prepared,
    open_documents,
    open_tokenizer,
    prepare,
    prepared_batches,
    shards,
    unigram_entropy,
    workers,
)
from sparsezoo_jax.data.claims import Patience, make_free_shards, shard_lease
from sparsezoo_jax.data.documents import Part
from sparsezoo_jax.data.local_files import documents
from sparsezoo_jax.data.manifest import MANIFEST_FILE
from sparsezoo_jax.data.preparation import Preparation
from sparsezoo_jax.data.shards import plan
from sparsezoo_jax.errors import ConfigError, DataError, StorageError
from sparsezoo_jax.lease import Owner

from .conftest import text


def with_cache(config, path):
    return replace(config, cache_dir=str(path))


def contents(path):
    """The files of records by name."""
    return {file.name: file.read_bytes() for file in sorted(Path(path).glob("*.array_record"))}


@pytest.fixture(scope="module")
def many(tmp_path_factory, config):
    """A corpus of six files, each of which becomes a shard."""
    folder = tmp_path_factory.mktemp("many")
    for file in range(6):
        lines = (json.dumps({"text": text(20 * file + n)}) + "\n" for n in range(20))
        (folder / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
    return replace(config, dataset=str(folder), shard_bytes=1)


@pytest.fixture(scope="module")
def made(many, tokenizer, tmp_path_factory):
    """It, prepared by one process."""
    return made_here(preparation(many, tokenizer, tmp_path_factory.mktemp("made") / "out"))


def preparation(config, tokenizer, directory, split="train"):
    opened = open_documents(config, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART_BYTES", 1)  # or small files would be one part
        opened.parts()
    return Preparation(config, split, opened, tokenizer, Path(directory))


def made_here(preparation):
    """The finished split, without other processes."""
    job = preparation.open()
    preparation.make(job, range(job.count), engine=make_free_shards)
    return preparation.finish(job)


def test_counts(config, prepared, tokenizer):
    opened = open_documents(config, "train")
    texts = [opened[i].text for i in range(len(opened))]
    ids = [tokenizer.encode(text) for text in texts]
    assert prepared.num_documents == len(texts)
    assert prepared.num_bytes == sum(len(text.encode()) for text in texts)
    # <bos> is never a target and <eos> always is.
    assert prepared.num_targets == sum(len(one) + 1 for one in ids)
    assert prepared.num_tokens == sum(len(one) + 2 for one in ids)
    targets = Counter(i for one in ids for i in [*one, 2])
    assert prepared.unigrams().tolist() == [targets[i] for i in range(tokenizer.vocab_size)]
    assert (prepared.seq_len, prepared.vocab_size, prepared.pad_id) == (16, tokenizer.vocab_size, 0)
    assert (prepared.split, len(prepared.shards), prepared.skipped) == ("train", 1, {})


@pytest.mark.parametrize("which", ["config", "many"])
def test_records_decode_to_the_documents(which, request, tokenizer, tmp_path):
    config = request.getfixturevalue(which)
    prepared = made_here(preparation(config, tokenizer, tmp_path / "out"))
    opened = open_documents(config, "train")
    (batch,) = evaluation_batches(prepared, prepared.num_records)
    stream = batch["tokens"][batch["segment_ids"] > 0].tolist()
    expected = [i for n in range(len(opened)) for i in [1, *tokenizer.encode(opened[n].text), 2]]
    # The last token of a shard may be a target only.
    missing = len(expected) - len(stream)
    assert missing <= len(prepared.shards) == (6 if which == "many" else 1)
    assert Counter(expected) - Counter(stream) == Counter({2: missing} if missing else {})
    assert prepared.dtype == np.dtype("<u2")


def test_wide_records_for_large_vocabularies(prepared):
    assert dataclasses.replace(prepared, vocab_size=2**16 + 1).dtype == np.dtype("<u4")
    assert dataclasses.replace(prepared, seq_len=2**16).dtype == np.dtype("<u4")
    assert dataclasses.replace(prepared, vocab_size=2**16).dtype == np.dtype("<u2")


def test_chunking_does_not_change_records(config, tokenizer, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_DOCUMENTS", 3)
    again = prepare(with_cache(config, tmp_path), "train", tokenizer)
    assert again.fingerprint == prepared.fingerprint
    assert contents(again.path) == contents(prepared.path)


def test_shards_are_parts_of_about_equal_raw_size():
    parts = [Part(str(i), size) for i, size in enumerate([10, 10, 10, 35, 1, 1, 1, 80, 10])]
    groups = plan(parts, 30)
    assert [list(group) for group in groups] == [[0, 1, 2], [3], [4, 5, 6], [7], [8]]
    assert plan(parts, 10**6) == [range(9)]
    assert len(plan(parts)) == 1
    # By default three gigabytes, a 256th of a smaller corpus, but not too small.
    assert len(plan([Part("", 2**25)] * 3 * 2**15)) == 1024
    assert len(plan([Part("", 2**25)] * 2**11)) == 256
    assert len(plan([Part("", 2**25)] * 16)) == 8
    assert len(plan([Part("", 0)] * 16)) == 8


def test_found_again_without_writing(config, tokenizer, prepared):
    (path,) = Path(prepared.path).glob("*.array_record")
    before = path.stat()
    assert prepare(config, "train", tokenizer) == prepared
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_fingerprint_depends_on_every_input(config, tokenizer, prepared, tmp_path):
    other_tokenizer = type("Other", (), {})()
    other_tokenizer.__dict__.update(tokenizer.__dict__)
    other_tokenizer.fingerprint = "other"
    other_tokenizer.encode_batch = tokenizer.encode_batch
    other_tokenizer.save = tokenizer.save
    fingerprints = [
        prepared.fingerprint,
        prepare(with_cache(config, tmp_path), "validation", tokenizer).fingerprint,
        prepare(with_cache(replace(config, seq_len=8), tmp_path), "train", tokenizer).fingerprint,
        prepare(with_cache(replace(config, validation_fraction=0), tmp_path), "train", tokenizer).fingerprint,
        prepare(with_cache(replace(config, shard_bytes=10**6), tmp_path), "train", tokenizer).fingerprint,
        prepare(with_cache(config, tmp_path), "train", other_tokenizer).fingerprint,
    ]
    assert len(set(fingerprints)) == 6


def test_corpus_without_text(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    config = DataConfig(dataset=str(tmp_path / "x.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"no text to predict \(1 documents\)"):
        prepare(config, "train", tokenizer)
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_shard_without_text_is_none_the_less_there(tokenizer, tmp_path):
    for name, line in (("a", ""), ("b", "peace and law"), ("c", "")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": line}) + "\n")
    config = DataConfig(dataset=str(tmp_path), shard_bytes=1, validation_fraction=0, seq_len=4)
    prepared = made_here(preparation(config, tokenizer, tmp_path / "out"))
    assert [shard.records > 0 for shard in prepared.shards] == [False, True, False]
    batch = next(prepared_batches(prepared, batch_size=2 * prepared.num_records, seed=0))
    assert batch["mask"].sum() == 2 * prepared.num_targets


# --------------------------------------------------------------------------------------------------- Several processes
def test_workers_do_not_change_records(many, tokenizer, made, tmp_path):
    by_two = preparation(many, tokenizer, tmp_path / "two")
    job = by_two.open()
    progress = by_two.make(job, range(6), workers=2)
    prepared = by_two.finish(job)
    assert contents(prepared.path) == contents(made.path)
    assert len(contents(made.path)) == 6
    assert replace(prepared, path="") == replace(made, path="")
    assert (progress.documents, progress.tokens) == (prepared.num_documents, prepared.num_tokens)
    # The manifest has replaced what workers left.
    names = {path.name for path in Path(prepared.path).iterdir()} - contents(prepared.path).keys()
    assert names == {MANIFEST_FILE, "sources.json", "unigrams.npy", "tokenizer.json", "tokenizer_config.json"}


def test_jobs_of_an_array_make_their_own_shards(many, tokenizer, made, tmp_path):
    jobs = [preparation(many, tokenizer, tmp_path) for _ in range(2)]
    first, second = (one.open() for one in jobs)
    jobs[1].make(second, range(1, 6, 2), engine=make_free_shards)
    assert not jobs[1].is_complete(second)
    assert sorted(path.name for path in tmp_path.glob("shard-*.json")) == [
        f"shard-0000{i}-of-00006.json" for i in (1, 3, 5)
    ]
    jobs[0].make(first, range(0, 6, 2), engine=make_free_shards)
    assert jobs[0].is_complete(first)
    assert contents(jobs[0].finish(first).path) == contents(made.path)
    assert jobs[1].finish(second).fingerprint == made.fingerprint


WORK = """
import sys, time
from pathlib import Path
from sparsezoo_jax.data import *
from sparsezoo_jax.data import shards
from sparsezoo_jax.data.claims import make_free_shards
from sparsezoo_jax.data.preparation import Preparation
from sparsezoo_jax.data.local_files import documents
documents.PART_BYTES = 1
corpus, tokenizer_dir, directory, mode = sys.argv[1:]
config = DataConfig(dataset=corpus, seq_len=16, validation_fraction=0.2, shard_bytes=1, bpe_vocab_size=300)
tokenizer = load_tokenizer(tokenizer_dir)
check, count = shards.check_written, 0
def written(*arguments):
    global count
    count += 1
    if mode == "slow" and count == 3:
        print("written", flush=True)
        time.sleep(60)
    return check(*arguments)
shards.check_written = written
made = Preparation(config, "train", open_documents(config, "train"), tokenizer, Path(directory))
job = made.open()
try:
    made.make(job, range(job.count), engine=make_free_shards)
    print(made.finish(job).fingerprint, count)
except Exception as error:
    print(type(error).__name__, error)
"""


def start(config, tokenizer, tmp_path, mode="normal"):
    """A process that prepares into `tmp_path / "out"`; prints the fingerprint and how many shards it made."""
    tokenizer.save(tmp_path / "tokenizer")
    arguments = [config.dataset, tmp_path / "tokenizer", tmp_path / "out", mode]
    return subprocess.Popen(
        [sys.executable, "-c", WORK, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_preparation_goes_on_with_its_shard(many, tokenizer, made, tmp_path):
    process = start(many, tokenizer, tmp_path, "slow")
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    out = tmp_path / "out"
    assert len(list(out.glob("shard-*.json"))) == 2
    assert len(list(out.glob(".shard-*.array_record.*"))) == 1
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.array_record")}
    again = preparation(many, tokenizer, out)
    job = again.open()
    progress = again.make(job, range(6), engine=make_free_shards)
    prepared = again.finish(job)
    assert contents(out) == contents(made.path)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert progress.documents < prepared.num_documents
    assert list(out.glob(".shard-*")) == []


def test_several_starters_share_the_work(many, tokenizer, made, tmp_path):
    processes = [start(many, tokenizer, tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].splitlines()[-1].split() for process in processes]
    assert {fingerprint for fingerprint, _ in outputs} == {made.fingerprint}
    assert sum(int(count) for _, count in outputs) == 6, "no shard is made twice"
    assert contents(tmp_path / "out") == contents(made.path)


def test_waiting_says_so_and_ends(many, tokenizer, tmp_path, capsys):
    config = replace(many, wait_minutes=1e-3)
    waiting = preparation(config, tokenizer, tmp_path)
    job = waiting.open()
    owner = replace(Owner.here(), host="elsewhere", pid=17)
    shard_lease(job, 2).path.write_text(json.dumps(asdict(owner)))
    with pytest.raises(StorageError, match=r"process 17 on elsewhere prepares 1 of 6 shards and finished nothing for"):
        waiting.make(job, range(6), engine=make_free_shards)
    assert "waiting for process 17 on elsewhere, which prepares 1 of 6 shards" in capsys.readouterr().err
    assert sum(shards.read_result(job, shard).documents > 0 for shard in (0, 1, 3, 4, 5)) == 5
    # Its owner is found to be gone.
    shard_lease(job, 2).path.write_text(json.dumps(asdict(replace(Owner.here(), started="0"))))
    waiting.make(job, range(6), engine=make_free_shards)
    assert waiting.is_complete(job)


def test_patience_is_renewed_by_progress(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    patience = Patience(tmp_path, 1)
    now = 59.0
    patience.wait(None, "it")
    patience.renew()
    now = 118.0
    patience.wait(None, "it")
    now = 120.0
    with pytest.raises(StorageError, match="another process prepares it and finished nothing for 1 minutes"):
        patience.wait(None, "it")


def test_what_a_worker_raises_is_raised_here(many, tokenizer, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(many.dataset, folder)
    config = replace(many, dataset=str(folder), on_bad_document="stop")
    broken = preparation(config, tokenizer, tmp_path / "out")
    job = broken.open()
    (folder / "3.jsonl").unlink()
    with pytest.raises(StorageError, match=r"3\.jsonl: No such file"):
        workers.run_workers(job, range(6), 2, lambda *done: None)


def test_a_worker_that_is_killed_is_reported(many, tokenizer, tmp_path):
    made = preparation(many, tokenizer, tmp_path)
    job = made.open()

    def kill():
        """As soon as there is one: it takes a while to start."""
        command = ["pgrep", "-P", str(os.getpid()), "-f", "data.workers"]
        while not (found := subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()):
            time.sleep(0.01)
        os.kill(int(found[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(StorageError, match=r"a worker process was killed \(signal 9; .*the same command goes on"):
        workers.run_workers(job, range(6), 1, lambda *done: None)
    killer.join(timeout=10)


def test_another_directory_is_refused(config, many, tokenizer, made, tmp_path):
    preparation(many, tokenizer, tmp_path).open()
    with pytest.raises(DataError, match="was begun for another corpus, tokenizer or configuration"):
        preparation(config, tokenizer, tmp_path).open()
    with pytest.raises(DataError, match="holds another prepared corpus"):
        preparation(config, tokenizer, made.path).run()


# --------------------------------------------------------------------------------------------------------------- Disks
def test_full_disk(many, tokenizer, tmp_path, monkeypatch):
    opened = "job = made.open()\n"
    full = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    )
    # From here on: what a pass over the corpus found, which the cache keeps, may be as long.
    assert opened in WORK
    monkeypatch.setitem(globals(), "WORK", WORK.replace(opened, opened + full))
    output, _ = start(many, tokenizer, tmp_path).communicate(timeout=60)
    assert output.startswith("StorageError")
    assert "File too large" in output
    assert list((tmp_path / "out").glob("*shard-*.array_record*")) == []


def test_damaged_files_are_reported(config, tokenizer, tmp_path):
    made = prepare(with_cache(config, tmp_path), "train", tokenizer)
    (path,) = Path(made.path).glob("*.array_record")
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    again = prepare(with_cache(config, tmp_path), "train", tokenizer)
    with pytest.raises(StorageError, match=r"damaged prepared corpus.*delete the directory"):
        list(evaluation_batches(again, 4))
    path.unlink()
    with pytest.raises(StorageError, match=r"damaged prepared corpus \(shard-00000-of-00001.*delete the directory"):
        list(evaluation_batches(again, 4))
    (Path(made.path) / "unigrams.npy").write_bytes(b"")
    with pytest.raises(StorageError, match="damaged prepared corpus"):
        unigram_entropy(again, again, again.vocab_size)
    known = json.loads((Path(made.path) / MANIFEST_FILE).read_text())
    (shard,) = known["shards"]
    for change in ({"seq_len": "3"}, {"shards": [shard | {"name": "../x"}]}, {"shards": []}, {"format": "another"}):
        (tmp_path / MANIFEST_FILE).write_text(json.dumps(known | change))
        with pytest.raises(StorageError, match="damaged prepared corpus"):
            load_prepared(tmp_path)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_found_when_it_is_read(config, tokenizer, tmp_path, place):
    made = prepare(with_cache(replace(config, seq_len=64), tmp_path), "train", tokenizer)
    (path,) = Path(made.path).glob("*.array_record")
    content = bytearray(path.read_bytes())
    # Files are filled up to 64 kB, so look for a byte that means something.
    used = [i for i in range(len(content) // 2) if content[i]]
    content[used[int(place * len(used))]] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="damaged prepared corpus"):
        list(evaluation_batches(made, 4))
    with pytest.raises(StorageError, match=r"shard-00000-of-00001\.array_record has another sha256"):
        prepare(with_cache(replace(config, seq_len=64, verify="full"), tmp_path), "train", tokenizer)


def test_cache_that_can_not_be_written(config, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        prepare(with_cache(config, tmp_path / "file"), "train", tokenizer)


# ---------------------------------------------------------------------------------------------- Without the raw text
@pytest.fixture
def directory(many, tokenizer, tmp_path):
    """Both splits, prepared from a corpus that is gone."""
    shutil.copytree(many.dataset, tmp_path / "corpus")
    config = replace(many, dataset=str(tmp_path / "corpus"))
    for split in ("train", "validation"):
        made_here(preparation(config, tokenizer, tmp_path / "out" / split, split))
    shutil.rmtree(tmp_path / "corpus")
    return tmp_path / "out"


def test_a_prepared_corpus_is_read_without_its_text(many, tokenizer, made, directory, monkeypatch):
    for name in (directory, directory / "train" / MANIFEST_FILE):
        config = replace(many, dataset=str(name))
        assert open_tokenizer(config).fingerprint == tokenizer.fingerprint
        prepared = prepare(config, "train", tokenizer)
        assert prepared.fingerprint == made.fingerprint
        assert contents(prepared.path) == contents(made.path)
    assert prepare(replace(many, dataset=str(directory)), "validation", tokenizer).split == "validation"
    with pytest.raises(DataError, match="holds no validation split"):
        prepare(config, "validation", tokenizer)
    config = replace(config, validation_dataset=str(directory / "validation"))
    assert prepare(config, "validation", tokenizer).split == "validation"


def test_a_prepared_corpus_that_does_not_fit(many, config, tokenizer, directory):
    prepared = replace(many, dataset=str(directory))
    with pytest.raises(ConfigError, match=r"data.seq_len=8: must be 16, that of the prepared corpus"):
        prepare(replace(prepared, seq_len=8), "train", tokenizer)
    with pytest.raises(ConfigError, match=r"data.tokenizer=.* is not the one that .* was prepared with"):
        prepare(prepared, "train", replace_fingerprint(tokenizer))
    with pytest.raises(DataError, match="is not the prepared corpus that this run was trained on"):
        prepare(prepared, "train", tokenizer, expected="other")


def replace_fingerprint(tokenizer):
    other = type("Other", (), {})()
    other.__dict__.update(tokenizer.__dict__)
    other.fingerprint = "other"
    return other


def test_a_file_cut_short(config, tokenizer, tmp_path, monkeypatch):
    opened = shards.open_writer

    class Losing:
        """ArrayRecord tells nothing of some errors."""

        def __init__(self, path):
            self.writer = opened(path)
            self.count = 0

        def write(self, row):
            self.count += 1
            if self.count > 1:
                self.writer.write(row)

        def close(self):
            self.writer.close()

    monkeypatch.setattr(shards, "open_writer", Losing)
    with pytest.raises(StorageError, match="was not written completely"):
        prepare(with_cache(config, tmp_path), "train", tokenizer)
    assert not list((tmp_path / "prepared").rglob("*.array_record"))
