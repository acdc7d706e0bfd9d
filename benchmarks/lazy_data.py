"""Batches for `benchmarks.lazy_neuron`: text, and what is changed of its labels and inputs; and a chain without end.

Shapes: R sequences of T tokens; a batch has B of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sparsezoo_jax.data import Batch, PreparedSplit, State, prepared_batches
from sparsezoo_jax.data.batches import check_state, endless_order

BatchAt = Callable[[int], Batch]


class NumberedBatches:
    """A `BatchIterator` over batches that are a function of their number, from 0 on."""

    def __init__(self, name: str, batch_at: BatchAt):
        self._name, self._batch_at, self._next = name, batch_at, 0

    def __iter__(self) -> NumberedBatches:
        return self

    def __next__(self) -> Batch:
        self._next += 1
        return self._batch_at(self._next - 1)

    def get_state(self) -> State:
        """`name` and `next_batch`."""
        return {"name": self._name, "next_batch": self._next}

    def set_state(self, state: State) -> None:
        """Continue at a saved batch; raises `DataError` if it is one of other batches."""
        check_state(state, {"name": self._name})
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Nothing to stop."""


def sample(prepared: PreparedSplit, records: int, seed: int = 0) -> Batch:
    """So many sequences of a split, drawn without replacement, as one batch."""
    drawn = prepared_batches(prepared, batch_size=records, seed=seed, epochs=1, prefetch=0)
    try:
        return drawn.batch_at(0)
    except IndexError:
        raise SystemExit(f"--records={records}: the split has {prepared.num_records} sequences") from None
    finally:
        drawn.close()


def endless(rows: Batch, batch_size: int, seed: int) -> BatchAt:
    """Batches of some sequences, in another order in every epoch."""
    order = endless_order(len(rows["tokens"]), seed)

    def batch_at(n: int) -> Batch:
        return _taken(rows, [order(n * batch_size + i) for i in range(batch_size)])

    return batch_at


def in_order(rows: Batch, batch_size: int) -> Iterator[Batch]:
    """Whole batches of some sequences, each once."""
    for first in range(0, len(rows["tokens"]) - batch_size + 1, batch_size):
        yield _taken(rows, list(range(first, first + batch_size)))


def shuffled_labels(rows: Batch, seed: int) -> Batch:
    """All targets of all sequences change places: as frequent as before, and of nothing that the inputs tell."""
    targets = rows["targets"].copy()
    targets[rows["mask"]] = np.random.default_rng(seed).permutation(targets[rows["mask"]])
    return Batch(**{**rows, "targets": targets})


def random_inputs(rows: Batch, vocab: int, seed: int) -> Batch:
    """Every input token is drawn anew, all alike; targets stay."""
    return noisy(rows, "tokens", 1.0, vocab, seed)


def noisy(rows: Batch, name: str, share: float, vocab: int, seed: int) -> Batch:
    """A share of the "tokens" or "targets" is replaced by tokens of the vocabulary, drawn with equal probabilities."""
    draw, values = np.random.default_rng(seed), rows[name]
    drawn = draw.integers(0, vocab, values.shape, values.dtype)
    return Batch(**{**rows, name: np.where(draw.random(values.shape) < share, drawn, values)})


class Chain:
    """A fixed random Markov chain: from each token to one of `branches` others."""

    def __init__(self, vocab: int, branches: int = 8, seed: int = 0):
        draw = np.random.default_rng(seed)
        self.next_VK = draw.integers(0, vocab, (vocab, branches), np.int32)
        self.odds_VK = draw.dirichlet(np.ones(branches), vocab)
        self._up_to_VK = np.cumsum(self.odds_VK, axis=1)

    @property
    def entropy(self) -> float:
        """Uncertainty of the next token, nats, mean over tokens; a little too large, for branches may coincide."""
        return float(-np.sum(self.odds_VK * np.log(self.odds_VK)) / len(self.odds_VK))

    def batches(self, batch_size: int, length: int, seed: int) -> BatchAt:
        """Batches that are all different, and the same for the same seed."""

        def batch_at(n: int) -> Batch:
            draw = np.random.default_rng((seed, n))
            tokens = np.empty((batch_size, length + 1), np.int32)
            tokens[:, 0] = draw.integers(0, len(self.next_VK), batch_size)
            points = draw.random((batch_size, length))
            for t in range(length):
                before = tokens[:, t]
                branch = np.sum(self._up_to_VK[before, :-1] < points[:, t, None], axis=1)
                tokens[:, t + 1] = self.next_VK[before, branch]
            shape = (batch_size, length)
            return Batch(
                tokens=tokens[:, :-1].copy(),
                targets=tokens[:, 1:].copy(),
                segment_ids=np.ones(shape, np.int32),
                positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
                mask=np.ones(shape, bool),
            )

        return batch_at


def unigram_entropy(rows: Batch, vocab: int) -> float:
    """Entropy of the targets' frequencies, nats: the loss of a model that knows these alone."""
    counts = np.bincount(rows["targets"][rows["mask"]], minlength=vocab)
    odds = counts[counts > 0] / counts.sum()
    return float(-np.sum(odds * np.log(odds)))


def _taken(rows: Batch, index: list[int]) -> Batch:
    return Batch(
        tokens=rows["tokens"][index],
        targets=rows["targets"][index],
        segment_ids=rows["segment_ids"][index],
        positions=rows["positions"][index],
        mask=rows["mask"][index],
    )
