"""Parameter counts of a decoder, without allocating it."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
