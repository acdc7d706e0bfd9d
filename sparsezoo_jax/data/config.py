"""Configuration of the corpora, the tokenizer and the batches."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from sparsezoo_jax.data.chess.config import ChessConfig
from sparsezoo_jax.data.corpus import CORPORA, Corpus
from sparsezoo_jax.data.dataset_names import are_games, require_corpus, short_name
from sparsezoo_jax.data.images.config import ImageDataConfig
from sparsezoo_jax.data.pysource.config import PySourceConfig
from sparsezoo_jax.data.tiktoken_files import TokenizerFamily
from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.storage import OBJECT_STORES, is_object, path, require_place, scheme_of
from sparsezoo_jax.untrusted import MAX_BATCH_TOKENS, Local

#: Special tokens and the 256 bytes: the smallest vocabulary a byte-level BPE can have.
MIN_BPE_VOCAB_SIZE = 259
_CACHE = "~/.cache/sparsezoo_jax"
#: Corpora of a mixture, and characters of the name of one.
MAX_COMPONENTS, MAX_NAME = 256, 64


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Component:
    """One corpus of a mixture. A field that is None has the value of the field of that name in `DataConfig`.

    Raises `ConfigError` that names the field for a value that is not allowed.
    """

    dataset: str
    """Corpus, as in `data.dataset`."""
    weight: float
    """Share of the tokens; weights need not add up to 1."""
    name: str | None = None
    """What it is called in metrics and directories. None: as its file, its directory or in its catalogue."""
    epochs: int | None = None
    """How often it is read at most: then the others go on without it, their shares as their weights are to each other.
    None: it is repeated for as long as the run lasts."""
    text_field: str | None = None
    """Field that holds the text of a document."""
    train_split: str | None = None
    """Training split."""
    validation_split: str | None = None
    """Validation split."""
    validation_fraction: float | None = None
    """Share of the documents to hold out for validation, where there is no validation split."""
    validation_dataset: str | None = None
    """Another corpus to validate this one on."""

    def __post_init__(self):
        require(bool(self.dataset.strip()), "data.mixture", repr(self.dataset), "names no dataset")
        where = f"data.mixture[{self.label}]"
        require_corpus(f"{where}.dataset", self.dataset)
        require_corpus(f"{where}.validation_dataset", self.validation_dataset)
        good = math.isfinite(self.weight) and self.weight > 0
        require(good, f"{where}.weight", self.weight, "must be above 0, and finite")
        require(self.epochs is None or self.epochs >= 1, f"{where}.epochs", self.epochs, "must be at least 1, or none")
        good = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.label) is not None and len(self.label) <= MAX_NAME
        allowed = f"must be of at most {MAX_NAME} letters, digits, dots, dashes and underscores"
        require(good, "data.mixture.name", self.label, allowed)

    @property
    def label(self) -> str:
        """`name`, or what stands for it."""
        return short_name(self.dataset)[:MAX_NAME] if self.name is None else self.name


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What a run reads: corpus, tokenizer, and the shape and order of its batches.

    Raises `ConfigError` that names the field for a value that is not allowed.
    """

    dataset: Annotated[str | None, Local(harmless=("sotu", "digits", "shapes", "textures", "moving_shapes"))] = "sotu"
    """Corpus, or for a model of images an image set: 'digits', 'shapes', 'textures', or 'tfds:NAME' (docs/vision.md).
    Corpora: 'sotu' (embedded), 'pysource' (Python source of installed packages), 'chess' (games that Stockfish plays),
    a TFDS name such as 'c4/en', a data set of Hugging Face's hub as 'hf://owner/name[:config][/split]', or a path,
    directory or glob of files, here or in a bucket (gs:// or s3://), or several of these with commas between them (or
    as a JSON list). Files are .txt, .jsonl, .json, .csv, .tsv, .parquet or .pgn, the ones of text also as .gz, .zst,
    .bz2 or .xz. Or a directory that the command `prepare` made. None in the configuration of somebody else's run whose
    corpus is not embedded: it has to be named here."""

    mixture: Annotated[tuple[Component, ...] | None, Local()] = None
    """Several corpora in place of `dataset`, as a JSON list: '[{"dataset": "c4/en", "weight": 0.7}, {"dataset":
    "books/", "weight": 0.3, "epochs": 4}]' (docs/data.md)."""

    text_field: str = "text"
    """Field (TFDS feature, JSON key, column of a table) that holds the text of a document; with dots within others, as
    in 'meta.text'."""

    train_split: str = "train"
    """Training split; slices such as 'train[:99%]' work for TFDS and hf://. In a local directory: its subdirectory of
    this name, if there is one."""

    validation_split: str = "validation"
    """Validation split; slices such as 'train[99%:]' work for TFDS and hf://. In a local directory: its subdirectory of
    this name, if there is one."""

    validation_fraction: float = 0.05
    """Share of the documents of local files and of hf:// to hold out for validation, when they have no validation
    split of their own."""

    validation_dataset: Annotated[str | None, Local(harmless=("sotu",))] = None
    """Another corpus to validate on, named as in `dataset` (a TFDS name is read at `validation_split`, local files
    whole)."""

    on_bad_document: Literal["skip", "stop"] = "skip"
    """What a document that can't be read does: 'skip' counts it and names the first few, 'stop' ends the command. A
    disk that can't be read, or a damaged file, always ends it."""

    max_bad_fraction: float = 0.01
    """Share of bad documents above which the command ends all the same; of at least 1,000 documents, so that a few in
    a small corpus pass."""

    tokenizer: Annotated[str | None, Local(harmless=("chess",))] = None
    """Path to a tokenizer.json, a SentencePiece .model, a rank file of tiktoken, or a directory with one; 'chess' is
    the 32 characters of chess games. None takes those for 'chess' and .pgn files, and trains a byte-level BPE on the
    training split of others."""

    tokenizer_family: TokenizerFamily | None = None
    """How a rank file of tiktoken cuts texts into pieces, and its special tokens, which it doesn't hold. None: as the
    known file with as many ranks."""

    bpe_vocab_size: int = 4096
    """Vocabulary size of the trained BPE, specials included (a small corpus may yield fewer)."""

    packing: Literal["stream", "blocks"] | None = None
    """'stream' joins documents and cuts the stream into sequences; 'blocks' begins each sequence with a document and
    leaves out what of the last one does not fit. None is 'blocks' for 'chess' and .pgn files, 'stream' for others."""

    seq_len: int = 256
    """Tokens in a sequence."""

    batch_size: int = 8
    """Sequences in a batch, over all hosts together."""

    mode: Literal["prepared", "streaming"] = "prepared"
    """'prepared' tokenises once into files with O(1) exact resume; 'streaming' tokenises while training."""

    seed: int = 0
    """Seed of the data order."""

    cache_dir: Annotated[str | None, Local()] = None
    """Where prepared corpora and trained tokenizers are kept, here or in a bucket; None is $SPARSEZOO_CACHE or
    ~/.cache/sparsezoo_jax."""

    tfds_data_dir: Annotated[str | None, Local()] = None
    """Directory of prepared TFDS data sets; None is TFDS's own default ($TFDS_DATA_DIR or ~/tensorflow_datasets)."""

    shard_bytes: int | None = None
    """Raw bytes of the corpus that become one file of records. None is three gigabytes, which make about one of
    records; in a corpus below 768 GB a 256th of it, but at least 64 MB."""

    verify: Literal["stat", "full"] = "stat"
    """How files are told to be those that were read before: by path, size and time of change ('stat'), or by reading
    them again ('full': the files of the corpus, or those of a prepared one)."""

    wait_minutes: float = 60.0
    """Minutes to wait for another process that prepares the same corpus, from the last thing that it finished."""

    prefetch: int = 2
    """Batches made ahead in the background; 0 makes each batch when it is asked for."""

    workers: int = 0
    """Threads that read documents ahead in streaming mode; 0 reads them one after another."""

    chess: ChessConfig = ChessConfig()
    """The games of the corpus 'chess'."""

    pysource: PySourceConfig = PySourceConfig()
    """The packages of the corpus 'pysource'."""

    images: ImageDataConfig = ImageDataConfig()
    """The images of an image set, for models that read them."""

    def __post_init__(self):
        self._check_mixture()
        for name in ("text_field", "train_split", "validation_split"):
            require(bool(getattr(self, name).strip()), f"data.{name}", repr(getattr(self, name)), "must not be empty")
        for name in ("train_split", "validation_split"):
            place = Path(getattr(self, name))
            inside = not place.is_absolute() and ".." not in place.parts and scheme_of(place) is None
            require(inside, f"data.{name}", place, "must name a split, or a directory within the corpus")
        for name in ("dataset", "validation_dataset", "tokenizer", "cache_dir", "tfds_data_dir"):
            value = getattr(self, name)
            require(value is None or bool(value.strip()), f"data.{name}", repr(value), "must not be empty")
        for name in ("dataset", "validation_dataset"):
            require_corpus(f"data.{name}", getattr(self, name))
        for name in ("tokenizer", "cache_dir", "tfds_data_dir"):
            require_place(f"data.{name}", getattr(self, name), schemes=OBJECT_STORES)
        require(
            0 <= self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "must be at least 0 and below 1",
        )
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "must be from 0 to 1")
        require(
            MIN_BPE_VOCAB_SIZE <= self.bpe_vocab_size <= 2**20,
            "data.bpe_vocab_size",
            self.bpe_vocab_size,
            f"must be from {MIN_BPE_VOCAB_SIZE} (3 specials + 256 bytes) to {2**20}",
        )
        require(
            self.mode == "prepared" or not self.in_blocks,
            "data.packing",
            "blocks",
            "needs data.mode=prepared; data.packing=stream goes with data.mode=streaming",
        )
        allowed = f"must be from 1 to {2**40}, or none"
        require(
            self.shard_bytes is None or 1 <= self.shard_bytes <= 2**40, "data.shard_bytes", self.shard_bytes, allowed
        )
        require(self.wait_minutes > 0, "data.wait_minutes", self.wait_minutes, "must be above 0")
        require(1 <= self.seq_len <= 2**24, "data.seq_len", self.seq_len, f"must be from 1 to {2**24}")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "must be at least 1")
        allowed = f"times data.seq_len={self.seq_len} must be at most {MAX_BATCH_TOKENS} tokens"
        require(self.batch_size * self.seq_len <= MAX_BATCH_TOKENS, "data.batch_size", self.batch_size, allowed)
        require(0 <= self.seed < 2**32, "data.seed", self.seed, f"must be from 0 to {2**32 - 1}")
        require(0 <= self.prefetch <= 1024, "data.prefetch", self.prefetch, "must be from 0 to 1024")
        require(0 <= self.workers <= 256, "data.workers", self.workers, "must be from 0 to 256")

    def _check_mixture(self) -> None:
        if self.mixture is None:
            return
        count = len(self.mixture)
        require(1 <= count <= MAX_COMPONENTS, "data.mixture", f"{count} corpora", f"must be 1 to {MAX_COMPONENTS}")
        for name in ("dataset", "validation_dataset"):
            value = getattr(self, name)
            require(value is None, f"data.{name}", value, "can't be given with data.mixture, which names the corpora")
        twice = [label for label, times in Counter(part.label for part in self.mixture).items() if times > 1]
        allowed = 'is the name of two corpora; give each another "name"'
        require(not twice, "data.mixture.name", ", ".join(twice), allowed)
        endless = any(part.epochs is None for part in self.mixture)
        allowed = "needs a corpus without epochs: how many tokens the others have is not known before they end"
        require(self.mode == "prepared" or endless, "data.mode", self.mode, allowed)
        for part in self.mixture:
            self.of(part)

    def of(self, part: Component) -> DataConfig:
        """The configuration of one corpus of the mixture: as if it were the only one."""
        own = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        own = {name: value for name, value in own.items() if name not in ("name", "weight", "epochs")}
        given = {name: value for name, value in own.items() if value is not None}
        return dataclasses.replace(self, mixture=None, **given)

    @property
    def names(self) -> tuple[str, ...]:
        """What `dataset` and `mixture` name as training corpora; nothing if none is named."""
        if self.mixture is not None:
            return tuple(part.dataset for part in self.mixture)
        return () if self.dataset is None else (self.dataset,)

    @property
    def corpus(self) -> type[Corpus] | None:
        """The registered corpus whose habits this one has. Games in a .pgn file are those of chess; a directory of such
        files has a name of its own, and none.
        """
        if self.dataset is None:
            return None
        return CORPORA.get("chess" if are_games(self.dataset) else self.dataset)

    @property
    def in_blocks(self) -> bool:
        """Whether sequences begin with documents."""
        packing = self.corpus.packing if self.packing is None and self.corpus is not None else self.packing
        return packing == "blocks"

    @property
    def tokenizer_name(self) -> str | None:
        """`tokenizer`, or else what the corpus (or all of a mixture) has in its place; None: a byte-level BPE is
        trained on the corpus.
        """
        if self.mixture is not None and self.tokenizer is None:
            wanted = {self.of(part).tokenizer_name for part in self.mixture}
            return wanted.pop() if len(wanted) == 1 else None
        return self.corpus.tokenizer if self.tokenizer is None and self.corpus is not None else self.tokenizer


def cache_directory(config: DataConfig) -> Path:
    """The directory for prepared corpora and trained tokenizers (not created here)."""
    name = config.cache_dir or os.environ.get("SPARSEZOO_CACHE") or _CACHE
    require_place("SPARSEZOO_CACHE", name, schemes=OBJECT_STORES)
    return path(name).expanduser()


def local_cache(config: DataConfig) -> Path:
    """The directory for what only this machine needs: the cache, unless that is in an object store."""
    directory = cache_directory(config)
    return Path(_CACHE).expanduser() if is_object(directory) else directory
