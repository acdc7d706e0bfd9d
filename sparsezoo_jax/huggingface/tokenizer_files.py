"""The tokenizer of a checkpoint for `transformers.AutoTokenizer`, and what `generate` there begins from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsezoo_jax import storage
from sparsezoo_jax.data import Tokenizer
from sparsezoo_jax.data.chat import TEMPLATE_FILE, copy_template
from sparsezoo_jax.data.special_tokens import GENERATION_FILE, HF_CONFIG_FILE, SPECIALS_FILE, stop_ids
from sparsezoo_jax.data.tokenizer import HF_FILE, is_converted
from sparsezoo_jax.errors import DataError, StorageError, UserError
from sparsezoo_jax.untrusted import MAX_TOKENIZER_BYTES, read_json

TOKENIZER_FILES = (
    *(HF_FILE, HF_CONFIG_FILE, SPECIALS_FILE, "tokenizer.model", TEMPLATE_FILE),
    *("vocab.json", "merges.txt", GENERATION_FILE),
)
ROLES = ("bos", "eos", "pad")


def copy_tokenizer(source: Path, destination: Path, tokenizer: Tokenizer | None) -> None:
    """Copy what there is of `TOKENIZER_FILES`; where the tokenizer's own file is not among these, save `tokenizer`.

    Raises:
      UserError: a link out of the directory, which would copy a file of this machine into what may be given away; the
        hub's cache has its links.
      StorageError: reading or writing failed.
    """
    homes = (source.resolve(), source.resolve().parent.parent / "blobs")
    converted = tokenizer is not None and is_converted(source)
    try:
        for name in (GENERATION_FILE,) if converted else TOKENIZER_FILES:
            if (source / name).is_file():
                if (source / name).resolve().parent not in homes:
                    raise UserError(f"{source / name}: is a link out of its directory; put the file there")
                storage.copy(source / name, destination / name)
    except OSError as error:
        raise StorageError(f"{destination}: {error.strerror}") from error
    if converted:
        assert tokenizer is not None
        tokenizer.save(destination)
        copy_template(source, destination)


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """What `config.json` says of special tokens."""
    return {f"{role}_token_id": None if tokenizer is None else getattr(tokenizer, f"{role}_id") for role in ROLES}


def complete_tokenizer(directory: Path, destination: Path, tokenizer: Tokenizer | None, max_seq_len: int) -> None:
    """Add to the copied files of a run's tokenizer what transformers needs to load it as it is.

    Without a class in `tokenizer_config.json` transformers picks one by the model's type, which builds a tokenizer of
    its own rules, with special tokens that the vocabulary may lack. A tokenizer of ours gets a template that puts the
    token before a text that `generate` puts there.

    Args:
      directory: the run.
      destination: the checkpoint, with the copied files.
      tokenizer: the run's; None: there is nothing to do for it.
      max_seq_len: the model's longest text.
    """
    if not (destination / GENERATION_FILE).exists():
        stops = [] if tokenizer is None else list(stop_ids(directory, tokenizer))
        values = {name: value for name, value in token_ids(tokenizer).items() if value is not None}
        values |= {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
        _write(destination / GENERATION_FILE, values)
    if tokenizer is None or not (destination / HF_FILE).is_file():
        return
    stored = _read(destination / HF_CONFIG_FILE)
    if "tokenizer_class" in stored:
        return
    rules = _read(destination / HF_FILE)
    names = {token["id"]: token["content"] for token in rules.get("added_tokens") or ()}
    model = rules.get("model") or {}
    specials = {f"{role}_token": names.get(getattr(tokenizer, f"{role}_id")) for role in ROLES}
    specials["unk_token"] = model.get("unk_token")
    own = set(stored) == {f"{role}_token" for role in ROLES}
    if own and rules.get("post_processor") is None and specials["bos_token"] is not None:
        rules["post_processor"] = _template(specials["bos_token"], tokenizer.bos_id)
        _write(destination / HF_FILE, rules)
    known = {name: token for name, token in specials.items() if token is not None and name not in stored}
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        # Text comes back as the tokens spell it, without spaces taken out before punctuation.
        "clean_up_tokenization_spaces": False,
    }
    _write(destination / HF_CONFIG_FILE, {**defaults, **known, **stored})


def _template(token: str, number: int | None) -> dict[str, Any]:
    """The post-processor that puts a token before a text."""
    special, first = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path, max_bytes=MAX_TOKENIZER_BYTES) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: damaged: must hold a JSON object")
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    storage.write_atomic(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
