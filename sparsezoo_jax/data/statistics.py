"""How predictable a corpus is without any model: the entropies that a trained one has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsezoo_jax.data.manifest import PreparedSplit
from sparsezoo_jax.data.pipeline import evaluation_batches
from sparsezoo_jax.errors import DataError

_ROWS = 256


@dataclass(frozen=True)
class UnigramEntropy:
    """Nats per target of the validation split.

    Attributes:
      entropy: H(x) of the validation targets under their own frequencies: no predictor that ignores the context does
      better.
      cross_entropy: under the frequencies of the training targets with add-one smoothing: what a model gets by learning
        frequencies alone. A model above it has learnt nothing from context.
      num_targets: validation targets counted.
    """

    entropy: float
    cross_entropy: float
    num_targets: int


@dataclass(frozen=True)
class BigramEntropy:
    """Nats per target of the validation split.

    Attributes:
      entropy: H(x_t | x_{t-1}) of the validation targets under their own bigram frequencies. A lower bound for
      predictors
        that see one token; it is biased low on a small split (many bigrams occur once), so beating it is no feat by
        itself.
      num_targets: validation targets counted.
    """

    entropy: float
    num_targets: int


def unigram_entropy(
    prepared_train: PreparedSplit, prepared_validation: PreparedSplit, vocab_size: int
) -> UnigramEntropy:
    """Unigram entropy of the validation targets, and their cross-entropy under the training frequencies."""
    validation, train = (_unigrams(split, vocab_size) for split in (prepared_validation, prepared_train))
    probabilities = (train + 1) / (train.sum() + vocab_size)
    total = int(validation.sum())
    return UnigramEntropy(_entropy(validation), float(-(validation * np.log(probabilities)).sum() / total), total)


def bigram_entropy(prepared_validation: PreparedSplit, vocab_size: int) -> BigramEntropy:
    """Conditional entropy of a validation target given the token before it: H(x_{t-1}, x_t) - H(x_{t-1})."""
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    previous = np.zeros(vocab_size, np.int64)
    for tokens, targets in _pairs(prepared_validation, vocab_size):
        previous += np.bincount(tokens, minlength=vocab_size)
        new_codes, new_counts = np.unique(tokens.astype(np.int64) * vocab_size + targets, return_counts=True)
        codes, inverse = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
        merged = np.zeros(len(codes), np.int64)
        np.add.at(merged, inverse, np.concatenate([counts, new_counts]))
        counts = merged
    return BigramEntropy(_entropy(counts) - _entropy(previous), int(counts.sum()))


def _entropy(counts: np.ndarray) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def _unigrams(prepared: PreparedSplit, vocab_size: int) -> np.ndarray:
    """Counts that were made when the split was prepared, for a vocabulary that may be larger; int64 [vocab_size]."""
    _check_vocabulary(prepared, vocab_size)
    return np.pad(prepared.unigrams(), (0, vocab_size - prepared.vocab_size))


def _check_vocabulary(prepared: PreparedSplit, vocab_size: int) -> None:
    if vocab_size < prepared.vocab_size:
        raise DataError(f"vocab_size={vocab_size}: the split has token ids up to {prepared.vocab_size - 1}")


def _pairs(prepared: PreparedSplit, vocab_size: int):
    _check_vocabulary(prepared, vocab_size)
    for batch in evaluation_batches(prepared, _ROWS):
        yield batch["tokens"][batch["mask"]], batch["targets"][batch["mask"]]
