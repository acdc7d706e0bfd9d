"""Parameters and FLOPs of a decoder, without allocating it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from sparsezoo_jax.models.config import DecoderConfig
from sparsezoo_jax.models.decoder import Decoder


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalars."""

    total: int
    embedding: int
    """Token and position embeddings, and the output projection where it is untied."""

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """The decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def count_parameters(config: DecoderConfig) -> ParameterCount:
    """Count the parameters of `config`'s decoder by its abstract form."""
    model = abstract_decoder(config)

    def size(tree) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    tables = (model.embedding_VD, model.positions_PD, model.output_DV)
    embedding = sum(math.prod(table.shape) for table in tables if table is not None)
    return ParameterCount(size(nnx.state(model, nnx.Param)), embedding)


def flops_per_token(
    config: DecoderConfig, context: int, *, position: Literal["mean", "last"] = "mean", logits: bool = False
) -> float:
    """FLOPs of one token's forward pass with the sparsity the configuration aims at; a multiply-add counts 2.

    Counted are matrix products: projections, attention over the visible keys, FFN; norms, softmax and the top-k's
    statistics are not.

    Args:
      context: tokens of the sequence.
      position: "last" is the token that sees all of them, "mean" the average over all positions.
      logits: count the output projection too.

    Source: Spark Transformer (arXiv 2506.06644), sections 2 and 3 (FLOPs per token).
    """
    total = 0.0
    for spec in config.layer_specs():
        window = spec.attention.window if spec.layer_type == "local" else None
        limit = context if window is None else min(window, context)
        if position == "last":
            mixing = spec.attention.mixing_flops(limit)
        else:
            # Position t sees min(t, limit) keys; all positions past the limit cost the same.
            growing = sum(spec.attention.mixing_flops(keys) for keys in range(1, limit))
            mixing = (growing + (context - limit + 1) * spec.attention.mixing_flops(limit)) / context
        total += spec.attention.projection_flops(config.d_model) + mixing + spec.ffn.flops(config.d_model)
    return total + (2 * config.d_model * config.vocab_size if logits else 0)
