"""From the name of a corpus to its documents: one that is registered, local files, or a TFDS dataset."""

from __future__ import annotations

import glob
from pathlib import Path

from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.corpus import CORPORA, Corpus, register_corpus
from sparsezoo_jax.data.dataset_names import HUGGING_FACE, format_of, names_in
from sparsezoo_jax.data.documents import Documents, Indexed, Split, digest, with_parts
from sparsezoo_jax.data.hf_datasets import is_saved, open_hf
from sparsezoo_jax.data.local_files import open_local
from sparsezoo_jax.data.tfds_source import open_tfds
from sparsezoo_jax.errors import DataError, require
from sparsezoo_jax.storage import scheme_of


def open_documents(config: DataConfig, split: Split) -> Documents:
    """Opens the training or validation documents that `config` names.

    A registered corpus comes first (`register_corpus`), then names that begin with hf://. Local files are chosen when
    `dataset` is an existing path or looks like one (several names, glob, leading '.', '/' or '~', or a known
    extension); any other name is a TFDS dataset. Raises `DataError` for a corpus that is missing, empty or not
    readable.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split={split}: must be 'train' or 'validation'")
    own_corpus = split == "validation" and config.validation_dataset is not None
    name = corpus_name(config, split)
    require(config.mixture is None, "data.mixture", "(several corpora)", "one has to be named here: --dataset")
    require(name is not None, "data.dataset", None, "must be named: --dataset, for a run from elsewhere")
    assert name is not None
    documents: Indexed
    if name in CORPORA:
        documents = CORPORA[name]().open(config, split)
    elif name.startswith(HUGGING_FACE):
        documents = open_hf(config, name, split, whole=own_corpus)
    elif scheme_of(name) is None and is_saved(Path(name).expanduser()):
        documents = open_hf(config, f"{HUGGING_FACE}{Path(name).expanduser().absolute()}", split, whole=own_corpus)
    elif is_local(name):
        documents = open_local(config, name, split, whole=own_corpus)
    else:
        documents = open_tfds(config, name, _split_name(config, split))
    if not documents:  # not its length, which may take a pass over the corpus
        raise DataError(f"data.dataset={name}: the {split} split has no documents")
    return with_parts(documents)


def corpus_name(config: DataConfig, split: Split) -> str | None:
    """Which corpus a split is read from."""
    if split == "validation" and config.validation_dataset is not None:
        return config.validation_dataset
    return config.dataset


@register_corpus("sotu")
class SotuCorpus(Corpus):
    """The embedded State of the Union addresses."""

    def open(self, config: DataConfig, split: Split) -> Indexed:
        return open_tfds(config, "sotu", _split_name(config, split))


@register_corpus("chess")
class ChessCorpus(Corpus):
    """Games that Stockfish plays."""

    packing = "blocks"
    tokenizer = "chess"

    def open(self, config: DataConfig, split: Split) -> Indexed:
        return open_tfds(config, "chess", _split_name(config, split))


@register_corpus("pysource")
class PySourceCorpus(Corpus):
    """Python source of installed packages."""

    def open(self, config: DataConfig, split: Split) -> Indexed:
        from sparsezoo_jax.data.pysource import builder

        name = _split_name(config, split)
        documents = open_tfds(config, "pysource", name)
        packages, directory = builder.packages_config(config.pysource), Path(documents.directory)
        texts = builder.fingerprint(builder.descriptions(directory, packages), config.pysource)
        documents.fingerprint = digest("pysource", texts, name, config.text_field)
        documents.files = builder.files(directory, packages)
        return documents


def _split_name(config: DataConfig, split: Split) -> str:
    return config.train_split if split == "train" else config.validation_split


def is_local(name: str) -> bool:
    """Whether a dataset name means files on this machine rather than a TFDS dataset."""
    if name in CORPORA or name.startswith(HUGGING_FACE):
        return False
    names = names_in(name)
    return len(names) != 1 or (
        scheme_of(names[0]) is not None
        or names[0].startswith((".", "/", "~"))
        or format_of(names[0]) is not None
        or glob.has_magic(names[0])
        or Path(names[0]).exists()
    )
