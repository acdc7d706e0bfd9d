"""Where Hugging Face's files name special tokens: beside the tokenizer, in its template, in model configurations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsezoo_jax import storage
from sparsezoo_jax.errors import DataError
from sparsezoo_jax.untrusted import MAX_SIZE, parse_json, read_json

if TYPE_CHECKING:
    from sparsezoo_jax.data.tokenizer import Tokenizer

#: The first names special tokens, the second does in older checkpoints, the third what ends a text.
HF_CONFIG_FILE, SPECIALS_FILE, GENERATION_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def named_in(path: Path) -> dict[str, str | None]:
    """Special tokens that a file names."""
    if not path.is_file():
        return {}
    try:
        config = read_json(path)
        # A special token is a string or, in older files, an object that describes one.
        named = {name: config[name] for name in ("pad_token", "bos_token", "eos_token") if name in config}
        specials = {name: v.get("content") if isinstance(v, dict) else v for name, v in named.items()}
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    for name, value in specials.items():
        if not isinstance(value, str | None):
            raise DataError(f"{path}: damaged: {name} is {value!r}, no text")
    return specials


def numbers_in(path: Path, role: str) -> list[int]:
    """Tokens that a model's configuration gives for a role, as one number or a list."""
    if not path.is_file():
        return []
    try:
        config = read_json(path)
        value = config.get(f"{role}_token_id") if isinstance(config, dict) else None
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    values = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [one for one in values if type(one) is not int or not 0 <= one < MAX_SIZE]
    if wrong:
        raise DataError(f"{path}: damaged: {role}_token_id has {wrong[0]!r}, no token")
    return values


def template_tokens(tokenizer: Any, role: str) -> list[str]:
    """What the post-processor puts before a text (bos) or after it (eos)."""
    try:
        processor = parse_json(tokenizer.post_processor.__getstate__()) if tokenizer.post_processor else {}
    except ValueError:
        return []
    for one in (processor, *processor.get("processors", ())):
        places = one.get("single") or ()
        texts = [i for i, place in enumerate(places) if "Sequence" in place]
        if texts:
            outside = places[: texts[0]] if role == "bos" else places[texts[-1] + 1 :]
            return [place["SpecialToken"]["id"] for place in outside if "SpecialToken" in place]
    return []


def stop_ids(directory: str | os.PathLike[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's, and those that `generation_config.json` of the directory lists.

    Raises:
      DataError: that file is damaged.
    """
    listed = numbers_in(storage.path(directory) / GENERATION_FILE, "eos")
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return tuple(dict.fromkeys([*own, *listed]))
