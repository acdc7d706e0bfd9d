"""Tokenizers that are made here: a byte-level BPE trained on the corpus, and single characters for games of chess."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsezoo_jax import storage
from sparsezoo_jax.data.chess.pgn import CHARACTERS
from sparsezoo_jax.data.config import DataConfig, cache_directory
from sparsezoo_jax.data.documents import Documents, digest, with_parts
from sparsezoo_jax.data.skipping import Skips, accepted
from sparsezoo_jax.data.tokenizer import HF_FILE, HFTokenizer, Tokenizer, load_tokenizer
from sparsezoo_jax.errors import DataError, require

#: Names the tokenizer of chess games in `data.tokenizer`.
CHESS = "chess"
#: Changes whenever `train_bpe` would give another tokenizer for the same corpus.
BPE_RECIPE = "byte-bpe-2"
#: A BPE is trained on at most so many documents and characters, from so many parts all over the corpus.
BPE_MAX_DOCUMENTS, BPE_MAX_CHARACTERS, BPE_MAX_PARTS = 200_000, 256_000_000, 1000


def build_tokenizer(config: DataConfig, documents: Documents) -> Tokenizer:
    """The tokenizer that `config` names, that of chess games for a corpus of them, or else a byte-level BPE trained on
    `documents` (the training split).
    """
    if (named := named_tokenizer(config)) is not None:
        return named
    return train_bpe(documents, config.bpe_vocab_size, cache_directory(config), Skips.of(config))


def build_mixture_tokenizer(config: DataConfig, corpora: Sequence[Documents], shares: Sequence[float]) -> Tokenizer:
    """As `build_tokenizer` for the training splits of a mixture's corpora, and their shares, which add up to 1."""
    if (named := named_tokenizer(config)) is not None:
        return named
    size, directory = config.bpe_vocab_size, cache_directory(config)
    key = digest("mixture", *(documents.fingerprint for documents in corpora), *shares, size, BPE_RECIPE)
    samples = (
        _sample(with_parts(documents), Skips.of(config), share)
        for documents, share in zip(corpora, shares, strict=True)
    )
    return _train(itertools.chain.from_iterable(samples), size, directory / "tokenizers" / key)


def named_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that `config` names: by a path, or that of chess games; None: a BPE is to be trained.

    Raises:
      DataError: as `load_tokenizer`. ConfigError: a family is given for something else than a file.
    """
    name, family = config.tokenizer_name, config.tokenizer_family
    if name is None or name == CHESS:
        allowed = "is for a rank file of tiktoken that data.tokenizer names"
        require(family is None, "data.tokenizer_family", family, allowed)
        return None if name is None else character_tokenizer(CHARACTERS)
    return load_tokenizer(name, family)


def character_tokenizer(characters: str) -> HFTokenizer:
    """A tokenizer whose tokens are single characters, numbered as in `characters`; it has no special tokens.

    Other characters are left out.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # A BPE without merges: unlike a table of words, it has an answer to characters that it does not know.
    model = models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    # Without it the places of characters behind an unknown one would be wrong.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return HFTokenizer(tokenizer)


def train_bpe(
    documents: Documents, vocab_size: int, cache_dir: str | os.PathLike[str], skips: Skips | None = None
) -> HFTokenizer:
    """Trains a byte-level BPE with `<pad>`=0, `<bos>`=1, `<eos>`=2 and all 256 bytes, so that every text round-trips.

    The result is kept in `cache_dir` under the fingerprint of (documents, size, recipe). A corpus with few distinct
    words gives fewer than `vocab_size` tokens. Documents that can't be read are passed over under the policy of
    `skips`. Raises `DataError` for a corpus without text, `StorageError` if the cache can't be written.
    """
    directory = storage.path(cache_dir) / "tokenizers" / digest(documents.fingerprint, vocab_size, BPE_RECIPE)
    return _train(_sample(with_parts(documents), skips or Skips()), vocab_size, directory)


def _train(texts: Iterator[str], vocab_size: int, directory: Path) -> HFTokenizer:
    """The tokenizer that is kept in `directory`, trained on `texts` if there is none."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if (directory / HF_FILE).is_file():
        found = load_tokenizer(directory / HF_FILE)
        assert isinstance(found, HFTokenizer)
        return found
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = HFTokenizer(tokenizer)
    trained.save(directory)
    return trained


def _sample(documents: Documents, skips: Skips, share: float = 1.0) -> Iterator[str]:
    """Texts from the beginnings of parts all over the corpus, as many of each; `share` of the usual amount."""
    parts = len(documents.parts())
    chosen = range(0, parts, -(-parts // BPE_MAX_PARTS) or 1)
    texts, characters, empty = math.ceil(share * BPE_MAX_DOCUMENTS), math.ceil(share * BPE_MAX_CHARACTERS), True
    for number, part in enumerate(chosen):
        # What one part has too little of is left to those after it.
        share = len(chosen) - number
        texts_here, characters_here = -(-texts // share), -(-characters // share)
        for document in accepted(documents.read(part), skips):
            texts, texts_here = texts - 1, texts_here - 1
            characters, characters_here = characters - len(document.text), characters_here - len(document.text)
            empty = empty and not document.text
            yield document.text
            if texts_here <= 0 or characters_here <= 0:
                break
    if empty:
        found = skips.summary()
        reason = "every document is empty" if found is None else found
        raise DataError(f"data.dataset: no text to train a tokenizer on, {reason}")
