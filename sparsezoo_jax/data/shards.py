"""The step that preparing is made of: the documents of some parts of a corpus become one file of records.

A shard depends on its own parts alone, and which parts these are on their raw sizes alone. So it does not matter who
makes it, when, or beside whom; `data.preparation` sees to that.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsezoo_jax import storage
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.documents import PART_BYTES, Documents, Part, Split
from sparsezoo_jax.data.manifest import Shard, encode_records, record_dtype, shard_name
from sparsezoo_jax.data.packing import BlockPacker, Packer, Records, target_mask, with_specials
from sparsezoo_jax.data.record_file import open_reader, open_writer
from sparsezoo_jax.data.skipping import Skips, accepted
from sparsezoo_jax.data.tokenizer import Tokenizer
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.untrusted import read_json

#: Raw bytes of a shard, at most, which become about a gigabyte of records; of a smaller corpus a share of it, so that
#: many cores can work, but not too few bytes.
SHARD_BYTES, SHARD_SHARE, FEWEST_BYTES = 3 << 30, 256, 1 << 26
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 4096, 1_000_000
_MAX_BAD_OF_SHARD = 0.5
_MAX_RESULT_BYTES = 1 << 28

Advance = Callable[[int, int, int], None]
"""Called as work goes on with the documents, tokens and raw bytes that were done since the last call."""


def part_bytes(part: Part) -> int:
    """Raw size of a part; a part that does not tell it counts as one of the usual size."""
    return part.bytes or PART_BYTES


def plan(parts: Sequence[Part], shard_bytes: int | None = None) -> list[range]:
    """Which parts become which shard: consecutive ones, of about `shard_bytes` (`SHARD_BYTES`, or less) together."""
    ends = np.cumsum([part_bytes(part) for part in parts], dtype=np.int64)
    if shard_bytes is None:
        shard_bytes = min(SHARD_BYTES, max(FEWEST_BYTES, int(ends[-1]) // SHARD_SHARE))
    # A part belongs to the shard that its middle falls into.
    middles = ends - np.array([part_bytes(part) for part in parts]) // 2
    numbers = (middles // shard_bytes).tolist()
    return [range(group[0], group[-1] + 1) for group in _groups(numbers)]


def _groups(numbers: Sequence[int]) -> Iterator[list[int]]:
    for _, group in itertools.groupby(range(len(numbers)), key=lambda part: numbers[part]):
        yield list(group)


@dataclass(frozen=True)
class Job:
    """A split to be prepared in a directory, as a process that makes shards of it needs it; can be pickled."""

    directory: Path
    documents: Documents
    config: DataConfig
    split: Split
    groups: Sequence[range]
    """The parts of each shard."""
    sizes: Sequence[int]
    """Raw bytes of each part."""

    @property
    def count(self) -> int:
        """Number of shards."""
        return len(self.groups)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.directory / shard_name(shard, self.count)

    def result_path(self, shard: int) -> Path:
        """What was found while a shard was made: it is complete when this is there."""
        return self.path(shard).with_suffix(".json")

    def raw_bytes(self, shard: int) -> int:
        """Raw size of a shard's parts."""
        return sum(self.sizes[part] for part in self.groups[shard])


class Result(NamedTuple):
    """What a shard came to."""

    shard: Shard
    targets: int
    tokens: int
    text_bytes: int
    documents: int
    skips: Skips
    unigrams: np.ndarray


def make_shard(job: Job, number: int, tokenizer: Tokenizer, advance: Advance) -> Result:
    """Tokenises and packs the parts of a shard, and publishes the file and then its result, each whole or not at all.

    Raises `DataError` for documents that can't be read (as `data.on_bad_document` says), `StorageError` if reading or
    writing fails.
    """
    final = job.path(number)
    try:
        for left in final.parent.glob(f".{final.name}.*"):
            left.unlink(missing_ok=True)  # of a process that was killed: nobody else works on a shard that we have
        with storage.staged(final) as temporary:
            result = _make(job, number, tokenizer, advance, temporary, final.name)
        write_result(job, number, result)
    except RuntimeError as error:  # ArrayRecord's only exception
        raise StorageError(f"{final}: could not write the prepared corpus: {error}") from error
    except OSError as error:
        raise StorageError(f"{final}: could not write the prepared corpus: {error.strerror or error}") from error
    return result


def _make(job: Job, number: int, tokenizer: Tokenizer, advance: Advance, temporary: Path, name: str) -> Result:
    config = job.config
    packer = (BlockPacker if config.in_blocks else Packer)(config.seq_len, tokenizer.pad_id)
    dtype = record_dtype(tokenizer.vocab_size, config.seq_len)
    unigrams = np.zeros(tokenizer.vocab_size, np.int64)
    # The faults of a corpus may all be in one shard, so its fraction is looked at when all are there. But nobody should
    # wait for that who named the wrong field.
    most = config.max_bad_fraction if job.count == 1 else max(config.max_bad_fraction, _MAX_BAD_OF_SHARD)
    skips = Skips(stop=config.on_bad_document == "stop", max_bad_fraction=most)
    records = tokens = text_bytes = documents = 0
    writer = open_writer(temporary)

    def store(packed: Records) -> None:
        nonlocal records
        records += len(packed.tokens)
        targets = packed.tokens[:, 1:][target_mask(packed.segment_ids)]
        np.add(unigrams, np.bincount(targets, minlength=len(unigrams)), out=unigrams)
        for row in encode_records(packed, dtype):
            writer.write(row)

    for texts, raw in _chunks(job, job.groups[number], skips):
        ids = tokenizer.encode_batch(texts)
        token_documents = [with_specials(one, tokenizer.bos_id, tokenizer.eos_id) for one in ids]
        chunk_tokens = sum(map(len, token_documents))
        text_bytes += sum(len(text.encode("utf-8")) for text in texts)
        tokens += chunk_tokens
        documents += sum(len(one) > 0 for one in token_documents)
        store(packer.push(token_documents))
        advance(len(texts), chunk_tokens, raw)
    store(packer.finish())
    writer.close()
    if packer.dropped:  # exact where all characters are tokens, as in chess games
        text_bytes = round(text_bytes * (1 - packer.dropped / tokens))
    size, sha256 = check_written(temporary, records)
    shard = Shard(name=name, records=records, bytes=size, sha256=sha256)
    return Result(shard, int(unigrams.sum()), tokens, text_bytes, documents, skips, unigrams)


def _chunks(job: Job, parts: range, skips: Skips) -> Iterator[tuple[list[str], int]]:
    """Texts in groups that bound the memory, and the raw bytes of the parts that end in each."""
    texts: list[str] = []
    characters = raw = 0
    for part in parts:
        for document in accepted(job.documents.read(part), skips):
            texts.append(document.text)
            characters += len(document.text)
            if len(texts) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
                yield texts, raw
                texts, characters, raw = [], 0, 0
        raw += job.sizes[part]
    yield texts, raw


def check_written(path: Path, records: int) -> tuple[int, str]:
    """Size and sha256 of a file of records on disk. ArrayRecord can lose a write error; reading the index back and
    syncing can't.
    """
    storage.sync(path)
    with storage.open_read(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = storage.version(path).size
    if records:  # a file without any has no index
        reader = open_reader(path)
        if not reader.ok() or reader.num_records() != records:
            raise StorageError(f"{path}: the prepared corpus was not written completely")
        reader.close()
    return size, sha256


def write_result(job: Job, number: int, result: Result) -> None:
    """Publishes what a shard came to; raises `StorageError`."""
    counts = zlib.compress(result.unigrams.astype("<i8").tobytes(), 1)
    values = {
        "shard": result.shard.__dict__,
        "targets": result.targets,
        "tokens": result.tokens,
        "text_bytes": result.text_bytes,
        "documents": result.documents,
        "skips": result.skips.as_dict(),
        "unigrams": base64.b64encode(counts).decode(),
    }
    write_atomic(job.result_path(number), json.dumps(values).encode())


def read_result(job: Job, number: int) -> Result:
    """What a shard came to.

    Raises `FileNotFoundError` if it is not there, `StorageError` if it can't be read.
    """
    path = job.result_path(number)
    try:
        values = read_json(path, max_bytes=_MAX_RESULT_BYTES)
        counts = zlib.decompress(base64.b64decode(values["unigrams"]))
        values["unigrams"] = np.frombuffer(counts, "<i8").astype(np.int64)
        values["shard"] = Shard(**values["shard"])
        values["skips"] = Skips(**values["skips"])
        return Result(**values)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise StorageError(f"{path}: damaged ({error}); delete it to make that shard again") from error
