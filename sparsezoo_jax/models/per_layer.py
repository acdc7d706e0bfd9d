"""Per-layer embeddings: each layer looks up a small vector of its own for every token, and adds what it makes of it.

A token reads one row of the table however large that is, so a decoder can keep it off the accelerator. Source: Gemma
3n's released code. Shape letter beside those of `models.common`: P width of a layer's vector.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import ActivationName, BuildContext, activation_fn
from sparsezoo_jax.models.embedding import lookup
from sparsezoo_jax.models.ffn import linear
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PerLayerConfig:
    """Embeddings of each layer: `x + norm(W_out (act(W_gate x) * e))` after its sublayers.

    `e = (norm(W_l x_0 / sqrt(d_model)) + sqrt(P) E[token, l]) / sqrt(2)` for the embedding x_0 of the token. Under
    AltUp the gate reads the first stream, scaled by a learned vector, and all others get the sum.
    """

    width: int | None = None
    """Of a layer's vector (Gemma 3n: 256). None: there are none."""
    vocab_size: int | None = None
    """Tokens that have vectors; the others have those of token 0 (Gemma 3n: 262,144). None: all have."""
    activation: ActivationName = "gelu_tanh"
    """Non-linearity of the gate."""

    def __post_init__(self):
        for name in ("width", "vocab_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.per_layer.{name}", value, "must be above 0 or None")
        allowed = "needs a model.per_layer.width"
        require(
            self.width is not None or self.vocab_size is None, "model.per_layer.vocab_size", self.vocab_size, allowed
        )

    def weights(self, d_model: int) -> int:
        """Weights in a layer; every token needs all."""
        return 2 * d_model * (self.width or 0)

    def projection_weights(self, d_model: int, layers: int) -> int:
        """Weights of the map from the embedding to the vectors of all layers."""
        return d_model * layers * (self.width or 0)

    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, *, scaled: bool) -> PerLayerInput | None:
        """What a layer has of it, None where there is none; `scaled` as in `PerLayerInput`."""
        return None if self.width is None else PerLayerInput(self, self.width, ctx, norm, rngs, scaled=scaled)

    def build_table(
        self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, vocab_size: int
    ) -> PerLayerEmbedding | None:
        """What a decoder of so many words has of it beside its layers, None where there is none."""
        if self.width is None:
            return None
        rows = vocab_size if self.vocab_size is None else self.vocab_size
        return PerLayerEmbedding(self.width, rows, ctx, norm, rngs)


class PerLayerEmbedding(nnx.Module):
    """The vectors of all layers; see `PerLayerConfig`."""

    def __init__(self, width: int, rows: int, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs):
        self.width, self.rows, self.layers, self.dtype = width, rows, ctx.layers, ctx.dtype
        every, std = ctx.layers * width, ctx.init.embedding_std
        if std is None:
            std = width**-0.5 if ctx.init.kind == "fan_in" else ctx.init.scale
        self.table_VP = ctx.weight(rngs, (rows, every), ("vocab", "embed"), width, std=std)
        self.projection_DP = ctx.weight(rngs, (ctx.d_model, every), ("embed", "ffn"), ctx.d_model)
        self.norm = norm.build(ctx, width, "head_dim")

    def __call__(self, tokens_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """The vectors [L, B, T, P] of tokens whose embeddings are `x_BTD`."""
        shape = (*tokens_BT.shape, self.layers, self.width)
        projected = linear(x_BTD, self.projection_DP, None, self.dtype) * x_BTD.shape[-1] ** -0.5
        known_BT = jnp.where(tokens_BT < self.rows, tokens_BT, 0)
        found: Any = lookup(self.table_VP[...], known_BT, self.dtype)
        vectors_BTLP = (self.norm(projected.reshape(shape)) + found.reshape(shape) * self.width**0.5) * 2**-0.5
        return constrain(jnp.moveaxis(vectors_BTLP, 2, 0), (None, "batch", "length", None))


class PerLayerInput(nnx.Module):
    """What one layer makes of its vectors; see `PerLayerConfig`."""

    def __init__(
        self,
        config: PerLayerConfig,
        width: int,
        ctx: BuildContext,
        norm: NormConfig,
        rngs: nnx.Rngs,
        *,
        scaled: bool,
    ):
        """`scaled`: what the gate reads is multiplied by a learned vector, from 1 on [ours] (Gemma 3n: from 0 on)."""
        self.activation, self.dtype, d = config.activation, ctx.dtype, ctx.d_model
        self.scale = ctx.constant(1.0, (d,), ("embed",)) if scaled else None
        self.gate_DP = ctx.weight(rngs, (d, width), ("embed", "ffn"), d)
        self.out_PD = ctx.weight(rngs, (width, d), ("ffn", "embed"), width, output=True)
        self.norm = norm.build(ctx)

    def __call__(self, x_BTD: jax.Array, vectors_BTP: jax.Array) -> jax.Array:
        """What is added to the stream, [B, T, D]."""
        if self.scale is not None:
            x_BTD = x_BTD * self.scale[...].astype(x_BTD.dtype)
        gate_BTP = activation_fn(self.activation)(linear(x_BTD, self.gate_DP, None, self.dtype))
        hidden_BTP = constrain(gate_BTP * vectors_BTP, ("batch", "length", "ffn"))
        return self.norm(linear(hidden_BTP, self.out_PD, None, self.dtype))
