"""The batches of the Lazy Neuron benchmark are what its tables say they are."""

import itertools

import numpy as np
import pytest

from benchmarks.lazy_data import Chain, NumberedBatches, endless, in_order, noisy, random_inputs, shuffled_labels
from sparsezoo_jax.data import Batch
from sparsezoo_jax.errors import DataError

VOCAB = 50


@pytest.fixture(scope="module")
def rows():
    """Six sequences of 40 tokens, each a target of the one before; a tenth has no target."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, VOCAB, (6, 41), np.int32)
    ones = np.ones((6, 40), np.int32)
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ones, positions=ones, mask=draw.random((6, 40)) < 0.9
    )


def changed(rows, other):
    return {name for name in rows if np.any(rows[name] != other[name])}


def test_shuffled_labels_are_as_frequent_as_before(rows):
    found = shuffled_labels(rows, 1)
    assert changed(rows, found) == {"targets"}
    real = rows["mask"]
    np.testing.assert_array_equal(np.sort(found["targets"][real]), np.sort(rows["targets"][real]))
    np.testing.assert_array_equal(found["targets"][~real], rows["targets"][~real])
    assert np.mean(found["targets"][real] == rows["targets"][real]) < 0.1


def test_a_share_is_replaced(rows):
    found = noisy(rows, "targets", 0.4, VOCAB, 1)
    assert changed(rows, found) == {"targets"}
    # Of those replaced one in 50 is drawn as it was.
    assert np.mean(found["targets"] != rows["targets"]) == pytest.approx(0.4 * 0.98, abs=0.1)
    assert changed(rows, noisy(rows, "tokens", 0.0, VOCAB, 1)) == set()
    inputs = random_inputs(rows, VOCAB, 1)
    assert changed(rows, inputs) == {"tokens"}
    assert np.mean(inputs["tokens"] == rows["tokens"]) < 0.1


def test_sequences_come_again_in_another_order(rows):
    batch_at = endless(rows, 3, seed=0)
    epochs = [np.concatenate([batch_at(n)["tokens"][:, 0] for n in (i, i + 1)]) for i in (0, 2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(rows["tokens"][:, 0]))
    assert np.any(epochs[0] != epochs[1])
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in in_order(rows, 3)]), rows["tokens"])


def test_a_chain_has_its_transitions_and_no_batch_twice():
    chain = Chain(VOCAB, branches=3)
    batch_at = chain.batches(8, 40, seed=0)
    first, again = batch_at(0), chain.batches(8, 40, seed=0)(0)
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    assert np.any(first["tokens"] != batch_at(1)["tokens"])
    np.testing.assert_array_equal(first["tokens"][:, 1:], first["targets"][:, :-1])
    for token, target in zip(first["tokens"].flat, first["targets"].flat, strict=True):
        assert target in chain.next_VK[token]
    # By their odds: the likeliest branch of every token, over many of them.
    pairs = [(b["tokens"], b["targets"]) for b in map(batch_at, range(50))]
    best_V = chain.next_VK[np.arange(VOCAB), chain.odds_VK.argmax(1)]
    taken = np.mean([best_V[tokens] == targets for tokens, targets in pairs])
    assert taken == pytest.approx(chain.odds_VK.max(1).mean(), abs=0.05)


def test_batches_go_on_where_they_were(rows):
    batches = NumberedBatches("text", endless(rows, 3, seed=0))
    expected = list(itertools.islice(batches, 4))
    state = batches.get_state()
    following = next(batches)
    other = NumberedBatches("text", endless(rows, 3, seed=0))
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["tokens"], following["tokens"])
    assert len(expected) == 4
    with pytest.raises(DataError, match="saved with name=text, but this run has name=chain"):
        NumberedBatches("chain", endless(rows, 3, seed=0)).set_state(state)
