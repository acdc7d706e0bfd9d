"""Chat templates: messages as the text that a model was trained on, by the template beside its tokenizer.

A template is a program in Jinja's language, of whoever made the checkpoint. It runs in a process of its own
(`chat_process`), in Jinja's sandbox, with a bound on its time and memory, and gives nothing back but a text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from sparsezoo_jax import storage
from sparsezoo_jax.data import chat_process
from sparsezoo_jax.data.special_tokens import HF_CONFIG_FILE, SPECIALS_FILE, named_in
from sparsezoo_jax.data.tokenizer import Tokenizer
from sparsezoo_jax.errors import DataError
from sparsezoo_jax.untrusted import MAX_CONFIG_BYTES, parse_json, read_bytes, read_json

TEMPLATE_FILE = "chat_template.jinja"
TIMEOUT = 30.0
"""Seconds that a template may take, with the start of its process."""


def read_template(directory: str | os.PathLike[str]) -> str:
    """The chat template of a run or checkpoint: `chat_template.jinja`, or the one in `tokenizer_config.json`.

    Raises:
      DataError: there is none, or the file is damaged.
    """
    found = _template(directory)
    if found is None:
        raise DataError(f"{directory}: has no chat template ({TEMPLATE_FILE}, or chat_template in {HF_CONFIG_FILE})")
    return found


def copy_template(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Give a directory the chat template of another one, if that has one and it itself has none.

    Raises:
      DataError: a file is damaged. StorageError: writing failed.
    """
    found = _template(source)
    if found is not None and _template(directory) is None:
        storage.write_atomic(storage.path(directory) / TEMPLATE_FILE, found.encode())


def _template(directory: str | os.PathLike[str]) -> str | None:
    own, config = storage.path(directory) / TEMPLATE_FILE, storage.path(directory) / HF_CONFIG_FILE
    try:
        if own.is_file():
            return read_bytes(own, MAX_CONFIG_BYTES).decode("utf-8")
        found = read_json(config).get("chat_template") if config.is_file() else None
        if isinstance(found, list):  # several by name
            found = {one["name"]: one["template"] for one in found}.get("default")
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise DataError(f"{directory}: the chat template can't be read: {error}") from None
    return found if isinstance(found, str) else None


def render(template: str, messages: Sequence[dict[str, str]], specials: dict[str, str]) -> str:
    """The text of a conversation, up to where the model's answer begins.

    Args:
      messages: with the keys 'role' (such as 'system', 'user', 'assistant') and 'content'.
      specials: what special tokens are called: 'bos_token', 'eos_token', 'pad_token'.

    Raises:
      DataError: the template is no template, refuses the messages, or takes too long.
    """
    variables = {**specials, "messages": list(messages), "add_generation_prompt": True}
    # Isolated: without the current directory and the user's variables of Python.
    command = [sys.executable, "-I", chat_process.__file__]
    given = json.dumps({"template": template, "variables": variables})
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=TIMEOUT, check=False)
        answer = parse_json(done.stdout, max_bytes=MAX_CONFIG_BYTES)
    except subprocess.TimeoutExpired:
        raise DataError(f"the chat template takes more than {TIMEOUT:.0f} s") from None
    except ValueError:
        lines = done.stderr.decode(errors="replace").splitlines()
        raise DataError(f"the chat template ended its process: {lines[-1] if lines else done.returncode}") from None
    if "error" in answer:
        raise DataError(f"the chat template fails: {answer['error']}")
    return answer["text"]


def chat_prompt(
    directory: str | os.PathLike[str], tokenizer: Tokenizer, messages: Sequence[dict[str, str]]
) -> list[int]:
    """Token ids of a conversation by the template of a directory; names of special tokens stand for them.

    Raises:
      DataError: as `read_template`, `render` and `Tokenizer.encode_prompt`.
    """
    named = {**named_in(storage.path(directory) / SPECIALS_FILE), **named_in(storage.path(directory) / HF_CONFIG_FILE)}
    specials = {name: text for name, text in named.items() if text is not None}
    text = render(read_template(directory), messages, specials)
    ids = tokenizer.encode_prompt(text, special_tokens=True)
    # The template says whether there is one.
    starts = bool(specials.get("bos_token")) and text.startswith(specials["bos_token"])
    return ids if starts or ids[:1] != [tokenizer.bos_id] else ids[1:]
