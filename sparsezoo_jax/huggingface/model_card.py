"""The README.md of a checkpoint: what is known of the model, how it is loaded and how it was trained.

Every text comes from files of a run, which somebody else may have made: it is escaped, so that it is shown and not
rendered. What a run does not tell is left out.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsezoo_jax.config import FREE_ON_RESUME, RunConfig, differences
from sparsezoo_jax.configs import PRESETS, archs
from sparsezoo_jax.errors import DataError
from sparsezoo_jax.evaluation.history import METRICS, last_evaluation
from sparsezoo_jax.overrides import local_fields
from sparsezoo_jax.untrusted import printable, read_json

CARD = "README.md"
FIGURES = "evaluation.json"
#: Figures of an evaluation that are shown, with their names in the table; per-layer ones are averaged.
_FIGURES = {
    "loss": "Loss, nats per token",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "tokens": "Tokens evaluated",
    "ffn_density": "Active share of feed-forward neurons or experts, mean over layers",
    "attended_keys": "Keys that a query attends to, mean over layers",
    "width_density": "Active share of the width, mean over layers",
}
#: Flags of a run that say nothing of the model that came out.
_NO_FLAGS = tuple(set(FREE_ON_RESUME) - {"data.dataset", "train.merge_last", "train.merge_decay"})


class Written(NamedTuple):
    """What a conversion knows of the checkpoint."""

    model_type: str
    parameters: int
    dtype: str
    own_code: bool
    """Whether Python files come with it."""
    tokenizer: bool
    loads: bool
    """Whether transformers loads it from these files alone."""


def model_card(directory: Path, config: RunConfig, step: int, written: Written, name: str | None = None) -> str:
    """The text of the README.md.

    Args:
      directory: the run.
      config: its configuration.
      step: of the checkpoint.
      written: what was made of it.
      name: OWNER/NAME on the hub; None: it stays a directory.
    """
    tags = ["sparsezoo_jax", "jax", "sparsity", *([config.arch] if re.fullmatch(r"[\w-]+", config.arch) else [])]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += [*(f"- {tag}" for tag in dict.fromkeys(tags)), "---"]
    parts = [
        "\n".join(front),
        f"# {markdown(name or f'{config.arch} {config.size}')}",
        _description(config),
        _table(("", ""), _facts(config, step, written)),
        _loading(written, name),
    ]
    figures = _figures(directory, step)
    shown = _shown(figures)
    if shown:
        split = figures.get("split")
        where = f" on the split {code(split)}" if isinstance(split, str) else ""
        parts.append(f"## Measured\n\nAt step {step}{where}:")
        parts.append(_table(("Figure", "Value"), shown))
    parts.append(_training(config))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(text: object) -> str:
    """`text` as Markdown that shows it as it is, in one line."""
    shown = printable(text, limit=200)
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Also what makes links of plain addresses and mentions.
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~@:])", r"\\\1", shown)


def code(text: object) -> str:
    """`text` as a code span of one line, which may stand in a table."""
    shown = printable(text, limit=200)
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    padding = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{padding}{shown}{padding}{fence}".replace("|", r"\|")


def _description(config: RunConfig) -> str:
    line = archs().get(config.arch)
    about = f" {line}." if line else ""
    return f"A decoder-only language model of architecture {code(config.arch)}, size {code(config.size)}.{about}"


def _facts(config: RunConfig, step: int, written: Written) -> list[tuple[str, str]]:
    model = config.model
    kinds = {"attention": model.attention.kind, "feed-forward": model.ffn.kind, "residual": model.residual.kind}
    return [
        ("Parts", ", ".join(f"{part} {code(kind)}" for part, kind in kinds.items())),
        ("Parameters", f"{written.parameters:,}, {written.dtype}"),
        ("Layers, width", f"{model.layers}, {model.d_model}"),
        ("Vocabulary", f"{model.vocab_size:,} tokens"),
        ("Longest text", f"{model.max_seq_len:,} tokens"),
        *_data(config, step),
    ]


def _data(config: RunConfig, step: int) -> list[tuple[str, str]]:
    """What a run was trained on; nothing of a converted checkpoint, which was never trained here."""
    if step == 0:
        return []
    names = [name for name in config.data.names if name is not None]
    tokens = step * config.data.batch_size * config.data.seq_len
    facts = [("Training", f"{step:,} steps of {config.data.batch_size} texts of {config.data.seq_len} tokens")]
    facts.append(("Tokens seen", f"{tokens:,}, padding included"))
    return [*([("Corpus", ", ".join(code(public_name(one)) for one in names))] if names else []), *facts]


def public_name(dataset: str) -> str:
    """The name of a corpus; of a place on a machine or in a bucket its last part, for the rest tells of that place."""
    local = dataset.startswith(("/", "~", ".")) or "\\" in dataset or os.path.exists(dataset)
    local = local or ("://" in dataset and not dataset.startswith("hf://"))
    return re.split(r"[/\\]", dataset.rstrip("/\\"))[-1] if local else dataset


def _loading(written: Written, name: str | None) -> str:
    place, more = repr(name or "path/to/this/directory"), ", trust_remote_code=True" if written.own_code else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({place}{more})")
    if written.tokenizer:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({place}{more})",
            'inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))",
        ]
    parts = ["## Load"]
    if written.loads:
        parts.append("```python\n" + "\n".join(lines) + "\n```")
    if written.own_code:
        parts.append(
            "`modeling_sparsezoo.py` holds the model in PyTorch. It computes what the model leaves out and masks it: "
            "the logits are those of the trained model, the time is that of a dense one."
        )
    source = shlex.quote(name) if name else "DIR"
    fetch = f"hf download {source} --local-dir DIR && " if name else ""
    parts.append(
        f"In JAX, to train on or to decode sparsely:\n\n```bash\n{fetch}sparsezoo convert from-hf DIR RUN\n```"
    )
    return "\n\n".join(parts)


def _training(config: RunConfig) -> str:
    """The command that trains such a model: its preset, and what was changed of it by flags that can say so."""
    preset = PRESETS.get(config.arch, {}).get(config.size)
    if preset is None:
        return ""
    hidden = local_fields(config)
    changed = {
        field: value
        for field, (_, value) in differences(preset, config, ignored=_NO_FLAGS).items()
        if field not in hidden and field not in ("data.dataset", "data.tokenizer")
    }
    if config.data.dataset is not None and config.data.dataset != preset.data.dataset:
        changed["data.dataset"] = public_name(config.data.dataset)
    plain = {field: value for field, value in changed.items() if isinstance(value, str | int | float)}
    flags = [word for field, value in plain.items() for word in _flag(field, value)]
    words = ["sparsezoo", "train", "--arch", config.arch, "--size", config.size, *flags, "--workdir", "RUN"]
    command = " ".join(shlex.quote(printable(word)) for word in words)
    others = sorted(set(changed) - set(plain))
    more = f"\n\nThe run also changed {', '.join(map(code, others))}." if others else ""
    return f"## Train\n\n```bash\n{command}\n```{more}"


def _flag(field: str, value: Any) -> Sequence[str]:
    name = field.replace("_", "-")
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{head}.no-{last}"]
    return [f"--{name}", str(value)]


def _figures(directory: Path, step: int) -> dict[str, Any]:
    """The figures of the final evaluation or, without one of this step, of the last one in training."""
    path = directory / FIGURES
    try:
        found = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}") from error
    if isinstance(found, dict) and found.get("step") == step:
        return found
    return last_evaluation(directory, step) if (directory / METRICS).is_file() else {}


def _shown(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, label in _FIGURES.items():
        value = figures.get(name)
        values = value if isinstance(value, list) else [value]
        numbers = [float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
        if numbers and all(map(math.isfinite, numbers)):
            mean = sum(numbers) / len(numbers)
            rows.append((label, f"{mean:,.0f}" if name == "tokens" else f"{mean:.4g}"))
    return rows


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)
