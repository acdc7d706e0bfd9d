"""Continue a text with a trained model: `python -m sparsezoo_jax.generate DIR --prompt "The state of the Union"`.

Text is printed as it is generated; of several prompts, which are continued together, each when all have ended.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsezoo_jax import cli
from sparsezoo_jax.errors import require
from sparsezoo_jax.mesh_flags import MeshFlags
from sparsezoo_jax.path_flags import IN_RUN_STORES
from sparsezoo_jax.untrusted import printable
from sparsezoo_jax.weight_formats import WeightFormats


@dataclass(frozen=True, kw_only=True)
class Generate(WeightFormats, MeshFlags):
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directory."""
    prompt: tuple[str, ...]
    """Text to continue, or several."""
    max_new_tokens: int = 100
    """Most tokens to add; generation also ends at the end-of-text token."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens with this much probability; 1 is off."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability; 0 is off."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same text."""
    special_tokens: bool = False
    """Read the names of special tokens in the prompt, such as '<|im_start|>', as these tokens and not as text."""
    chat: bool = False
    """Take each prompt for a user's message, put it into the tokenizer's chat template, and print the answer."""
    system: str | None = None
    """With --chat: the system message before it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside those that the tokenizer and generation_config.json name."""
    drafts: int = 0
    """Tokens that each step proposes by looking the last ones up in the text, to be checked at once; 0 is off. Needs
    one prompt and temperature 0, whose text it does not change."""
    stats: bool = False
    """Print on stderr how fast it went, what was read for each token, and how sparse the layers were."""
    step: int | None = None
    """Checkpoint to load; none is the newest."""
    base: Annotated[Path | None, IN_RUN_STORES] = None
    """Of a run of adapters: the run that they were trained for. None: where its configuration says."""


def main(args: Sequence[str]) -> None:
    """Print the prompt and stream its continuation."""
    command = cli.parse(Generate, args, prog="generate", description=(__doc__ or "").strip())
    from sparsezoo_jax.inference import Sampling
    from sparsezoo_jax.text_model import TextModel

    sampling = Sampling(command.temperature, command.top_k, command.top_p, command.min_p)
    require(command.system is None or command.chat, "--system", command.system, "needs --chat")
    require(not (command.chat and command.special_tokens), "--special-tokens", True, "is implied by --chat")
    require(command.max_new_tokens > 0, "--max-new-tokens", command.max_new_tokens, "must be above 0")
    model = TextModel.load(
        command.directory,
        step=command.step,
        base=command.base,
        formats=command.formats,
        stop_ids=command.stop_ids,
        mesh=command.build_mesh(),
    )
    if command.chat:
        prompts = [model.encode_message(prompt, command.system) for prompt in command.prompt]
    else:
        prompts = [model.encode(prompt, special_tokens=command.special_tokens) for prompt in command.prompt]
    generation = model.generate(
        prompts, max_new_tokens=command.max_new_tokens, sampling=sampling, seed=command.seed, drafts=command.drafts
    )
    # A model may have learned, or been made, to write what steers a terminal; a file gets its text as it is.
    shown = _on_terminal if sys.stdout.isatty() else str
    if len(command.prompt) == 1:
        text = model.tokenizer.stream_decoder(prompts[0])
        with cli.held_warnings():
            if not command.chat:
                print(command.prompt[0], end="", flush=True)
            for (new,) in generation:
                for token in new:
                    print(shown(text.push(token)), end="", flush=True)
            print(shown(text.flush()))
    else:
        for prompt, text in zip(command.prompt, model.texts(generation), strict=True):
            print(f"{'' if command.chat else prompt}{shown(text)}\n")
    if command.stats:
        print_stats(model.engine.model, generation.stats)


def _on_terminal(text: str) -> str:
    return printable(text, keep="\n\t", limit=None)


def print_stats(model: Any, stats: Any) -> None:
    """Print a generation's speed, bytes for each token and the sparsity of its layers, on stderr."""
    import numpy as np

    from sparsezoo_jax.inference import read_per_token

    rows = [
        ("prompt", f"{stats.prompt_tokens:,} tokens, {stats.prefill_rate:,.1f} tokens/s"),
        ("generated", f"{stats.decoded:,} tokens after the first, {stats.decode_rate:,.1f} tokens/s"),
        ("compiling", f"{stats.compile_seconds:.1f} s, in none of these"),
    ]
    if stats.drafted:
        rows.append(("drafts", f"{stats.accepted:,} of {stats.drafted:,} accepted, {stats.steps:,} steps"))
    elif stats.steps:
        rows.append(("weights and cache read", f"{read_per_token(model, stats) / 1e6:,.2f} MB for each token"))
    means = stats.layer_means()
    for name, label in (("ffn_density", "active neurons"), ("attended_keys", "attended keys")):
        if name in means and not np.isnan(means[name]).all():
            form = "{:.1%}" if name == "ffn_density" else "{:.1f}"
            rows.append((f"{label}, by layer", "  ".join(form.format(value) for value in means[name])))
    cli.print_table("Generation", ("figure", "value"), rows, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
