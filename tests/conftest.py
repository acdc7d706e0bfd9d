"""Settings that must hold before jax is imported, and the corpus that several test modules share."""

import os
import random

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # for several test processes that compile for TPUs

WORDS = ["the", "state", "of", "union", "is", "strong", "and", "peace", "will", "follow", "where", "law", "congress"]


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """One cache of prepared corpora for the session; nothing goes to the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True, scope="session")
def _use_shared_cache(shared_cache):
    before = os.environ.get("SPARSEZOO_CACHE")
    os.environ["SPARSEZOO_CACHE"] = str(shared_cache)
    yield
    if before is None:
        del os.environ["SPARSEZOO_CACHE"]
    else:
        os.environ["SPARSEZOO_CACHE"] = before


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Sixty short text files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(60):
        sentences = (" ".join(draw.choices(WORDS, k=9)).capitalize() for _ in range(12))
        (folder / f"{i:02}.txt").write_text(". ".join(sentences) + ".\n", encoding="utf-8")
    return folder
