"""Local text, JSON-lines, Parquet and PGN files as documents."""

from __future__ import annotations

import bisect
import functools
import glob
import hashlib
import itertools
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sparsezoo_jax.data.chess.pgn import find_games, game_string
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.documents import Document, Documents, InRanges, Split, digest
from sparsezoo_jax.errors import DataError, StorageError
from sparsezoo_jax.untrusted import MAX_COMPRESSION, parse_json

EXTENSIONS = (".txt", ".jsonl", ".parquet", ".pgn")


class _File(Protocol):
    """The documents of one file; ids are relative to the corpus, so that they survive moving it."""

    def __len__(self) -> int: ...

    def document_id(self, index: int) -> str: ...

    def text(self, index: int) -> str: ...


class LocalDocuments(InRanges):
    """Some of the documents in a list of files, in the order of the files."""

    def __init__(self, files: Sequence[_File], indices: Sequence[int] | None, fingerprint: str):
        self._files = files
        self._ends = list(itertools.accumulate(len(file) for file in files))
        self._indices = range(self._ends[-1]) if indices is None else indices
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        file, row = _locate(self._files, self._ends, self._indices[index])
        return Document(file.document_id(row), file.text(row))


def _locate(files: Sequence[_File], ends: Sequence[int], index: int) -> tuple[_File, int]:
    number = bisect.bisect_right(ends, index)
    return files[number], index - (ends[number - 1] if number else 0)


def open_local(config: DataConfig, name: str, split: Split, *, whole: bool = False) -> Documents:
    """Opens the local files that `name` (a file, a directory or a glob) stands for.

    A directory with a subdirectory called `validation_split` validates on it, and trains on the subdirectory
    `train_split` or, without one, on all other files. Otherwise the `validation_fraction` of documents whose ids have
    the lowest sha256 values are held out: at least one, and never all. `whole` takes every document. Raises
    `DataError` for files that can't be used.
    """
    root, paths = _resolve(name)
    own_validation = root / config.validation_split
    if not whole and Path(name).expanduser().is_dir() and own_validation.is_dir():
        if split == "validation":
            root, paths = _resolve(str(own_validation))
        elif (root / config.train_split).is_dir():
            root, paths = _resolve(str(root / config.train_split))
        else:
            paths = [path for path in paths if own_validation not in path.parents]
        whole = True
    if not paths:
        raise DataError(f"data.dataset={name}: no {', '.join(EXTENSIONS)} files for the {split} split")
    files = [_open(path, path.relative_to(root).as_posix(), config.text_field) for path in paths]
    total = sum(len(file) for file in files)
    if total == 0:
        raise DataError(f"data.dataset={name}: no documents in {_count(paths)}")
    indices = None if whole else _held(files, total, config, name, split)
    contents = [(path.relative_to(root).as_posix(), path.stat().st_size, _sha256(path)) for path in paths]
    rule = "all" if whole else f"{split}:{config.validation_fraction}"
    return LocalDocuments(files, indices, digest("local", config.text_field, rule, contents))


def _count(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"


def _resolve(name: str) -> tuple[Path, list[Path]]:
    """The directory that document ids are relative to, and the files in a fixed order."""
    path = Path(name).expanduser()
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*") if p.suffix in EXTENSIONS and p.is_file()]
        if not found:
            raise DataError(f"data.dataset={name}: no {', '.join(EXTENSIONS)} files in this directory")
    elif path.is_file():
        root, found = path.parent, [path]
    elif glob.has_magic(name):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts)
        root = Path(*fixed)
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        if not found:
            raise DataError(f"data.dataset={name}: no file matches")
    else:
        raise DataError(f"data.dataset={name}: no such file or directory")
    unknown = [p for p in found if p.suffix not in EXTENSIONS]
    if unknown:
        hint = "; decompress it first: zstd -d" if unknown[0].suffix == ".zst" else ""
        raise DataError(
            f"{unknown[0]}: unknown extension '{unknown[0].suffix}', known are {', '.join(EXTENSIONS)}{hint}"
        )
    return root, sorted(found)


def _held(files: Sequence[_File], total: int, config: DataConfig, name: str, split: Split) -> Sequence[int] | None:
    """Indices of the documents in `split` (None: all), by the hash of each document's id."""
    if config.validation_fraction == 0 or total == 1:
        if split == "train":
            return None
        reason = "it has one document" if total == 1 else "data.validation_fraction=0"
        raise DataError(f"data.dataset={name}: nothing to validate on, {reason}; give data.validation_dataset")
    threshold = int(config.validation_fraction * 2**64)
    chosen, keep = array("q"), array("q")
    low, high = (2**65, -1), (-1, -1)
    index = 0
    for file in files:
        for row in range(len(file)):
            value = int.from_bytes(hashlib.sha256(file.document_id(row).encode()).digest()[:8], "big")
            (chosen if value < threshold else keep).append(index)
            low, high = min(low, (value, index)), max(high, (value, index))
            index += 1
    if not chosen:
        chosen, keep = array("q", [low[1]]), array("q", (i for i in keep if i != low[1]))
    elif not keep:
        keep, chosen = array("q", [high[1]]), array("q", (i for i in chosen if i != high[1]))
    return chosen if split == "validation" else keep


def _open(path: Path, name: str, text_field: str) -> _File:
    try:
        if path.suffix == ".txt":
            return _TextFile(path, name)
        if path.suffix == ".jsonl":
            return _JsonLinesFile(path, name, text_field)
        if path.suffix == ".pgn":
            return _PgnFile(path, name)
        return _ParquetFile(path, name, text_field)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


def _read(path: Path, start: int = 0, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte offset {offset + error.start}") from error


def _sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256_of_version(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _sha256_of_version(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # the key only: both splits of a corpus hash its files once
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


class _TextFile:
    """A .txt file is one document; a file without text is none."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        self._length = int(path.stat().st_size > 0)

    def __len__(self) -> int:
        return self._length

    def document_id(self, index: int) -> str:
        return self._name

    def text(self, index: int) -> str:
        return _decode(_read(self._path), self._path)


class _JsonLinesFile:
    """A .jsonl file: one object a line, blank lines skipped; only the line offsets are kept in memory."""

    def __init__(self, path: Path, name: str, text_field: str):
        self._path, self._name, self._text_field = path, name, text_field
        self._starts, self._sizes, self._lines = array("q"), array("q"), array("q")
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._starts.append(offset)
                    self._sizes.append(len(line))
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def document_id(self, index: int) -> str:
        return f"{self._name}:{self._lines[index]}"

    def text(self, index: int) -> str:
        where = f"{self._path}:{self._lines[index]}"
        start = self._starts[index]
        line = _decode(_read(self._path, start, self._sizes[index]), self._path, start)
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        except ValueError as error:
            raise DataError(f"{where}: not JSON that is read: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(self._text_field), str):
            has = f"has {', '.join(map(repr, row)) or 'no fields'}" if isinstance(row, dict) else "is no object"
            raise DataError(f"{where}: needs a string in '{self._text_field}' (data.text_field); the line {has}")
        text = row[self._text_field]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: '{self._text_field}' has half a surrogate pair at character {error.start}"
            ) from error
        return text


class _PgnFile:
    """A .pgn file: one game a document, as a game string; only the places of the games are kept in memory."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        self._starts, self._sizes, self._lines = array("q"), array("q"), array("q")
        with open(path, "rb") as file:
            for place in find_games(file):
                self._starts.append(place.start)
                self._sizes.append(place.size)
                self._lines.append(place.line)

    def __len__(self) -> int:
        return len(self._starts)

    def document_id(self, index: int) -> str:
        return f"{self._name}:{self._lines[index]}"

    def text(self, index: int) -> str:
        start = self._starts[index]
        pgn = _decode(_read(self._path, start, self._sizes[index]), self._path, start)
        return game_string(pgn, f"{self._path}:{self._lines[index]}")


class _ParquetFile:
    """A .parquet file: one row a document; reads the text column of one row group at a time."""

    def __init__(self, path: Path, name: str, text_field: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._name, self._text_field = path, name, text_field
        self._cached: tuple[int, Any] = (-1, None)
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from error
        if text_field not in schema.names:
            raise DataError(f"{path}: no column '{text_field}' (data.text_field), it has {', '.join(schema.names)}")
        kind = schema.field(text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(f"{path}: column '{text_field}' holds {kind}, not strings")
        groups = range(metadata.num_row_groups)
        self._ends = list(itertools.accumulate(metadata.row_group(group).num_rows for group in groups))
        if len(self) > MAX_COMPRESSION * path.stat().st_size:
            raise DataError(f"{path}: declares {len(self):,} rows in {path.stat().st_size:,} bytes")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def document_id(self, index: int) -> str:
        return f"{self._name}:{index}"

    def text(self, index: int) -> str:
        group = bisect.bisect_right(self._ends, index)
        value = self._column(group)[index - (self._ends[group - 1] if group else 0)].as_py()
        if value is None:
            raise DataError(f"{self._path}: row {index} has no '{self._text_field}'")
        return value

    def _column(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        cached, column = self._cached  # read once: another thread may replace the pair meanwhile
        if cached != group:
            try:
                with pq.ParquetFile(self._path) as file:
                    column = file.read_row_group(group, columns=[self._text_field]).column(0)
            except (pa.ArrowException, OSError) as error:
                raise StorageError(f"{self._path}: row group {group}: {str(error).splitlines()[0]}") from error
            rows = self._ends[group] - (self._ends[group - 1] if group else 0)
            if len(column) != rows:
                raise StorageError(f"{self._path}: row group {group}: holds {len(column):,} rows, not {rows:,}")
            self._cached = (group, column)
        return column
