"""What `train` prints of a run: the mixture it reads, its final figures, and a sample."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsezoo_jax import cli
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.errors import DataError, NumericsError, SparsezooWarning


def print_mixture(config: RunConfig, prepared: Any) -> None:
    """Print to stderr what a mixture comes to: normalised weights, and how often each corpus will have been read.

    Args:
      prepared: the training split, None when streaming.
    """
    parts = config.data.mixture or ()
    total = sum(part.weight for part in parts)
    header = ["corpus", "weight", "epochs at most"]
    rows = [[part.label, f"{part.weight / total:.4f}", "-" if part.epochs is None else part.epochs] for part in parts]
    if prepared is not None:
        schedule, size = prepared.schedule(), config.data.batch_size
        header += ["sequences", f"epochs in {config.train.steps:,} steps", "ends in step"]
        drawn = schedule.counts(config.train.steps * size)
        for row, component, count, end in zip(rows, prepared.components, drawn, schedule.ends, strict=True):
            records, step = component.split.num_records, end / size
            row += [f"{records:,}", f"{count / records:.2f}", math.ceil(step) if step <= config.train.steps else "-"]
    cli.print_table("Mixture", header, rows, file=sys.stderr)


def print_figures(figures: dict[str, Any], workdir: Path) -> None:
    """Print what a run came to: loss beside the entropies of simpler predictors, sparsity of each layer, time."""
    rows = [
        ("validation loss", f"{figures['loss']:.4f} nats/token"),
        ("perplexity", f"{figures['perplexity']:.2f}"),
        ("bits per byte", f"{figures['bits_per_byte']:.4f}"),
        *cli.corpus_rows(figures),
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


def print_image_figures(figures: dict[str, Any], workdir: Path) -> None:
    """Print what a run on images came to: loss, of a classifier accuracy and calibration, sparsity of each layer."""
    classifies = "accuracy" in figures
    rows = [
        ("validation loss", f"{figures['loss']:.4f} {'nats/image' if classifies else 'a hidden patch'}"),
        *([("accuracy", f"{figures['accuracy']:.2%}")] if classifies else []),
        *([("calibration error", f"{figures['ece']:.4f}")] if classifies else []),
        ("first step after", f"{figures['seconds_to_first_step']:.1f} s"),
        (
            "whole run",
            f"{figures['seconds']:.1f} s, {figures['train_tokens_per_second']:,.0f} "
            f"{'images' if classifies else 'hidden patches'}/s",
        ),
    ]
    cli.print_table(f"{workdir}: step {figures['step']}", ("figure", "value"), rows)
    cli.print_layers(figures)


def print_sample(
    model: Any, tokenizer: Any, stop: Sequence[int], prompt: str = "The state of the Union is", tokens: int = 60
) -> str | None:
    """Print a continuation of `prompt`; returns both, or None where the model could not go on."""
    from sparsezoo_jax.data import continuation
    from sparsezoo_jax.inference import Sampling, generate_tokens

    try:
        ids = tokenizer.encode_prompt(prompt)
    except DataError:  # a vocabulary without these letters: nothing sensible to begin with
        return None
    tokens = min(tokens, model.config.max_seq_len - len(ids))
    if tokens < 1:
        return None
    sampling = Sampling(temperature=0.8, top_p=0.95)
    try:
        new = list(generate_tokens(model, ids, max_new_tokens=tokens, sampling=sampling, stop=stop))
    except NumericsError as error:
        print(f"\nNo sample: {error}")
        return None
    text = f"{prompt}{continuation(tokenizer, ids, new)}"
    print(f"\nSample (temperature 0.8, top-p 0.95):\n{text}", file=sys.stdout)
    return text


def show_text(workdir: Path, step: int, name: str, text: str) -> None:
    """Add a text to the run's TensorBoard events; what fails is said, for the run is complete without."""
    from sparsezoo_jax.training.tensorboard import TensorBoardWriter
    from sparsezoo_jax.training.usual_writers import TENSORBOARD

    writer = TensorBoardWriter(workdir / TENSORBOARD)
    try:
        writer.add_text(step, name, text)
        writer.close()
    except OSError as error:
        warnings.warn(f"{workdir / TENSORBOARD}: {error.strerror}", SparsezooWarning, stacklevel=2)
