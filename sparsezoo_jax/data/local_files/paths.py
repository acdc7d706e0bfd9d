"""The files that a name in `data.dataset` stands for."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsezoo_jax import storage
from sparsezoo_jax.data.dataset_names import KNOWN, format_of, names_in
from sparsezoo_jax.errors import DataError, StorageError

#: So many files that are not read are named.
_NAMED = 5


class Found(NamedTuple):
    """Files of a corpus."""

    root: Path
    """The directory that ids of documents are relative to."""
    files: list[Path]
    """In the order of the corpus."""
    left_out: list[str]
    """What of the same directories is not read."""
    named: bool
    """Whether each file was named by itself."""

    def name_of(self, path: Path) -> str:
        """The name of a file in ids of documents."""
        return path.relative_to(self.root).as_posix()


def find(dataset: str) -> Found:
    """The files of a path, a directory or a glob, or of several.

    Of a directory all files in known formats are taken, also those in folders within it, but hidden ones. Names in a
    list keep their order; the files of each are sorted.

    Raises:
      DataError: there are none. StorageError: a directory can't be read.
    """
    names = names_in(dataset)
    if not names:
        raise DataError(f"data.dataset={dataset}: names nothing")
    found = [_find(name, len(names) > 1) for name in names]
    if len(found) == 1:
        return found[0]
    roots = [storage.absolute(one.root) for one in found]
    try:
        root = storage.common(roots)
    except ValueError as error:
        raise DataError(f"data.dataset={dataset}: {error}") from None
    paths = [storage.absolute(path) for one in found for path in one.files]
    left_out = [name for one in found for name in one.left_out]
    return Found(root, list(dict.fromkeys(paths)), left_out, all(one.named for one in found))


def _find(name: str, listed: bool) -> Found:
    path = storage.path(name).expanduser()
    if storage.scheme_of(name) not in (None, *storage.OBJECT_STORES):
        raise DataError(f"data.dataset={name}: no such file or directory; only files can be listed")
    if path.is_dir():
        known, others = _sorted_out(_walk(path), path)
        if not known:
            raise DataError(f"data.dataset={name}: no files in a known format in this directory; known are {KNOWN}")
        return Found(path, known, others, False)
    if path.exists():
        if not path.is_file():
            raise DataError(f"data.dataset={name}: is no regular file")
        if format_of(path) is None:
            raise DataError(f"{path}: unknown extension '{path.suffix}', known are {KNOWN}")
        return Found(path.parent, [path], [], True)
    if not glob.has_magic(name):
        files = "; only files can be listed" if listed and format_of(name) is None else ""
        raise DataError(f"data.dataset={name}: no such file or directory{files}")
    root = type(path)(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts))
    found = storage.matching(path)
    if not found:
        raise DataError(f"data.dataset={name}: no file matches")
    known, others = _sorted_out(found, root)
    if not known:
        raise DataError(f"{found[0]}: unknown extension '{found[0].suffix}', known are {KNOWN}")
    return Found(root, known, others, False)


def _walk(root: Path) -> Iterator[Path]:
    """What is in a directory and the folders within it, links followed; hidden folders as a whole."""
    if storage.is_object(root):
        yield from storage.files_below(root)
        return
    seen = set()
    for directory, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [folder for folder in folders if folder.startswith(".")]
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        yield from (Path(directory, name) for name in (*hidden, *names))


def _raise(error: OSError) -> None:
    raise StorageError(f"{error.filename}: {error.strerror or error}") from error


def _sorted_out(paths: Iterator[Path] | Sequence[Path], root: Path) -> tuple[list[Path], list[str]]:
    """The files to read, and the names of all others."""
    known, others = [], []
    for path in paths:
        # Folders of this machine that are hidden come as a whole.
        parts = path.relative_to(root).parts if storage.is_object(path) else (path.name,)
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and format_of(path) is not None and (storage.is_object(path) or path.is_file()):
            known.append(path)
        else:
            others.append(
                path.relative_to(root).as_posix() + ("/" if not storage.is_object(path) and path.is_dir() else "")
            )
    return sorted(known), sorted(others)


def shortened(names: Sequence[str]) -> str:
    """Some names for one line."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
