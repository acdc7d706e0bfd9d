"""From the name of a corpus to its documents: local files or a TFDS dataset."""

from __future__ import annotations

import glob
from pathlib import Path

from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.documents import Documents, Split
from sparsezoo_jax.data.local_files import EXTENSIONS, open_local
from sparsezoo_jax.data.tfds_source import OWN, open_tfds
from sparsezoo_jax.errors import DataError


def open_documents(config: DataConfig, split: Split) -> Documents:
    """Opens the training or validation documents that `config` names.

    Local files are chosen when `dataset` is an existing path or looks like one (glob, leading '.', '/' or '~', or a
    known extension); any other name is a TFDS dataset. Raises `DataError` for a corpus that is missing, empty or not
    readable.
    """
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
    if name in OWN:
        return False
    looks_like_path = name.startswith((".", "/", "~")) or Path(name).suffix in EXTENSIONS
    return looks_like_path or glob.has_magic(name) or Path(name).exists()
