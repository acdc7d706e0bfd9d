"""Random access to files that can only be read from their beginning: read once, and kept as lines in the cache."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sparsezoo_jax import storage
from sparsezoo_jax.data.documents import BadDocumentError, digest
from sparsezoo_jax.data.local_files.file import Entry, File
from sparsezoo_jax.data.local_files.streams import reading
from sparsezoo_jax.errors import StorageError

#: Changes whenever the same file would be unpacked in another way.
_RECIPE = "unpacked-1"


class UnpackedFile(File):
    """The documents of another file: a line for each, its number there, a tab and its text, or why it has none."""

    def __init__(self, file: File, cache: Path):
        super().__init__(file.path, file.name, file.text_field)
        key = digest(_RECIPE, type(file).__name__, file.path.name, file.text_field, file.digest())
        self._lines = cache / "unpacked" / f"{key}.lines"
        if not self._lines.is_file():
            _unpack(file, self._lines)

    def entries(self, piece: int) -> Iterator[Entry]:
        """All entries."""
        return self.entries_at(0, 0)

    def entries_at(self, place: int, number: int) -> Iterator[Entry]:
        """The entries from an offset in the lines on."""
        with reading(self._lines), storage.open_read(self._lines) as file:
            file.seek(place)
            for line in file:
                key, _, content = line.partition(b"\t")
                yield Entry(int(key), place, content)
                place += len(line)

    def text(self, entry: Entry) -> str:
        """The text of an entry."""
        value = json.loads(entry.content)
        if isinstance(value, str):
            return value
        place, reason, detail = value
        raise BadDocumentError(f"{self.label}{place}", reason, detail)


def _unpack(file: File, target: Path) -> None:
    """Writes the lines at once for all processes: others wait, and what a killed one left is written anew."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f".{target.name}.partial"), "ab") as lines:
            fcntl.flock(lines, fcntl.LOCK_EX)
            if target.is_file():
                return
            lines.truncate(0)
            for piece in range(len(file.pieces())):
                for entry in file.entries(piece):
                    lines.write(b"%d\t%s\n" % (entry.number, json.dumps(_value(file, entry)).encode()))
            lines.flush()
            os.fsync(lines.fileno())
            os.rename(lines.name, target)
    except OSError as error:
        raise StorageError(f"{target.parent}: could not unpack {file.path}: {error.strerror or error}") from error


def _value(file: File, entry: Entry) -> str | list[str]:
    try:
        return file.text(entry)
    except BadDocumentError as error:
        where, reason, detail = error.skipped
        return [where.removeprefix(file.label), reason, detail]
