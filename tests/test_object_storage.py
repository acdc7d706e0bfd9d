"""Runs, corpora, caches and reports in an object store: the commands against an emulator on loopback."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from sparsezoo_jax import evaluate, generate, lease, prepare, report, storage, train
from sparsezoo_jax.data import record_file
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.training import loop
from sparsezoo_jax.training.writers import JsonlWriter
from tests.object_store import BUCKET, DENIED, environment, object_store
from tests.test_commands import call, flags

RUN, CORPUS = f"gs://{BUCKET}/run", f"gs://{BUCKET}/corpus"


@pytest.fixture(scope="module")
def store():
    with object_store() as running:
        yield running


def test_objects_are_files(store, tmp_path):
    path = storage.path(f"gs://{BUCKET}/files/a/b.txt")
    assert not path.exists()
    assert not path.parent.is_dir()
    storage.write_atomic(path, b"0123456789" * 1000)
    assert path.is_file()
    assert not path.is_dir()
    assert path.parent.is_dir()
    assert not path.parent.is_file()
    assert list(path.parent.iterdir()) == list(path.parent.glob("b*")) == [path]
    same = storage.write_atomic(path.with_name("a"), b"")  # named as the folder that it is in
    assert list(path.parent.iterdir()) == [same, path]
    same.unlink()
    assert storage.version(path).size == storage.bytes_below(path.parent) == 10_000
    before = storage.version(path)
    with storage.open_read(path) as file:
        file.seek(5)
        assert file.read(3) == b"567"
        assert len(file.read()) == 10_000 - 8
    path.rename(path.with_name("c.txt"))
    path.parent.rename(path.parent.with_name("d"))
    moved = storage.path(f"gs://{BUCKET}/files/d/c.txt")
    assert storage.files_below(moved.parents[1]) == storage.matching(moved.parents[1] / "*" / "*.txt") == [moved]
    storage.write_atomic(moved, b"0123456789" * 1000)
    assert storage.version(moved).changed != before.changed
    with storage.staged(moved) as file:
        file.write_bytes(b"new")
    assert store.content("files/d/c.txt") == b"new"
    with contextlib.suppress(RuntimeError), storage.staged(moved) as file:
        file.write_bytes(b"half")
        raise RuntimeError
    assert store.content("files/d/c.txt") == b"new"
    storage.remove_tree(moved.parents[1])
    assert not moved.exists()
    with pytest.raises(FileNotFoundError, match="No such file"):
        storage.open_read(moved)


def test_records_are_read_by_ranges(store, tmp_path):
    random = np.random.default_rng(0)
    # Within a block, over blocks, and an index that is longer than one.
    for count, size in ((1, 10), (3000, 300), (7, 200_000)):
        rows = [random.integers(0, 50 if row % 2 else 256, size, np.uint8).tobytes() for row in range(count)]
        with storage.staged(storage.path(f"gs://{BUCKET}/records/{count}")) as file:
            writer = record_file.open_writer(file)
            for row in rows:
                writer.write(row)
            writer.close()
        reader = record_file.open_reader(f"gs://{BUCKET}/records/{count}")
        assert reader.num_records() == count
        chosen = sorted({0, count - 1, *random.integers(0, count, 8).tolist()})
        assert reader.read(chosen) == [rows[row] for row in chosen]
    for damage in (b"", b"x" * 100, store.content("records/7")[:-70_000]):
        storage.write_atomic(storage.path(f"gs://{BUCKET}/records/bad"), damage)
        with pytest.raises(ValueError, match=r"ends|has"):
            record_file.open_reader(f"gs://{BUCKET}/records/bad")


def test_a_lease_has_one_owner(store, monkeypatch):
    path = storage.path(f"gs://{BUCKET}/lease/.lease")
    first, second = (lease.Lease(path, touch_seconds=0.05, stale_seconds=0.2) for _ in range(2))
    assert first.try_acquire() is None
    owner = second.try_acquire()
    assert owner is not None
    assert owner.pid == os.getpid()
    assert first.is_held()
    touched = first.touched()
    while first.touched() == touched:  # its generation shows that the owner lives
        pass
    # The owner is elsewhere and silent: it is taken over once it was watched for long enough.
    first._ended.set()
    first._thread.join()
    monkeypatch.setattr(lease.Owner, "is_local", lambda self: False)
    assert second.try_acquire() is not None
    while second.try_acquire() is not None:
        pass
    assert second.is_held()
    assert not first.is_held()
    # What was lost can be neither touched nor removed.
    first._store.touch()
    first.release()
    assert second.is_held()
    second.release()
    assert not path.exists()


def test_of_two_starters_one_gets_the_lease(store):
    path = storage.path(f"gs://{BUCKET}/lease/race")
    first, second = lease._ObjectStore(path), lease._ObjectStore(path)
    assert first.read() is second.read() is None
    assert first.replace(None, lease.Owner.here())
    assert not second.replace(None, lease.Owner.here())


def test_rows_that_are_not_in_the_store_go_into_the_checkpoint(store, tmp_path):
    path = storage.path(f"gs://{BUCKET}/rows/metrics.jsonl")
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 1.0})
    assert len(writer.held()) == 1  # the next copy is not due yet
    writer.flush()
    assert writer.held() == []
    assert json.loads(store.content("rows/metrics.jsonl"))["step"] == 1
    writer.write(2, {"loss": 1.0})
    writer.write(3, {"loss": 1.0})
    lost = writer.held()
    # The process ends here; another goes on from the checkpoint of step 2, which has them.
    again = JsonlWriter(path, resume_step=2, unlogged=lost[:1])
    again.write(3, {"loss": 2.0})
    again.close()
    rows = [json.loads(line) for line in store.content("rows/metrics.jsonl").splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_log_without_checkpoints_is_no_loss_in_a_store(store, tmp_path):
    """A run that was killed before its first checkpoint: only on a disk there would be a directory."""
    row = b'{"step": 1, "loss": 1.0}\n'
    storage.write_atomic(storage.path(f"gs://{BUCKET}/early/metrics.jsonl"), row)
    loop._refuse_lost_checkpoints(storage.path(f"gs://{BUCKET}/early"))
    (tmp_path / "metrics.jsonl").write_bytes(row)
    with pytest.raises(StorageError, match="is missing"):
        loop._refuse_lost_checkpoints(tmp_path)


def test_a_denied_bucket_is_one_line(store, small_corpus, tmp_path, monkeypatch, capsys):
    for command, args in (
        (train, [*flags(small_corpus), "--workdir", f"gs://{DENIED}/run"]),
        (prepare, ["--data.dataset", f"gs://{DENIED}/text/*.jsonl"]),
        (prepare, ["--data.dataset", small_corpus, "--data.bpe-vocab-size", "300", "--out", f"gs://{DENIED}/out"]),
        (evaluate, [f"gs://{DENIED}/run"]),
    ):
        assert call(command, args, monkeypatch) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert DENIED in error
        assert "access denied (you may not use this bucket)" in error


@pytest.fixture(scope="module")
def run(store, small_corpus):
    """What a run said that was killed while it saved a checkpoint, then was denied that, and then went on to its end.

    Its corpus was prepared in the store.
    """
    for file in small_corpus.rglob("*"):
        if file.is_file():
            storage.upload(file, storage.path(f"gs://{BUCKET}/text") / file.relative_to(small_corpus))
    with pytest.MonkeyPatch.context() as patch:
        named = ["--data.dataset", f"gs://{BUCKET}/text", "--data.cache-dir", f"gs://{BUCKET}/cache"]
        shape = ["--data.seq-len", "32", "--data.bpe-vocab-size", "320", "--data.validation-fraction", "0.2"]
        assert call(prepare, [*named, *shape, "--out", CORPUS], patch) == 0
        trained = [*flags(CORPUS), "--workdir", RUN]
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsezoo_jax.train", *map(str, trained)],
            env=environment(store.address),
            stderr=subprocess.PIPE,
            text=True,
        )

        def is_sixth(method, name):
            return name.startswith("run/checkpoints/6") and method == "POST"

        def kill(method, name):
            if is_sixth(method, name):
                process.send_signal(signal.SIGKILL)
            return False

        store.denies = kill
        _, killed = process.communicate(timeout=500)
        assert process.returncode == -signal.SIGKILL, killed
        said = []
        patch.setattr("sys.stderr", io.StringIO())
        for store.denies, status in ((is_sixth, 1), (lambda method, name: False, 0)):
            assert call(train, trained, patch) == status, sys.stderr.getvalue()
            said.append(sys.stderr.getvalue())
            sys.stderr.truncate(0)
    return killed, *said


@pytest.mark.slow
def test_a_killed_run_goes_on(run, store):
    killed, denied, finished = run
    assert "training from step 0 in gs://bucket/run" in killed
    assert "resuming from step 3 in gs://bucket/run" in denied
    (error,) = (line for line in denied.splitlines() if line.startswith("error: "))
    assert "saving a checkpoint in gs://bucket/run/checkpoints failed" in error
    assert "resuming from step 3 in gs://bucket/run" in finished
    names = store.names()
    assert {"run/config.json", "run/tokenizer.json", "run/evaluation.json", "run/report.html"} <= set(names)
    assert any(name.startswith("run/tensorboard/events") for name in names)
    assert "run/.lease" not in names
    rows = [json.loads(line) for line in store.content("run/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows if "split" not in row] == list(range(1, 9))
    assert not any(name.startswith("gs:") for name in os.listdir())


@pytest.mark.slow
def test_it_can_be_used_from_there(run, store, tmp_path, monkeypatch, capsys):
    assert call(evaluate, [RUN, "--json", "--no-meters"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["loss"] == pytest.approx(json.loads(store.content("run/evaluation.json"))["loss"], rel=1e-4)
    assert call(generate, [RUN, "--prompt", "peace", "--max-new-tokens", "4"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith("peace")
    output = f"gs://{BUCKET}/reports/one.html"
    assert call(report, [RUN, "--output", output, "--batches", "1"], monkeypatch) == 0
    assert store.content("reports/one.html").startswith(b"<!")


@pytest.mark.slow
def test_what_is_trained_is_what_a_disk_gives(run, store, tmp_path):
    from sparsezoo_jax import data

    for name in store.names():
        if name.startswith("corpus/"):
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(store.content(name))
    there, here = (data.load_prepared(f"{root}/train") for root in (CORPUS, tmp_path / "corpus"))
    there.verify()
    np.testing.assert_array_equal(there.unigrams(), here.unigrams())
    one, other = (data.prepared_batches(split, batch_size=4, seed=0) for split in (there, here))
    for n in (0, 5):
        np.testing.assert_array_equal(one.batch_at(n)["tokens"], other.batch_at(n)["tokens"])
    one.close()
    other.close()
    shutil.rmtree(tmp_path / "corpus")
    store.remove("corpus/train/" + there.shards[0].name)
    with pytest.raises(StorageError, match="damaged prepared corpus"):
        data.prepared_batches(there, batch_size=4, seed=0, prefetch=0).batch_at(0)
