"""What a prepared split consists of: a directory with many files of records, and a manifest that says what they hold.

    shard-00000-of-00003.array_record ...   records of T+1 tokens and their segment ids
    unigrams.npy                            how often each token is a target, int64 [V]
    sources.json                            the files of the corpus: name, bytes, time of change, sha256
    tokenizer.json                          or tokenizer.model
    manifest.json                           written last: a directory that has it is complete

Nothing else is needed to train on it. All of it may come from somebody else, so nothing is believed (docs/security.md).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparsezoo_jax import storage
from sparsezoo_jax.data.documents import Split
from sparsezoo_jax.data.packing import Records
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.untrusted import MAX_SIZE, printable, read_json

MANIFEST_FILE, UNIGRAMS_FILE, SOURCES_FILE = "manifest.json", "unigrams.npy", "sources.json"
#: Says that a manifest is one of this package, for other programs call their files so, too.
FORMAT = "sparsezoo_jax prepared split 1"
#: Bytes of a manifest: that of a million shards.
MAX_MANIFEST_BYTES = 1 << 28
#: Bytes before the numbers of a .npy file; its own are 128.
_MAX_NPY_HEAD = 1 << 12
_AGAIN = "delete the directory to prepare it again"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of records.

    Attributes:
      name: of the file.
      records: in it.
      bytes: its size.
      sha256: of its content.
    """

    name: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """A tokenised and packed split on disk.

    Attributes:
      path: its directory.
      split: 'train' or 'validation'.
      fingerprint: of (documents, tokenizer, seq_len, recipe, sizes of shards); equal fingerprints mean equal records.
      documents, tokenizer: fingerprints of what it was made of.
      recipe: how documents became records.
      num_records: records of `seq_len + 1` tokens.
      num_targets: tokens that are predicted, over all records.
      num_tokens: tokens of the documents, specials included.
      num_bytes: UTF-8 bytes of the documents' text that is in the records, for bits per byte.
      num_documents: documents with text.
      skipped: documents that were left out, by reason.
      seq_len: tokens of a sequence.
      vocab_size, pad_id: of the tokenizer.
      shards: its files, in order.
    """

    path: str
    split: Split
    fingerprint: str
    documents: str
    tokenizer: str
    recipe: str
    num_records: int
    num_targets: int
    num_tokens: int
    num_bytes: int
    num_documents: int
    skipped: dict[str, int]
    seq_len: int
    vocab_size: int
    pad_id: int
    shards: tuple[Shard, ...]

    @property
    def dtype(self) -> np.dtype:
        """Little-endian type of the numbers in a record: tokens [T+1], then segment ids [T+1]."""
        return record_dtype(self.vocab_size, self.seq_len)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Number of the first record of each shard, and of all records; int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.records for shard in self.shards], dtype=np.int64)])

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a target token stands for."""
        return self.num_bytes / self.num_targets

    @property
    def file_bytes(self) -> int:
        """Size of all files of records."""
        return sum(shard.bytes for shard in self.shards)

    def unigrams(self) -> np.ndarray:
        """How often each token is a target, int64 [V]; raises `StorageError` if the file is missing or damaged."""
        path = storage.path(self.path) / UNIGRAMS_FILE
        try:
            # Its size first: the head of such a file may declare any.
            if storage.version(path).size > 8 * self.vocab_size + _MAX_NPY_HEAD:
                raise ValueError(f"{UNIGRAMS_FILE} is too long")
            with storage.open_read(path) as file:
                counts = _declared(file, self.vocab_size)
            if counts.shape != (self.vocab_size,) or counts.dtype != np.int64 or counts.sum() != self.num_targets:
                raise ValueError(f"{UNIGRAMS_FILE} does not count {self.num_targets:,} targets")
            return counts
        except (OSError, ValueError, EOFError) as error:
            raise damaged(self.path, error) from error

    def verify(self) -> None:
        """Reads all files of records; raises `StorageError` naming the first that is not as its sha256 says."""
        for shard in self.shards:
            path = storage.path(self.path) / shard.name
            try:
                with storage.open_read(path) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise damaged(self.path, f"{shard.name}: {error.strerror or error}") from error
            if found != shard.sha256:
                raise damaged(self.path, f"{shard.name} has another sha256 than when it was written")


def _declared(file: BinaryIO, vocab_size: int) -> np.ndarray:
    """The array of a .npy file, if it declares no more than one number a token."""
    version = np.lib.format.read_magic(file)
    head = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = head(file)
    if shape != (vocab_size,) or dtype != np.int64:
        raise ValueError(f"{UNIGRAMS_FILE} declares {dtype} {shape}")
    return np.array(np.frombuffer(file.read(), np.int64))


def record_dtype(vocab_size: int, seq_len: int) -> np.dtype:
    """Little-endian type that holds all tokens and segment ids."""
    return np.dtype("<u2" if max(vocab_size, seq_len + 2) <= 2**16 else "<u4")


def shard_name(index: int, count: int) -> str:
    """The file of a shard."""
    return f"shard-{index:05}-of-{count:05}.array_record"


def damaged(where: object, why: object) -> StorageError:
    """The error for files that are not what their manifest says."""
    return StorageError(f"{where}: damaged prepared corpus ({printable(why)}); {_AGAIN}")


def encode_records(records: Records, dtype: np.dtype) -> list[bytes]:
    """Records as the bytes stored on disk."""
    return [row.tobytes() for row in np.stack(records, axis=1).astype(dtype)]


def decode_records(rows: list[bytes], prepared: PreparedSplit) -> Records:
    """Stored bytes as records; inverse of `encode_records`."""
    both = np.frombuffer(b"".join(rows), prepared.dtype).reshape(len(rows), 2, prepared.seq_len + 1).astype(np.int32)
    return Records(both[:, 0], both[:, 1])


def write_manifest(prepared: PreparedSplit, unigrams: np.ndarray, sources: list[dict[str, Any]]) -> None:
    """Writes what is beside the records, the manifest last; raises `StorageError`."""
    directory = storage.path(prepared.path)
    content = io.BytesIO()
    np.lib.format.write_array(content, unigrams.astype(np.int64), allow_pickle=False)
    write_atomic(directory / UNIGRAMS_FILE, content.getvalue())
    write_atomic(directory / SOURCES_FILE, _lines("files", sources))
    values = {"format": FORMAT, **asdict(prepared)}
    del values["path"], values["shards"]
    write_atomic(directory / MANIFEST_FILE, _lines("shards", [asdict(shard) for shard in prepared.shards], values))


def _lines(name: str, rows: list[dict[str, Any]], values: dict[str, Any] | None = None) -> bytes:
    """JSON with a row a line: for people, and for tools that compare."""
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in (values or {}).items())
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f"{{\n{head} {json.dumps(name)}: [\n{body}\n ]\n}}\n".encode()


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of this package."""
    try:
        with storage.open_read(path) as file:
            return FORMAT.encode() in file.read(200)
    except OSError:
        return False


def load_prepared(path: str | os.PathLike[str]) -> PreparedSplit:
    """Reads the manifest of a prepared split, given it or its directory.

    Its files are looked at when they are read. Raises `StorageError` if it is missing or damaged.
    """
    path = storage.path(path)
    directory = path.parent if path.name == MANIFEST_FILE else path
    try:
        values = read_json(directory / MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"{MANIFEST_FILE} is not of the format '{FORMAT}'")
        rows = values.pop("shards")
        shards = tuple(_checked(Shard(**row)) for row in rows)
        prepared = _checked(PreparedSplit(path=str(directory), shards=shards, **values))
        _check_split(prepared)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(directory, error) from error
    return prepared


def _checked(read: Any) -> Any:
    for field in fields(read):
        value = getattr(read, field.name)
        if field.type == "int" and not (type(value) is int and 0 <= value < 2**63):
            raise ValueError(f"{field.name} is {value!r}")
        if field.type == "str" and not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r}")
    return read


def _check_split(prepared: PreparedSplit) -> None:
    if max(prepared.seq_len, prepared.vocab_size, prepared.pad_id) > MAX_SIZE:
        raise ValueError(f"seq_len, vocab_size and pad_id are at most {MAX_SIZE}")
    if prepared.split not in ("train", "validation"):
        raise ValueError(f"split is {prepared.split!r}")
    reasons = prepared.skipped
    if not isinstance(reasons, dict) or not all(type(count) is int and count >= 0 for count in reasons.values()):
        raise ValueError(f"skipped is {reasons!r}")
    for index, shard in enumerate(prepared.shards):
        # Also keeps a name from leading out of the directory.
        if shard.name != shard_name(index, len(prepared.shards)):
            raise ValueError(f"shard {index} is called {shard.name!r}")
    records = sum(shard.records for shard in prepared.shards)
    if records != prepared.num_records or records == 0:
        raise ValueError(f"{prepared.num_records} records, but {records} in its shards")


def read_sources(directory: str | os.PathLike[str]) -> list[dict[str, Any]] | None:
    """The files that a split was made of; None if that is not known."""
    try:
        rows = read_json(storage.path(directory) / SOURCES_FILE, max_bytes=MAX_MANIFEST_BYTES)["files"]
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)]
    except (OSError, ValueError, TypeError, KeyError):
        return None
