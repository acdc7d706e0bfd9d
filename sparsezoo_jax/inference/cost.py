"""What a generation had to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.inference.generation import GenerationStats
from sparsezoo_jax.inference.layouts import DecodingLayout
from sparsezoo_jax.inference.packing import PackedDecoder
from sparsezoo_jax.models import Decoder, Sparsity
from sparsezoo_jax.models.accounting import attention_weights, end_weights, reads_per_token


def read_per_token(model: Decoder, stats: GenerationStats) -> float:
    """Bytes of weights and cache that one token of a generation needed, by the sparsity that it had.

    The output projection is counted; rows of a batch are counted as if each were alone. Needs a generation of more than
    one token.
    """
    return bytes_read(model, round(np.mean(stats.contexts)), stats.layer_means())


def bytes_read(model: Decoder, context: int, stats: Mapping[str, Any]) -> float:
    """Bytes that the token which sees `context` tokens reads, with these layer statistics.

    Of a packed model: what its modules hold, factors of int8 rows and routers included. As trained, the numbers that
    `bytes_per_token` counts. Norms, the embedding's row and activations are counted in neither.
    """
    config, specs = model.config, model.config.layer_specs()
    density, attended = (np.asarray(stats[name], np.float64) for name in ("ffn_density", "attended_keys"))
    sparsity = Sparsity(
        tuple(None if np.isnan(share) else share * spec.ffn.d_ff for share, spec in zip(density, specs, strict=True)),
        tuple(None if np.isnan(keys) else float(keys) for keys in attended),
    )
    reads, size = reads_per_token(config, context, sparsity=sparsity), jnp.dtype(config.dtype).itemsize
    if not isinstance(model, PackedDecoder):
        return (reads.weights + reads.head + reads.cache) * size
    total = reads.cache * size + model.output_rows.bytes_read + _bytes_of(model.head.maps())
    beside = config.altup.weights(config.d_model) + config.per_layer.weights(config.d_model)
    total += (end_weights(config) + config.layers * beside) * size
    blocks = [block for segment in model.segments for block in segment.blocks]
    for layer, (block, active, spec) in enumerate(zip(blocks, sparsity.active_neurons, specs, strict=True)):
        ffn, attention = block.ffn, block.attention
        own = {name: float(values[layer]) for name, values in stats.items() if not np.isnan(values[layer])}
        # Layers without a layout of their own read what they read as trained.
        if isinstance(ffn, DecodingLayout):
            total += ffn.bytes_of(own)
        else:
            total += spec.ffn.weights(config.d_model, active) * size
        if isinstance(attention, DecodingLayout):
            total += attention.bytes_read()
        else:
            total += attention_weights(spec, config.d_model) * size
        total += _bytes_of(block.attention_residual.maps()) + _bytes_of(block.ffn_residual.maps())
    return total


def _bytes_of(modules: tuple[nnx.Module, ...]) -> int:
    """Bytes of all parameters of some modules."""
    return sum(leaf.nbytes for module in modules for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
