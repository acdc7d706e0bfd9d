"""Drafts by looking tokens up."""

from sparsezoo_jax.inference import PromptLookup


def test_the_longest_and_latest_match_wins():
    lookup = PromptLookup([1, 2, 3, 9, 5, 2, 3, 8, 2, 3], drafts=3)
    assert lookup.propose() == [8, 2, 3], "the latest (2, 3)"
    lookup = PromptLookup([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], drafts=2)
    assert lookup.propose() == [9, 5], "(1, 2, 3), though (2, 3) is later"
    assert PromptLookup([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], drafts=2, ngram=2).propose() == [8, 1]


def test_new_tokens_propose_nothing():
    lookup = PromptLookup([1, 2, 3], drafts=4)
    assert lookup.propose() == []
    lookup.push(2)
    assert lookup.propose() == [3, 2, 3, 2], "over and over"
    lookup.push(7)
    assert lookup.propose() == []
