"""The files of a corpus: what they hold is known by their sha256, and that by their size and time of change.

A corpus is what its files hold. Reading all of them at every start would take hours, so the sha256 of a file is
remembered in the cache under its path, size and time of change, and taken from there as long as these are the same
(`data.verify` full reads the file anyway). A file that was moved, copied or touched is read once more: if it still
holds the same, it is still the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sparsezoo_jax.data.documents import SourceFile, digest
from sparsezoo_jax.data.tokenizer import write_atomic
from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.untrusted import read_json

MEMORY = "file_hashes"
#: A file changed in the last moments may change again without its time showing it: file systems count in ticks.
_TICK_SECONDS = 2.0
_MAX_MEMORY_BYTES = 1 << 28
#: So many small files of a memory become one.
_MANY = 32


class Version(NamedTuple):
    """A file as it is now."""

    path: str
    size: int
    modified_ns: int


_known: dict[Version, str] = {}


def versions(files: Sequence[SourceFile]) -> list[Version]:
    """Path, size and time of change of each file; raises `StorageError` if one is missing."""
    found = []
    for file in files:
        try:
            stat = os.stat(file.path)
        except OSError as error:
            raise StorageError(f"{file.path}: {error.strerror or error}") from error
        found.append(Version(os.path.abspath(file.path), stat.st_size, stat.st_mtime_ns))
    return found


def describe(files: Sequence[SourceFile], cache: Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """`name`, `bytes`, `modified_ns` and `sha256` of each file.

    Args:
      files: of one corpus.
      cache: directory of what is remembered.
      verify: read every file.

    Raises `StorageError` if a file can't be read.
    """
    found = versions(files)
    memory = cache / MEMORY / digest(os.path.commonpath([os.path.dirname(version.path) for version in found] or ["/"]))
    if not verify and any(version not in _known for version in found):
        _read_memory(memory)
    missing = [version for version in dict.fromkeys(found) if verify or version not in _known]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "hash") as pool:
        hashes = dict(zip(missing, pool.map(_sha256, missing), strict=True))
    _known.update(hashes)
    _remember(memory, hashes)
    return [
        {"name": file.name, "bytes": v.size, "modified_ns": v.modified_ns, "sha256": _known[v]}
        for file, v in zip(files, found, strict=True)
    ]


def changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[str]:
    """What is different between two descriptions of a corpus, a line for each file."""
    old, new = {row["name"]: row for row in before}, {row["name"]: row for row in now}
    lines = []
    for name, row in new.items():
        if name not in old:
            lines.append(f"{name} is new")
        elif row["sha256"] != old[name].get("sha256"):
            lines.append(f"{name} was changed ({old[name].get('bytes')} bytes then, {row['bytes']} now)")
    return lines + [f"{name} is missing" for name in old if name not in new]


def _sha256(version: Version) -> str:
    try:
        with open(version.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{version.path}: {error.strerror or error}") from error


def _read_memory(memory: Path) -> None:
    for path in sorted(memory.glob("*.json")):
        try:
            rows = read_json(path, max_bytes=_MAX_MEMORY_BYTES)
            _known.update({Version(*row[:3]): str(row[3]) for row in rows})
        except (OSError, ValueError, TypeError, IndexError):  # another process made one file of several meanwhile
            continue


def _remember(memory: Path, hashes: dict[Version, str]) -> None:
    settled = (time.time() - _TICK_SECONDS) * 1e9
    rows = [[*version, value] for version, value in hashes.items() if version.modified_ns < settled]
    if not rows:
        return
    content = json.dumps(rows).encode()
    write_atomic(memory / f"{hashlib.sha256(content).hexdigest()[:16]}.json", content)
    before = sorted(memory.glob("*.json"))
    if len(before) > _MANY:
        _read_memory(memory)
        everything = json.dumps([[*version, value] for version, value in _known.items()]).encode()
        kept = write_atomic(memory / f"{hashlib.sha256(everything).hexdigest()[:16]}.json", everything)
        for path in before:
            if path != kept:
                path.unlink(missing_ok=True)
