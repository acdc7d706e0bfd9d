"""Parameters, FLOPs and bytes read per token of a decoder, without allocating it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.models.building import build_model
from sparsezoo_jax.models.config import DecoderConfig, LayerSpec
from sparsezoo_jax.models.decoder import Decoder
from sparsezoo_jax.models.encoder import reconstruction_config


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalars."""

    total: int
    embedding: int
    """Token, position and per-layer embeddings, and the output projection where it is untied."""
    active: int
    """Those of one token's forward pass: all but the experts that a fixed number of chosen ones leaves out."""
    mtp: int = 0
    """Of the modules of multi-token prediction, which only training uses: not among the others."""

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def abstract_decoder(config: DecoderConfig) -> Decoder:
    """The decoder with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def count_parameters(config: DecoderConfig) -> ParameterCount:
    """Count the parameters of `config`'s model by its abstract form, without what pads its vocabulary.

    Of a masked autoencoder those of both parts.
    """

    def size(tree) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    idle = sum(spec.ffn.idle_parameters(config.d_model) for spec in config.layer_specs())
    if config.images.patch is not None:
        encoder = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
        total = size(nnx.state(encoder, nnx.Param))
        head = None if encoder.classes is None else encoder.classes.output_DV
        tables = (encoder.patches_PD, encoder.positions_TD, head)
        embedding = sum(math.prod(table.shape) for table in tables if table is not None)
        return ParameterCount(total, embedding, total - idle)
    model = abstract_decoder(dataclasses.replace(config, vocab_multiple=1))
    per_layer = None if model.per_layer is None else model.per_layer.table_VP
    router = None if model.pre_gate is None else model.pre_gate.decoder.embedding_VD
    tables = (model.embedding_VD, model.positions_PD, model.output_DV, per_layer, router)
    embedding = sum(math.prod(table.shape) for table in tables if table is not None)
    mtp = size(nnx.state(model.mtp, nnx.Param))
    total = size(nnx.state(model, nnx.Param)) - mtp
    return ParameterCount(total, embedding, total - idle, mtp)


@dataclass(frozen=True)
class ActivatedCount:
    """Numbers of weights that one token needs; norm scales are not counted."""

    layers: float
    """Attention, feed-forward networks and residual connections of all layers, and maps below and above them."""
    head: float
    """Output projection."""

    @property
    def total(self) -> float:
        return self.layers + self.head


@dataclass(frozen=True)
class Sparsity:
    """How sparse each layer is, in place of what its configuration aims at; None where that is kept."""

    active_neurons: tuple[float | None, ...]
    """Active neurons of a token, for each layer."""
    attended_keys: tuple[float | None, ...]
    """Attended keys of a query that sees more keys than its selection aims at, for each layer."""


def flops_per_token(
    config: DecoderConfig,
    context: int,
    *,
    position: Literal["mean", "last"] = "mean",
    logits: bool = False,
    sparsity: Sparsity | None = None,
) -> float:
    """FLOPs of one token's forward pass; a multiply-add counts 2.

    Counted are matrix products: projections, attention over the visible keys, FFN; norms, softmax and the top-k's
    statistics are not.

    Args:
      context: tokens of the sequence.
      position: "last" is the token that sees all of them, "mean" the average over all positions. In a model of images
        all tokens see all of them.
      logits: count the output projection too.
      sparsity: of each layer, as measured; None is the sparsity that the configuration aims at.

    Source: Spark Transformer (arXiv 2506.06644), sections 2 and 3 (FLOPs per token).
    """
    total = 0.0
    position = "last" if config.images.patch is not None else position
    for spec, active, attended in _layers(config, sparsity):
        mixing = _over_positions(partial(spec.attention.mixing_flops, target=attended), spec, context, position)
        total += _layer_flops(config, spec, mixing, active)
    for spec in _router_layers(config):
        total += _over_positions(spec.attention.mixing_flops, spec, context, position)
    return total + 2 * end_weights(config) + (2 * _head_weights(config) if logits else 0)


class TrainFlops(NamedTuple):
    """FLOPs per token of a train step without recomputation: the useful ones, which model FLOPs utilisation counts.

    A forward pass and twice as much for the backward pass: 6 for each weight that multiplies a token (embedding lookups
    have none, the output projection does), and three times those of attention, over visible keys only (a causal query
    sees half of the sequence on average, fewer with a window).

    Source: PaLM (arXiv 2204.02311), appendix B, which counts every key of the sequence instead.
    """

    dense: float
    """Of the decoder of equal parameters that computes every neuron and attends to every visible key."""
    sparse: float
    """With the sparsity that the configuration aims at."""


def train_flops_per_token(config: DecoderConfig, length: int) -> TrainFlops:
    """Of sequences of `length` tokens; where there is no `dense_twin`, `dense` is the same as `sparse`.

    Of images for each target: an image whose class is predicted, or a hidden patch.
    """

    def forward(config: DecoderConfig) -> float:
        if config.images.patch is not None:
            return _forward_of_image(config)
        flops = flops_per_token(config, length, logits=True)
        if config.mtp_layers:
            # A module is the last layer once more, a matrix [2 D, D] and the output projection.
            last = config.layer_specs()[-1]
            mixing = _over_positions(last.attention.mixing_flops, last, length, "mean")
            own = _layer_flops(config, last, mixing, None) + 4 * config.d_model**2 + 2 * _head_weights(config)
            flops += config.mtp_layers * own
        return flops

    dense, sparse = (3 * forward(each) for each in (dense_twin(config) or config, config))
    return TrainFlops(dense, sparse)


def _forward_of_image(config: DecoderConfig) -> float:
    """FLOPs of a forward pass for each target of an image."""
    images = config.images
    total = images.visible * flops_per_token(config, images.visible)
    total += 2 * (images.patches - images.visible) * images.pixels * config.d_model  # all patches are embedded
    if not images.reconstructs:
        return total + 2 * _head_weights(config)
    decoder = reconstruction_config(config)
    attention, ffn, width = decoder.attention, decoder.ffn, decoder.d_model
    layer = attention.projection_flops(width) + attention.mixing_flops(images.patches) + ffn.flops(width)
    total += images.patches * (decoder.layers * layer + 2 * width * images.pixels)
    total += 2 * images.visible * config.d_model * width
    return total / (images.patches - images.visible)


def bytes_per_token(
    config: DecoderConfig,
    context: int,
    *,
    position: Literal["mean", "last"] = "last",
    logits: bool = False,
    sparsity: Sparsity | None = None,
) -> float:
    """Bytes that decoding one token at batch size 1 reads: weights that it needs and the key/value cache.

    Both are counted in the activations' dtype (`model.dtype`), in which they are served. Norms, the embedding's row and
    the activations themselves are not counted. Arguments as in `flops_per_token`.

    Source: Spark Transformer (arXiv 2506.06644), section 2 (columns of K2 and rows of V of active neurons only).
    """
    reads = reads_per_token(config, context, position=position, sparsity=sparsity)
    numbers = reads.weights + reads.cache + (reads.head if logits else 0)
    return numbers * jnp.dtype(config.dtype).itemsize


class Reads(NamedTuple):
    """Numbers that decoding one token reads."""

    weights: float
    """Of the layers, and of maps below and above them."""
    cache: float
    head: float
    """Weights of the output projection."""


def reads_per_token(
    config: DecoderConfig,
    context: int,
    *,
    position: Literal["mean", "last"] = "last",
    sparsity: Sparsity | None = None,
) -> Reads:
    """What `bytes_per_token` counts, part by part and not yet in bytes."""
    weights, cache = 0.0, 0.0
    for spec, active, attended in _layers(config, sparsity):
        cache += _over_positions(partial(spec.attention.cache_reads, target=attended), spec, context, position)
        weights += _layer_weights(config, spec, active)
    for spec in _router_layers(config):
        cache += _over_positions(spec.attention.cache_reads, spec, context, position)
    weights += end_weights(config)
    return Reads(weights, cache, _head_weights(config))


def activated_parameters(config: DecoderConfig, sparsity: Sparsity | None = None) -> ActivatedCount:
    """The parameters that one token needs; `sparsity` as in `flops_per_token`.

    Of a layer with a routed width: `delta B` of its `B` weights, routers, and the fusion of active blocks (MoHD,
    arXiv 2412.05644).
    """
    layers = sum(_layer_weights(config, spec, active) for spec, active, _ in _layers(config, sparsity))
    return ActivatedCount(layers + end_weights(config), _head_weights(config))


def dense_twin(config: DecoderConfig) -> DecoderConfig | None:
    """The decoder of equal parameters that computes every neuron and attends to every visible key.

    `config` itself when it is dense; None when its FFN has no gated form of equal parameters.
    """
    ffn, first = config.ffn.dense_twin(), None if config.first_ffn is None else config.first_ffn.dense_twin()
    if ffn is None or (config.first_ffn is not None and first is None):
        return None
    attention, residual = config.attention.dense_twin(), config.residual.dense_twin()
    return dataclasses.replace(config, ffn=ffn, first_ffn=first, attention=attention, residual=residual)


def _width(config: DecoderConfig, sublayer: Literal["attention", "ffn", "head"]) -> int:
    """The part of the residual stream that a token's sublayer reads or writes."""
    return config.residual.active_width(config.d_model, sublayer)


def _connections(config: DecoderConfig) -> float:
    """Weights of a layer's two residual connections (routers, fusion) that one token needs."""
    return sum(config.residual.weights(config.d_model, sublayer) for sublayer in ("attention", "ffn"))


def _layer_flops(config: DecoderConfig, spec: LayerSpec, mixing: float, active: float | None) -> float:
    width = _width(config, "attention")
    attention = spec.attention.projection_flops(width) + mixing - 2 * _lacking(spec, width)
    beside = 2 * (_connections(config) + config.per_layer.weights(config.d_model))
    beside += config.adapter.flops(config.d_model) + config.altup.flops(config.d_model)
    return attention + spec.ffn.flops(_width(config, "ffn"), active) + beside


def _layer_weights(config: DecoderConfig, spec: LayerSpec, active: float | None) -> float:
    attention = attention_weights(spec, _width(config, "attention"))
    parts = (config.adapter, config.altup, config.per_layer)
    beside = _connections(config) + sum(part.weights(config.d_model) for part in parts)
    return attention + spec.ffn.weights(_width(config, "ffn"), active) + beside


def attention_weights(spec: LayerSpec, width: int) -> int:
    """Weights of a layer's maps from and to a stream of this width."""
    return spec.attention.projection_weights(width) - _lacking(spec, width)


def _lacking(spec: LayerSpec, width: int) -> int:
    """Weights of attention that a layer with keys and values of another lacks."""
    return spec.attention.key_weights(width) if spec.keys == "reused" else 0


def end_weights(config: DecoderConfig) -> float:
    """Weights of maps below the first layer and above the last one that one token needs; a router of all layers is one
    of these.
    """
    projection = config.per_layer.projection_weights(config.d_model, config.layers)
    gate, router = config.ffn.pre_gate(config), 0.0
    if gate is not None:
        router = sum(_layer_weights(gate.decoder, spec, None) for spec in gate.decoder.layer_specs())
        router += gate.decoder.d_model * gate.experts
    patches = config.images.pixels * config.d_model
    return config.altup.end_weights(config.d_model) + projection + router + patches


def _router_layers(config: DecoderConfig) -> tuple[LayerSpec, ...]:
    """Layers of the router of all layers, where there is one."""
    gate = config.ffn.pre_gate(config)
    return () if gate is None else gate.decoder.layer_specs()


def _head_weights(config: DecoderConfig) -> float:
    """Weights of the output projection, and of what chooses its part of the width, that one token needs."""
    return _width(config, "head") * config.vocab_size + config.residual.weights(config.d_model, "head")


def _layers(config: DecoderConfig, sparsity: Sparsity | None):
    nothing = (None,) * config.layers
    measured = Sparsity(nothing, nothing) if sparsity is None else sparsity
    return zip(config.layer_specs(), measured.active_neurons, measured.attended_keys, strict=True)


def _over_positions(cost: Callable[[int], float], spec: LayerSpec, context: int, position: str) -> float:
    """`cost` of a number of visible keys for the last token, or averaged over the positions of the context."""
    window = spec.attention.window if spec.layer_type == "local" else None
    limit = context if window is None else min(window, context)
    if position == "last":
        return cost(limit)
    # Position t sees min(t, limit) keys; all positions past the limit cost the same.
    growing = sum(cost(keys) for keys in range(1, limit))
    return (growing + (context - limit + 1) * cost(limit)) / context
