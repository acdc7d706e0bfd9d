"""Tokenizers from files: Hugging Face's `tokenizer.json`, `vocab.json` with `merges.txt`, SentencePiece's `.model`, and
rank files of tiktoken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparsezoo_jax import storage
from sparsezoo_jax.data.documents import digest
from sparsezoo_jax.data.special_tokens import (
    GENERATION_FILE,
    HF_CONFIG_FILE,
    SPECIALS_FILE,
    named_in,
    numbers_in,
    template_tokens,
)
from sparsezoo_jax.data.tiktoken_files import LONGEST_LINE, SUFFIX, TokenizerFamily, holds_ranks, tiktoken_bpe
from sparsezoo_jax.errors import ConfigError, DataError, SparsezooWarning
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.untrusted import (
    MAX_SIZE,
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_GROWTH,
    parse_json,
    read_bytes,
)

HF_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
RANKS_FILE = f"tokenizer{SUFFIX}"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


#: Ids that the text of the next one may depend on.
_CONTEXT = 16


class StreamDecoder:
    """Turns token ids into text piece by piece; no piece ends inside a UTF-8 character.

    The pieces of `push` and the final `flush` concatenate to `decode` of all the ids; after a `context`, to what
    `decode` of both has more than that of the context.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # Ids already shown, the last of them: SentencePiece, say, strips the space of a first piece.
        self._context = [int(i) for i in context[-_CONTEXT:]]
        self._window: list[int] = []
        self._emitted = 0

    def push(self, token: int) -> str:
        """Adds one id; returns the text that is complete now, possibly empty."""
        self._window.append(int(token))
        text = self._text()
        # A character whose bytes are still missing shows up as a trailing replacement character.
        complete = text.rstrip(REPLACEMENT)
        if len(complete) == len(text) and text:
            piece = text[self._emitted :]
            self._context, self._window, self._emitted = self._window, [], 0
            return piece
        piece = complete[self._emitted :]
        self._emitted = max(self._emitted, len(complete))
        return piece

    def flush(self) -> str:
        """Returns what is left, with U+FFFD for bytes that never became a character."""
        piece = self._text()[self._emitted :]
        self._context, self._window, self._emitted = self._context + self._window, [], 0
        return piece

    def _text(self) -> str:
        prefix = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._window)[len(prefix) :]


class Tokenizer(Protocol):
    """Text to token ids and back.

    `encode` adds no special tokens and never reads any out of the text: a document that contains the characters
    '<eos>' is plain text. `decode` leaves special tokens out; an id outside the vocabulary becomes U+FFFD.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_prompt(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """`[bos] + encode(text)`; raises `DataError` naming the characters the vocabulary can't represent.

        With `special_tokens` their names in the text stand for them, and a bos is not put before one.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def stream_decoder(self, context: Sequence[int] = ()) -> StreamDecoder: ...

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes the tokenizer into a directory; returns the file. Raises `StorageError`."""
        ...


class _Base:
    """What both tokenizers do alike."""

    vocab_size: int
    bos_id: int | None

    def stream_decoder(self: Any, context: Sequence[int] = ()) -> StreamDecoder:
        """A new incremental decoder, for what follows the ids of `context`."""
        return StreamDecoder(self, context)

    def _prompt(self, ids: list[int], missing: Iterable[str]) -> list[int]:
        names = sorted(set("".join(missing)))
        if names:
            listed = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in names[:8])
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise DataError(f"prompt: the tokenizer can't represent {listed}{more}")
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _decode_known(self, ids: Sequence[int], decode: Any) -> str:
        """Decodes runs of known ids; the others become U+FFFD (a model may have more rows than the tokenizer has
        tokens).
        """
        ids = [int(i) for i in ids]
        if all(0 <= i < self.vocab_size for i in ids):
            return decode(ids)
        text, run = "", []
        for i in ids:
            if 0 <= i < self.vocab_size:
                run.append(i)
            else:
                text, run = text + decode(run) + REPLACEMENT, []
        return text + decode(run)


@contextlib.contextmanager
def _faults_of_library(what: str) -> Iterator[None]:
    """Errors of the Rust side, which raises bare `Exception`, and panics, which are none, as `DataError`."""
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"{what}: {error}") from error
        raise


class HFTokenizer(_Base):
    """A Hugging Face fast tokenizer (`tokenizer.json`), its special tokens from `tokenizer_config.json` or by their
    usual names.
    """

    _USUAL = {
        "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
        "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
        "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    }

    def __init__(self, tokenizer: Any, special_tokens: dict[str, str | None] | None = None):
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = {} if special_tokens is None else special_tokens
        self.bos_id, self.eos_id = self._special("bos", named), self._special("eos", named)
        pad = self._special("pad", named)
        # Padding is masked by segment ids, so without a pad token any id will do.
        self.pad_id = next((i for i in (pad, self.eos_id) if i is not None), 0)
        self.fingerprint = digest("hf", tokenizer.to_str(), self.pad_id, self.bos_id, self.eos_id)
        unk = getattr(tokenizer.model, "unk_token", None)
        self._unk_id = None if unk is None else tokenizer.token_to_id(unk)

    def _special(self, role: str, named: dict[str, str | None]) -> int | None:
        key = f"{role}_token"
        usual = self._USUAL[role]
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        if special:  # then "<s>" may be a word among others, of web pages
            usual = tuple(name for name in usual if name in special)
        candidates = (named[key],) if key in named else (*template_tokens(self._tokenizer, role), *usual)
        ids = (self._tokenizer.token_to_id(token) for token in candidates if token is not None)
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        with _faults_of_library("the tokenizer fails"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        # The `fast` variant skips offsets, which nobody reads here.
        with _faults_of_library("the tokenizer fails"):
            return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_prompt(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """`[bos] + encode(text)`; raises `DataError` naming the characters the vocabulary can't represent."""
        with _faults_of_library("the tokenizer fails"):
            self._tokenizer.encode_special_tokens = not special_tokens
            try:
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
                missing = self._not_covered(text, encoding)
                if missing and self._tokenizer.normalizer is not None:
                    # Places are those of characters before a normalizer changed them: an accent that it joins to its
                    # letter has none of its own. What counts is the text that the model gets.
                    normalized = self._tokenizer.normalizer.normalize_str(text)
                    missing = self._not_covered(
                        normalized, self._tokenizer.encode(normalized, add_special_tokens=False)
                    )
            finally:
                self._tokenizer.encode_special_tokens = True
        return self._prompt(encoding.ids, missing)

    def _not_covered(self, text: str, encoding: Any) -> list[str]:
        """Characters that became <unk> or, in a model without one, vanished."""
        covered = [False] * len(text)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != self._unk_id:
                covered[start:end] = [True] * (end - start)
        return [c for c, ok in zip(text, covered, strict=True) if not (ok or c.isspace())]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some token ids, special tokens left out."""
        with _faults_of_library("the tokenizer fails"):
            return self._decode_known(ids, lambda known: self._tokenizer.decode(known, skip_special_tokens=True))

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `tokenizer.json` and the names of its special tokens; returns the former. Raises `StorageError`."""
        name = self._tokenizer.id_to_token
        specials = {
            f"{role}_token": None if i is None else name(i)
            for role, i in (("pad", self.pad_id), ("bos", self.bos_id), ("eos", self.eos_id))
        }
        write_atomic(storage.path(directory) / HF_CONFIG_FILE, (json.dumps(specials, indent=1) + "\n").encode())
        return write_atomic(storage.path(directory) / HF_FILE, self._tokenizer.to_str(pretty=True).encode())


class SentencePieceTokenizer(_Base):
    """A SentencePiece model (`tokenizer.model`)."""

    def __init__(self, processor: Any):
        self._processor = processor
        self.vocab_size = processor.vocab_size()
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))
        self.pad_id = next((i for i in (processor.pad_id(), processor.eos_id()) if i >= 0), 0)
        self._special = {i for i in range(self.vocab_size) if processor.is_control(i)}
        self.fingerprint = digest("sp", hashlib.sha256(processor.serialized_model_proto()).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        return self._processor.encode(list(texts))

    def encode_prompt(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """`[bos] + encode(text)`; raises `DataError` naming the characters the vocabulary can't represent."""
        names = {self._processor.id_to_piece(i): i for i in sorted(self._special)} if special_tokens else {}
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        ids: list[int] = []
        missing: list[str] = []
        unk = self._processor.unk_id()
        for part in filter(None, parts):
            if part in names:
                ids.append(names[part])
                continue
            own, pieces = self._processor.encode(part), self._processor.encode(part, out_type=str)
            # The piece of an unknown token is the text it stands for.
            missing += [p.replace("▁", "") for i, p in zip(own, pieces, strict=True) if i == unk]
            ids += own
        return self._prompt(ids, missing)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some token ids, control tokens left out."""
        return self._decode_known(
            ids, lambda known: self._processor.decode([i for i in known if i not in self._special])
        )

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `tokenizer.model`; returns it. Raises `StorageError`."""
        return write_atomic(storage.path(directory) / SENTENCEPIECE_FILE, self._processor.serialized_model_proto())


def find_tokenizer(run_dir: str | os.PathLike[str], family: TokenizerFamily | None = None) -> Tokenizer | None:
    """The tokenizer in a directory, or None if it holds none; `family` as in `load_tokenizer`.

    Raises:
      DataError: it is damaged.
    """
    path = tokenizer_file(run_dir)
    return None if path is None else load_tokenizer(path, family)


def tokenizer_file(directory: str | os.PathLike[str]) -> Path | None:
    """The file of a directory's tokenizer: of those of known names the first, else the one whose suffix is tiktoken's.

    Raises:
      DataError: there are several of these.
    """
    folder = storage.path(directory)
    known = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    if known is not None or not folder.is_dir():
        return known
    ranks = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    if len(ranks) > 1:
        raise DataError(f"{folder}: holds {', '.join(path.name for path in ranks)}; name one of them")
    return ranks[0] if ranks else None


def is_converted(directory: str | os.PathLike[str]) -> bool:
    """Whether the tokenizer of a directory has a form there that it is not saved in: a rank file."""
    path = tokenizer_file(directory)
    if path is None or path.suffix not in (SUFFIX, Path(SENTENCEPIECE_FILE).suffix):
        return False
    with storage.open_read(path) as file:
        return path.suffix == SUFFIX or holds_ranks(file.read(LONGEST_LINE))


def load_tokenizer(path: str | os.PathLike[str], family: TokenizerFamily | None = None) -> Tokenizer:
    """Loads a `tokenizer.json`, a SentencePiece `.model`, a rank file of tiktoken, or the one that a directory holds.

    Args:
      path: of the file or directory.
      family: of a rank file; None: going by its number of ranks. Tokenizers in other files know their own rules.

    Raises:
      DataError: the file (named) is missing, damaged or of no such kind; a rank file is of no known family.
    """
    path = storage.path(path).expanduser()
    if path.is_dir():
        tokenizer = find_tokenizer(path, family)
        if tokenizer is None:
            raise DataError(f"{path}: holds neither {' nor '.join(TOKENIZER_FILES)}")
        return tokenizer
    of_suffix = (load for name, load in TOKENIZER_FILES.items() if Path(name).suffix == path.suffix)
    load = TOKENIZER_FILES.get(path.name) or next(of_suffix, None)
    if load is None:
        raise DataError(
            f"{path}: a tokenizer is a {HF_FILE}, a SentencePiece .model, a {SUFFIX} of ranks, or a directory with one"
        )
    try:
        content = read_bytes(path, MAX_TOKENIZER_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't read the tokenizer: {getattr(error, 'strerror', None) or error}") from error
    # Llama 3's rank file has the name of Llama 2's SentencePiece model.
    if load is _load_ranks or (load is _load_sentencepiece and holds_ranks(content)):
        return _load_ranks(path, content, family)
    if family is not None:
        raise DataError(f"{path}: knows its own rules; data.tokenizer-family={family} is for rank files of tiktoken")
    return load(path, content)


def register_tokenizer(name: str, load: Callable[[Path, bytes], Tokenizer]) -> None:
    """Make another kind of tokenizer known by the file that it is stored in; files of its suffix are read by `load`.

    Args:
      name: of the file that its `save` writes into a run directory ("tokenizer.vocab"); its suffix must be its own.
      load: makes the tokenizer of a path and its content; raises `DataError` for a damaged one.
    """
    taken = [known for known in TOKENIZER_FILES if known != name and Path(known).suffix == Path(name).suffix]
    if taken:
        raise ConfigError("data.tokenizer", name, f"has the suffix of {taken[0]}")
    TOKENIZER_FILES[name] = load


def _load_sentencepiece(path: Path, content: bytes) -> SentencePieceTokenizer:
    import sentencepiece

    try:
        return SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_proto=content))
    except Exception as error:  # C++ errors of several types
        raise DataError(f"{path}: not a SentencePiece model, or damaged") from error


def _load_hf(path: Path, content: bytes) -> HFTokenizer:
    import tokenizers

    # Silences the library's warning when a data worker is forked after it has used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _faults_of_library(f"{path}: not a Hugging Face tokenizer, or damaged"):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # The library writes a tokenizer by counting up to its last token, in memory for each.
        tokens = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        rules = [parse_json(part.__getstate__()) for part in (tokenizer.normalizer, tokenizer.decoder) if part]
    if tokens > MAX_SIZE:
        raise DataError(f"{path}: numbers its tokens up to {tokens - 1}; at most {MAX_SIZE} tokens are read")
    growth = max(map(_growth, rules), default=1)
    if growth > MAX_TOKENIZER_GROWTH:
        raise DataError(f"{path}: its rules may make {growth} characters of one; at most {MAX_TOKENIZER_GROWTH}")
    return _with_specials(tokenizer, path)


def _with_specials(tokenizer: Any, path: Path) -> HFTokenizer:
    """The tokenizer with the special tokens that files beside it name: a file that comes first has the last word."""
    specials = {**named_in(path.with_name(SPECIALS_FILE)), **named_in(path.with_name(HF_CONFIG_FILE))}
    found = HFTokenizer(tokenizer, specials)
    for role in ("bos", "eos"):
        # Model configurations give numbers.
        if getattr(found, f"{role}_id") is None and f"{role}_token" not in specials:
            ids = [i for name in (GENERATION_FILE, "config.json") for i in numbers_in(path.with_name(name), role)]
            token = next((tokenizer.id_to_token(i) for i in ids if i < found.vocab_size), None)
            specials |= {} if token is None else {f"{role}_token": token}
    found = HFTokenizer(tokenizer, specials)
    if found.eos_id is None and "eos_token" not in specials:
        warnings.warn(
            f"{path}: no end-of-text token is named in it or beside it: documents to train on do not end in one, and "
            f'generated text ends at its length only; "eos_token" in {HF_CONFIG_FILE} names one, or null for none',
            SparsezooWarning,
            stacklevel=2,
        )
    return found


def continuation(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after `context`, which tokenizers may not decode as they decode them alone."""
    stream = tokenizer.stream_decoder(context)
    return "".join(map(stream.push, ids)) + stream.flush()


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each of `ids` where it stands; together they are the text. A character is at its last token."""
    stream = tokenizer.stream_decoder()
    found = [stream.push(token) for token in ids]
    if found:
        found[-1] += stream.flush()
    return found


def _load_vocabulary(path: Path, content: bytes) -> HFTokenizer:
    """A byte-level BPE as GPT-2 stores it: `vocab.json`, and `merges.txt` beside it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    merges_path = path.with_name(MERGES_FILE)
    if not merges_path.is_file():
        raise DataError(f"{path}: needs {MERGES_FILE} beside it")
    try:
        vocabulary, merges = parse_json(content), read_bytes(merges_path, MAX_TOKENIZER_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't read the tokenizer: {getattr(error, 'strerror', None) or error}") from error
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [None]
    if not all(type(i) is int and 0 <= i < MAX_SIZE for i in ids):
        raise DataError(f"{path}: must map tokens to numbers below {MAX_SIZE}")
    pairs: Any = [tuple(line.split(" ")) for line in merges.splitlines() if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{merges_path}: must have two tokens a line")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _faults_of_library(f"{path}: not a tokenizer, or damaged"):
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {**named_in(path.with_name(SPECIALS_FILE)), **named_in(path.with_name(HF_CONFIG_FILE))}.values()
    tokenizer.add_special_tokens([name for name in (*names, "<|endoftext|>") if name in vocabulary])
    return _with_specials(tokenizer, path)


def _load_ranks(path: Path, content: bytes, family: TokenizerFamily | None = None) -> HFTokenizer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _faults_of_library(f"{path}: not a tokenizer, or damaged"):
        tokenizer = tiktoken_bpe(path, content, family)
    return _with_specials(tokenizer, path)


def _growth(rule: dict[str, Any]) -> int:
    """Characters that a normalizer or decoder may make of one."""
    growth = math.prod(map(_growth, rule.get("normalizers") or rule.get("decoders") or ()))
    if rule["type"] == "Replace":
        text = rule["pattern"].get("String")
        # A regular expression may match nothing at all, before every character.
        growth *= len(rule["content"]) + 1 if not text else max(1, -(-len(rule["content"]) // len(text)))
    return growth


TOKENIZER_FILES: dict[str, Callable[[Path, bytes], Tokenizer]] = {
    HF_FILE: _load_hf,
    SENTENCEPIECE_FILE: _load_sentencepiece,
    VOCABULARY_FILE: _load_vocabulary,
    RANKS_FILE: _load_ranks,
}
