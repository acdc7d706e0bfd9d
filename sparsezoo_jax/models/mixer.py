"""MLP-Mixer's token mixing (arXiv 2105.01601): a feed-forward network across the patches of each channel."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import ActivationName, BuildContext, CallContext, LayerAux, activation_fn
from sparsezoo_jax.models.contract import Attention, AttentionKind, register_attention
from sparsezoo_jax.pallas_kernels.matmul import matmul


@register_attention
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixerConfig(AttentionKind):
    """`W_2 act(W_1 x)` with maps over the patches, the same for all channels: equation 1 of the paper, first line."""

    kind: Literal["mixer"] = "mixer"
    tokens: int
    """Patches of an image."""
    d_tokens: int
    """Inner width."""
    activation: ActivationName = "gelu_tanh"
    """Non-linearity."""
    heads: int = 1
    """There are none to split."""
    window: int | None = None
    """There is none."""

    def __post_init__(self):
        for name in ("tokens", "d_tokens"):
            require(getattr(self, name) > 0, f"model.attention.{name}", getattr(self, name), "must be above 0")
        require(self.heads == 1, "model.attention.heads", self.heads, "must be 1: mixing has no heads")
        require(self.window is None, "model.attention.window", self.window, "must be none: all patches are mixed")

    @property
    def fixed_length(self) -> int:
        """Patches of an image."""
        return self.tokens

    @property
    def score_heads(self) -> int:
        """Heads by which tensor parallelism can split the scores."""
        return 1

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Nothing that could be kept for later tokens."""
        return (0, 0), (0, 0)

    def projection_weights(self, d_model: int) -> int:
        """None from or to the stream."""
        return 0

    def projection_flops(self, d_model: int) -> float:
        """FLOPs per token of both maps: each has `tokens * d_tokens` weights for every channel of an image."""
        return 4 * self.d_tokens * d_model

    def mixing_flops(self, keys: int, target: float | None = None) -> float:
        """None beside the maps."""
        return 0

    def cache_reads(self, keys: int, target: float | None = None) -> float:
        """Nothing is decoded."""
        return 0

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> Mixer:
        return Mixer(self, ctx, rngs)


class Mixer(Attention):
    """Token mixing; see `MixerConfig`. Patches that are padding count as 0."""

    def __init__(self, config: MixerConfig, ctx: BuildContext, rngs: nnx.Rngs):
        super().__init__(config, ctx)
        tokens, width = config.tokens, config.d_tokens
        self.up_TM = ctx.weight(rngs, (tokens, width), (None, None), tokens)
        self.up_bias = ctx.constant(0.0, (width,), (None,))
        self.down_MT = ctx.weight(rngs, (width, tokens), (None, None), width, output=True)
        self.down_bias = ctx.constant(0.0, (tokens,), (None,))

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, cache: Any = None) -> tuple[jax.Array, LayerAux, Any]:
        dtype = self.dtype
        x_BDT = jnp.where(ctx.valid_BT[..., None], x_BTD, 0).swapaxes(1, 2)
        hidden_BDM = matmul(x_BDT, self.up_TM[...].astype(dtype)) + self.up_bias[...].astype(dtype)
        hidden_BDM = activation_fn(self.config.activation)(hidden_BDM)
        y_BDT = matmul(hidden_BDM, self.down_MT[...].astype(dtype)) + self.down_bias[...].astype(dtype)
        real_B = jnp.any(ctx.valid_BT, axis=1).astype(jnp.float32)
        active_B = jnp.mean(hidden_BDM != 0, axis=(1, 2), dtype=jnp.float32)
        stats = {
            "attended_keys": ctx.keys_seen[self.layer_type],
            # Rows of padding alone, which fill up a batch, don't count.
            "mixing_density": jnp.sum(active_B * real_B) / jnp.maximum(jnp.sum(real_B), 1),
        }
        return y_BDT.swapaxes(1, 2), LayerAux(stats=stats), cache
