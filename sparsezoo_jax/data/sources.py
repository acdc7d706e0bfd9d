"""The files of a corpus: what they hold is known by their sha256, and that by their size and time of change.

A corpus is what its files hold. Reading all of them at every start would take hours, so what a pass over a file found
is remembered in the cache under its path, size and time of change, and taken from there as long as these are the same
(`data.verify` full reads the file anyway). A file that was moved, copied or touched is read once more: if it still
holds the same, it is still the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sparsezoo_jax import storage
from sparsezoo_jax.data.documents import PART_BYTES, SourceFile, changed_files, digest
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.untrusted import read_json

MEMORY, CORPORA = "file_scans", "corpora"
#: A file changed in the last moments may change again without its time showing it: file systems count in ticks.
_TICK_SECONDS = 2.0
_MAX_MEMORY_BYTES = 1 << 28
#: So many small files of a memory become one.
_MANY = 32
_CHUNK = 1 << 20
#: A pass over so many bytes is announced.
_TELL_BYTES = 4 << 30


class Version(NamedTuple):
    """A file as it is now."""

    path: str
    size: int
    modified_ns: int
    """Of an object, its generation, which is exact."""


class Scan(NamedTuple):
    """What a pass over the bytes of a file found."""

    sha256: str
    newlines: array[int]
    """Newlines before each multiple of the size of a part."""


_Key = tuple[Version, int]
#: Passes of this process, and those that the cache knows of.
_made: dict[_Key, Scan] = {}
_remembered: dict[_Key, Scan] = {}


def version(path: Path) -> Version:
    """Path, size and time of change; raises `StorageError` if there is no such file."""
    try:
        size, changed = storage.version(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
    return Version(str(storage.absolute(path)), size, changed)


def scan(path: Path, part_bytes: int) -> Scan:
    """One pass over a file, which is remembered while its size and time of change are the same.

    Args:
      part_bytes: what newlines are counted before the multiples of.

    Raises `StorageError` if it can't be read.
    """
    key = (version(path), part_bytes)
    if not _is_known(key):
        _made[key] = _scan(path, part_bytes)
    return _made.get(key) or _remembered[key]


def _is_known(key: _Key) -> bool:
    return key in _made or key in _remembered


def scan_all(files: Sequence[SourceFile], part_bytes: int, cache: Path) -> list[Scan]:
    """A pass over each file, several at a time, remembered in the cache; raises `StorageError`."""
    unknown = [key[0].size for file in files if not _is_known(key := (version(file.path), part_bytes))]
    if sum(unknown) > _TELL_BYTES:
        what = f"{len(unknown):,} files ({sum(unknown) / 1e9:,.0f} GB)"
        print(f"reading {what} once, to know what they hold; {cache / MEMORY} remembers it", file=sys.stderr)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "scan") as pool:
        scans = list(pool.map(lambda file: scan(file.path, part_bytes), files))
    _remember(files, cache)
    return scans


def recall(files: Sequence[SourceFile], cache: Path, *, verify: bool) -> None:
    """Takes what the cache knows of a corpus, unless all is to be read again in this process."""
    if verify:
        _remembered.clear()
        return
    for path in sorted(_memory(files, cache).glob("*.json")):
        try:
            for row in read_json(path, max_bytes=_MAX_MEMORY_BYTES):
                name, size, modified_ns, part_bytes, sha256, newlines = row
                _remembered[Version(name, size, modified_ns), part_bytes] = Scan(str(sha256), array("q", newlines))
        except (OSError, ValueError, TypeError, OverflowError):  # another process joins them, or a damaged one
            continue


def describe(files: Sequence[SourceFile], part_bytes: int) -> list[dict[str, Any]]:
    """`name`, `bytes`, `modified_ns` and `sha256` of each file; raises `StorageError`."""
    return [
        {
            "name": file.name,
            "bytes": now.size,
            "modified_ns": now.modified_ns,
            "sha256": scan(file.path, part_bytes).sha256,
        }
        for file, now in ((file, version(file.path)) for file in files)
    ]


def changed(dataset: str | None, before: Sequence[dict[str, Any]] | None, files: Sequence[SourceFile]) -> str:
    """The line for a run whose corpus is not what it was: which files changed, and the ways on.

    Args:
      dataset: as the user names it.
      before: the description of its files then, None if it was not kept.
      files: of the corpus now.
    """
    now = {row["name"]: row["sha256"] for row in describe(files, PART_BYTES)}
    found = changed_files({row["name"]: row.get("sha256", "") for row in before or ()}, now) if before else ""
    what = f" ({found})" if found else ""
    return (
        f"data.dataset={dataset}: is not what this run was trained on{what}; put it back as it was, or begin "
        "another run from its parameters (--train.init-from RUN --workdir ANOTHER)"
    )


def keep(fingerprint: str, files: Sequence[SourceFile], cache: Path) -> None:
    """Keeps the description of a corpus in the cache, for `kept`; raises `StorageError`."""
    path = cache / CORPORA / f"{fingerprint}.json"
    if files and not path.exists():
        write_atomic(path, json.dumps(describe(files, PART_BYTES)).encode())


def kept(fingerprint: str, cache: Path) -> list[dict[str, Any]] | None:
    """The description of a corpus by its fingerprint; None if there is none."""
    try:
        return read_json(cache / CORPORA / f"{fingerprint}.json", max_bytes=_MAX_MEMORY_BYTES)
    except (OSError, ValueError):
        return None


def _scan(path: Path, part_bytes: int) -> Scan:
    sha256, newlines, count, left = hashlib.sha256(), array("q"), 0, 0
    try:
        with storage.open_read(path) as file:
            while chunk := file.read(min(_CHUNK, left or part_bytes)):
                if not left:
                    newlines.append(count)
                    left = part_bytes
                sha256.update(chunk)
                count += chunk.count(b"\n")
                left -= len(chunk)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
    return Scan(sha256.hexdigest(), newlines)


def _memory(files: Sequence[SourceFile], cache: Path) -> Path:
    """Where passes over the files of a corpus are remembered."""
    folders = {storage.absolute(file.path).parent for file in files}
    return cache / MEMORY / digest(str(storage.common(folders or {Path("/")})))


def _remember(files: Sequence[SourceFile], cache: Path) -> None:
    memory, settled = _memory(files, cache), (time.time() - _TICK_SECONDS) * 1e9
    paths = {str(storage.absolute(file.path)) for file in files}
    new = {key: found for key, found in _made.items() if key[0].path in paths and key not in _remembered}
    new = {key: found for key, found in new.items() if key[0].modified_ns < settled}
    if not new:
        return
    _write(memory, new)
    _remembered.update(new)
    before = sorted(memory.glob("*.json"))
    if len(before) > _MANY:
        recall(files, cache, verify=False)
        kept = _write(memory, {key: found for key, found in _remembered.items() if key[0].path in paths})
        for path in before:
            if path != kept:
                path.unlink(missing_ok=True)


def _write(memory: Path, scans: dict[_Key, Scan]) -> Path:
    rows = [[*key[0], key[1], found.sha256, found.newlines.tolist()] for key, found in scans.items()]
    content = json.dumps(rows).encode()
    return write_atomic(memory / f"{hashlib.sha256(content).hexdigest()[:16]}.json", content)
