"""Continue a text with a trained model: `python -m sparsezoo_jax.generate DIR --prompt "The state of the Union"`.

Text is printed as it is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparsezoo_jax import cli
from sparsezoo_jax.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run directory."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 100
    """Most tokens to add; generation also ends at the end-of-text token."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens with this much probability; 1 is off."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same text."""
    step: int | None = None
    """Checkpoint to load; none is the newest."""


def main(args: Sequence[str]) -> None:
    """Print the prompt and stream its continuation."""
    command = cli.parse(Generate, args, prog="generate", description=(__doc__ or "").strip())
    from sparsezoo_jax import run_dir
    from sparsezoo_jax.inference import Sampling, generate_tokens

    sampling = Sampling(command.temperature, command.top_k, command.top_p)
    require(command.max_new_tokens > 0, "--max-new-tokens", command.max_new_tokens, "must be above 0")
    model, _, tokenizer = run_dir.load(command.directory, step=command.step)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")
    ids = tokenizer.encode_prompt(command.prompt)
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    tokens = generate_tokens(
        model, ids, max_new_tokens=command.max_new_tokens, sampling=sampling, seed=command.seed, stop=stop
    )
    text = tokenizer.stream_decoder()
    print(command.prompt, end="", flush=True)
    for token in tokens:
        print(text.push(token), end="", flush=True)
    print(text.flush())


if __name__ == "__main__":
    cli.run(main)
