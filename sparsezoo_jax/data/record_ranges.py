"""ArrayRecord files read by ranges of bytes, for stores that ArrayRecord's own library can't open.

The file is one of Riegeli: chunks, with a header of 24 bytes between them and within them every 64 KiB. The last block
has a postscript that says where the footer is, and the footer says where each group of records is. Formats:
`riegeli_records_file_format.md` of google/riegeli and `layout.proto` of google/array_record. Hashes are not looked at:
the store checks what it sends, and `data.verify` full compares whole files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zstandard

from sparsezoo_jax import storage
from sparsezoo_jax.untrusted import MAX_LINE_BYTES

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_POSTSCRIPT_MAGIC = 0x71930E704FDAE05E
_PLAIN, _ZSTANDARD = 0, ord("z")
#: Requests at the same time for one file.
_THREADS = 16


class RangeReader:
    """What `record_file.open_reader` gives for an object: `num_records()`, `read(indices)`, `ok()`.

    In memory is where each record is, 8 bytes a record; a read is one request for each record.

    Raises:
      OSError: the store can't be read. ValueError: it is no ArrayRecord file with one record a group.
    """

    def __init__(self, path: Path):
        self._path, self._size = path, storage.version(path).size
        postscript = next(iter(self._records(max(0, (self._size - 1) // _BLOCK * _BLOCK))))
        place, magic = _fields(postscript, 1, 2)
        if magic != _POSTSCRIPT_MAGIC:
            raise ValueError("has no postscript of ArrayRecord")
        self._footer = place
        groups = itertools.islice(self._records(place), 1, None)  # the first one describes the file
        starts = [start for start, records in (_fields(group, 1, 3) for group in groups) if _is_one(records)]
        self._starts = np.array(starts, np.int64)

    def ok(self) -> bool:
        """Whether the file could be opened: else it raised."""
        return True

    def num_records(self) -> int:
        """Records in the file."""
        return len(self._starts)

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Records by number."""
        if any(not 0 <= index < len(self._starts) for index in indices):
            raise ValueError("has no such record")
        if len(indices) == 1:
            return [self._read(indices[0])]
        with ThreadPoolExecutor(min(_THREADS, len(indices)), "ranges") as pool:
            return list(pool.map(self._read, indices))

    def close(self) -> None:
        """Nothing is open between reads."""

    def _read(self, index: int) -> bytes:
        after = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._footer
        (record,) = self._records(int(self._starts[index]), after)
        return record

    def _records(self, start: int, end: int | None = None) -> list[bytes]:
        """The records of the chunk at an offset, which lies before `end` if that is known."""
        limit = min(self._size, start + _BLOCK if end is None else end)
        content = self._without_block_headers(start, limit)
        if len(content) < _CHUNK_HEADER:
            raise ValueError("ends within a chunk")
        size = int.from_bytes(content[8:16], "little")
        if size > MAX_LINE_BYTES * 16 or size > self._size:
            raise ValueError(f"has a chunk of {size:,} bytes")
        missing = _CHUNK_HEADER + size - len(content)
        if missing > 0:
            more = missing + (missing // (_BLOCK - _BLOCK_HEADER) + 2) * _BLOCK_HEADER
            content += self._without_block_headers(limit, min(self._size, limit + more))
        if content[24] != ord("r") or len(content) < _CHUNK_HEADER + size:
            raise ValueError("ends within a chunk")
        return _records_of(content[_CHUNK_HEADER : _CHUNK_HEADER + size], int.from_bytes(content[25:32], "little"))

    def _without_block_headers(self, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        raw = storage.read_range(self._path, start, end)
        if len(raw) != end - start:
            raise ValueError("was changed while it was read")
        pieces = []
        while start < end:
            inside = start % _BLOCK
            following = min(end, start - inside + _BLOCK)
            skipped = max(0, _BLOCK_HEADER - inside)
            pieces.append(raw[skipped : following - start] if skipped < following - start else b"")
            raw, start = raw[following - start :], following
        return b"".join(pieces)


def _is_one(records: int) -> bool:
    if records != 1:
        raise ValueError(f"has groups of {records} records, not of one")
    return True


def _records_of(data: bytes, count: int) -> list[bytes]:
    """The records of a simple chunk: their sizes, then themselves, both compressed alike."""
    compression = data[0]
    length, place = _varint(data, 1)
    sizes, values = _expanded(data[place : place + length], compression), _expanded(data[place + length :], compression)
    records, place, start = [], 0, 0
    for _ in range(count):
        size, place = _varint(sizes, place)
        records.append(values[start : start + size])
        start += size
    if start != len(values):
        raise ValueError("has a chunk whose records are not as long as it says")
    return records


def _expanded(data: bytes, compression: int) -> bytes:
    if compression == _PLAIN or not data:
        return data
    if compression != _ZSTANDARD:
        raise ValueError("is not compressed by Zstandard")
    size, place = _varint(data, 0)
    if size > MAX_LINE_BYTES:
        raise ValueError(f"has a chunk of {size:,} bytes")
    try:
        found = zstandard.ZstdDecompressor().decompress(data[place:], max_output_size=size) if size else b""
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(found) != size:
        raise ValueError("has a chunk that is not as long as it says")
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of Protocol Buffers, and what is after it."""
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("ends within a number")


def _fields(message: bytes, *numbers: int) -> list[int]:
    """Whole-number fields of a message of Protocol Buffers; 0 for those that are not there."""
    found, place = {}, 0
    while place < len(message):
        key, place = _varint(message, place)
        value, place = _varint(message, place)
        if key & 7 == 2:
            place += value
        elif key & 7:
            raise ValueError("has a message that is not of ArrayRecord")
        else:
            found[key >> 3] = value
    return [found.get(number, 0) for number in numbers]
