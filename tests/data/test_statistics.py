import math
from collections import Counter
from itertools import pairwise

import pytest

from sparsezoo_jax.data import bigram_entropy, open_documents, prepare, unigram_entropy
from sparsezoo_jax.errors import DataError


def pairs(config, tokenizer, split):
    documents = open_documents(config, split)
    encoded = ([1, *tokenizer.encode(documents[i].text), 2] for i in range(len(documents)))
    return [pair for ids in encoded for pair in pairwise(ids)]


def test_entropies_match_their_definitions(config, tokenizer, prepared):
    held = prepare(config, "validation", tokenizer)
    train, validation = (pairs(config, tokenizer, split) for split in ("train", "validation"))
    total, size = len(validation), tokenizer.vocab_size
    targets, fitted = Counter(y for _, y in validation), Counter(y for _, y in train)
    unigram = unigram_entropy(prepared, held, size)
    assert unigram.num_targets == total
    assert unigram.entropy == pytest.approx(-sum(n / total * math.log(n / total) for n in targets.values()))
    cross = -sum(n * math.log((fitted[y] + 1) / (len(train) + size)) for y, n in targets.items()) / total
    assert unigram.cross_entropy == pytest.approx(cross)
    both, first = Counter(validation), Counter(x for x, _ in validation)
    conditional = -sum(n / total * math.log(n / first[x]) for (x, _), n in both.items())
    bigram = bigram_entropy(held, size)
    assert bigram.entropy == pytest.approx(conditional)
    assert bigram.num_targets == total
    assert bigram.entropy < unigram.entropy < unigram.cross_entropy


def test_vocabulary_too_small(prepared):
    with pytest.raises(DataError, match="vocab_size=3"):
        bigram_entropy(prepared, 3)
