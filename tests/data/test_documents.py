import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsezoo_jax.data import DataConfig, open_documents
from sparsezoo_jax.data.documents import BadDocumentError
from sparsezoo_jax.errors import DataError, SparsezooWarning


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def texts(documents):
    return [documents[i].text for i in range(len(documents))]


def ids(documents):
    return [documents[i].id for i in range(len(documents))]


def both_splits(config):
    return open_documents(config, "train"), open_documents(config, "validation")


def test_directory_of_text_files_is_one_document_a_file(tmp_path):
    for n in range(40):
        write(tmp_path / f"sub{n % 2}" / f"{n:02}.txt", f"text {n}")
    train, validation = both_splits(DataConfig(dataset=str(tmp_path), validation_fraction=0.25))
    assert sorted(ids(train) + ids(validation)) == sorted(f"sub{n % 2}/{n:02}.txt" for n in range(40))
    assert 2 <= len(validation) <= 20
    assert set(texts(train)).isdisjoint(texts(validation))


def test_held_out_documents_do_not_depend_on_where_the_corpus_is(tmp_path):
    for n in range(20):
        write(tmp_path / "a" / f"{n}.txt", f"text {n}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (first, held), (second, held_again) = (both_splits(DataConfig(dataset=str(tmp_path / d))) for d in "ab")
    assert ids(held) == ids(held_again)
    assert (first.fingerprint, held.fingerprint) == (second.fingerprint, held_again.fingerprint)
    assert first.fingerprint != held.fingerprint


def test_fingerprint_follows_content_and_names(tmp_path):
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.txt", "two")
    config = DataConfig(dataset=str(tmp_path))
    before = open_documents(config, "train").fingerprint
    write(tmp_path / "b.txt", "owt")
    changed = open_documents(config, "train").fingerprint
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    renamed = open_documents(config, "train").fingerprint
    assert len({before, changed, renamed}) == 3


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_split_is_empty_with_two_documents(tmp_path, fraction):
    write(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    train, validation = both_splits(DataConfig(dataset=str(tmp_path / "x.jsonl"), validation_fraction=fraction))
    assert sorted(texts(train) + texts(validation)) == ["a", "b"]
    assert len(train) == len(validation) == 1


def test_one_document_can_train_but_not_validate(tmp_path):
    path = write(tmp_path / "only.txt", "text")
    assert texts(open_documents(DataConfig(dataset=str(path)), "train")) == ["text"]
    with pytest.raises(DataError, match=r"one document.*data\.validation_dataset"):
        open_documents(DataConfig(dataset=str(path)), "validation")


def test_validation_dataset_is_read_whole(tmp_path):
    train = write(tmp_path / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    other = write(tmp_path / "other.txt", "c")
    config = DataConfig(dataset=str(train), validation_dataset=str(other), validation_fraction=0)
    assert texts(open_documents(config, "train")) == ["a", "b"]
    assert texts(open_documents(config, "validation")) == ["c"]


def test_validation_subdirectory_is_the_validation_split(tmp_path):
    write(tmp_path / "validation" / "v.txt", "v")
    write(tmp_path / "t.txt", "t")
    train, validation = both_splits(DataConfig(dataset=str(tmp_path)))
    assert (texts(train), texts(validation)) == (["t"], ["v"])
    write(tmp_path / "train" / "u.txt", "u")
    train, validation = both_splits(DataConfig(dataset=str(tmp_path)))
    assert (texts(train), texts(validation)) == (["u"], ["v"])


def test_glob_and_home(tmp_path, monkeypatch):
    for name in ("a1.txt", "a2.txt", "b1.txt"):
        write(tmp_path / "deep" / name, name)
    config = DataConfig(dataset=str(tmp_path / "*" / "a?.txt"), validation_fraction=0)
    assert ids(open_documents(config, "train")) == ["deep/a1.txt", "deep/a2.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_documents(DataConfig(dataset="~/deep", validation_fraction=0), "train")) == 3


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    path = write(tmp_path / "x.jsonl", '\n{"body": "é"}\n\n{"body": "last, no newline"}')
    documents = open_documents(DataConfig(dataset=str(path), text_field="body", validation_fraction=0), "train")
    assert ids(documents) == ["x.jsonl:2", "x.jsonl:4"]
    assert texts(documents) == ["é", "last, no newline"]
    with pytest.raises(IndexError):
        documents[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"other": 1}', r"x\.jsonl:2: needs a string in 'text'.*'other'"),
        ('{"text": 3}', r"x\.jsonl:2: needs a string in 'text'"),
        ("[1]", r"x\.jsonl:2: is no JSON object"),
        ('{"text": ', r"x\.jsonl:2: not JSON"),
        ('{"text": "\\ud800"}', r"x\.jsonl:2: .*surrogate"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", f'{{"text": "fine"}}\n{line}\n')
    documents = open_documents(DataConfig(dataset=str(path), validation_fraction=0), "train")
    with pytest.raises(BadDocumentError, match=message):
        texts(documents)


def test_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"x\.txt:1: not UTF-8 at byte offset 3"):
        texts(open_documents(DataConfig(dataset=str(tmp_path / "x.txt")), "train"))
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not UTF-8 at byte 11 of it"):
        texts(open_documents(DataConfig(dataset=str(tmp_path / "x.jsonl"), validation_fraction=0), "train"))


def parquet(path, columns, group=3):
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return DataConfig(dataset=str(path), validation_fraction=0)


def test_parquet_random_access_across_row_groups(tmp_path):
    values = [f"row {i}" for i in range(10)]
    documents = open_documents(parquet(tmp_path / "x.parquet", {"text": values, "n": list(range(10))}), "train")
    order = [9, 0, 3, 2, 8, 5]
    assert [documents[i] for i in order] == [(f"x.parquet:{i}", values[i]) for i in order]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, r"no column 'text'.*body"),
        ({"text": [1]}, "holds int64, not strings"),
        ({"text": ["a", None]}, "row 1 has null in 'text'"),
        ({"text": pa.array([], pa.string())}, "no documents"),
    ],
)
def test_parquet_errors(tmp_path, columns, message):
    config = parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(DataError, match=message):
        texts(open_documents(config, "train"))


def test_damaged_parquet(tmp_path):
    path = write(tmp_path / "x.parquet", "PAR1 not really")
    with pytest.raises(DataError, match=r"x\.parquet: not a Parquet file"):
        open_documents(DataConfig(dataset=str(path)), "train")


def test_all_kinds_of_files_together(tmp_path):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.jsonl", json.dumps({"text": "b"}))
    parquet(tmp_path / "c.parquet", {"text": ["c", "d"]})
    write(tmp_path / "README.md", "ignored in a directory")
    with pytest.warns(SparsezooWarning, match=r"not read: README\.md$"):
        documents = open_documents(DataConfig(dataset=str(tmp_path), validation_fraction=0), "train")
    assert texts(documents) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.txt", "no documents"),
        ("empty.jsonl", "no documents"),
        ("table.xls", r"unknown extension '\.xls'.*\.txt, \.jsonl, .*\.parquet"),
        ("nothing/*.txt", "no file matches"),
        ("missing.txt", "no such file"),
        ("folder", "no files in a known format in this directory; known are .txt, .jsonl"),
    ],
)
def test_unusable_files(tmp_path, name, message):
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "empty.jsonl", "\n\n")
    write(tmp_path / "table.xls", "a,b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        open_documents(DataConfig(dataset=str(tmp_path / name)), "train")
