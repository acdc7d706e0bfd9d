"""Several corpora as one: what is prepared of each, and in which shares they are read.

Every corpus of a mixture is prepared as if it were the only one, so that the same records serve any other weights. One
tokenizer is that of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.corpora import open_documents
from sparsezoo_jax.data.documents import Split
from sparsezoo_jax.data.manifest import PreparedSplit
from sparsezoo_jax.data.preparation import prepare_split, prepared_directory
from sparsezoo_jax.data.schedule import Schedule
from sparsezoo_jax.data.tokenizer import Tokenizer, find_tokenizer
from sparsezoo_jax.data.trained_tokenizers import build_mixture_tokenizer, build_tokenizer
from sparsezoo_jax.errors import DataError, StorageError


@dataclass(frozen=True, kw_only=True)
class PreparedComponent:
    """A corpus of a mixture.

    Attributes:
      name: in metrics.
      weight: its share of the tokens, that of all corpora being 1.
      given_weight: as the configuration has it.
      epochs: how often its training split is read at most; None: without end.
      split: what was prepared of it.
    """

    name: str
    weight: float
    given_weight: float
    epochs: int | None
    split: PreparedSplit


@dataclass(frozen=True, kw_only=True)
class PreparedMixture:
    """The same split of several corpora, with one tokenizer and one length of sequences."""

    components: tuple[PreparedComponent, ...]

    @property
    def fingerprint(self) -> list[str]:
        """Those of the corpora, in order."""
        return [component.split.fingerprint for component in self.components]

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return self.components[0].split.seq_len

    @property
    def pad_id(self) -> int:
        """Of the tokenizer."""
        return self.components[0].split.pad_id

    @property
    def num_records(self) -> int:
        """Records of all corpora."""
        return sum(component.split.num_records for component in self.components)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a target token of the mixture stands for."""
        return weighted(self, lambda split: split.bytes_per_token)

    def schedule(self, *, epochs: Sequence[int | None] | None = None) -> Schedule:
        """Which corpus each sequence is of; `epochs` instead of those of the corpora."""
        epochs = [component.epochs for component in self.components] if epochs is None else epochs
        sizes = [component.split.num_records for component in self.components]
        limits = [None if times is None else times * size for times, size in zip(epochs, sizes, strict=True)]
        return Schedule([component.given_weight for component in self.components], limits)


Prepared = PreparedSplit | PreparedMixture


def components_of(prepared: Prepared) -> tuple[PreparedComponent, ...]:
    """The corpora of a mixture; a single one has no name and the weight 1."""
    if isinstance(prepared, PreparedMixture):
        return prepared.components
    return (PreparedComponent(name="", weight=1.0, given_weight=1.0, epochs=None, split=prepared),)


def weighted(prepared: Prepared, figure: Callable[[PreparedSplit], float]) -> float:
    """The mean of a figure over the corpora by their weights: that of a token of the mixture, for one of a token."""
    return sum(component.weight * figure(component.split) for component in components_of(prepared))


def prepare(
    config: DataConfig, split: Split, tokenizer: Tokenizer, *, expected: str | Sequence[str] | None = None
) -> Prepared:
    """The prepared split that `config` names, or those of all corpora of its mixture; made now where they are missing.

    Args:
      expected: the fingerprint (for a mixture: those of its corpora) that a run to be resumed was trained on.

    Raises as `preparation.prepare_split`.
    """
    if config.mixture is None:
        return prepare_split(config, split, tokenizer, expected=None if expected is None else str(expected))
    if expected is not None and (isinstance(expected, str) or len(expected) != len(config.mixture)):
        raise DataError("data.mixture: this run was trained on other corpora")
    before = [None] * len(config.mixture) if expected is None else list(expected)
    total = sum(part.weight for part in config.mixture)
    found = []
    for part, fingerprint in zip(config.mixture, before, strict=True):
        made = prepare_split(config.of(part), split, tokenizer, expected=fingerprint)
        weight = part.weight / total
        found.append(
            PreparedComponent(name=part.label, weight=weight, given_weight=part.weight, epochs=part.epochs, split=made)
        )
    return PreparedMixture(components=tuple(found))


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a prepared corpus; that which `config` names; or one trained on the training split.

    Of a mixture: that of the first corpus that is prepared (which has to be that of all), that which is named, or one
    trained on all corpora by their weights.
    """
    configs = [config] if config.mixture is None else [config.of(part) for part in config.mixture]
    for one in configs:
        directory = prepared_directory(one, "train")
        if directory is not None:
            found = find_tokenizer(directory)
            if found is None:
                raise StorageError(f"{directory}: the tokenizer is missing")
            return found
    if config.mixture is None:
        return build_tokenizer(config, open_documents(config, "train"))
    total = sum(part.weight for part in config.mixture)
    shares = [part.weight / total for part in config.mixture]
    return build_mixture_tokenizer(config, [open_documents(one, "train") for one in configs], shares)
