"""Local files as documents: text, JSON, tables and games, compressed or not, in one file or in many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsezoo_jax import storage
from sparsezoo_jax.data.config import DataConfig, local_cache
from sparsezoo_jax.data.dataset_names import KNOWN, format_of
from sparsezoo_jax.data.documents import SourceFile, Split
from sparsezoo_jax.data.local_files.columns import NoColumnError
from sparsezoo_jax.data.local_files.documents import LocalDocuments, Share, held_out
from sparsezoo_jax.data.local_files.file import File
from sparsezoo_jax.data.local_files.json_values import JsonFile, is_json_lines
from sparsezoo_jax.data.local_files.paths import Found, find, shortened
from sparsezoo_jax.data.local_files.streams import reading
from sparsezoo_jax.data.local_files.tables import CsvFile, ParquetFile, TsvFile
from sparsezoo_jax.data.local_files.texts import GamesFile, JsonLinesFile, TextFile
from sparsezoo_jax.data.sources import recall
from sparsezoo_jax.errors import DataError, SparsezooWarning

__all__ = ["LocalDocuments", "open_local", "share_of"]

_KINDS: dict[str, Callable[..., File]] = {
    ".txt": TextFile,
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".csv": CsvFile,
    ".tsv": TsvFile,
    ".parquet": ParquetFile,
    ".pgn": GamesFile,
}


def open_local(config: DataConfig, name: str, split: Split, *, whole: bool = False) -> LocalDocuments:
    """Opens the local files that `name` (a file, a directory, a glob, or several) stands for.

    A directory with a subdirectory called `validation_split` validates on it, and trains on the subdirectory
    `train_split` or, without one, on all other files. Otherwise the `validation_fraction` of documents whose ids have
    the lowest sha256 values are held out: at least one, and never all. `whole` takes every document. What of a
    directory is not read is named in a warning. Raises `DataError` for files that can't be used.
    """
    found = find(name)
    own_validation = found.root / config.validation_split
    if not whole and storage.path(name).expanduser().is_dir() and own_validation.is_dir():
        if split == "validation":
            found = find(str(own_validation))
        elif (found.root / config.train_split).is_dir():
            found = find(str(found.root / config.train_split))
        else:
            others = [path for path in found.files if own_validation not in path.parents]
            found = found._replace(files=others)
        whole = True
    if not found.files:
        raise DataError(f"data.dataset={name}: no files for the {split} split; known are {KNOWN}")
    named = [SourceFile(found.name_of(path), path) for path in found.files]
    recall(named, local_cache(config), verify=config.verify == "full")
    files, left_out = _open_all(config, found)
    if left_out:
        warnings.warn(f"data.dataset={name}: not read: {shortened(left_out)}", SparsezooWarning, stacklevel=2)
    return LocalDocuments(files, share_of(files, config, name, split, whole), local_cache(config))


def share_of(files: Sequence[File], config: DataConfig, name: str, split: Split, whole: bool) -> Share:
    """The documents of `files` that are in `split`: all of them if it is `whole`.

    Raises:
      DataError: there are none.
    """
    first = next((number for file in files for number in file.numbers()), None)
    if first is None:
        where = files[0].label if len(files) == 1 else f"{len(files)} files"
        raise DataError(f"data.dataset={name}: no documents in {where}")
    if whole:
        return Share(None)
    fraction = config.validation_fraction
    share = held_out(files, fraction, split == "validation") if fraction else None
    if share is not None:
        return share
    if split == "train":
        return Share(None)
    reason = "it has one document" if fraction else "data.validation_fraction=0"
    raise DataError(f"data.dataset={name}: nothing to validate on, {reason}; give data.validation_dataset")


def _open_all(config: DataConfig, found: Found) -> tuple[list[File], list[str]]:
    """The files, and the names of those that are not read."""
    files, left_out = [], list(found.left_out)
    for path in found.files:
        try:
            files.append(_open(path, found.name_of(path), config.text_field))
        except NoColumnError as error:
            # A table of something else beside the corpus, unless it was asked for.
            if found.named or len(found.files) == 1 or config.on_bad_document == "stop":
                raise
            if path == found.files[-1] and not files:
                raise
            left_out.append(f"{found.name_of(path)} ({str(error).removeprefix(f'{path}: ')})")
    return files, left_out


def _open(path: Path, name: str, text_field: str) -> File:
    known = format_of(path)
    assert known is not None
    with reading(path):
        if known.suffix == ".json":
            kind = JsonLinesFile if is_json_lines(path, known.compression) else JsonFile
        else:
            kind = _KINDS[known.suffix]
        return kind(path, name, text_field, known.compression)
