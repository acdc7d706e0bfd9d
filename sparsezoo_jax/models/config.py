"""The decoder's configuration, and how its layers group into scanned segments."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from pydantic import Field
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.adapter import AdapterConfig
from sparsezoo_jax.models.altup import AltUpConfig
from sparsezoo_jax.models.common import BuildContext, DType, InitConfig, KeysOf, LayerType
from sparsezoo_jax.models.contract import AttentionConfig, FFNConfig, FFNKind, ResidualConfig
from sparsezoo_jax.models.images import ImagesConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.per_layer import PerLayerConfig
from sparsezoo_jax.models.remat import Remat
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.overrides import integers
from sparsezoo_jax.untrusted import MAX_LAYERS, MAX_SIZE


class LayerSpec(NamedTuple):
    """What one layer is made of."""

    layer_type: LayerType
    attention: AttentionConfig
    ffn: FFNConfig
    keys: KeysOf = "own"


class SegmentSpec(NamedTuple):
    """A run of layers: the period's layers, and how often the period repeats."""

    period: tuple[LayerSpec, ...]
    repeats: int


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DecoderConfig:
    """A decoder-only transformer, composed of one attention, one FFN and one residual kind."""

    vocab_size: int
    """Words; at least the tokenizer's vocabulary."""
    vocab_multiple: int = 1
    """Rows of the embedding and columns of the output projection are filled up with zeros to a multiple of this, so
    that a mesh can split them. What was filled up is no word: it has no logit and is not exported."""
    d_model: int
    """Width of the residual stream."""
    layers: int
    """Number of layers."""
    max_seq_len: int
    """Longest sequence, in tokens."""
    attention: AttentionConfig
    """The attention kind of every layer."""
    ffn: FFNConfig
    """The feed-forward kind of every layer, or of those after `first_layers`."""
    first_layers: int = 0
    """Layers at the bottom that have `first_ffn` in place of `ffn` (dense ones below mixtures of experts)."""
    first_ffn: FFNConfig | None = None
    """The feed-forward kind of these layers."""
    residual: ResidualConfig = PreNormConfig()
    """How sublayers join the residual stream."""
    adapter: AdapterConfig = AdapterConfig()
    """Bottleneck adapters after sublayers."""
    altup: AltUpConfig = AltUpConfig()
    """A residual stream wider than the layers."""
    per_layer: PerLayerConfig = PerLayerConfig()
    """Embeddings that each layer adds."""
    images: ImagesConfig = ImagesConfig()
    """Patches of images in place of words: the model is an `Encoder` then."""
    kv_shared_layers: int = 0
    """Layers at the top that have no keys and values: each attends to those of the last layer of its type below them
    (Gemma 3n; "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention", arXiv 2405.12981)."""
    norm: NormConfig = NormConfig()
    """Normalisation of sublayer inputs and of the final state."""
    layer_pattern: tuple[LayerType, ...] = Field(default=("global",), min_length=1)
    """Layer types, repeated from the first layer on; local layers use the attention's window."""
    embedding_scale: float | Literal["sqrt_d_model"] = 1.0
    """Factor on embeddings, rounded to the activations' dtype first."""
    learned_positions: bool = False
    """Add a learned embedding of each position (GPT-2)."""
    mtp_layers: int = 0
    """Modules of multi-token prediction, each with one layer like the last: while the decoder trains, that of depth d
    predicts the token d places after the next, for the loss `mtp`. Evaluation and decoding leave them out."""
    tie_embeddings: bool = True
    """Use the embedding as the output projection."""
    logit_divisor: float = 1.0
    """Divides the final state before the output projection (MiniCPM: d_model / 256)."""
    final_softcap: float | None = None
    """Logits become cap * tanh(logits / cap)."""
    init: InitConfig = InitConfig()
    """Initialisation of weights."""
    dtype: DType = "float32"
    """Activations and matrix products. Norms, softmax, statistics and logits are float32 whatever this says."""
    param_dtype: DType = "float32"
    """Stored parameters."""
    scan_layers: bool = True
    """Compile one period and loop over it; off unrolls the layers (slower to compile, the same numbers)."""
    remat: Remat = "none"
    """What the backward pass finds again of each layer, in place of computing it again. none: everything; full: its
    input; attention: what attention mixed and its rows' statistics, too; dots: products with weights, too; offload: the
    same as dots, kept in the host's memory."""

    def __post_init__(self):
        for name, size in integers(self, "model.").items():
            require(abs(size) <= MAX_SIZE, name, size, f"must be at most {MAX_SIZE}")
        require(self.layers <= MAX_LAYERS, "model.layers", self.layers, f"must be at most {MAX_LAYERS}")
        for name in ("vocab_size", "vocab_multiple", "d_model", "layers", "max_seq_len"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be above 0")
        require(self.mtp_layers >= 0, "model.mtp_layers", self.mtp_layers, "must be at least 0")
        allowed = f"must be below model.max_seq_len={self.max_seq_len}"
        require(self.mtp_layers < self.max_seq_len, "model.mtp_layers", self.mtp_layers, allowed)
        require(self.logit_divisor > 0, "model.logit_divisor", self.logit_divisor, "must be above 0")
        require(
            "local" not in self.layer_pattern or self.attention.window is not None,
            "model.attention.window",
            None,
            "must be set, for model.layer_pattern has local layers",
        )
        # A routed stream lets a sublayer write to a part of the width, an adapter after it would write to all of it.
        allowed = f"must be none with model.residual.kind={self.residual.kind}: adapters are for pre_norm"
        plain = self.adapter.width is None or isinstance(self.residual, PreNormConfig)
        require(plain, "model.adapter.width", self.adapter.width, allowed)
        self._check_keys()
        self.attention.check(self.d_model)
        first, below = self.first_layers, self.first_ffn
        require(0 <= first < self.layers, "model.first_layers", first, f"must be from 0 to {self.layers - 1}")
        allowed = "must be above 0 with a model.first_ffn, and 0 without one"
        require((first > 0) == (below is not None), "model.first_layers", first, allowed)
        for ffn in (self.ffn, *([] if below is None else [below])):
            ffn.check(self.d_model)
        if below is not None:
            allowed = "takes its experts from the router of all layers, and can't be that of the first ones"
            require(below.pre_gate(self) is None, "model.first_ffn.kind", below.kind, allowed)
        allowed = f"must be 0 with model.ffn.kind={self.ffn.kind}, whose router is that of the decoder's tokens"
        require(not self.mtp_layers or self.ffn.pre_gate(self) is None, "model.mtp_layers", self.mtp_layers, allowed)
        for ffn in (self.ffn, *([] if below is None else [below])):
            self.residual.check(self.d_model, self.attention, ffn)
        self.images.check(self)
        self.segments()  # a pattern of the wrong length is an error of the configuration, not of the first build

    def _check_keys(self) -> None:
        shared = self.kv_shared_layers
        name, able = "model.kv_shared_layers", self.attention.shares_keys or shared == 0
        require(0 <= shared < self.layers, name, shared, f"must be from 0 to {self.layers - 1}")
        require(able, name, shared, f"must be 0 with model.attention.kind={self.attention.kind}")
        types = [self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.layers)]
        homeless = set(types[self.layers - shared :]) - set(types[: self.layers - shared])
        allowed = f"must leave a {', '.join(sorted(homeless))} layer below, whose keys and values are taken"
        require(not homeless, name, shared, allowed)
        for field, off in (
            ("altup.streams", self.altup.streams == 1),
            ("per_layer.width", self.per_layer.width is None),
        ):
            value = self.altup.streams if field == "altup.streams" else self.per_layer.width
            require(off or not self.mtp_layers, f"model.{field}", value, "can't be used with model.mtp_layers")
        require(not (shared and self.mtp_layers), name, shared, "must be 0 with model.mtp_layers")

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What each layer is made of, in order."""
        pattern = self.layer_pattern
        return tuple(
            LayerSpec(
                pattern[i % len(pattern)], self.attention, self._ffn_of(i).for_layer(i, self.layers), self._keys_of(i)
            )
            for i in range(self.layers)
        )

    def _keys_of(self, layer: int) -> KeysOf:
        if self.kv_shared_layers == 0:
            return "own"
        return "kept" if layer < self.layers - self.kv_shared_layers else "reused"

    def _ffn_of(self, layer: int) -> FFNKind:
        return self.ffn if self.first_ffn is None or layer >= self.first_layers else self.first_ffn

    def segments(self) -> tuple[SegmentSpec, ...]:
        """Runs of equal periods: the units that are scanned. Layers past the last whole period form their own."""
        specs, width = self.layer_specs(), len(self.layer_pattern)
        segments: list[SegmentSpec] = []
        for start in range(0, self.layers, width):
            period = specs[start : start + width]
            if segments and segments[-1].period == period:
                segments[-1] = SegmentSpec(period, segments[-1].repeats + 1)
            else:
                segments.append(SegmentSpec(period, 1))
        return tuple(segments)

    def mtp_segment(self) -> SegmentSpec:
        """The layer of a module of multi-token prediction."""
        return SegmentSpec(self.layer_specs()[-1:], 1)

    def build_context(self, layer_type: LayerType = "global", keys: KeysOf = "own") -> BuildContext:
        """What layer kinds need to know to build themselves into this decoder."""
        return BuildContext(
            self.d_model,
            self.layers,
            self.init,
            jnp.dtype(self.param_dtype),
            jnp.dtype(self.dtype),
            layer_type,
            self.residual.fan_in(self.d_model),
            self.first_layers,
            keys,
        )
