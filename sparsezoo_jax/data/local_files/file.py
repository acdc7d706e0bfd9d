"""What a file of any format offers: its documents in order, piece by piece, and where one can begin to read."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsezoo_jax import storage
from sparsezoo_jax.data.documents import PART_BYTES, BadDocumentError
from sparsezoo_jax.data.local_files.streams import reading
from sparsezoo_jax.data.skipping import HALF_SURROGATE, NO_TEXT, NOT_JSON, NOT_TEXT, NOT_UTF8, NULL_TEXT, TOO_LONG
from sparsezoo_jax.data.sources import scan
from sparsezoo_jax.untrusted import MAX_LINE_BYTES, parse_json


class Entry(NamedTuple):
    """A document that is not looked into yet."""

    number: int
    """Its line or row, which tells it from others of the file."""
    place: int
    """Where `File.entries_at` finds it."""
    content: Any


class File(abc.ABC):
    """A file of documents.

    Args:
      path: on this machine; shown in errors.
      name: relative to the corpus, so that ids of documents survive moving it.
      text_field: see `DataConfig`.
      compression: ".gz" and the like, or "".
    """

    seekable = True
    """Whether `entries_at` works; a file where it does not is unpacked for random access."""
    rows: int | None = None
    """How many entries there are, numbered from 0 at places of the same number; None: only reading tells."""

    def __init__(self, path: Path, name: str, text_field: str, compression: str = ""):
        self.path, self.name, self.text_field, self.compression = path, name, text_field, compression
        self.label = str(path)
        """Its name in errors."""

    def id(self, number: int) -> str:
        """The id of a document."""
        return f"{self.name}:{number}"

    def pieces(self) -> Sequence[int]:
        """Raw bytes of each piece that can be read without the others; none of an empty file."""
        return [self.size] if self.size else []

    @property
    def size(self) -> int:
        """Bytes of the file."""
        with reading(self.path):
            return storage.version(self.path).size

    def numbers(self) -> Iterator[int]:
        """The numbers of all entries, found as cheaply as the format allows."""
        return (entry.number for piece in range(len(self.pieces())) for entry in self.entries(piece))

    @abc.abstractmethod
    def entries(self, piece: int) -> Iterator[Entry]:
        """The entries that begin in a piece."""

    def entries_at(self, place: int, number: int) -> Iterator[Entry]:
        """The entry at a place and all that follow it in the file."""
        raise NotImplementedError

    @abc.abstractmethod
    def text(self, entry: Entry) -> str:
        """The text of an entry.

        Raises:
          BadDocumentError: there is none.
        """

    def digest(self) -> str:
        """A digest of the content; reads the file, but once while it stays the same."""
        return scan(self.path, PART_BYTES).sha256

    def bad(self, line: int, reason: str, detail: str = "") -> BadDocumentError:
        """The error for a document that is read in vain."""
        return BadDocumentError(f"{self.label}:{line}", reason, detail)


def value_at(row: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a row has a field, and its value: `name` as it is, or else its parts between dots within each other."""
    if name in row:
        return True, row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def text_of_json(file: File, line: int, content: bytes | None) -> str:
    """The text in the JSON object that begins in `line` (None: it was too long to be kept).

    Raises:
      BadDocumentError: there is none.
    """
    if content is None:
        raise file.bad(line, TOO_LONG, f"longer than {MAX_LINE_BYTES:,} bytes")
    decoded = decode(file, line, content)
    try:
        row = parse_json(decoded)
    except json.JSONDecodeError as error:
        raise file.bad(line, NOT_JSON, f"not JSON: {error.msg} at character {error.pos + 1} of it") from None
    except ValueError as error:
        raise file.bad(line, NOT_JSON, f"not JSON that is read: {error}") from None
    if not isinstance(row, dict):
        raise file.bad(line, NOT_JSON, "is no JSON object")
    found, text = value_at(row, file.text_field)
    needs = f"needs a string in '{file.text_field}' (data.text_field); it has"
    if not found:
        fields = ", ".join(repr(key[:40]) for key in list(row)[:20]) or "no fields"
        raise file.bad(line, NO_TEXT, f"{needs} {fields}")
    if text is None:
        raise file.bad(line, NULL_TEXT, f"{needs} null")
    if not isinstance(text, str):
        raise file.bad(line, NOT_TEXT, f"{needs} {type(text).__name__} there")
    return checked(file, line, text)


def decode(file: File, line: int, content: bytes) -> str:
    """UTF-8 as text, without the byte-order mark that joined files have in their middle.

    Raises:
      BadDocumentError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise file.bad(line, NOT_UTF8, f"not UTF-8 at byte {error.start + 1} of it") from None


def checked(file: File, line: int, text: str) -> str:
    """`text`, if it can be written as UTF-8.

    Raises:
      BadDocumentError: it has half a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"'{file.text_field}' has half a surrogate pair at character {error.start}"
        raise file.bad(line, HALF_SURROGATE, detail) from None
    return text
