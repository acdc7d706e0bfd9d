"""Runs, corpora, caches and reports in object stores: the commands against emulators on loopback."""

import contextlib
import dataclasses
import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tokenizers
import zstandard
from etils.epath import backend

from sparsezoo_jax import (
    autoencoders,
    chess,
    convert,
    evaluate,
    generate,
    huggingface,
    lease,
    prepare,
    report,
    sae,
    storage,
    train,
)
from sparsezoo_jax.data import Component, DataConfig, open_documents, record_file
from sparsezoo_jax.data.chess import generation
from sparsezoo_jax.errors import DataError, StorageError
from sparsezoo_jax.evaluation.chess import games_for
from sparsezoo_jax.huggingface.tensors import open_tensors
from sparsezoo_jax.storage import conditions, objects
from sparsezoo_jax.training import loop
from sparsezoo_jax.training.writers import JsonlWriter
from tests.object_store import BUCKET, DENIED, environment, object_store, s3_store
from tests.test_commands import call, flags
from tests.test_convert import CONFIGS, tensors_of, write

RUN, CORPUS = f"gs://{BUCKET}/run", f"gs://{BUCKET}/corpus"


@pytest.fixture(scope="module")
def gs():
    with object_store() as running:
        yield running


@pytest.fixture(scope="module")
def s3():
    with s3_store() as running:
        yield running


@pytest.fixture(params=["gs", "s3"])
def store(request):
    """Each of the stores, for what all of them must do."""
    return request.getfixturevalue(request.param)


def test_objects_are_files(store, tmp_path):
    path = storage.path(f"{store.root}/files/a/b.txt")
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
    moved = storage.path(f"{store.root}/files/d/c.txt")
    assert storage.files_below(moved.parents[1]) == storage.matching(moved.parents[1] / "*" / "*.txt") == [moved]
    storage.write_atomic(moved, b"1234567890" * 1000)
    after = storage.version(moved)
    assert after.size == before.size
    assert after.changed != before.changed
    assert storage.version(moved) == after
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


def test_text_is_read_from_there(store, tmp_path):
    """Files in every way that they are opened: whole, unpacked, by pyarrow; by name, folder, list and pattern."""
    texts = [f"text {number}" for number in range(6)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[2:4]).encode()
    files = {"a.txt": b"text 0", "b/c.txt.gz": gzip.compress(b"text 1"), "b/d.jsonl.zst": zstandard.compress(lines)}
    pq.write_table(pa.table({"text": texts[4:]}), tmp_path / "e.parquet")
    files |= {"e.parquet": (tmp_path / "e.parquet").read_bytes(), "b/.hidden.txt": b"hidden", "b/other": b"?"}
    for name, content in files.items():
        storage.write_atomic(storage.path(f"{store.root}/texts/{name}"), content)
        storage.write_atomic(tmp_path / "texts" / name, content)

    def documents(root, *names):
        named = json.dumps([f"{root}/{name}" for name in names])
        dataset = named if len(names) > 1 else f"{root}/{names[0]}"
        config = DataConfig(dataset=dataset, validation_fraction=0, cache_dir=str(tmp_path))
        found = open_documents(config, "train")
        return [found[index] for index in range(len(found))]

    for names, count in ((["texts"], 6), (["texts/*/*.gz"], 1), (["texts/e.parquet", "texts/a.txt"], 3)):
        there, here = (documents(root, *names) for root in (store.root, tmp_path))
        assert there == here
        assert len({document.text for document in there} & set(texts)) == len(there) == count
    with pytest.raises(DataError, match=r"no such file or directory"):
        documents(store.root, "texts/missing.txt")
    with pytest.raises(DataError, match=r"no file matches"):
        documents(store.root, "texts/*.pgn")


def test_records_are_read_by_ranges(store, tmp_path):
    random = np.random.default_rng(0)
    # Within a block, over blocks, and an index that is longer than one.
    for count, size in ((1, 10), (3000, 300), (7, 200_000)):
        rows = [random.integers(0, 50 if row % 2 else 256, size, np.uint8).tobytes() for row in range(count)]
        with storage.staged(storage.path(f"{store.root}/records/{count}")) as file:
            writer = record_file.open_writer(file)
            for row in rows:
                writer.write(row)
            writer.close()
        reader = record_file.open_reader(f"{store.root}/records/{count}")
        assert reader.num_records() == count
        chosen = sorted({0, count - 1, *random.integers(0, count, 8).tolist()})
        assert reader.read(chosen) == [rows[row] for row in chosen]
    for damage in (b"", b"x" * 100, store.content("records/7")[:-70_000]):
        storage.write_atomic(storage.path(f"{store.root}/records/bad"), damage)
        with pytest.raises(ValueError, match=r"ends|has"):
            record_file.open_reader(f"{store.root}/records/bad")


def test_a_lease_has_one_owner(store, monkeypatch):
    path = storage.path(f"{store.root}/lease/.lease")
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


def test_a_lease_is_given_back_though_an_answer_was_lost(store, monkeypatch):
    taken = lease.Lease(storage.path(f"{store.root}/lease/lost"))
    assert taken.try_acquire() is None

    def lost(path, content, generation, write=conditions.write_if):
        write(path, content, generation)
        raise objects.StoreError(errno.EIO, "the object store failed", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditions, "write_if", lost)
        with pytest.raises(OSError, match="the object store failed"):
            taken._store.touch()
    assert taken.is_held()
    taken.release()
    assert "lease/lost" not in store.names()


def test_lists_are_not_remembered(store):
    """Nor by a client that another library made, and asked, before."""
    folder = storage.path(f"{store.root}/lists")
    one = storage.write_atomic(folder / "one", b"")
    type(objects.client(folder)).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    objects._client.cache_clear()
    epath = backend.fsspec_backend.fs(f"{folder.scheme}://")
    assert len(epath.ls(str(folder))) == 1
    other = fsspec.filesystem(folder.scheme, skip_instance_cache=True)
    assert list(folder.iterdir()) == [one]
    other.pipe_file(str(folder / "two"), b"")
    assert objects.client(folder) is epath
    assert (folder / "two").is_file()
    assert len(list(folder.iterdir())) == 2


def test_of_two_starters_one_gets_the_lease(store):
    path = storage.path(f"{store.root}/lease/race")
    first, second = lease._ObjectStore(path), lease._ObjectStore(path)
    assert first.read() is second.read() is None
    assert first.replace(None, lease.Owner.here())
    assert not second.replace(None, lease.Owner.here())


def test_rows_that_are_not_in_the_store_go_into_the_checkpoint(gs, tmp_path):
    path = storage.path(f"gs://{BUCKET}/rows/metrics.jsonl")
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 1.0})
    assert len(writer.held()) == 1  # the next copy is not due yet
    writer.flush()
    assert writer.held() == []
    assert json.loads(gs.content("rows/metrics.jsonl"))["step"] == 1
    writer.write(2, {"loss": 1.0})
    writer.write(3, {"loss": 1.0})
    lost = writer.held()
    # The process ends here; another goes on from the checkpoint of step 2, which has them.
    again = JsonlWriter(path, resume_step=2, unlogged=lost[:1])
    again.write(3, {"loss": 2.0})
    again.close()
    rows = [json.loads(line) for line in gs.content("rows/metrics.jsonl").splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_log_without_checkpoints_is_no_loss_in_a_store(gs, tmp_path):
    """A run that was killed before its first checkpoint: only on a disk there would be a directory."""
    row = b'{"step": 1, "loss": 1.0}\n'
    storage.write_atomic(storage.path(f"gs://{BUCKET}/early/metrics.jsonl"), row)
    loop._refuse_lost_checkpoints(storage.path(f"gs://{BUCKET}/early"))
    (tmp_path / "metrics.jsonl").write_bytes(row)
    with pytest.raises(StorageError, match="is missing"):
        loop._refuse_lost_checkpoints(tmp_path)


def test_games_are_read_from_there(store, tmp_path):
    pgn = (Path(__file__).parent / "data" / "games.pgn").read_bytes()
    (tmp_path / "games.pgn").write_bytes(pgn)
    storage.write_atomic(storage.path(f"{store.root}/games/a.pgn"), pgn)
    storage.write_atomic(storage.path(f"{store.root}/games/b.pgn.zst"), zstandard.compress(pgn))

    def texts(dataset, split):
        config = DataConfig(dataset=str(dataset), cache_dir=f"{store.root}/cache", validation_fraction=0.1)
        assert config.in_blocks
        documents = open_documents(config, split)
        return [documents[i].text for i in range(len(documents))]

    # Which games are held out follows from the name of the file.
    whole = sorted(texts(tmp_path / "games.pgn", "train") + texts(tmp_path / "games.pgn", "validation"))
    assert len(whole) == 60
    for name in ("a.pgn", "b.pgn.zst", "*.pgn"):
        parts = [texts(f"{store.root}/games/{name}", split) for split in ("train", "validation")]
        assert all(parts)
        assert sorted(parts[0] + parts[1]) == whole
    # To score a run on that was trained on several corpora.
    config = DataConfig(dataset=None, mixture=(Component(dataset="sotu", weight=1),))
    places = (f"{store.root}/games/a.pgn", str(tmp_path / "games.pgn"))
    there, here = (games_for(config, (place,), 5) for place in places)
    assert [games.texts for games in there] == [games.texts for games in here]


class Players:
    """In place of Stockfish; what it plays says nothing."""

    name = "players"
    before_game = staticmethod(lambda number: None)

    def __init__(self, config):
        self._event = f"sparsezoo_jax: {config.recipe}"

    def play(self, number):
        self.before_game(number)
        return f'[Event "{self._event}"]\n[Site "players"]\n[Round "{number}"]\n\n1. e4 e5 *\n\n'

    def close(self):
        pass


def test_games_are_generated_there(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation, "Players", Players)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "_COPY_SECONDS", 0.0)
    args = ["generate", "--games", 6, "--processes", 1, "--out", f"{store.root}/played/games.pgn"]

    def fails(number):
        # What was played by now is there, for a process that is killed.
        assert number == 0 or "played/games.pgn.partial" in store.names()
        if number == 4:
            raise DataError("stopped in game 4")

    monkeypatch.setattr(Players, "before_game", staticmethod(fails))
    assert call(chess, args, monkeypatch) == 2
    assert store.content("played/games.pgn.partial").count(b"[Round") == 4
    monkeypatch.undo()
    monkeypatch.setattr(generation, "Players", Players)
    assert call(chess, args, monkeypatch) == 0
    assert "6 games, 2 of them played now" in capsys.readouterr().out
    assert [name for name in store.names() if name.startswith("played/")] == ["played/games.pgn"]
    assert call(chess, [*args[:-1], tmp_path / "here" / "games.pgn"], monkeypatch) == 0
    assert store.content("played/games.pgn") == (tmp_path / "here" / "games.pgn").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert call(chess, [*args, "--seed", 1], monkeypatch) == 2
    assert f"{store.root}/played/games.pgn: holds other games" in capsys.readouterr().err


def test_a_tfds_data_set_is_read_from_there(store, tmp_path, monkeypatch):
    own = DataConfig(cache_dir=str(tmp_path))
    here = open_documents(own, "train")
    (root,) = (tmp_path / "tfds").iterdir()
    for file in root.rglob("*"):
        if file.is_file():
            storage.upload(file, storage.path(f"{store.root}/tfds") / file.relative_to(root))
    config = DataConfig(tfds_data_dir=f"{store.root}/tfds", cache_dir=str(tmp_path))
    there = open_documents(config, "train")
    assert (len(there), there.fingerprint) == (len(here), here.fingerprint)
    for index in (100, 3, 4, 5, len(here) - 1, 200, 201):
        assert there[index] == here[index]
    half = open_documents(dataclasses.replace(config, train_split="train[50%:]"), "train")
    assert [half[i].id for i in (0, 1)] == [here[len(here) - len(half) + i].id for i in (0, 1)]
    with pytest.raises(
        DataError, match=rf"sotu: not prepared in {store.root}/other/.* ArrayRecord writes to disks alone"
    ):
        open_documents(dataclasses.replace(config, tfds_data_dir=f"{store.root}/other"), "train")
    features = f"{store.root}/tfds/sotu/1.0.0/features.json"
    storage.write_atomic(storage.path(features), b'{"type": "elsewhere.Feature"}')
    with pytest.raises(DataError, match=f"{features}: names elsewhere.Feature, which is no feature of TFDS"):
        open_documents(config, "train")
    store.remove("tfds/sotu/1.0.0/sotu-train.array_record-00000-of-00001")
    with pytest.raises(StorageError, match=r"sotu-train.*: can't be read \(No such file"):
        there[7]


@pytest.fixture(scope="module")
def llama(gs, tmp_path_factory):
    """A checkpoint in Hugging Face's layout, here and in the store, and a run that was made of it there."""
    source = write(tmp_path_factory.mktemp("llama") / "source", CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    words = {"<unk>": 0, "peace": 1, "</s>": 2}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(str(source / "tokenizer.json"))
    place = f"gs://{BUCKET}/llama"
    for file in source.iterdir():
        storage.copy(file, storage.path(place) / "source" / file.name)
    with pytest.MonkeyPatch.context() as patch:
        temporary = tmp_path_factory.mktemp("temporary")
        patch.setattr(tempfile, "tempdir", str(temporary))
        assert call(convert, ["from-hf", f"{place}/source", f"{place}/run"], patch) == 0
        assert list(temporary.iterdir()) == []
    return source, place


def test_an_autoencoder_is_trained_there(llama, gs, small_corpus, monkeypatch, capsys):
    _, place = llama
    small = ["--sae.features", 32, "--train.steps", 2, "--train.batch-size", 64, "--batches", 1, "--train.layer", 1]
    args = [f"{place}/run", "--dataset", small_corpus, *small, "--sae.k", 3]
    assert call(sae, [*args, "--json"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    made = f"{place}/run/sae/topk-residual-1"
    assert figures["workdir"] == made
    assert json.loads(gs.content("llama/run/sae/topk-residual-1/evaluation.json")) == figures
    autoencoder, stored = autoencoders.load_sae(made)
    assert (stored.source, stored.sae.k) == (f"{place}/run", 3)
    assert autoencoder.encode(np.ones((2, 24), np.float32)).shape == (2, 32)
    assert call(sae, args, monkeypatch) == 2
    assert f"--workdir={made}: is not empty" in capsys.readouterr().err


def test_checkpoints_are_converted_there(llama, gs, tmp_path, monkeypatch, capsys):
    source, place = llama
    tensors = tensors_of(CONFIGS["llama"])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert call(convert, ["to-hf", f"{place}/run", f"{place}/back"], monkeypatch) == 0
    back = safetensors.numpy.load(gs.content("llama/back/model.safetensors"))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    assert gs.content("llama/back/tokenizer.json") == (source / "tokenizer.json").read_bytes()
    # From a store to a disk, and to one in several files.
    assert call(convert, ["to-hf", f"{place}/run", tmp_path / "back"], monkeypatch) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == gs.content("llama/back/model.safetensors")
    huggingface.to_hf(storage.path(f"{place}/run"), storage.path(f"{place}/files"), max_file_bytes=10_000)
    with open_tensors(storage.path(f"{place}/files")) as files:
        assert files.shapes.keys() == tensors.keys()
    for args in (["from-hf", f"{place}/source", f"{place}/back"], ["to-hf", f"{place}/run", f"{place}/source"]):
        assert call(convert, args, monkeypatch) == 2
        assert "is not empty" in capsys.readouterr().err
    storage.write_atomic(storage.path(f"{place}/source/model.safetensors"), b"0123456789")
    assert call(convert, ["from-hf", f"{place}/source", f"{place}/new"], monkeypatch) != 0
    assert f"error: {place}/source/model.safetensors: " in capsys.readouterr().err
    assert not any(name.startswith("llama/new") for name in gs.names())
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_denied_bucket_is_one_line(gs, small_corpus, tmp_path, monkeypatch, capsys):
    for command, args in (
        (sae, [f"gs://{DENIED}/run"]),
        (chess, ["generate", "--out", f"gs://{DENIED}/games.pgn"]),
        (convert, ["from-hf", f"gs://{DENIED}/source", tmp_path / "run"]),
        (convert, ["to-hf", f"gs://{DENIED}/run", tmp_path / "to"]),
        (convert, ["to-hf", tmp_path, f"gs://{DENIED}/to"]),
        (train, [*flags("sotu"), "--data.tfds-data-dir", f"gs://{DENIED}/tfds", "--workdir", tmp_path / "run"]),
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
def run(gs, small_corpus):
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
            env=environment(gs.address),
            stderr=subprocess.PIPE,
            text=True,
        )

        def is_sixth(method, name):
            return name.startswith("run/checkpoints/6") and method == "POST"

        def kill(method, name):
            if is_sixth(method, name):
                process.send_signal(signal.SIGKILL)
            return False

        gs.denies = kill
        _, killed = process.communicate(timeout=500)
        assert process.returncode == -signal.SIGKILL, killed
        said = []
        patch.setattr("sys.stderr", io.StringIO())
        for gs.denies, status in ((is_sixth, 1), (lambda method, name: False, 0)):
            assert call(train, trained, patch) == status, sys.stderr.getvalue()
            said.append(sys.stderr.getvalue())
            sys.stderr.truncate(0)
    return killed, *said


@pytest.mark.slow
def test_a_killed_run_goes_on(run, gs):
    killed, denied, finished = run
    assert "training from step 0 in gs://bucket/run" in killed
    assert "resuming from step 3 in gs://bucket/run" in denied
    (error,) = (line for line in denied.splitlines() if line.startswith("error: "))
    assert "saving a checkpoint in gs://bucket/run/checkpoints failed" in error
    assert "resuming from step 3 in gs://bucket/run" in finished
    names = gs.names()
    assert {"run/config.json", "run/tokenizer.json", "run/evaluation.json", "run/report.html"} <= set(names)
    assert any(name.startswith("run/tensorboard/events") for name in names)
    assert "run/.lease" not in names
    rows = [json.loads(line) for line in gs.content("run/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows if "split" not in row] == list(range(1, 9))
    assert not any(name.startswith("gs:") for name in os.listdir())


@pytest.mark.slow
def test_it_can_be_used_from_there(run, gs, s3, tmp_path, monkeypatch, capsys):
    assert call(evaluate, [RUN, "--json", "--no-meters"], monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["loss"] == pytest.approx(json.loads(gs.content("run/evaluation.json"))["loss"], rel=1e-4)
    assert call(generate, [RUN, "--prompt", "peace", "--max-new-tokens", "4"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith("peace")
    output = f"{s3.root}/reports/one.html"
    assert call(report, [RUN, "--output", output, "--batches", "1"], monkeypatch) == 0
    assert s3.content("reports/one.html").startswith(b"<!")


@pytest.mark.slow
def test_what_is_trained_is_what_a_disk_gives(run, gs, tmp_path):
    from sparsezoo_jax import data

    for name in gs.names():
        if name.startswith("corpus/"):
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(gs.content(name))
    there, here = (data.load_prepared(f"{root}/train") for root in (CORPUS, tmp_path / "corpus"))
    there.verify()
    np.testing.assert_array_equal(there.unigrams(), here.unigrams())
    one, other = (data.prepared_batches(split, batch_size=4, seed=0) for split in (there, here))
    for n in (0, 5):
        np.testing.assert_array_equal(one.batch_at(n)["tokens"], other.batch_at(n)["tokens"])
    one.close()
    other.close()
    shutil.rmtree(tmp_path / "corpus")
    gs.remove("corpus/train/" + there.shards[0].name)
    with pytest.raises(StorageError, match="damaged prepared corpus"):
        data.prepared_batches(there, batch_size=4, seed=0, prefetch=0).batch_at(0)
