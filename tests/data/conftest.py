"""Tiny corpora shared by the tests of the data room."""

import json

import pytest

from sparsezoo_jax.data import DataConfig, build_tokenizer, open_documents, prepare

SENTENCE = "the union of states shall keep a record of every treaty naïve café 日本 and of peace with all nations"
WORDS = SENTENCE.split()


def text(number):
    length = 5 + 11 * number % 60
    return " ".join([f"number {number}", *(WORDS[(number * 7 + i * (number + 3)) % len(WORDS)] for i in range(length))])


@pytest.fixture(scope="session")
def cache(shared_cache):
    """The session's one cache: another one here would stay for the modules that follow on the same worker."""
    return shared_cache


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A JSON-lines file of 60 documents."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text(n), "n": n}) + "\n" for n in range(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config(corpus):
    return DataConfig(dataset=str(corpus), bpe_vocab_size=300, seq_len=16, batch_size=4, validation_fraction=0.2)


@pytest.fixture(scope="session")
def tokenizer(config):
    return build_tokenizer(config, open_documents(config, "train"))


@pytest.fixture(scope="session")
def prepared(config, tokenizer):
    return prepare(config, "train", tokenizer)
