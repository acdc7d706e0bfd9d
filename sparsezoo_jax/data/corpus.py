"""Corpora by name, those of the package and those that plugins add: what `data.dataset` may say beside paths and TFDS
names.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from sparsezoo_jax.data.documents import Indexed, Split
from sparsezoo_jax.errors import ConfigError

if TYPE_CHECKING:
    from sparsezoo_jax.data.config import DataConfig

Packing = Literal["stream", "blocks"]


class Corpus(abc.ABC):
    """A corpus that has a name."""

    packing: ClassVar[Packing] = "stream"
    """How sequences are made of documents where `data.packing` does not say it."""
    tokenizer: ClassVar[str | None] = None
    """What `data.tokenizer` means where it is None; None trains a byte-level BPE on the training documents."""

    @abc.abstractmethod
    def open(self, config: DataConfig, split: Split) -> Indexed:
        """The documents of a split; as `Documents` if it can read them in parts, for preparing on several cores.

        Raises:
          DataError: there are none, or they can't be read.
        """


CORPORA: dict[str, type[Corpus]] = {}
Named = TypeVar("Named", bound=type[Corpus])


def register_corpus(name: str):
    """Class decorator: makes a corpus known as `--data.dataset NAME`.

    Raises:
      ConfigError: another corpus has that name.
    """

    def register(corpus: Named) -> Named:
        known = CORPORA.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (corpus.__module__, corpus.__qualname__):
            raise ConfigError("data.dataset", name, f"is taken by {known.__module__}.{known.__qualname__}")
        CORPORA[name] = corpus
        return corpus

    return register
