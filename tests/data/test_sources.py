import os
import shutil
import time
from dataclasses import replace

import pytest

from sparsezoo_jax.data import open_documents, prepare, sources, streaming_batches
from sparsezoo_jax.errors import DataError

LONG_AGO = 10**18


@pytest.fixture
def local(config, corpus, tmp_path, monkeypatch):
    """A corpus of its own, in a cache of its own, seen by a process that knows nothing yet."""
    shutil.copytree(corpus.parent, tmp_path / "corpus")
    set_time(tmp_path / "corpus" / corpus.name, LONG_AGO)
    forget(monkeypatch)
    return replace(config, dataset=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))


def set_time(path, nanoseconds):
    os.utime(path, ns=(nanoseconds, nanoseconds))


def forget(monkeypatch):
    """As in another process."""
    monkeypatch.setattr(sources, "_made", {})
    monkeypatch.setattr(sources, "_remembered", {})


@pytest.fixture
def passes(monkeypatch):
    """Names of the files that are read from beginning to end."""
    read, scan = [], sources._scan
    monkeypatch.setattr(sources, "_scan", lambda path, size: read.append(path.name) or scan(path, size))
    return read


def fingerprint(config):
    return open_documents(config, "train").fingerprint


def test_a_file_is_read_once(local, corpus, passes, monkeypatch):
    first = fingerprint(local)
    assert fingerprint(local) == first
    forget(monkeypatch)
    assert fingerprint(local) == first
    assert passes == [corpus.name]
    forget(monkeypatch)
    assert fingerprint(replace(local, verify="full")) == first
    assert passes == 2 * [corpus.name]


def test_a_long_pass_is_announced(local, monkeypatch, capsys):
    monkeypatch.setattr(sources, "_TELL_BYTES", 1)
    fingerprint(local)
    assert "reading 1 files (0 GB) once, to know what they hold" in capsys.readouterr().err
    fingerprint(local)
    assert capsys.readouterr().err == ""


def test_a_moved_or_touched_file_is_read_again_and_is_the_same(local, corpus, passes, monkeypatch, tmp_path):
    first = fingerprint(local)
    set_time(tmp_path / "corpus" / corpus.name, LONG_AGO + 1)
    assert fingerprint(local) == first
    shutil.move(tmp_path / "corpus", tmp_path / "moved")
    forget(monkeypatch)
    moved = replace(local, dataset=str(tmp_path / "moved"))
    assert fingerprint(moved) == first
    assert len(passes) == 3
    forget(monkeypatch)
    assert fingerprint(moved) == first
    assert len(passes) == 3


def test_a_change_that_size_and_time_do_not_show(local, corpus, passes, monkeypatch, tmp_path):
    path = tmp_path / "corpus" / corpus.name
    first = fingerprint(local)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"peace", b"quiet"))
    assert fingerprint(local) != first
    path.write_bytes(content.replace(b"peace", b"quiet"))
    set_time(path, LONG_AGO)
    forget(monkeypatch)
    assert fingerprint(local) == first, "this is the price of not reading"
    assert fingerprint(replace(local, verify="full")) != first


def test_a_file_just_written_is_not_remembered(local, corpus, passes, monkeypatch, tmp_path):
    # It may change again within a tick of the file system's clock.
    set_time(tmp_path / "corpus" / corpus.name, time.time_ns())
    fingerprint(local)
    forget(monkeypatch)
    fingerprint(local)
    assert len(passes) == 2


def test_what_several_processes_remember_is_joined(local, corpus, passes, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_MANY", 3)
    path = tmp_path / "corpus" / corpus.name
    for i in range(6):
        set_time(path, LONG_AGO + i)
        forget(monkeypatch)
        fingerprint(local)
    memory = list((tmp_path / "cache" / sources.MEMORY).rglob("*.json"))
    assert 1 <= len(memory) <= 3
    memory[0].with_name("damaged.json").write_text("[[1, 2]]")
    forget(monkeypatch)
    for i in range(6):
        set_time(path, LONG_AGO + i)
        fingerprint(local)
    assert len(passes) == 6


@pytest.mark.parametrize("mode", ["prepared", "streaming"])
def test_a_run_is_told_what_changed(local, corpus, tokenizer, mode, tmp_path):
    message = (
        rf"data.dataset={local.dataset}: is not what this run was trained on "
        rf"\(changed: {corpus.name}; new: extra.txt\); put it back as it was, or begin another run from"
    )
    if mode == "prepared":
        before = prepare(local, "train", tokenizer).fingerprint
    else:
        stream = streaming_batches(local, "train", tokenizer)
        state = stream.get_state()
        stream.close()
    with open(tmp_path / "corpus" / corpus.name, "a") as file:
        file.write('{"text": "one more line"}\n')
    (tmp_path / "corpus" / "extra.txt").write_text("more text")
    if mode == "prepared":
        with pytest.raises(DataError, match=message):
            prepare(local, "train", tokenizer, expected=before)
        assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 1, "nothing is prepared in vain"
    else:
        stream = streaming_batches(local, "train", tokenizer)
        with pytest.raises(DataError, match=message):
            stream.set_state(state)
        stream.close()


def test_a_file_that_changes_while_it_is_prepared(local, corpus, tokenizer, tmp_path):
    from sparsezoo_jax.data.claims import make_free_shards
    from sparsezoo_jax.data.preparation import Preparation

    making = Preparation(local, "train", open_documents(local, "train"), tokenizer)
    job = making.open()

    def engine(*arguments):
        make_free_shards(*arguments)
        set_time(tmp_path / "corpus" / corpus.name, LONG_AGO + 1)

    with pytest.raises(DataError, match=rf"{corpus.name}: was changed while it was prepared"):
        making.make(job, [0], engine=engine)
    assert not making.is_complete(job)
