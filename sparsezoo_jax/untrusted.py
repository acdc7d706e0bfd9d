"""Files that somebody else made: what they may declare, JSON read within those bounds, and their texts shown safely.

docs/security.md says what is trusted and what is not. The bounds below are far above what any honest file holds and are
checked before work begins, so that a file can't make a command work for hours or fill the memory by what it declares.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsezoo_jax import storage

#: Bytes of a configuration, of a run or of a Hugging Face checkpoint. The longest known hold some hundred kilobytes.
MAX_CONFIG_BYTES = 1 << 22
#: Bytes of an index of tensors or a header of safetensors: that of `MAX_TENSORS` names of 300 characters.
MAX_INDEX_BYTES = 1 << 25
#: Tensors of a checkpoint in Hugging Face's layout. Most have less than twenty a layer, Ling 1T 60,000 in all.
MAX_TENSORS = 100_000
#: Files of a checkpoint; 10,000 of the usual 5 GB are 50 TB.
MAX_SHARDS = 10_000
#: Bytes of a tokenizer; that of a vocabulary of 262,144 tokens is a file of 35 MB.
MAX_TOKENIZER_BYTES = 1 << 28
#: Characters that the rules of a tokenizer may make of one; usual rules make up to three.
MAX_TOKENIZER_GROWTH = 4096
#: Bytes of a rank file of tiktoken, bytes of a token in it, ways to make its tokens of two others, and numbers of
#: tokens beside its ranks. Known files have up to 4 MB, 128 bytes, some 300,000 ways and 256 numbers.
MAX_RANKS_BYTES, MAX_TOKEN_BYTES, MAX_MERGES, MAX_ADDED_TOKENS = 1 << 25, 1024, 1 << 22, 1 << 16
#: Bytes of one line of JSON: a document, or a row of metrics.
MAX_LINE_BYTES = 1 << 28
#: Objects and lists within each other; configurations have up to six, a tokenizer twelve.
MAX_JSON_DEPTH = 64
#: Digits of an integer in JSON. Transformers writes one of 31 for "no limit"; none of 100 overflows a double.
MAX_JSON_DIGITS = 100
#: Layers of a model; the deepest published ones have a thousand.
MAX_LAYERS = 4096
#: Any other size in the configuration of a model: vocabulary, widths, experts, positions.
MAX_SIZE = 1 << 24
#: Tokens of a batch; the largest of published runs have about 2^26.
MAX_BATCH_TOKENS = 1 << 28
#: Times that arrays in memory may be larger than their files: trained parameters compress to more than half.
MAX_COMPRESSION = 1000
#: Bytes of arrays that any file may declare.
ALWAYS_HELD = 1 << 30
#: Times that tensors in a file of torch may be larger than it: tied embeddings are stored once.
MAX_SHARING = 2
#: Characters of one line of an error or a cell of a table.
MAX_SHOWN = 4000


@dataclass(frozen=True)
class Local:
    """Marks a field that names a program, code or a place on this machine, in its annotation.

    Its value in the configuration of somebody else's run is never used; see `config.read_config`. Such a field must
    allow None, which stands for a value that was not given.
    """

    harmless: tuple[str, ...] = ()
    """Values that name nothing of this machine."""


def parse_json(
    text: str | bytes, *, max_bytes: int = MAX_LINE_BYTES, max_depth: int = MAX_JSON_DEPTH, finite: bool = False
) -> Any:
    """The value of a JSON text within bounds on size, depth and digits.

    Args:
      text: bytes are UTF-8.
      max_bytes: bound on the size (of a str: on its characters).
      max_depth: bound on objects and lists within each other.
      finite: refuse NaN and infinities, also as numbers too large for a double.

    Raises:
      ValueError: not JSON, or beyond the bounds; its message is one line.
    """
    if len(text) > max_bytes:
        raise ValueError(f"longer than {max_bytes:,} bytes")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.count("[") + text.count("{") > max_depth and _depth(text) > max_depth:
        raise ValueError(f"more than {max_depth} objects and lists within each other")
    return (_FINITE if finite else _ANY).decode(text)


def read_json(
    path: Path, *, max_bytes: int = MAX_CONFIG_BYTES, max_depth: int = MAX_JSON_DEPTH, finite: bool = False
) -> Any:
    """The value of a JSON file, of which no more than `max_bytes` are read.

    Raises:
      OSError: it can't be read. ValueError: as for `parse_json`.
    """
    return parse_json(read_bytes(path, max_bytes), max_bytes=max_bytes, max_depth=max_depth, finite=finite)


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A file's content.

    Raises:
      OSError: it can't be read. ValueError: it is longer than `max_bytes`, or no regular file.
    """
    require_regular(path)
    with storage.open_read(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes:,} bytes")
    return content


def require_regular(path: Path) -> None:
    """Check that opening `path` can't wait for ever, as a pipe does. Of a directory the system says so itself.

    Raises:
      OSError: there is no such file. ValueError: it is a pipe or a device.
    """
    if storage.is_object(path):
        return
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("is no regular file")


# A string without an end is taken to the end of the text, so that no character is looked at twice.
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def _depth(text: str) -> int:
    """Objects and lists within each other; brackets in strings don't count."""
    depth = deepest = 0
    for match in _TOKENS.finditer(text):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


def _integer(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise ValueError(f"an integer of more than {MAX_JSON_DIGITS} digits")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


# Made once: a corpus has a text for every document.
_ANY = json.JSONDecoder(parse_int=_integer)
_FINITE = json.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_finite)


def printable(text: object, *, keep: str = "", limit: int | None = MAX_SHOWN) -> str:
    r"""`text` with everything escaped that steers a terminal or hides what is written: `\n`, `\x1b`, `\u202e`.

    Args:
      text: any object; its `str` is taken.
      keep: control characters to leave as they are.
      limit: more characters than this are cut off at the end; None: none.
    """
    shown = str(text)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[:limit]}..."
    return "".join(c if c in keep or not _steers(c) else c.encode("unicode_escape").decode() for c in shown)


def _steers(character: str) -> bool:
    # Controls, formats (such as the marks that turn the direction of writing), halves of surrogate pairs, and the two
    # separators that some programs take for the end of a line. Joiners are letters' business in several scripts.
    return not character.isprintable() and (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or (unicodedata.category(character) == "Cf" and character not in "\u200c\u200d\u00ad")
    )


def check_expansion(arrays: Mapping[str, int], stored: int, *, most: int = MAX_COMPRESSION) -> None:
    """Check that files of `stored` bytes can hold `arrays`, declared bytes by name.

    Raises:
      ValueError: they declare more than `most` times as much, and more than `ALWAYS_HELD`.
    """
    declared = sum(arrays.values())
    if declared > max(ALWAYS_HELD, most * stored):
        raise ValueError(f"declares arrays of {declared:,} bytes in files of {stored:,}")
