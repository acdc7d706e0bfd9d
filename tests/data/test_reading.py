"""Files as people have them: formats, compressions, encodings, directories; and what can't be read of them."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import pickle
import re
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sparsezoo_jax import untrusted
from sparsezoo_jax.data import DataConfig, open_documents, prepare, streaming_batches, train_bpe
from sparsezoo_jax.data.dataset_names import COMPRESSIONS, format_of, names_in
from sparsezoo_jax.data.documents import (
    BadDocumentError,
    Document,
    InRanges,
    Skipped,
    changed_files,
    read_all,
    readable,
)
from sparsezoo_jax.data.local_files import documents as local_documents
from sparsezoo_jax.data.local_files import json_values, streams, texts
from sparsezoo_jax.data.skipping import (
    HALF_SURROGATE,
    NO_TEXT,
    NOT_CSV,
    NOT_JSON,
    NOT_TEXT,
    NOT_UTF8,
    NULL_TEXT,
    TOO_LONG,
    Skips,
)
from sparsezoo_jax.errors import DataError, SparsezooWarning, StorageError

TEXTS = ['peace, "law"', "naïve café 日本\nof two lines", "x" * 300]
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress, "": bytes}


def table(separator):
    made = io.StringIO()
    writer = csv.writer(made, delimiter=separator)
    writer.writerows([["n", "text"], *enumerate(TEXTS)])
    return made.getvalue()


LINES = "\r\n\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS)
CONTENTS = {
    "text.txt": TEXTS[1].replace("\n", "\r\n"),
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "array.json": "\n" + json.dumps([{"n": [{"[": ']\\"'}], "text": text} for text in TEXTS], indent=1),
    "objects.json": "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS),
    "commas.csv": table(","),
    "semicolons.csv": table(";"),
    "tabs.tsv": table("\t"),
    "games.pgn": '[White "ä"]\r\n\r\n1. e4 *\r\n\r\n[White "b"]\r\n\r\n1. d4 *\r\n',
}
EXPECTED = {"text.txt": [TEXTS[1]], "games.pgn": [";1.e4", ";1.d4"]}


def opened(path, **fields):
    return open_documents(DataConfig(dataset=str(path), **{"validation_fraction": 0, **fields}), "train")


def texts_of(documents):
    return [document.text for document in readable(read_all(documents))]


def outcomes(documents):
    """What random access gives."""
    found = []
    for index in range(len(documents)):
        try:
            found.append(documents[index])
        except BadDocumentError as error:
            found.append(error.skipped)
    return found


def reasons(documents):
    items = list(read_all(documents))
    assert outcomes(documents) == items
    return [item.reason if isinstance(item, Skipped) else item.text for item in items]


@pytest.mark.parametrize("name", CONTENTS)
def test_formats_compressed_and_with_byte_order_marks(tmp_path, name):
    """Each in every compression and encoding; in order and by index."""
    expected = EXPECTED.get(name, TEXTS)
    for compression in PACK:
        path = tmp_path / (name + compression)
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
            path.write_bytes(PACK[compression](CONTENTS[name].encode(encoding)))
            documents = opened(path, cache_dir=str(tmp_path / "cache"))
            found = list(read_all(documents))
            assert [document.text for document in found] == expected, (compression, encoding)
            assert outcomes(documents) == found
            assert len({document.id for document in found}) == len(expected)


def test_a_directory_of_mixed_files(tmp_path):
    for number, compression in enumerate(PACK):
        content = json.dumps({"text": f"document {number}"}).encode()
        (tmp_path / f"{number}.jsonl{compression}").write_bytes(PACK[compression](content))
    (tmp_path / "BIG.TXT").write_text("big")
    for name in ("._0.txt", ".ipynb_checkpoints/0.txt", "deep/.git/x.txt", "deep/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("no part of the corpus")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "deep" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.warns(SparsezooWarning) as warned:
        documents = opened(tmp_path)
    assert texts_of(documents) == [*(f"document {n}" for n in range(5)), "big"]
    (only,) = warned
    left_out = "._0.txt, .ipynb_checkpoints/, deep/.git/, deep/README.md, deep/gone.txt"
    assert str(only.message) == f"data.dataset={tmp_path}: not read: {left_out}"


def test_names():
    assert names_in("a.txt") == ["a.txt"]
    assert names_in("a.txt, b/*.json,") == ["a.txt", "b/*.json"]
    assert names_in('["a,b.txt", "c"]') == ["a,b.txt", "c"]
    assert names_in("[ab]*.txt") == ["[ab]*.txt"]
    assert format_of("A.JSONL.GZ") == ("jsonl", ".jsonl", ".gz")
    assert format_of("a.parquet.gz") is format_of("a.gz") is format_of("txt") is None
    assert DataConfig(dataset="a/*.pgn.zst, b.PGN").in_blocks
    assert not DataConfig(dataset="a.pgn,b.txt").in_blocks


def test_several_names_keep_their_order(tmp_path):
    for name in ("b/x.txt", "a/x.txt", "a/y.txt", "c,d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(opened(tmp_path / "c,d.txt")) == ["c,d.txt"]
    documents = opened(f"{tmp_path}/b/*.txt,{tmp_path}/a,{tmp_path}/b/x.txt")
    assert [(d.id, d.text) for d in read_all(documents)] == [(n, n) for n in ("b/x.txt", "a/x.txt", "a/y.txt")]
    assert texts_of(opened(json.dumps([str(tmp_path / "c,d.txt"), str(tmp_path / "a")]))) == [
        *("c,d.txt", "a/x.txt", "a/y.txt")
    ]
    with pytest.raises(DataError, match=r"b/none\.txt: no such file or directory$"):
        opened(f"{tmp_path}/a,{tmp_path}/b/none.txt")
    with pytest.raises(DataError, match="hf://owner/name: no such file or directory; only files can be listed"):
        opened(f"{tmp_path}/a,hf://owner/name")


@pytest.mark.parametrize("fraction", [0, 0.3])
def test_parts_are_the_corpus(tmp_path, monkeypatch, fraction):
    """Ranges of any size: each document once, in order, with the number of its line, by index too; in both splits."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": f"{n} " + "word " * (n % 7)} if n % 5 else {"text": None} for n in range(40)]
    lines = "".join(json.dumps(row) + ("\r\n", "\n", "\n\n \n")[i % 3] for i, row in enumerate(rows))
    (folder / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (folder / "b.txt").write_text("one")
    pq.write_table(pa.table({"text": [row["text"] for row in rows]}), folder / "c.parquet", row_group_size=7)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with open(folder / "a.jsonl", encoding="utf-8") as file:
        numbers = [number for number, line in enumerate(file, 1) if line.strip(" \n\ufeff")]
    whole = [f"a.jsonl:{n}" for n in numbers] + ["b.txt"] + [f"c.parquet:{n}" for n in range(40)]
    whole += [f"d.jsonl.gz:{n}" for n in numbers]
    config = DataConfig(dataset=str(folder), validation_fraction=fraction, cache_dir=str(tmp_path / "cache"))
    for size in (13, 50, 333, 10**6):
        monkeypatch.setattr(texts, "PART_BYTES", size)
        monkeypatch.setattr(local_documents, "PART_BYTES", size)
        splits = [open_documents(config, split) for split in ("train", "validation")[: 2 if fraction else 1]]
        parts = splits[0].parts()
        assert len({part.name for part in parts}) == len(parts)
        found = []
        for documents in splits:
            assert documents.parts() == parts
            pieces = [list(documents.read(part)) for part in range(len(parts))]
            flat = [item for piece in pieces for item in piece]
            assert outcomes(documents) == flat
            assert len(documents) == len(flat)
            copy = pickle.loads(pickle.dumps(documents))
            assert [list(copy.read(part)) for part in range(len(parts))] == pieces
            found += flat
        places = [x.id if isinstance(x, Document) else x.where.removeprefix(f"{folder}/") for x in found]
        assert sorted(places) == sorted(whole)
        assert fraction or places == whole
        assert all(len(splits[0]._plan[i]) == 1 or part.bytes <= size for i, part in enumerate(parts))
    assert len(parts) == 1  # all that is small is one part


def test_random_access_alone_has_parts_too(monkeypatch):
    class Corpus(InRanges):
        total_bytes = 1000

        def __len__(self):
            return 10

        def __getitem__(self, index):
            if index == 7:
                raise BadDocumentError("x:7", NOT_UTF8)
            return Document(str(index), "text")

    monkeypatch.setattr("sparsezoo_jax.data.documents.PART_DOCUMENTS", 4)
    assert [len(list(Corpus().read(part))) for part in range(len(Corpus().parts()))] == [4, 4, 2]
    assert [part.bytes for part in Corpus().parts()] == [400, 400, 200]
    assert list(read_all(Corpus()))[7] == Skipped("x:7", NOT_UTF8)


def test_what_changed_in_a_corpus(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    before = opened(tmp_path).contents
    assert changed_files(before, opened(tmp_path).contents) == ""
    (tmp_path / "a.txt").write_text("x.txt")
    (tmp_path / "b.txt").rename(tmp_path / "d.txt")
    assert changed_files(before, opened(tmp_path).contents) == "changed: a.txt; gone: b.txt; new: d.txt"


def test_lines_that_can_not_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 200)
    lines = [
        b'{"meta": {"text": "fine"}}',
        b'{"meta": {"text": null}}',
        b'{"meta": {"text": ["x"]}}',
        b'{"meta": 3, "text": "x"}',
        b'["x"]',
        b'{"meta": {"text": "x"}',
        b'{"meta": {"text": "\xff"}}',
        b'{"meta": {"text": "\\ud800"}}',
        b'{"meta": {"text": "' + b"x" * 500_000 + b'"}}',
        '\ufeff{"meta.text": "joined files"}'.encode(),
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents = opened(path, text_field="meta.text")
    expected = ["fine", NULL_TEXT, NOT_TEXT, NO_TEXT, NOT_JSON, NOT_JSON, NOT_UTF8, HALF_SURROGATE, TOO_LONG]
    assert reasons(documents) == [*expected, "joined files"]
    assert [x.where for x in read_all(documents) if isinstance(x, Skipped)] == [f"{path}:{n}" for n in range(2, 10)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert reasons(opened(tmp_path / "x.jsonl.gz", text_field="meta.text")) == [*expected, "joined files"]


def test_wide_encodings_that_are_damaged(tmp_path):
    lines = [json.dumps({"text": text}).encode("utf-16-le") + b"\n\0" for text in ("one", "two", "three")]
    lines[1] = lines[1].replace(b"w\0", b"\0\xdc")  # the second half of a pair alone
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe" + b"".join(lines))
    assert reasons(opened(tmp_path / "x.jsonl")) == ["one", NOT_UTF8, "three"]
    (tmp_path / "x.txt").write_bytes("text".encode("utf-16") + b"\0")
    assert reasons(opened(tmp_path / "x.txt")) == [NOT_UTF8]
    unmarked = json.dumps({"text": "a"}).encode("utf-16-le")
    (tmp_path / "y.txt").write_bytes(unmarked)
    with pytest.raises(DataError, match=r"y\.txt:1: UTF-16 without a byte-order mark"):
        _ = opened(tmp_path / "y.txt")[0]
    for name, content in (("y.jsonl", unmarked), ("y.json.gz", gzip.compress(unmarked)), ("y.csv", unmarked)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: UTF-16 without a byte-order mark; convert it: iconv"):
            opened(tmp_path / name)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_elements_of_an_array(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_values, "_CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text('\n\n [\n{"text": "a]\\""}, {"text": oops},\n\n  null\n,{"text": {"b": 1}},{"text": "c"}\n]\n')
    documents = opened(path)
    assert reasons(documents) == ['a]"', NOT_JSON, NOT_JSON, NOT_TEXT, "c"]
    lines = [x.id if isinstance(x, Document) else x.where for x in read_all(documents)]
    assert [int(x.rpartition(":")[2]) for x in lines] == [4, 4, 6, 7, 7]
    path.write_text('{\n"text": "a"}{"text": "b"}\n\n{\n"text": 3}')
    assert reasons(opened(path)) == ["a", "b", NOT_TEXT]
    assert [x.id for x in readable(read_all(opened(path)))] == ["x.json:1", "x.json:2"]
    for content, line in (('[{"text": "a"},\n{"text": "b"]', 2), ('[{"text": "a"},\n"b]\n', 2), ('"word"', 1)):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"x\.json:{line}: .* (open from here on|nothing after it can be found)"):
            list(read_all(opened(path)))
    path.write_text("[]")
    with pytest.raises(DataError, match=r"no documents in .*x\.json"):
        opened(path)


def test_rows_of_tables(tmp_path):
    path = tmp_path / "x.csv"
    rows = [b"n,text", b'1,"a ""b""\n,c"', b"2", b"", b"3,\xff", b"4,d,e", b'5,"f"g', b"6,\xc3\xa9", b'7,"open']
    path.write_bytes(b"\r\n".join(rows))
    documents = opened(path)
    assert reasons(documents) == ['a "b"\n,c', NOT_CSV, NOT_UTF8, NOT_CSV, NOT_CSV, "é", NOT_CSV]
    with pytest.raises(DataError, match=r"x\.csv: no column 'body' \(data\.text_field\), its first row is 'n', 'text'"):
        opened(path, text_field="body")
    (tmp_path / "c.jsonl").write_text('{"body": "b"}')
    with pytest.warns(SparsezooWarning, match=r"not read: x\.csv \(no column 'body'.*'n', 'text'\)"):
        assert texts_of(opened(tmp_path, text_field="body")) == ["b"]
    with pytest.raises(DataError, match="no column 'body'"):
        opened(tmp_path, text_field="body", on_bad_document="stop")
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000)  # beyond what Python reads by default
    assert [len(text) for text in texts_of(opened(tmp_path / "long.csv"))] == [200_000]


def test_columns_of_parquet(tmp_path):
    values = ["a", None, "é"]
    inner = [{"text": value} if value else None for value in values]
    columns = {
        "plain": values,
        "large": pa.array(values, pa.large_string()),
        "view": pa.array(values, pa.string_view()),
        "dictionary": pa.array(values).dictionary_encode(),
        "binary": pa.array([b"a", b"\xff", "é".encode()], pa.binary()),
        "doc": pa.array(inner, pa.struct([("text", pa.string())])),
        "deep": [{"a": {"b": value}} for value in values],
        "with.dot": values,
    }
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=2)
    for field in ("plain", "large", "view", "dictionary", "doc.text", "deep.a.b", "with.dot"):
        assert reasons(opened(path, text_field=field)) == ["a", NULL_TEXT, "é"], field
    assert reasons(opened(path, text_field="binary")) == ["a", NOT_UTF8, "é"]
    for field, message in (
        ("doc", r"holds struct<text: string>, not strings"),
        ("doc.x", "no column"),
        ("x", "it has"),
    ):
        with pytest.raises(DataError, match=message):
            opened(path, text_field=field)


def test_parquet_that_grows_without_bound(tmp_path, monkeypatch):
    """Values repeated by their index stay so in memory, and sizes that no honest file declares are refused."""
    path = tmp_path / "x.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * (1 << 20)]))
    pq.write_table(pa.table({"text": text}), path, store_schema=False, compression="zstd")
    before = pa.total_allocated_bytes()
    documents = opened(path)
    each = iter(read_all(documents))
    assert len(documents[299].text) == len(next(each).text) == 1 << 20
    assert pa.total_allocated_bytes() - before < 100 << 20
    # The bound is a gigabyte, which this does not take the time to write.
    monkeypatch.setattr(untrusted, "ALWAYS_HELD", 1 << 20)
    pq.write_table(pa.table({"text": ["x" * (1 << 18)] * 5}), path, use_dictionary=False, compression="zstd")
    with pytest.raises(DataError, match=r"declares arrays of 1,31.* bytes in files of [0-9,]+$"):
        opened(path)


# ------------------------------------------------------------------------------------------------------- The policy


def corpus(tmp_path, good, bad):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"peace and law, number {n}"}) for n in range(good)]
    lines[1:1] = ['{"text": null}', "\x1b[2J"] * (bad // 2)
    path.write_text("\n".join(lines))
    return DataConfig(
        dataset=str(path), validation_fraction=0, bpe_vocab_size=300, seq_len=8, batch_size=2, cache_dir=str(tmp_path)
    )


def test_skipped_documents_are_counted_and_named(tmp_path, tokenizer):
    config = corpus(tmp_path, 40, 4)
    with pytest.warns(SparsezooWarning) as warned:
        prepared = prepare(config, "train", tokenizer)
    assert prepared.num_documents == 40
    name = f"data.dataset={config.dataset}, train split"
    assert str(warned[0].message).startswith(
        f"{name}: 4 of 44 documents skipped (2 not JSON, 2 null in data.text_field); first {config.dataset}:2: needs a "
        "string in 'text' (data.text_field); it has null; "
    )
    assert "x.jsonl:3: not JSON" in str(warned[0].message)
    train_bpe(open_documents(config, "train"), 300, tmp_path)


@pytest.mark.parametrize(
    ("bad", "fields", "message"),
    [
        (
            2,
            {"on_bad_document": "stop"},
            r"^[^ ]*x\.jsonl:2: needs a string in 'text' .*; it has null$",
        ),
        (
            12,
            {},
            r"data\.max_bad_fraction=0\.01: 11 of 12 documents can't be read \(6 null .*, 5 not .*:2: needs",
        ),
        (2, {"max_bad_fraction": 0}, r"data\.max_bad_fraction=0: 1 of 2 documents"),
    ],
)
def test_too_many_or_the_first_stop_every_way_of_reading(tmp_path, tokenizer, bad, fields, message):
    config = DataConfig(**{**vars(corpus(tmp_path, 3, bad)), **fields})
    documents = open_documents(config, "train")
    with pytest.raises(DataError, match=message):
        prepare(config, "train", tokenizer)
    assert not list((tmp_path / "prepared").glob("*"))
    with pytest.raises(DataError, match=message):
        train_bpe(documents, 300, tmp_path, Skips.of(config))
    config = DataConfig(**{**vars(config), "batch_size": 1, "prefetch": 0})
    stream = streaming_batches(config, "train", tokenizer)
    with warnings.catch_warnings(action="ignore"), pytest.raises(DataError, match=r"x\.jsonl:\d+: |can't be read"):
        list(stream)
    stream.close()


def test_streaming_names_what_it_skips(tmp_path, tokenizer):
    config = corpus(tmp_path, 12, 2)
    stream = streaming_batches(config, "train", tokenizer)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        list(itertools.islice(stream, 20))
        stream.close()
    messages = sorted(str(warning.message) for warning in warned)
    assert any(f"data.dataset: skipped {config.dataset}:3: not JSON" in message for message in messages)
    assert re.match(r"data\.dataset: \d+ of \d+ documents skipped \(\d+ n", messages[0])


def test_what_is_left_out_by_rule_is_no_fault():
    skips = Skips(stop=True, max_bad_fraction=0)
    assert skips.take(Skipped("x.pgn:1", "a game with a null move")) is None
    assert skips.take(Document("x.pgn:9", "")) == ("x.pgn:9", "")
    assert skips.summary() == "1 of 2 documents skipped (1 a game with a null move)"
    many = Skips(documents=1098, reasons={NOT_JSON: 10})
    with pytest.raises(DataError, match="11 of 1,099"):
        many.take(Skipped("x", NOT_JSON))
    Skips(documents=1099, reasons={NOT_JSON: 10}).take(Skipped("x", NOT_JSON))


def test_counts_of_workers():
    """They are added in the order of the corpus, and judged together."""
    first, second = Skips(), Skips()
    for number in range(6):
        first.take(Skipped(f"x:{number}", NOT_JSON))
        second.take(Skipped(f"y:{number}", NOT_JSON, "no JSON"))
        second.take(Document(f"y:{number}", ""))
    with pytest.raises(DataError, match=r"12 of 18 documents can't be read \(12 not JSON\): x:0: not JSON; x:1: .*"):
        first.add(second)
    whole = Skips()
    whole.add(second)
    assert whole.as_dict() == second.as_dict()
    assert whole.named == ["y:0: no JSON", "y:1: no JSON", "y:2: no JSON"]


def test_a_disk_that_fails_is_no_bad_document(tmp_path, tokenizer):
    """Exit status 1, whatever the policy: a file that is gone or damaged, however it is read."""
    rows = b"".join(json.dumps({"text": f"number {n} {n * n}"}).encode() + b"\n" for n in range(3000))
    for compression in COMPRESSIONS:
        path = tmp_path / f"x.jsonl{compression}"
        path.write_bytes(PACK[compression](rows)[:-20])
        config = DataConfig(dataset=str(path), validation_fraction=0, seq_len=8, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(StorageError, match=rf"{path.name}: damaged, it can't be decompressed to its end"):
            prepare(config, "train", tokenizer)
        with pytest.raises(StorageError, match="damaged"):
            len(open_documents(config, "train"))
    assert not list((tmp_path / "cache").glob("unpacked/*.lines"))
    for name, content in CONTENTS.items():
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        documents = opened(path)
        assert len(documents.parts()) == 1
        path.unlink()
        with pytest.raises(StorageError, match=r"No such file"):
            list(documents.read(0))


def test_frames_of_zstandard(tmp_path):
    """Several frames, and windows as large as `zstd --long=31` makes them."""
    frames = [zstandard.ZstdCompressor().compress(json.dumps({"text": text}).encode() + b"\n") for text in "ab"]
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    wide = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    frames.append(wide.compress(json.dumps({"text": "c" * 100_000}).encode()) + wide.flush())
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames))
    assert texts_of(opened(tmp_path / "x.jsonl.zst")) == ["a", "b", "c" * 100_000]


def test_a_compressed_file_is_unpacked_once(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    cache = tmp_path / "cache"
    assert opened(path, cache_dir=str(cache))[2].text == TEXTS[2]
    (made,) = (cache / "unpacked").iterdir()
    before = made.stat().st_mtime_ns
    monkeypatch.setattr(texts, "text_of_json", None)
    assert opened(path, cache_dir=str(cache))[1].text == TEXTS[1]
    assert made.stat().st_mtime_ns == before
