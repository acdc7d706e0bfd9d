"""Files as streams of UTF-8 bytes: decompressed, without a byte-order mark, in lines of bounded length."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from sparsezoo_jax import storage
from sparsezoo_jax.errors import DataError, StorageError
from sparsezoo_jax.untrusted import MAX_LINE_BYTES

#: Longest mark first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHUNK = 1 << 20


class Encoding(NamedTuple):
    """How the text of a file begins."""

    name: str
    mark: int
    """Bytes of its byte-order mark."""

    @property
    def is_utf8(self) -> bool:
        """Whether bytes are given as they are."""
        return self.name == "utf-8"


def encoding_of(head: bytes) -> Encoding:
    """The encoding that the first bytes of a file show by a byte-order mark; UTF-8 without one."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return Encoding(name, len(mark))
    return Encoding("utf-8", 0)


def unmarked_utf16(head: bytes) -> bool:
    """Whether the first bytes are those of UTF-16 without a byte-order mark: every other one is 0."""
    first, second = head[: len(head) & ~1 : 2], head[1::2]
    return len(second) >= 2 and ((all(first) and not any(second)) or (all(second) and not any(first)))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what reading raises into errors for users.

    Raises:
      StorageError: the disk can't be read, or the file is damaged.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, _DamagedError) as error:
        raise StorageError(f"{path}: damaged, it can't be decompressed to its end ({error or 'cut short'})") from error
    except OSError as error:
        if error.errno is None:  # raised by bz2 for what is in the file
            raise StorageError(f"{path}: damaged, it can't be decompressed to its end ({error})") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


class _DamagedError(Exception):
    pass


def open_raw(path: Path, compression: str) -> IO[bytes]:
    """The decompressed bytes of a file, as they are; to be used within `reading`."""
    if compression == ".gz":
        return gzip.open(storage.source(path), "rb")  # type: ignore[return-value]
    if compression == ".bz2":
        return bz2.open(storage.source(path), "rb")  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.open(storage.source(path), "rb")
    if compression == ".zst":
        return io.BufferedReader(_Zstandard(path), _CHUNK)
    return storage.open_read(path)


def open_utf8(path: Path, compression: str) -> IO[bytes]:
    """The text of a file as UTF-8 without its byte-order mark; to be used within `reading`.

    What is wrong in UTF-16 or UTF-32 comes out as bytes that are no UTF-8.

    Raises:
      DataError: it is UTF-16 without a byte-order mark.
    """
    encoding = encoding_at(path, compression)
    raw = open_raw(path, compression)
    raw.read(encoding.mark)
    return raw if encoding.is_utf8 else io.BufferedReader(_Recoded(raw, encoding.name), _CHUNK)


def encoding_at(path: Path, compression: str) -> Encoding:
    """The encoding of a file; to be used within `reading`.

    Raises:
      DataError: it is UTF-16 without a byte-order mark.
    """
    with open_raw(path, compression) as file:
        head = file.read(16)
    encoding = encoding_of(head)
    if encoding.is_utf8 and unmarked_utf16(head):
        raise DataError(f"{path}: UTF-16 without a byte-order mark; convert it: iconv -f UTF-16LE -t UTF-8")
    return encoding


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file, one after another; unlike `zstandard.open` it tells a file that is cut short, and
    reads frames with windows of up to 2 GiB (`zstd --long=31`).
    """

    def __init__(self, path: Path):
        import zstandard

        self._file, self._error = storage.open_read(path), zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            # Small pieces: a byte of a frame may stand for 32,768.
            data = self._compressed or self._file.read(1 << 13)
            if not data:
                if self._frame is not None:
                    raise _DamagedError("cut short")
                return 0
            try:
                if self._frame is None:
                    self._frame = self._frames.decompressobj()
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise _DamagedError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _no_character(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udfff", error.end  # encoded by `surrogatepass` as bytes that are no UTF-8


codecs.register_error("sparsezoo-no-character", _no_character)


class _Recoded(io.RawIOBase):
    """UTF-16 or UTF-32 as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str):
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("sparsezoo-no-character")
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready and not self._ended:
            data = self._file.read(_CHUNK)
            self._ended = not data
            self._ready = memoryview(self._decoder.decode(data, final=self._ended).encode("utf-8", "surrogatepass"))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


class Line(NamedTuple):
    """A line of a stream."""

    number: int
    """From 1."""
    start: int
    """Its offset in the stream."""
    content: bytes | None
    """With its newline; None if it is longer than `MAX_LINE_BYTES`."""


def lines(file: IO[bytes], *, start: int = 0, number: int = 1, end: int | None = None) -> Iterator[Line]:
    """The lines of a stream that stands at offset `start`, those that begin before `end`."""
    while end is None or start < end:
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        size = len(line)
        if size > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
                size += len(line)
            yield Line(number, start, None)
        else:
            yield Line(number, start, line)
        number, start = number + 1, start + size
