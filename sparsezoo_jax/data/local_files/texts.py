"""Files of text, JSON lines and games, which can be read from any of their places on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

from sparsezoo_jax import storage
from sparsezoo_jax.data.chess.pgn import MAX_GAME_BYTES, NOT_CHESS, GameError, find_games, follows_tags, game_string
from sparsezoo_jax.data.documents import PART_BYTES
from sparsezoo_jax.data.local_files.file import Entry, File, text_of_json
from sparsezoo_jax.data.local_files.streams import (
    Line,
    encoding_at,
    encoding_of,
    lines,
    open_raw,
    open_utf8,
    reading,
    unmarked_utf16,
)
from sparsezoo_jax.data.skipping import NOT_UTF8, TOO_LONG
from sparsezoo_jax.data.sources import scan

#: Bytes of a text file, which is one document.
MAX_TEXT_BYTES = 1 << 30
_BLOCK = 1 << 16


class TextFile(File):
    """A text file is one document; an empty file is none. Lines end with a newline alone, also those of Windows."""

    def id(self, number: int) -> str:
        """The name of the file."""
        return self.name

    def entries(self, piece: int) -> Iterator[Entry]:
        """The file."""
        yield Entry(1, 0, None)

    def numbers(self) -> Iterator[int]:
        """1, or nothing."""
        return iter(range(1, 1 + len(self.pieces())))

    def entries_at(self, place: int, number: int) -> Iterator[Entry]:
        """The file."""
        return self.entries(0)

    def text(self, entry: Entry) -> str:
        """The text of the file."""
        with reading(self.path), open_raw(self.path, self.compression) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise self.bad(1, TOO_LONG, f"longer than {MAX_TEXT_BYTES:,} bytes, and a text file is one document")
        encoding = encoding_of(content)
        try:
            text = content[encoding.mark :].decode(encoding.name)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, encoding.mark + error.start) + 1
            kind = encoding.name.upper().removesuffix("-LE").removesuffix("-BE")
            raise self.bad(line, NOT_UTF8, f"not {kind} at byte offset {encoding.mark + error.start}") from None
        if encoding.is_utf8 and unmarked_utf16(content[:16]):
            raise self.bad(1, NOT_UTF8, "UTF-16 without a byte-order mark")
        return text.replace("\r\n", "\n")


class LinesFile(File):
    """A file of lines in which reading can begin anywhere, unless it is compressed or not in UTF-8.

    What lines are is the business of subclasses; this opens them at the beginning of a piece.
    """

    def __init__(self, path, name, text_field, compression=""):
        super().__init__(path, name, text_field, compression)
        self._newlines: Sequence[int] | None = None  # before each piece; kept, for it goes along to other processes
        self._mark = 0
        if not compression:
            with reading(path):
                encoding = encoding_at(path, compression)
            self._mark = encoding.mark
            self.seekable = encoding.is_utf8
        else:
            self.seekable = False

    def pieces(self) -> Sequence[int]:
        """Ranges of `PART_BYTES` where reading can begin anywhere."""
        size = self.size
        if not self.seekable or size <= PART_BYTES:
            return [size] if size else []
        if self._newlines is None:
            self._newlines = scan(self.path, PART_BYTES).newlines
        return [min(PART_BYTES, size - start) for start in range(0, size, PART_BYTES)]

    def stream(self) -> Iterator[Line]:
        """All lines, without the byte-order mark of the first."""
        with reading(self.path), open_utf8(self.path, self.compression) as file:
            yield from lines(file, start=self._mark)

    def lines_from(self, piece: int, end: int | None = None) -> Iterator[Line]:
        """The lines that begin in a piece (that of a seekable file), and those after it up to `end`."""
        if piece == 0:
            yield from self.lines_at(self._mark, 1, end)
            return
        start = piece * PART_BYTES
        newlines = self._newlines if self._newlines is not None else scan(self.path, PART_BYTES).newlines
        with reading(self.path), storage.open_read(self.path) as file:
            file.seek(start - 1)
            rest = _skip_line(file)
            number = newlines[piece] + (1 if rest == 1 else 2)
            yield from lines(file, start=start - 1 + rest, number=number, end=end)

    def lines_at(self, place: int, number: int, end: int | None = None) -> Iterator[Line]:
        """The lines of a seekable file from an offset on."""
        with reading(self.path), storage.open_read(self.path) as file:
            file.seek(place)
            yield from lines(file, start=place, number=number, end=end)


def _skip_line(file: IO[bytes]) -> int:
    """Reads to the end of a line; returns how many bytes that took."""
    size = 0
    while part := file.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


class JsonLinesFile(LinesFile):
    """One object a line, blank lines left out."""

    def entries(self, piece: int) -> Iterator[Entry]:
        """The lines that begin in a piece."""
        if not self.seekable:
            return _entries(self.stream())
        return _entries(self.lines_from(piece, (piece + 1) * PART_BYTES))

    def entries_at(self, place: int, number: int) -> Iterator[Entry]:
        """The lines from an offset on."""
        return _entries(self.lines_at(place, number))

    def text(self, entry: Entry) -> str:
        """The text field of a line."""
        return text_of_json(self, entry.number, entry.content)


def _entries(found: Iterator[Line]) -> Iterator[Entry]:
    return (Entry(*line) for line in found if line.content is None or line.content.strip())


class GamesFile(LinesFile):
    """A PGN file: one game a document, as a game string."""

    def entries(self, piece: int) -> Iterator[Entry]:
        """The games whose first tag begins in a piece."""
        if not self.seekable:
            return self._games(find_games(self.stream()))
        end = (piece + 1) * PART_BYTES
        if piece == 0:
            return self._games(find_games(self.lines_from(0), end=end))
        return self._games(find_games(self.lines_from(piece), begun=True, in_tags=self._in_tags(piece), end=end))

    def entries_at(self, place: int, number: int) -> Iterator[Entry]:
        """The games from the offset of one on."""
        return self._games(find_games(self.lines_at(place, number)))

    def _games(self, games) -> Iterator[Entry]:
        return (Entry(game.line, game.start, game) for game in games)

    def _in_tags(self, piece: int) -> bool:
        """Whether the first line that begins in a piece would go on with the tags before it."""
        start, size = piece * PART_BYTES, _BLOCK
        with reading(self.path), storage.open_read(self.path) as file:
            file.seek(start - 1)
            end = start - 1 + _skip_line(file)
            while True:
                begin = max(0, end - size)
                file.seek(begin)
                before = file.read(end - begin).splitlines(keepends=True)
                found = follows_tags(reversed(before if begin == 0 else before[1:]))
                if found is not None or begin == 0:
                    return bool(found)
                size *= 4

    def text(self, entry: Entry) -> str:
        """The moves of a game."""
        game = entry.content
        if game.left_out is not None:
            raise self.bad(game.line, game.left_out)
        if game.content is None:
            raise self.bad(game.line, TOO_LONG, f"longer than {MAX_GAME_BYTES:,} bytes: games need tags between them")
        try:
            return game_string(game.content)
        except GameError as error:
            raise self.bad(game.line + error.line, error.reason, str(error)) from None


__all__ = ["NOT_CHESS", "GamesFile", "JsonLinesFile", "LinesFile", "TextFile"]
