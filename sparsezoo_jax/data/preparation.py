"""Tokenise and pack a corpus once, into an ArrayRecord file that later runs read by index."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsezoo_jax.data.config import DataConfig, cache_directory
from sparsezoo_jax.data.corpora import open_documents
from sparsezoo_jax.data.documents import Documents, Split, digest
from sparsezoo_jax.data.packing import BlockPacker, Packer, Records, target_mask, with_specials
from sparsezoo_jax.data.record_file import open_reader, open_writer
from sparsezoo_jax.data.skipping import Skips, accepted
from sparsezoo_jax.data.tokenizer import Tokenizer
from sparsezoo_jax.errors import DataError, StorageError
from sparsezoo_jax.untrusted import MAX_SIZE, read_json

#: Changes whenever `prepare` would write other records for the same corpus and tokenizer.
RECIPE, BLOCK_RECIPE = "pack-1", "blocks-1"
META_FILE, RECORDS_FILE = "meta.json", "records.array_record"
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 4096, 4_000_000
_ABANDONED_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """A tokenised and packed split on disk.

    Attributes:
      path: directory of `records.array_record` and `meta.json`.
      fingerprint: of (documents, tokenizer, seq_len, recipe); equal fingerprints mean equal records.
      num_records: records of `seq_len + 1` tokens.
      num_targets: tokens that are predicted, over all records.
      num_bytes: UTF-8 bytes of the documents' text that is in the records, for bits per byte.
      num_documents: documents with text.
      seq_len: tokens of a sequence.
      vocab_size, pad_id: of the tokenizer.
      file_bytes: size of the record file.
    """

    path: str
    fingerprint: str
    num_records: int
    num_targets: int
    num_bytes: int
    num_documents: int
    seq_len: int
    vocab_size: int
    pad_id: int
    file_bytes: int

    @property
    def records_path(self) -> str:
        """The ArrayRecord file."""
        return str(Path(self.path) / RECORDS_FILE)

    @property
    def dtype(self) -> np.dtype:
        """Little-endian type of the numbers in a record: tokens [T+1], then segment ids [T+1]."""
        return np.dtype("<u2" if max(self.vocab_size, self.seq_len + 2) <= 2**16 else "<u4")


def prepare(config: DataConfig, split: Split, tokenizer: Tokenizer) -> PreparedSplit:
    """Tokenises and packs a split into the cache, or finds it there.

    Processes that prepare the same split at once are all right (the first to finish is kept), and a killed one leaves
    nothing that looks finished. Raises `DataError` for a corpus without text, `StorageError` if the cache can't be
    written or is damaged.
    """
    documents = open_documents(config, split)
    recipe = BLOCK_RECIPE if config.in_blocks else RECIPE
    fingerprint = digest(documents.fingerprint, tokenizer.fingerprint, config.seq_len, split, recipe)
    root = cache_directory(config) / "prepared"
    final = root / fingerprint
    if (final / META_FILE).is_file():
        return load_prepared(final)
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{fingerprint}-"))
        with _lock(temporary):
            packer = (BlockPacker if config.in_blocks else Packer)(config.seq_len, tokenizer.pad_id)
            skips = Skips.of(config)
            counts = _write(documents, skips, tokenizer, config.seq_len, packer, temporary / RECORDS_FILE, split)
            meta = {"fingerprint": fingerprint, **counts, "file_bytes": (temporary / RECORDS_FILE).stat().st_size}
            _write_synced(temporary / META_FILE, json.dumps(meta, indent=1) + "\n")
            _publish(temporary, final)
            skips.warn(f"data.dataset={config.dataset}, {split} split")
    except OSError as error:
        raise StorageError(f"{root}: could not write the prepared corpus: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return load_prepared(final)


def load_prepared(path: str | os.PathLike[str]) -> PreparedSplit:
    """Reads the description of a prepared split; raises `StorageError` if its files are missing or damaged."""
    path = Path(path)
    try:
        prepared = PreparedSplit(path=str(path), **read_json(path / META_FILE))
        for field in dataclasses.fields(prepared):
            value = getattr(prepared, field.name)
            if not (isinstance(value, str) if field.type == "str" else type(value) is int and 0 <= value < 2**63):
                raise ValueError(f"{field.name} is {value!r}")
        if max(prepared.seq_len, prepared.vocab_size, prepared.pad_id) > MAX_SIZE:
            raise ValueError(f"seq_len, vocab_size and pad_id are at most {MAX_SIZE}")
        size = (path / RECORDS_FILE).stat().st_size
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"{path}: damaged prepared corpus ({error}); delete the directory to prepare it again"
        ) from error
    if size != prepared.file_bytes:
        raise StorageError(
            f"{path}: damaged prepared corpus ({RECORDS_FILE} has {size} bytes, not {prepared.file_bytes}); "
            "delete the directory to prepare it again"
        )
    return prepared


def encode_records(records: Records, dtype: np.dtype) -> list[bytes]:
    """Records as the bytes stored on disk."""
    return [row.tobytes() for row in np.stack(records, axis=1).astype(dtype)]


def decode_records(rows: list[bytes], prepared: PreparedSplit) -> Records:
    """Stored bytes as records; inverse of `encode_records`."""
    both = np.frombuffer(b"".join(rows), prepared.dtype).reshape(len(rows), 2, prepared.seq_len + 1).astype(np.int32)
    return Records(both[:, 0], both[:, 1])


def _write(
    documents: Documents,
    skips: Skips,
    tokenizer: Tokenizer,
    seq_len: int,
    packer: Packer | BlockPacker,
    path: Path,
    split: str,
) -> dict[str, int]:
    sizes = {"seq_len": seq_len, "vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}
    counts = {"num_records": 0, "num_targets": 0, "num_bytes": 0, "num_documents": 0}
    empty = PreparedSplit(path="", fingerprint="", file_bytes=0, **counts, **sizes)
    tokens = 0
    try:
        writer = open_writer(path)

        def store(records: Records) -> None:
            counts["num_records"] += len(records.tokens)
            counts["num_targets"] += int(target_mask(records.segment_ids).sum())
            for row in encode_records(records, empty.dtype):
                writer.write(row)

        for texts in _chunks(documents, skips, f"Preparing {split}"):
            token_documents = [
                with_specials(ids, tokenizer.bos_id, tokenizer.eos_id) for ids in tokenizer.encode_batch(texts)
            ]
            counts["num_bytes"] += sum(len(text.encode("utf-8")) for text in texts)
            tokens += sum(map(len, token_documents))
            counts["num_documents"] += sum(len(ids) > 0 for ids in token_documents)
            store(packer.push(token_documents))
        store(packer.finish())
        writer.close()
        _check_written(path, counts["num_records"])
    except RuntimeError as error:  # ArrayRecord's only exception
        raise StorageError(f"{path.parent.parent}: could not write the prepared corpus: {error}") from error
    if packer.dropped:  # exact where all characters are tokens, as in chess games
        counts["num_bytes"] = round(counts["num_bytes"] * (1 - packer.dropped / tokens))
    if counts["num_targets"] == 0:
        found = skips.summary() or f"{skips.documents:,} documents"
        raise DataError(f"data.dataset: the {split} split has no text to predict ({found})")
    return {**counts, **sizes}


def _check_written(path: Path, num_records: int) -> None:
    """ArrayRecord can lose a write error; reading the index back and syncing can't."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    if num_records == 0:
        return  # reported by the caller as a corpus without text
    reader = open_reader(path)
    if not reader.ok() or reader.num_records() != num_records:
        raise StorageError(f"{path}: the prepared corpus was not written completely")
    reader.close()


def _chunks(documents: Documents, skips: Skips, title: str) -> Iterator[list[str]]:
    """Texts in groups that bound the memory, with a progress bar on a terminal."""
    texts: list[str] = []
    characters = 0
    parts = documents.parts()
    with _progress(title, len(parts)) as advance:
        for part in range(len(parts)):
            for document in accepted(documents.read(part), skips):
                texts.append(document.text)
                characters += len(texts[-1])
                if len(texts) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
                    yield texts
                    texts, characters = [], 0
            advance(1)
        if texts:
            yield texts


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Any]:
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, final: Path) -> None:
    _sync_directory(temporary)
    try:
        os.rename(temporary, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return  # another process was first; its records are the same
    _sync_directory(final.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Marks a temporary directory as in use; the kernel drops the mark when the process dies."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(root: Path) -> None:
    """Deletes what killed processes left behind."""
    for directory in root.glob(".*-*"):
        with contextlib.suppress(OSError):  # in use, or just deleted by another process
            # A directory younger than this may not be locked yet.
            if time.time() - directory.stat().st_mtime > _ABANDONED_SECONDS:
                with _lock(directory):
                    shutil.rmtree(directory, ignore_errors=True)
