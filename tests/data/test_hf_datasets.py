"""Data sets of the library `datasets`, without a network."""

import socket
import sys

import pytest

from sparsezoo_jax.data import DataConfig, open_documents, prepare, streaming_batches
from sparsezoo_jax.data.documents import Skipped, read_all
from sparsezoo_jax.data.hf_datasets import Name, parse
from sparsezoo_jax.errors import DataError

datasets = pytest.importorskip("datasets")


def rows(prefix, count):
    texts = [f"{prefix} {n}, of peace and law" for n in range(count)]
    return datasets.Dataset.from_dict({"n": list(range(count)), "text": texts, "meta": [{"text": t} for t in texts]})


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parquet files as the hub has them."""
    path = tmp_path_factory.mktemp("hub") / "owner"
    for split, count in (("train", 30), ("validation", 3)):
        (path / "data").mkdir(parents=True, exist_ok=True)
        rows(split, count).to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
    return path


def texts(documents):
    found = list(read_all(documents))
    assert [documents[i] for i in range(len(documents))] == found
    assert len({document.id for document in found}) == len(found)
    return [document.text for document in found]


def both(dataset, **fields):
    config = DataConfig(dataset=str(dataset), **fields)
    return [texts(open_documents(config, split)) for split in ("train", "validation")]


def expected(prefix, count):
    return [f"{prefix} {n}, of peace and law" for n in range(count)]


@pytest.mark.parametrize("field", ["text", "meta.text"])
def test_a_folder_as_the_hub_has_it(folder, field):
    train, validation = both(f"hf://{folder}", text_field=field)
    assert (train, validation) == (expected("train", 30), expected("validation", 3))
    train, validation = both(f"hf://{folder}", text_field=field, validation_split="dev", validation_fraction=0.2)
    assert sorted(train + validation) == sorted(expected("train", 30))
    assert len(train) > 20
    assert validation
    assert both(f"hf://{folder}", train_split="train[10:20]")[0] == expected("train", 30)[10:20]


def test_what_save_to_disk_wrote(tmp_path):
    rows("only", 20).save_to_disk(tmp_path / "one")
    train, validation = both(tmp_path / "one", validation_fraction=0.2)
    assert sorted(train + validation) == sorted(expected("only", 20))
    assert validation
    splits = {"train": rows("a", 5).shuffle(seed=1), "validation": rows("b", 2)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    for name in (tmp_path / "several", f"hf://{tmp_path}/several"):
        train, validation = both(name)
        assert train == splits["train"]["text"]
        assert validation == expected("b", 2)
    before = open_documents(DataConfig(dataset=str(tmp_path / "several")), "train").fingerprint
    rows("c", 5).save_to_disk(tmp_path / "several" / "train")
    assert open_documents(DataConfig(dataset=str(tmp_path / "several")), "train").fingerprint != before


def test_prepared_and_streaming(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsezoo_jax.data.hf_datasets.PART_BYTES", 300)
    monkeypatch.setattr("sparsezoo_jax.data.local_files.documents.PART_BYTES", 300)
    config = DataConfig(dataset=f"hf://{folder}", seq_len=8, batch_size=2, cache_dir=str(tmp_path))
    documents = open_documents(config, "train")
    assert len(documents.parts()) > 2
    assert 600 < sum(part.bytes for part in documents.parts()) < 900  # of text alone
    assert texts(documents) == expected("train", 30)
    assert prepare(config, "train", tokenizer).num_documents == 30
    stream = streaming_batches(config, "train", tokenizer)
    assert next(stream)["mask"].all()
    stream.close()


def test_nulls_are_skipped(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", None, "c"]}).save_to_disk(tmp_path / "x")
    documents = open_documents(DataConfig(dataset=str(tmp_path / "x"), validation_fraction=0), "train")
    a, null, c = read_all(documents)
    assert (a.text, c.text) == ("a", "c")
    assert null == Skipped(f"hf://{tmp_path}/x:1", "null in data.text_field", "row 1 has null in 'text'")


def test_names():
    assert parse("hf://owner/name") == Name("owner/name", None, None)
    assert parse("hf://owner/name:en/dev") == Name("owner/name", "en", "dev")
    assert parse("hf://owner/name/train[:10%]") == Name("owner/name", None, "train[:10%]")
    assert parse("hf://name:en") == Name("name", "en", None)
    for name in ("hf://", "hf://a/b/c/d", "hf://a/b:c:d"):
        with pytest.raises(DataError, match="must be hf://owner/name"):
            parse(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_split": "test"}, r"has no split 'test', it has train, validation$"),
        ({"text_field": "body"}, r"no column 'body' \(data\.text_field\), it has n, text, meta$"),
        ({"text_field": "n"}, r"column 'n' holds int64, not strings"),
        ({"dataset": "hf:///nowhere/x"}, r"data\.dataset=hf:///nowhere/x: no such folder"),
    ],
)
def test_errors(folder, fields, message):
    with pytest.raises(DataError, match=message):
        open_documents(DataConfig(**{"dataset": f"hf://{folder}", **fields}), "train")


def test_without_a_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    with pytest.raises(DataError, match=r"hf://nobody/nothing: the hub can't be reached, and the data set is not in"):
        open_documents(DataConfig(dataset="hf://nobody/nothing"), "train")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets: pip install 'sparsezoo-jax\[hf-data\]'"):
        open_documents(DataConfig(dataset="hf://owner/name"), "train")
