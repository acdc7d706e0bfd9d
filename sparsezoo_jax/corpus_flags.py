"""Flags that say which corpus a command reads and where things are on this machine, shared by commands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsezoo_jax.data.dataset_names import require_corpus
from sparsezoo_jax.storage import OBJECT_STORES, require_place

if TYPE_CHECKING:
    from sparsezoo_jax.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class CorpusFlags:
    """What a run's configuration says for its own machine alone (see `config.read_config`); none leaves that."""

    dataset: str | None = None
    """Another corpus, named as in --data.dataset of training; its split of that name is read."""
    cache_dir: str | None = None
    """As --data.cache-dir of training: where prepared corpora are kept."""
    tfds_data_dir: str | None = None
    """As --data.tfds-data-dir of training: directory of prepared TFDS data sets."""
    stockfish: str | None = None
    """As --data.chess.stockfish of training: the program that plays the games of the corpus 'chess'."""

    def __post_init__(self):
        require_corpus("--dataset", self.dataset)
        require_place("--cache-dir", self.cache_dir, schemes=OBJECT_STORES)
        require_place("--tfds-data-dir", self.tfds_data_dir, schemes=OBJECT_STORES)
        require_place("--stockfish", self.stockfish)

    def corpus(self, config: DataConfig) -> DataConfig:
        """`config` with what the flags say."""
        if self.dataset is not None:
            config = dataclasses.replace(config, dataset=self.dataset, mixture=None, validation_dataset=None)
        if self.stockfish is not None:
            config = dataclasses.replace(config, chess=dataclasses.replace(config.chess, stockfish=self.stockfish))
        places = {"cache_dir": self.cache_dir, "tfds_data_dir": self.tfds_data_dir}
        return dataclasses.replace(config, **{name: place for name, place in places.items() if place is not None})
