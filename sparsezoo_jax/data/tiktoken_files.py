"""Rank files of tiktoken (Llama 3's `tokenizer.model`, `qwen.tiktoken`) as byte-level BPEs of Hugging Face's library.

A line of such a file is a token in base64 and its rank. Nothing else is stored: the patterns that cut a text into
pieces and the special tokens are code elsewhere, and are known here by family.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from sparsezoo_jax.data.special_tokens import HF_CONFIG_FILE
from sparsezoo_jax.errors import DataError
from sparsezoo_jax.untrusted import (
    MAX_ADDED_TOKENS,
    MAX_MERGES,
    MAX_RANKS_BYTES,
    MAX_SIZE,
    MAX_TOKEN_BYTES,
    read_json,
)

SUFFIX = ".tiktoken"
TokenizerFamily = Literal["cl100k", "llama3", "o200k", "qwen2"]
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
#: Bytes of a line, and more.
LONGEST_LINE = 2 * MAX_TOKEN_BYTES
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,10})")


class Family(NamedTuple):
    """What is known of the files of a family."""

    ranks: int
    """How many its own file has, by which it is told."""
    pattern: str
    """Regular expression of the pieces of a text, in the syntax of Oniguruma."""
    special: tuple[tuple[str, int], ...]
    """Special tokens, and their numbers after the ranks."""


def _numbered(*names: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, i) for i, name in enumerate(names))


def _reserved(*numbers: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in numbers]


FAMILIES: dict[TokenizerFamily, Family] = {
    "cl100k": Family(
        100_256,
        # At the end of a text all spaces are one piece, lines or not.
        rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
        (
            *(("<|endoftext|>", 1), ("<|fim_prefix|>", 2), ("<|fim_middle|>", 3), ("<|fim_suffix|>", 4)),
            ("<|endofprompt|>", 20),
        ),
    ),
    "llama3": Family(
        128_000,
        rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}",
        _numbered(
            *("<|begin_of_text|>", "<|end_of_text|>", *_reserved(0, 1), "<|finetune_right_pad_id|>", *_reserved(2)),
            *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
            *_reserved(*range(3, 248)),
        ),
    ),
    "o200k": Family(
        199_998,
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        (("<|endoftext|>", 1), ("<|endofprompt|>", 20)),
    ),
    "qwen2": Family(
        151_643,
        rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}",
        _numbered("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    ),
}
assert set(FAMILIES) == set(get_args(TokenizerFamily))


def holds_ranks(content: bytes) -> bool:
    """Whether a file is of this kind, going by its first line."""
    return _LINE.fullmatch(content[:LONGEST_LINE].split(b"\n", 1)[0].rstrip(b"\r")) is not None


def tiktoken_bpe(path: Path, content: bytes, family: TokenizerFamily | None) -> Any:
    """The `tokenizers.Tokenizer` that encodes as tiktoken does.

    Special tokens are those of `added_tokens_decoder` in `tokenizer_config.json` beside the file, else the family's.

    Args:
      path: of the file.
      content: of it.
      family: None: the one whose own file has as many ranks.

    Raises:
      DataError: the file or the one beside it is damaged or beyond the bounds of `untrusted`; no family has as many
        ranks.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    ranks = read_ranks(path, content)
    if family is None:
        family = next((name for name, one in FAMILIES.items() if one.ranks == len(ranks)), None)
    if family is None:
        raise DataError(
            f"{path}: has {len(ranks)} ranks, as the files of no known family; data.tokenizer-family (convert: "
            f"--tokenizer-family) says how it cuts texts into pieces: {', '.join(FAMILIES)}"
        )
    added = _added_tokens(path, len(ranks))
    if added is None:
        added = {len(ranks) + i: (name, True) for name, i in FAMILIES[family].special}
    characters = _characters()

    def spelled(token: bytes) -> str:
        return "".join(map(characters.__getitem__, token))

    merges = [(spelled(token[:i]), spelled(token[i:])) for token, i in _splits(path, ranks)]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    # A piece that is a token is that token, whether or not merges lead to it.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    pieces = pre_tokenizers.Split(Regex(FAMILIES[family].pattern), "isolated")
    bytes_of_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_of_pieces])
    tokenizer.decoder = decoders.ByteLevel()
    # The library numbers added tokens itself, one after another: numbers without a name need one.
    names = [added.get(i, (f"<|unused_{i}|>", True)) for i in range(len(ranks), max(added, default=-1) + 1)]
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in names])
    wrong = [name for i, (name, _) in added.items() if tokenizer.token_to_id(name) != i]
    if wrong:
        raise DataError(f"{path}: the special token {wrong[0]!r} has two numbers, or those of another token")
    return tokenizer


def read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """The tokens of a rank file and their ranks, in the order of these.

    Raises:
      DataError: it is damaged, or beyond the bounds of `untrusted`.
    """
    if len(content) > MAX_RANKS_BYTES:
        raise DataError(f"{path}: longer than {MAX_RANKS_BYTES:,} bytes")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        try:
            token = b"" if match is None else binascii.a2b_base64(match[1], strict_mode=True)
        except binascii.Error:
            token = b""
        if match is None or not token:
            raise DataError(f"{path}: damaged: line {number} is no token in base64 and its rank")
        if len(token) > MAX_TOKEN_BYTES:
            raise DataError(f"{path}: the token of line {number} has more than {MAX_TOKEN_BYTES} bytes")
        if token in ranks:
            raise DataError(f"{path}: damaged: line {number} has the token of rank {ranks[token]} again")
        ranks[token] = int(match[2])
    if len(ranks) > MAX_SIZE or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: damaged: its ranks must be the numbers from 0 to {len(ranks) - 1}, each once")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise DataError(f"{path}: damaged: has no token for the byte {lacking[0]:#04x}")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _splits(path: Path, ranks: dict[bytes, int]) -> Iterator[tuple[bytes, int]]:
    """Each way to make a token of two others, as the place where they meet; first those of the token that comes first.

    tiktoken joins whatever two tokens make the one of the lowest rank, not only the two that its training joined.
    """
    found = 0
    for token in ranks:
        places = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        found += len(places)
        if found > MAX_MERGES:
            raise DataError(f"{path}: its tokens are made of others in more than {MAX_MERGES:,} ways")
        for i in sorted(places, key=lambda i: (ranks[token[:i]], ranks[token[i:]])):
            yield token, i


def _characters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE of Hugging Face's library: a visible one itself."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _added_tokens(path: Path, first: int) -> dict[int, tuple[str, bool]] | None:
    """Tokens beside the ranks, and whether they are special, by number; None where no file says."""
    beside = path.with_name(HF_CONFIG_FILE)
    if not beside.is_file():
        return None
    try:
        listed = read_json(beside).get("added_tokens_decoder")
        if listed is None:
            return None
        found = {int(i): (one["content"], one.get("special", True)) for i, one in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{beside}: damaged: {error}") from error
    for i, (name, special) in found.items():
        if not first <= i < first + MAX_ADDED_TOKENS:
            allowed = f"must be from {first}, after the ranks, to {first + MAX_ADDED_TOKENS - 1}"
            raise DataError(f"{beside}: the added token {name!r} has number {i}; {allowed}")
        if not (isinstance(name, str) and name and isinstance(special, bool)):
            raise DataError(f"{beside}: damaged: the added token {i} has no name")
    return found
