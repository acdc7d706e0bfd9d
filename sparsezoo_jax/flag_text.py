"""Texts about flags: the short help of commands that take a preset, their aliases, and errors as one line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unittest import mock

from sparsezoo_jax.errors import UserError

#: The commands, with a line on each.
COMMANDS = {
    "train": "train a preset on a corpus, or go on with a run",
    "evaluate": "loss, perplexity and sparsity of a run; its features, its chess, its activation ratio",
    "generate": "continue a text with a run's model",
    "serve": "answer requests in OpenAI's form over HTTP",
    "report": "plots of one run or of several side by side, as one HTML file",
    "convert": "checkpoints from and to Hugging Face's layout; adapters into a run of their own",
    "aot": "compile a step for TPUs or GPUs that are not here: memory, communication, time",
    "sparsify": "leave out or prune what matters least in a trained run: TEAL, WINA, Wanda, CFSP, ...",
    "sae": "train a sparse autoencoder on a run's activations",
    "theory": "how few active units tell one pattern from others: by formula, and in a run",
    "chess": "play games of chess to train on",
    "prepare": "tokenise and pack a corpus into records to train on",
}
#: Short names of the flags that are given most.
ALIASES = {
    "--steps": "--train.steps",
    "--lr": "--train.schedule.learning-rate",
    "--batch-size": "--data.batch-size",
    "--seq-len": "--data.seq-len",
    "--dataset": "--data.dataset",
}
#: What the short help shows beside the command's own fields.
FREQUENT = (
    "train.steps",
    "train.stop_at",
    "train.schedule.learning_rate",
    "train.accumulation",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.init_from",
    "train.seed",
    "data.dataset",
    "data.mixture",
    "data.text_field",
    "data.tokenizer",
    "data.seq_len",
    "data.batch_size",
    "model.layers",
    "model.d_model",
    "mesh.fsdp",
    "mesh.tensor",
)
_WIDTH = 100
#: Of tyro's errors.
_TITLES = (
    *("Invalid choice", "Missing argument", "Missing input", "Missing subcommand", "Parsing error", "Required options"),
    *("Unrecognized input", "Unrecognized option", "Unrecognized options", "Value error"),
)


def expanded(args: Sequence[str], own: Collection[str] = ()) -> list[str]:
    """`args` with the full names of `ALIASES`, but for those that the command has as fields of its `own`."""
    found = []
    for arg in args:
        flag, given, value = arg.partition("=")
        if flag in ALIASES and flag.removeprefix("--").replace("-", "_") not in own:
            flag = ALIASES[flag]
        found.append(f"{flag}{given}{value}")
    return found


@functools.cache
def documentation(cls: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, its own and inherited ones."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # made at run time
            continue
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def short_help(command: Any, prog: str, description: str, archs: dict[str, str], sizes: dict[str, str]) -> str:
    """Help of a command with a preset: what it does, presets, and the flags that people use most.

    Args:
      command: its configuration, from which defaults are shown.
      prog: how it is called.
      description: what it does.
      archs: architectures, with a line on each.
      sizes: sizes of the architecture at hand, likewise.
    """
    aliases = {full: short for short, full in ALIASES.items()}
    inherited = {name for base in type(command).__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    own = [field.name for field in dataclasses.fields(command) if field.name not in inherited]
    lines = [f"usage: {prog} [--arch ARCH] [--size SIZE] [--flag value ...]", "", description, ""]
    lines += [f"--arch, default {command.arch}:", *_choices(archs), f"--size of {command.arch}:", *_choices(sizes), ""]
    for path in (*FREQUENT, *own):
        holder, name = command, path
        while "." in name:
            part, _, name = name.partition(".")
            holder = getattr(holder, part, None)
        if not hasattr(holder, name) or dataclasses.is_dataclass(getattr(holder, name)):
            continue
        flag = f"--{path.replace('_', '-')}"
        names = f"{flag}, {aliases[flag]}" if flag in aliases and aliases[flag][2:] not in own else flag
        text = documentation(type(holder)).get(name, "").split(". ")[0].rstrip(".")
        lines += [f"  {names}  (default: {_shown(getattr(holder, name))})", *_indented(text)]
    lines += [
        "",
        "Examples:",
        f"  {prog} --arch spark --steps 300",
        f"  {prog} --arch blockffn --size small --dataset 'texts/*.jsonl' --batch-size 64 --lr 1e-3",
        "",
        f"Every number of a run is a flag: {prog} --help-all lists them.",
        "--no-compilation-cache keeps no compiled programs, and takes none that were kept.",
    ]
    return "\n".join(lines)


def _choices(lines: dict[str, str]) -> list[str]:
    width = max(map(len, lines))
    return [f"  {name:<{width}}  {text}".rstrip() for name, text in lines.items()]


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


@contextlib.contextmanager
def one_line_errors(prog: str, fields: Collection[str] = ()) -> Iterator[None]:
    """What tyro says of wrong flags becomes a `UserError` of one line; `fields` may have been meant."""
    said = io.StringIO()
    try:
        # Wide enough that no line is broken.
        with mock.patch.dict(os.environ, {"COLUMNS": "10000"}), contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        known = [f"--{name.replace('_', '-')}" for name in fields]
        raise UserError(f"{condensed(said.getvalue(), known)}; {prog} --help says what there is") from None


def condensed(text: str, known: Sequence[str] = ()) -> str:
    """The lines of a box of tyro's as one: what is wrong and, of what is suggested or `known`, the nearest."""
    # Where a terminal has no box, its title stands alone, and the lines between parts are of ASCII.
    lines = [line for line in text.splitlines() if not re.match(r"[╭╰+]|\W*[─-]{3}", line)]
    lines = [line for line in lines if line.strip("-─|│ ") not in _TITLES]
    rows = [re.sub(r"^[│|\s]+|[│|\s]+$", "", line) for line in lines]
    indents = [len(line) - len(line.lstrip("│| ")) for line in lines]
    wrong: list[str] = []
    close: str | None = None
    part = ""
    unknown: list[str] = []
    missing: list[str] = []
    for row, indent in zip(rows, indents, strict=True):
        if not row:
            part = ""  # a line between parts
        elif row.startswith("Unrecognized options:"):
            part = "unknown"
            unknown += [name for name in row.partition(":")[2].split(", ") if name.strip()]
        elif row.startswith("Missing from"):
            part = "missing"
        elif row.startswith(("Perhaps you meant", "Similar")):
            part = "close"
        elif row.startswith(("For full helptext", "Argument helptext")):
            part = "help"
        elif part == "close":
            close = close or (row.split()[0] if row.startswith("--") else None)
        elif part == "unknown":
            unknown.append(row)
        elif part == "missing":
            missing += [row.split()[0]] if indent <= 6 else []
        elif part != "help":
            wrong.append(re.sub(r"^Error parsing (\S+?):", r"\1:", row).rstrip("."))
    flags = [name.strip() for name in unknown if name.strip().startswith("-")] or [name.strip() for name in unknown]
    if flags:
        close = close or next(iter(difflib.get_close_matches(flags[0].partition("=")[0], known, n=1)), None)
        hint = f" (did you mean {close}?)" if close else ""
        wrong.insert(0, f"{flags[0]}: no such {'flag' if flags[0].startswith('-') else 'argument'}{hint}")
    if missing:
        wrong.append(f"{', '.join(missing)}: needed")
    return "; ".join(wrong) or " ".join(filter(None, rows))
