"""What is S3's own: conditions that a store may lack, its errors, and that checkpoints can't be kept there."""

import json
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import sparsezoo_jax
from sparsezoo_jax import (
    autoencoders,
    chess,
    convert,
    data,
    evaluate,
    generate,
    lease,
    prepare,
    report,
    sae,
    serve,
    sparsify,
    storage,
    theory,
    train,
)
from sparsezoo_jax.data import workers
from sparsezoo_jax.data.local_files import documents
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.storage import conditions, objects, s3
from sparsezoo_jax.training.parameters import save_params
from tests.object_store import BUCKET, DENIED, S3Store, forget_s3_client, s3_store
from tests.test_commands import call, flags
from tests.test_convert import CONFIGS, tensors_of, write

ROOT = f"s3://{BUCKET}"
SHAPE = ["--data.seq-len", "32", "--data.bpe-vocab-size", "320", "--data.validation-fraction", "0.2", "--workers", "1"]
RUN = "s3://bucket/run"


@pytest.fixture(scope="module")
def running():
    with s3_store() as server:
        yield server


@pytest.fixture
def store(running: S3Store):
    """The server, which holds, denies and ignores nothing and has been asked nothing."""
    s3._deletions.clear()
    running.denies = running.ignores = lambda method, name: False
    for name in running.names():
        running.remove(name)
    running.requests.clear()
    yield running
    running.denies = running.ignores = lambda method, name: False


# ----------------------------------------------------------------------------------------------------------- Conditions
@pytest.mark.parametrize("missing", ["If-None-Match", "If-Match"])
def test_a_store_without_conditions_is_refused(store, missing):
    store.ignores = lambda method, condition: method == "PUT" and condition == missing
    taken = lease.Lease(storage.path(f"{ROOT}/none/.lease"))
    wanted = missing.replace("-", "")
    with pytest.raises(objects.StoreError, match=rf"\.lease: the object store ignores {wanted} of conditional writes"):
        taken.try_acquire()
    assert store.names() == []


def test_a_lease_is_emptied_where_deletions_have_no_conditions(store):
    store.ignores = lambda method, condition: method == "DELETE"
    path = storage.path(f"{ROOT}/emptied/.lease")
    first, second = lease.Lease(path), lease.Lease(path)
    assert first.try_acquire() is None
    assert second.try_acquire() is not None
    _, old = conditions.read_versioned(path) or (b"", 0)
    first.release()
    assert store.names() == ["emptied/.lease"]
    assert first.owner() is None
    assert second.try_acquire() is None
    conditions.remove_if(path, old)
    assert second.is_held()
    second.release()


def test_whether_a_store_has_conditions_is_tried_once(store):
    for name in ("a", "b"):
        assert conditions.write_if(storage.path(f"{ROOT}/once/{name}"), b"", 0)
    assert len({name for _, name in store.requests if name.startswith("once/a.")}) == 1
    assert not any(name.startswith("once/b.") for _, name in store.requests)
    assert store.names() == ["once/a", "once/b"]


def test_each_write_is_another_generation(store):
    path = storage.path(f"{ROOT}/generations/a")
    assert conditions.read_versioned(path) is None
    first = conditions.write_if(path, b"same", 0)
    assert first is not None
    second = conditions.write_if(path, b"same", first)
    assert second not in (None, first)
    assert conditions.read_versioned(path) == (b"same", second)
    assert conditions.write_if(path, b"other", first) is None
    conditions.remove_if(path, first)
    assert path.exists()
    conditions.remove_if(path, second)
    assert not path.exists()
    assert conditions.write_if(path, b"other", second) is None


# --------------------------------------------------------------------------------------------------------------- Errors
def failed(command, args, monkeypatch, capsys):
    """Exit status of a command that fails, and its one line."""
    status = call(command, args, monkeypatch)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return status, error


def test_a_denied_bucket_is_one_line(store, small_corpus, tmp_path, monkeypatch, capsys):
    for command, args in (
        (chess, ["generate", "--out", f"s3://{DENIED}/games.pgn"]),
        (convert, ["from-hf", f"s3://{DENIED}/source", tmp_path / "run"]),
        (convert, ["to-hf", tmp_path, f"s3://{DENIED}/to"]),
        (train, ["--data.tfds-data-dir", f"s3://{DENIED}/tfds", "--workdir", tmp_path / "run"]),
        (
            train,
            ["--data.dataset", small_corpus, "--data.cache-dir", f"s3://{DENIED}/cache", "--workdir", tmp_path / "run"],
        ),
        (prepare, ["--data.dataset", f"s3://{DENIED}/text/*.jsonl"]),
        (prepare, ["--data.dataset", small_corpus, "--data.tokenizer", f"s3://{DENIED}/t", "--out", f"{ROOT}/never"]),
        (prepare, ["--data.dataset", small_corpus, *SHAPE, "--out", f"s3://{DENIED}/out"]),
    ):
        status, error = failed(command, args, monkeypatch, capsys)
        assert status == 1
        assert f"s3://{DENIED}/" in error
        assert "access denied (" in error
    assert not any(name.startswith("never/") for name in store.names())


def test_a_bucket_that_is_not_there_is_one_line(store, small_corpus, tmp_path, monkeypatch, capsys):
    for name in ("s3://nowhere/text", "s3://nowhere/*.txt"):
        status, error = failed(prepare, ["--data.dataset", name], monkeypatch, capsys)
        assert status == 2
        assert f"data.dataset={name}: no " in error
    args = ["--data.dataset", small_corpus, *SHAPE, "--out", "s3://nowhere/out"]
    status, error = failed(prepare, args, monkeypatch, capsys)
    assert status == 1
    assert "s3://nowhere/out" in error
    assert "no such bucket" in error


def test_missing_credentials_are_one_line(store, monkeypatch, capsys):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_s3_client()
    status, error = failed(prepare, ["--data.dataset", f"{ROOT}/text"], monkeypatch, capsys)
    forget_s3_client()
    assert status == 1
    assert error == f"error: {ROOT}/text: no credentials (Unable to locate credentials)\n"


def test_a_server_that_is_not_there_is_one_line(store, monkeypatch, capsys):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget_s3_client()
        status, error = failed(prepare, ["--data.dataset", f"{ROOT}/text"], monkeypatch, capsys)
    forget_s3_client()
    assert status == 1
    assert f"{ROOT}/text: the object store failed (Could not connect to the endpoint URL" in error


# ------------------------------------------------------------------------------------------------------ What goes there
def test_a_corpus_is_prepared_there(store, small_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "PART_BYTES", 1)  # a shard for each file
    for file in sorted(small_corpus.iterdir())[:5]:
        storage.copy(file, storage.path(f"{ROOT}/text") / file.name)
        storage.copy(file, tmp_path / file.name)
    shape = [*SHAPE, "--splits", "train", "--data.shard-bytes", "1"]
    args = ["--data.dataset", f"{ROOT}/text", "--data.cache-dir", f"{ROOT}/cache", *shape, "--out", f"{ROOT}/corpus"]
    # It is denied to store its second shard, and goes on with that.
    store.denies = lambda method, name: method == "PUT" and name.startswith("corpus/train/") and "00001-of" in name
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(workers, "can_be_sent", lambda job: False)  # in this process, which is faster
        status, error = failed(prepare, args, monkeypatch, capsys)
    assert status == 1
    assert "access denied (you may not use this bucket)" in error
    first = [name for name in store.names() if name.startswith("corpus/train/") and "00000-of" in name]
    assert len(first) == 2  # records, and what is known of them
    store.denies = lambda method, name: False
    store.requests.clear()
    assert call(prepare, args, monkeypatch) == 0
    assert not {("PUT", name) for name in first} & set(store.requests)
    assert [name for name in store.names() if name.endswith(".lease")] == []
    here = ["--data.dataset", tmp_path / "*.txt", "--data.cache-dir", tmp_path / "cache", *shape]
    monkeypatch.setattr(workers, "can_be_sent", lambda job: False)
    assert call(prepare, [*here, "--out", tmp_path / "corpus"], monkeypatch) == 0
    there, local = (data.load_prepared(f"{root}/corpus/train") for root in (ROOT, tmp_path))
    there.verify()
    assert len(there.shards) == len(local.shards) > 2
    assert data.load_tokenizer(f"{ROOT}/corpus/train").fingerprint == there.tokenizer
    one, other = (data.prepared_batches(split, batch_size=4, seed=0) for split in (there, local))
    for n in (0, 5):
        np.testing.assert_array_equal(one.batch_at(n)["tokens"], other.batch_at(n)["tokens"])
    one.close()
    other.close()


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_published_a_shard_goes_on(store, small_corpus, tmp_path, monkeypatch):
    for file in small_corpus.iterdir():
        storage.upload(file, storage.path(f"{ROOT}/text") / file.name)
    args = [*flags(f"{ROOT}/text"), "--data.cache-dir", f"{ROOT}/cache", "--workdir", tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsezoo_jax.train", *map(str, args)], stderr=subprocess.PIPE, text=True
    )

    def kill(method, name):
        """When the records are there, and what is known of them is to follow."""
        is_result = method == "PUT" and "/shard-" in name and name.endswith(".json")
        if is_result:
            process.send_signal(signal.SIGKILL)
        return is_result

    store.denies = kill
    _, said = process.communicate(timeout=500)
    assert process.returncode == -signal.SIGKILL, said
    (left,) = (name for name in store.names() if name.endswith(".lease"))
    assert left.replace("/.", "/").replace(".lease", ".array_record") in store.names()
    store.denies = lambda method, name: False
    assert call(train, args, monkeypatch) == 0
    assert not any(name.endswith((".lease", "plan.json")) for name in store.names())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "split" not in row] == list(range(1, 9))


def test_checkpoints_of_other_packages_are_read_and_written_there(store, tmp_path, monkeypatch):
    tensors = tensors_of(CONFIGS["llama"])
    source = write(tmp_path / "source", CONFIGS["llama"], tensors)
    words = {"<unk>": 0, "peace": 1, "</s>": 2}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(str(source / "tokenizer.json"))
    for file in source.iterdir():
        storage.copy(file, storage.path(f"{ROOT}/llama/source") / file.name)
    assert call(convert, ["from-hf", f"{ROOT}/llama/source", tmp_path / "run"], monkeypatch) == 0
    assert call(convert, ["to-hf", tmp_path / "run", f"{ROOT}/llama/back"], monkeypatch) == 0
    back = safetensors.numpy.load(store.content("llama/back/model.safetensors"))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    assert store.content("llama/back/tokenizer.json") == (source / "tokenizer.json").read_bytes()


# ---------------------------------------------------------------------------------------------------------- Checkpoints
@pytest.mark.parametrize(
    ("command", "args"),
    [
        (train, ["--workdir", RUN]),
        (train, ["--train.init-from", RUN]),
        (evaluate, [RUN]),
        (evaluate, ["run", "--base", RUN]),
        (evaluate, ["run", "--interpret.sae", RUN]),
        (generate, [RUN, "--prompt", "a"]),
        (generate, ["run", "--prompt", "a", "--base", RUN]),
        (serve, [RUN]),
        (serve, ["run", "--base", RUN]),
        (report, ["run", RUN]),
        (sae, [RUN]),
        (sae, ["run", "--workdir", RUN]),
        (sparsify, [RUN, "out", "--method", "cats"]),
        (sparsify, ["run", RUN, "--method", "cats"]),
        (sparsify, ["run", "out", "--base", RUN, "--method", "cats"]),
        (theory, ["--run", RUN]),
        (convert, ["from-hf", "source", RUN]),
        (convert, ["to-hf", RUN, "out"]),
        (convert, ["merge", RUN, "out"]),
        (convert, ["merge", "run", RUN]),
        (convert, ["merge", "run", "out", "--base", RUN]),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else " ".join(value),
)
def test_what_has_checkpoints_is_refused(command, args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, error = failed(command, args, monkeypatch, capsys)
    assert status == 2
    assert f"={RUN}: must be a path on this machine or gs://; checkpoints can't be kept there, for Orbax takes" in error
    assert not list(tmp_path.iterdir())


def test_the_library_refuses_checkpoints_there(store):
    for use in (
        lambda: sparsezoo_jax.load(RUN),
        lambda: sparsezoo_jax.Run(RUN),
        lambda: autoencoders.load_sae(RUN),
        lambda: save_params(RUN, {"a": np.zeros(1)}),
    ):
        with pytest.raises(ConfigError, match=r"s3://bucket/run: must be .* for Orbax takes no s3:// paths"):
            use()
    assert store.requests == []
