"""A trained run and tokens of its validation text, for benchmarks that need real choices of experts."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.records import EXPERT_SCORES


def validation_text(directory: Path, rows: int) -> tuple[Decoder, np.ndarray, np.ndarray]:
    """The model of a run, and tokens and segment ids [rows, T] of its validation split."""
    from sparsezoo_jax import data, run_dir  # what needs no run needs no tokenizer or corpus either

    model, config, tokenizer = run_dir.load(directory)
    if tokenizer is None:
        raise UserError(f"{directory}: has no tokenizer, so no text can be read")
    batch = next(data.evaluation_batches(data.prepare(config.data, "validation", tokenizer), rows))
    return model, np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])


def expert_choices(model: Decoder, tokens: np.ndarray, segments: np.ndarray, chunk: int) -> np.ndarray:
    """Experts of each of `chunk` consecutive tokens of a document: booleans [chunks of all layers, chunk, E]."""
    out = model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments), logits=False, record={EXPERT_SCORES})
    layers = [np.asarray(scores) != 0 for scores in out.records[EXPERT_SCORES] if scores is not None]
    if not layers:
        raise UserError(f"model.ffn.kind={model.config.ffn.kind}: has no experts")
    length = tokens.shape[1] // chunk * chunk
    whole = segments[:, :length].reshape(-1, chunk)
    one_document = (whole == whole[:, :1]).all(axis=1) & (whole[:, 0] > 0)
    chunks = [active[:, :length].reshape(len(whole), chunk, -1)[one_document] for active in layers]
    return np.concatenate(chunks)


def chunk_sparsity(choices: np.ndarray) -> float:
    """Share of the experts that no token of a chunk takes (CLS), of booleans [..., chunk, E]."""
    return 1 - float(choices.any(axis=-2).mean())
