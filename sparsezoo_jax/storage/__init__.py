"""The files of runs, corpora, caches and reports: the one module that opens them, on disks and in object stores.

A name becomes a path in `path`: one of this machine is a `pathlib.Path`, one with a scheme an `ObjectPath`, which does
the same things through the file systems of `etils.epath`. What differs is what a store can promise, and is here:

- whole or absent: a file that is synced and renamed, or an object, which appears when its last byte is there;
- appending: objects can't, so a `Mirror` copies local files there now and then;
- one writer: objects have generations, and a write can demand the one that was read (`conditions.write_if`).

Every failure is an `OSError` with a `strerror` of one line. docs/storage.md says what is supported where.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import glob
import importlib.util
import io
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from sparsezoo_jax.errors import ConfigError, StorageError
from sparsezoo_jax.storage.objects import CLIENTS, calls, change, client, info, read_range

#: Object stores that corpora, caches, tokenizers, reports and checkpoints of Hugging Face's layout can be in.
OBJECT_STORES = tuple(CLIENTS)
#: Object stores that what has checkpoints can be in: runs and autoencoders.
RUN_STORES = ("gs",)
#: What a file object reads ahead, and so the memory of each.
READ_AHEAD = 1 << 22
_COPY_SECONDS = 30.0
#: One slash, too: what is left of a name that went through `pathlib`. Drives of Windows have one letter.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_WHY_NOT = {"s3": "checkpoints can't be kept there, for Orbax takes no s3:// paths"}


# ---------------------------------------------------------------------------------------------------------------- Paths
class ObjectPath(PosixPath):
    """A path with a scheme, which it keeps: `str` gives `gs://bucket/name`, and so does every path made from it.

    Directories are what names have in common: they exist with the first object in them.
    """

    def __str__(self) -> str:
        first, *rest = self.parts or ("",)
        return f"{first}//{'/'.join(rest)}" if first.endswith(":") else super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    @property
    def scheme(self) -> str:
        """What is before the colon."""
        return self.parts[0].removesuffix(":")

    def is_absolute(self) -> bool:
        """Always."""
        return True

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Itself: there are no links."""
        return self

    def expanduser(self) -> ObjectPath:
        """Itself."""
        return self

    def exists(self, **_: Any) -> bool:
        """Whether there is such an object, or any below this name."""
        return info(self) is not None

    def is_file(self, **_: Any) -> bool:
        """Whether there is such an object."""
        found = info(self)
        return found is not None and found["type"] == "file"

    def is_dir(self, **_: Any) -> bool:
        """Whether there are objects below this name."""
        found = info(self)
        return found is not None and found["type"] == "directory"

    def iterdir(self) -> Iterator[ObjectPath]:
        """What is directly below this name."""
        with calls(self):
            found = {ObjectPath(f"{self.scheme}://{name}") for name in client(self).ls(str(self), detail=False)}
        # The object that some tools make of an empty folder has the folder's own name.
        yield from sorted(found - {self})

    def glob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:
        """What is directly below this name and matches."""
        with contextlib.suppress(FileNotFoundError):
            yield from (one for one in self.iterdir() if fnmatch.fnmatchcase(one.name, pattern))

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: see above."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object."""
        with contextlib.suppress(*(FileNotFoundError,) if missing_ok else ()), calls(self):
            client(self).rm_file(str(self))

    def rename(self, target: str | os.PathLike[str]) -> ObjectPath:
        """Copies within the store, then removes; not atomic."""
        with calls(self):
            client(self).copy(str(self), os.fspath(target), recursive=self.is_dir())
            client(self).rm(str(self), recursive=True)
        return ObjectPath(target)

    def open(self, mode: str = "r", *_: Any, **__: Any) -> Any:
        """Opens an object to be read as bytes."""
        assert mode == "rb", "objects are written whole: see write_atomic"
        return open_read(self)


def scheme_of(name: str | os.PathLike[str]) -> str | None:
    """The scheme that a name begins with ('gs' of 'gs://bucket/run'); None for a path of this machine."""
    found = _SCHEME.match(os.fspath(name))
    return found[1].lower() if found else None


def path(name: str | os.PathLike[str]) -> Path:
    """The path that a name stands for; one with a scheme keeps it."""
    return Path(name) if scheme_of(name) is None else ObjectPath(name)


def require_place(field: str, name: str | os.PathLike[str] | None, *, schemes: Collection[str] = ()) -> None:
    """Raise `ConfigError` unless `name` (None is none) is a path of this machine or begins with one of `schemes`."""
    scheme = None if name is None else scheme_of(name)
    if scheme is None:
        return
    if scheme not in schemes:
        also = "".join(f" or {known}://" for known in schemes)
        why = f"{scheme}: is not supported here"
        why = _WHY_NOT.get(scheme, why) if schemes else why
        raise ConfigError(field, name, f"must be a path on this machine{also}; {why}")
    module, extra = CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(field, name, f"must be a path on this machine without: pip install 'sparsezoo-jax[{extra}]'")
    if len(ObjectPath(cast(str, name)).parts) < 2:
        raise ConfigError(field, name, "must name a bucket")


def is_object(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store."""
    return scheme_of(path) is not None


def absolute(path: Path) -> Path:
    """`path` from the root on, with no `..` in it."""
    return path if is_object(path) else Path(os.path.abspath(path))


def common(paths: Collection[str | os.PathLike[str]]) -> Path:
    """The folder that all of some absolute paths are in; raises `ValueError` if there is none."""
    if not any(map(is_object, paths)):
        return Path(os.path.commonpath(paths))
    if len(set(map(scheme_of, paths))) > 1:
        raise ValueError("files of this machine and of a bucket can't be one corpus, nor those of several stores")
    return ObjectPath(os.path.commonpath([re.sub(r":/+", ":/", os.fspath(path)) for path in paths]))


# -------------------------------------------------------------------------------------------------------------- Reading
def open_read(path: str | os.PathLike[str]) -> io.BufferedReader:
    """A file or object to read bytes from; of an object `READ_AHEAD` bytes are in memory, and seeking is cheap.

    Raises:
      OSError: it can't be read, now or when it is read from.
    """
    return io.BufferedReader(_Object(ObjectPath(path)), READ_AHEAD) if is_object(path) else open(path, "rb")


def source(path: Path) -> Any:
    """What libraries that open a path of this machine themselves (gzip, pyarrow) take for any path."""
    return open_read(path) if is_object(path) else path


@contextlib.contextmanager
def fetched(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Files of this machine for libraries that open no others: these, or copies of objects, gone when the block ends.

    Raises:
      OSError: one can't be read, or the temporary directory has no room for them.
    """
    with contextlib.ExitStack() as stack:
        files = list(paths)
        if any(map(is_object, paths)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsezoo-")))
            for number, path in enumerate(paths):
                files[number] = folder / f"{number}-{path.name}"
                copy(path, files[number])
        yield files


class Version(NamedTuple):
    """What tells whether a file is still the same."""

    size: int
    changed: int
    """Nanoseconds of a file's time of change, or a number for an object's version."""


def version(path: Path) -> Version:
    """Size and time of change; raises `OSError` if there is no such file."""
    if is_object(path):
        found = info(path)
        if found is None or found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return Version(int(found["size"]), change(found))
    stat = os.stat(path)
    return Version(stat.st_size, stat.st_mtime_ns)


def bytes_below(directory: Path) -> int:
    """Bytes of all files in a directory and the folders within it; raises `OSError`."""
    if is_object(directory):
        with calls(directory):
            return sum(int(found["size"]) for found in client(directory).find(str(directory), detail=True).values())
    return sum(os.stat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(directory) for name in names)


def files_below(directory: Path) -> list[Path]:
    """All files in a directory and the folders within it, links not followed; raises `OSError`."""
    if not is_object(directory):
        return [Path(folder, name) for folder, _, names in os.walk(directory) for name in names]
    with calls(directory):
        return _named(directory, client(directory).find(str(directory)))


def matching(pattern: Path) -> list[Path]:
    """The files that a pattern (`*`, `?`, `[...]`, `**` for folders) matches; raises `OSError`."""
    if not is_object(pattern):
        return sorted(found for found in map(Path, glob.glob(str(pattern), recursive=True)) if found.is_file())
    with calls(pattern):
        return _named(pattern, client(pattern).glob(str(pattern)))


def _named(path: Path, names: Iterable[str]) -> list[Path]:
    """What the client of a path's store calls so; not the objects that stand for folders in a browser."""
    scheme = scheme_of(path)
    return [ObjectPath(f"{scheme}://{name}") for name in names if not name.endswith("/")]


# -------------------------------------------------------------------------------------------------------------- Writing
def write_atomic(path: Path, content: bytes) -> Path:
    """Writes a file that is either whole or absent, even after a crash; raises `StorageError`."""
    temporary = None
    try:
        if is_object(path):
            with calls(path):
                client(path).pipe_file(str(path), content)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise StorageError(f"{path}: could not write: {error.strerror or error}") from error
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file of this machine that is whole or what it was for those who read it; raises `OSError`."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes out of blocks like this one for the same directory; the lock ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: reading back must do
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A file of this machine to be written, which becomes `path` when the block ends, and is gone if it fails.

    It is beside `path`, under the name `.NAME.` and something random; of an object it is in the temporary directory.

    Raises:
      OSError: it can't be published.
    """
    if is_object(path):
        with tempfile.TemporaryDirectory(prefix="sparsezoo-") as folder:
            yield Path(folder) / path.name
            upload(Path(folder) / path.name, path)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copies a file or an object to a file or an object that is whole or absent; raises `OSError`."""
    with open_read(source) as file, staged(target) as temporary, open(temporary, "wb") as new:
        shutil.copyfileobj(file, new, READ_AHEAD)


def sync(path: Path) -> None:
    """Returns when a file or directory of this machine is on its disk; raises `OSError` if it can't be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def upload(file: Path, path: Path) -> None:
    """Copies a file of this machine to an object, which appears when it is whole; raises `OSError`."""
    with calls(path):
        client(path).put_file(str(file), str(path))


def open_append(path: Path) -> int:
    """The descriptor of a file of this machine to append to; raises `OSError`."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


class Rewritten:
    """The new content of a file, which takes its place if `keep` is set."""

    def __init__(self, file: BinaryIO):
        self.write, self.keep = file.write, False


@contextlib.contextmanager
def rewritten(path: Path) -> Iterator[Rewritten]:
    """Writes a file of this machine anew beside itself: the old one stays whole until the new one is.

    Raises:
      OSError: it can't be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        new = Rewritten(file)
        yield new
    if new.keep:
        os.replace(temporary, path)
    else:
        temporary.unlink()


def remove_tree(directory: Path) -> None:
    """Removes a directory and what is in it, as far as that is possible."""
    if not is_object(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    with contextlib.suppress(OSError), calls(directory):
        client(directory).rm(str(directory), recursive=True)


class Mirror:
    """Files that are written on this machine bit by bit and belong into `directory`, which may be in a store.

    On a disk `local` is `directory` itself. Else it is a temporary folder, and `send` copies there what changed in it:
    at once, or no sooner than `_COPY_SECONDS` (and ten times what the last copy took) after the time before.
    """

    def __init__(self, directory: Path):
        self.directory, self.is_remote = directory, is_object(directory)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._due = time.monotonic() + _COPY_SECONDS

    @property
    def local(self) -> Path:
        """Where to write; raises `OSError` if the temporary folder can't be made."""
        if not self.is_remote:
            return self.directory
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="sparsezoo-")
        return Path(self._folder.name)

    def fetch(self, name: str) -> None:
        """Copy a file, if there is one, to go on with it; raises `OSError`."""
        if self.is_remote and (self.directory / name).is_file():
            with calls(self.directory / name):
                client(self.directory).get_file(str(self.directory / name), str(self.local / name))
            self._sent[name] = self._state(self.local / name)

    def send(self, *, now: bool = False) -> bool:
        """Copy what changed, if it is time or `now`; whether the store has everything then. Raises `OSError`."""
        if self._folder is None:
            return True
        if not now and time.monotonic() < self._due:
            return False
        started = time.monotonic()
        try:
            for file in sorted(self.local.rglob("*")):
                name, state = file.relative_to(self.local).as_posix(), self._state(file)
                if file.is_file() and self._sent.get(name) != state:
                    upload(file, self.directory / name)
                    self._sent[name] = state
        finally:
            ended = time.monotonic()
            self._due = ended + max(_COPY_SECONDS, 10 * (ended - started))
        return True

    def close(self) -> None:
        """Copy what changed, and remove the temporary folder; raises `OSError`."""
        self.send(now=True)
        if self._folder is not None:
            self._folder.cleanup()

    @staticmethod
    def _state(file: Path) -> tuple[int, int]:
        stat = file.stat()
        return stat.st_size, stat.st_mtime_ns


class _Object(io.RawIOBase):
    """An object as a stream of bytes that can seek."""

    def __init__(self, path: ObjectPath):
        self._path, self._place = path, 0
        self._size = version(path).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        content = read_range(self._path, self._place, end)
        if len(content) != end - self._place:
            raise OSError(errno.EIO, "was changed while it was read", str(self._path))
        buffer[: len(content)] = content
        self._place = end
        return len(content)
