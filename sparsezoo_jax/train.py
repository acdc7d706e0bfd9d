"""Train a preset: `python -m sparsezoo_jax.train --arch spark`.

On the embedded corpus the tiny presets take two to three minutes on two CPU cores. A workdir that holds a checkpoint is
resumed; the same flags must be given.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from sparsezoo_jax import cli
from sparsezoo_jax.config import RunConfig, flatten
from sparsezoo_jax.errors import STRICT, DataError, StorageError, require

_STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train(RunConfig):
    """Flags of the command."""

    workdir: Path | None = None
    """Run directory: gets configuration, tokenizer, checkpoints and metrics. Default: runs/ARCH-SIZE."""
    fresh: bool = False
    """Refuse a workdir that is not empty instead of going on with the run there."""

    def config(self) -> RunConfig:
        return RunConfig(**{name: getattr(self, name) for name in RunConfig.__dataclass_fields__})


def main(args: Sequence[str]) -> None:
    """Train, evaluate on the validation split, and print what came out and a sample."""
    command = cli.parse_with_preset(Train, args, prog="train", description=(__doc__ or "").strip())
    train(command.config(), command.workdir or Path("runs") / f"{command.arch}-{command.size}", fresh=command.fresh)


def train(config: RunConfig, workdir: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Train `config` in `workdir`, or go on there; returns the final figures that are also in `evaluation.json`.

    Raises:
      UserError: an impossible configuration, corpus or directory; nothing has been written to `workdir` then.
      StorageError: reading or writing failed.
    """
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.evaluation import evaluate_model
    from sparsezoo_jax.evaluation.report import run_figures, write_report
    from sparsezoo_jax.models import Decoder
    from sparsezoo_jax.training.loop import fit

    # ------------------------------------------------------------------------------------------- Directory and corpus
    resumes = run_dir.open_for_training(workdir, config, fresh=fresh)
    tokenizer = data.find_tokenizer(workdir) if resumes else None
    if tokenizer is None:
        tokenizer = data.build_tokenizer(config.data, data.open_documents(config.data, "train"))
    require(
        tokenizer.vocab_size <= config.model.vocab_size,
        "model.vocab_size",
        config.model.vocab_size,
        f"must be at least the tokenizer's {tokenizer.vocab_size}",
    )
    validation = data.prepare(config.data, "validation", tokenizer)
    if config.data.mode == "prepared":
        prepared = data.prepare(config.data, "train", tokenizer)
        batches = data.prepared_batches(prepared, batch_size=config.data.batch_size, seed=config.data.seed)
    else:
        prepared = None
        batches = data.streaming_batches(config.data, "train", tokenizer)
    bytes_per_token = validation.num_bytes / validation.num_targets

    def evaluate(model, max_batches: int | None):
        shown = data.evaluation_batches(validation, config.data.batch_size, max_batches)
        return evaluate_model(model, shown, bytes_per_token)

    def write_run_files() -> None:
        run_dir.write_config(workdir, config)
        try:
            tokenizer.save(workdir)
        except OSError as error:
            raise StorageError(f"{workdir}: the tokenizer can't be saved: {error.strerror}") from None

    # --------------------------------------------------------------------------------------------------------- Train
    setup_seconds = time.monotonic() - _STARTED
    try:
        result = fit(
            config.train,
            build=lambda rngs: Decoder(config.model, rngs=rngs),
            data=batches,
            batch_shape=(config.data.batch_size, config.data.seq_len),
            workdir=workdir,
            evaluate=lambda model: evaluate(model, config.eval.batches).as_arrays(),
            before_writing=write_run_files,
        )
    finally:
        batches.close()
    if not result.finished:
        return {}

    # ------------------------------------------------------------------------------------------------- Final figures
    final = evaluate(result.model, config.eval.final_batches)
    figures: dict[str, Any] = {
        "step": result.step,
        "split": config.data.validation_split,
        **final.as_dict(),
        "seconds": round(time.monotonic() - _STARTED, 1),
        "seconds_to_first_step": round(result.time_to_first_step + setup_seconds, 1),
        "train_tokens_per_second": round(result.tokens_per_second, 1),
    }
    bigram = data.bigram_entropy(validation, tokenizer.vocab_size)
    figures["bigram_entropy"] = bigram.entropy
    if prepared is not None:
        figures["unigram_entropy"] = data.unigram_entropy(prepared, validation, tokenizer.vocab_size).entropy
    _write_json(workdir / "evaluation.json", figures)
    print_figures(figures, workdir)
    print_sample(result.model, tokenizer)
    if config.eval.report:
        shown = data.evaluation_batches(validation, config.data.batch_size, config.eval.batches)
        run = run_figures(workdir, workdir.name, flatten(config), config.model, result.model, shown)
        write_report(workdir / "report.html", [run])
        print(f"\nReport: {workdir / 'report.html'}")
    return figures


def _write_json(path: Path, figures: dict[str, Any]) -> None:
    clean = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in figures.items()}
    try:
        path.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def print_figures(figures: dict[str, Any], workdir: Path) -> None:
    """Print what a run came to: loss beside the entropies of simpler predictors, sparsity of each layer, time."""
    rows = [
        ("validation loss", f"{figures['loss']:.4f} nats/token"),
        ("perplexity", f"{figures['perplexity']:.2f}"),
        ("bits per byte", f"{figures['bits_per_byte']:.4f}"),
        *(
            (f"{name} entropy of the split", f"{figures[f'{name}_entropy']:.4f} nats/token")
            for name in ("unigram", "bigram")
            if f"{name}_entropy" in figures
        ),
        ("first step after", f"{figures['seconds_to_first_step']:.1f} s"),
        ("whole run", f"{figures['seconds']:.1f} s, {figures['train_tokens_per_second']:,.0f} tokens/s"),
    ]
    cli.print_table(f"{workdir}: step {figures['step']}", ("figure", "value"), rows)
    cli.print_layers(figures)


def print_sample(model, tokenizer, prompt: str = "The state of the Union is", tokens: int = 60) -> None:
    """Print a continuation of `prompt`."""
    from sparsezoo_jax.inference import Sampling, generate_tokens

    try:
        ids = tokenizer.encode_prompt(prompt)
    except DataError:  # a vocabulary without these letters: nothing sensible to begin with
        return
    tokens = min(tokens, model.config.max_seq_len - len(ids))
    if tokens < 1:
        return
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    sampling = Sampling(temperature=0.8, top_p=0.95)
    new = list(generate_tokens(model, ids, max_new_tokens=tokens, sampling=sampling, stop=stop))
    print(f"\nSample (temperature 0.8, top-p 0.95):\n{prompt}{tokenizer.decode(new)}", file=sys.stdout)


if __name__ == "__main__":
    cli.run(main)
