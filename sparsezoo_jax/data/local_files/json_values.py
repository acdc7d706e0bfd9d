"""JSON files that are no lines: an array of objects, or objects one after another, each over several lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sparsezoo_jax.data.local_files.file import Entry, File, text_of_json
from sparsezoo_jax.data.local_files.streams import encoding_at, lines, open_utf8, reading
from sparsezoo_jax.errors import DataError
from sparsezoo_jax.untrusted import MAX_LINE_BYTES, parse_json

# What ends or begins a value: a string is taken whole, and one that is not complete not at all.
_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|"|[\[\]{},]', re.DOTALL)
_CHUNK = 1 << 20


def is_json_lines(path: Path, compression: str) -> bool:
    """Whether the first line with something in it is a JSON object of its own; to be told by reading it.

    Raises:
      DataError: the file is UTF-16 without a byte-order mark. StorageError: it can't be read.
    """
    with reading(path), open_utf8(path, compression) as file:
        for line in lines(file):
            if line.content is None:
                return False
            if line.content.strip():
                break
        else:
            return True  # nothing in it
    try:
        return line.content.lstrip()[:1] != b"[" and isinstance(parse_json(line.content), dict)
    except ValueError:
        return False


class JsonFile(File):
    """The elements of an array, or objects that follow each other."""

    seekable = False

    def __init__(self, path, name, text_field, compression=""):
        super().__init__(path, name, text_field, compression)
        with reading(path):
            encoding_at(path, compression)

    def entries(self, piece: int) -> Iterator[Entry]:
        """The elements in order."""
        with reading(self.path), open_utf8(self.path, self.compression) as file:
            for line, start, content in _values(file, self.path):
                yield Entry(line, start, content)

    def text(self, entry: Entry) -> str:
        """The text field of an element."""
        return text_of_json(self, entry.number, entry.content)


def _values(file: IO[bytes], path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line, offset and content of each value; brackets are matched, what is between them is not looked at.

    Raises:
      DataError: brackets don't match, so that nothing after them can be found.
    """
    buffer, base, begin, line = b"", 0, 0, 1  # the next value is looked for from `begin` on, which is in this line
    array: bool | None = None
    while True:
        if array is None and (head := buffer.lstrip()):
            array = head.startswith(b"[")
            if array:
                begin = buffer.index(b"[") + 1
                line += buffer.count(b"\n", 0, begin)
        end, after, last = _end_of_value(buffer, begin, bool(array)) if array is not None else (-1, 0, False)
        if end < 0:
            if len(buffer) - begin > MAX_LINE_BYTES:
                raise DataError(f"{path}:{line}: one JSON value is longer than {MAX_LINE_BYTES:,} bytes")
            # As much as there is: a value is looked through again from its beginning.
            chunk = file.read(max(_CHUNK, len(buffer) - begin))
            if not chunk:
                break
            base, buffer, begin = base + begin, buffer[begin:] + chunk, 0
            continue
        content = buffer[begin:end]
        if stripped := content.strip():
            space = content.index(stripped[:1])
            yield line + content.count(b"\n", 0, space), base + begin + space, stripped
        line, begin = line + buffer.count(b"\n", begin, after), after
        if last:
            array = False
    rest = buffer[begin:]
    line += rest.count(b"\n", 0, len(rest) - len(rest.lstrip()))
    if array:
        raise DataError(f"{path}:{line}: the JSON array has no end; a bracket or a quote is open from here on")
    if rest.strip():
        raise DataError(f"{path}:{line}: is no JSON object, and nothing after it can be found")


def _end_of_value(buffer: bytes, begin: int, array: bool) -> tuple[int, int, bool]:
    """Where the value ends (-1: not in this buffer), where the next may begin, and whether it ends the array."""
    depth = 0
    for mark in _MARKS.finditer(buffer, begin):
        token = mark[0]
        if token == b'"':  # a string that has no end here
            break
        if token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}"):
            depth -= 1
            if array and depth < 0:
                return mark.start(), mark.end(), True
            if not array and depth <= 0:
                return mark.end(), mark.end(), False
        elif token == b"," and array and depth == 0:
            return mark.start(), mark.end(), False
    return -1, 0, False
