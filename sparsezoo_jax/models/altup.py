"""AltUp: a residual stream several times as wide as its layers, which compute one part of it and correct the others.

Source: "Alternating Updates for Efficient Transformers" (arXiv 2301.13310), section 3 (predict, compute, correct), with
coefficients that depend on the token, as Gemma 3n's released code has them. Shape letter beside those of
`models.common`: S streams, [S, B, T, D] together; layers compute the first one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import BuildContext
from sparsezoo_jax.models.ffn import linear
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.sharding import constrain

STREAMS = (None, "batch", "length", "embed")
MAX_STREAMS = 64
#: Least mean square by which a stream is divided.
_EPS = 1e-5


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AltUpConfig:
    """Streams that each layer predicts from all of them and corrects by what it computed of the first."""

    streams: int = 1
    """How many times as wide the stream is as a layer (Gemma 3n: 4). 1: no AltUp."""
    coef_clip: float | None = 120.0
    """While training, weights of the maps to coefficients are clipped to this. None: they are not."""

    def __post_init__(self):
        allowed = f"must be from 1 to {MAX_STREAMS}"
        require(1 <= self.streams <= MAX_STREAMS, "model.altup.streams", self.streams, allowed)
        clip = self.coef_clip
        require(clip is None or clip > 0, "model.altup.coef_clip", clip, "must be above 0 or None")

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's maps to coefficients."""
        return 0 if self.streams == 1 else self.streams**3 + self.streams**2

    def weights(self, d_model: int) -> int:
        """Weights in a layer: those and the router's. Every token needs all."""
        return 0 if self.streams == 1 else self.layer_weights + d_model * self.streams

    def flops(self, d_model: int) -> int:
        """FLOPs per token in a layer of these maps, the router's twice (a multiply-add counts 2)."""
        return 0 if self.streams == 1 else 2 * (self.layer_weights + 2 * d_model * self.streams)

    def end_weights(self, d_model: int) -> int:
        """Weights of the maps below the first layer and above the last one."""
        return 2 * (self.streams - 1) * d_model**2

    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs) -> AltUp | None:
        """What a layer has of it, None where there is none."""
        return None if self.streams == 1 else AltUp(self, ctx, norm, rngs)

    def build_ends(self, ctx: BuildContext, rngs: nnx.Rngs) -> AltUpEnds | None:
        """What a decoder has of it beside its layers, None where there is none."""
        return None if self.streams == 1 else AltUpEnds(self, ctx, rngs)


class AltUp(nnx.Module):
    """Prediction and correction around one layer; see `AltUpConfig`."""

    deterministic = True
    """Whether this is not training: `Module.train` and `Module.eval` set it."""

    def __init__(self, config: AltUpConfig, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs):
        self.config, self.dtype, self.d_model, s = config, ctx.dtype, ctx.d_model, config.streams
        self.router_norm = norm.build(ctx)
        self.router_DS = ctx.weight(rngs, (ctx.d_model, s), ("embed", None), ctx.d_model)
        # Of each output, one after another, the coefficients of all inputs.
        self.prediction_SC = ctx.weight(rngs, (s, s * s), (None, None), s)
        self.correction_SS = ctx.weight(rngs, (s, s), (None, None), s)

    def predict(self, x_SBTD: jax.Array) -> jax.Array:
        """What the streams would be after the layer, [S, B, T, D]; the layer reads the first."""
        s = self.config.streams
        coefficients_BTSR = self._coefficients(x_SBTD[0], self.prediction_SC).reshape(*x_SBTD.shape[1:3], s, s)
        return constrain(x_SBTD + jnp.einsum("btsr,rbtd->sbtd", coefficients_BTSR, x_SBTD), STREAMS)

    def correct(self, predicted_SBTD: jax.Array, computed_BTD: jax.Array) -> jax.Array:
        """The streams after the layer, [S, B, T, D], from those predicted and the first as the layer computed it."""
        factors_BTS = 1 + self._coefficients(computed_BTD, self.correction_SS)
        innovation_BTD = computed_BTD - predicted_SBTD[0]
        return constrain(predicted_SBTD + jnp.einsum("bts,btd->sbtd", factors_BTS, innovation_BTD), STREAMS)

    def _coefficients(self, x_BTD: jax.Array, weight: nnx.Param) -> jax.Array:
        routed_BTS = linear(self.router_norm(x_BTD) / self.d_model, self.router_DS, None, self.dtype)
        modes_BTS = jnp.tanh(routed_BTS.astype(jnp.float32)).astype(self.dtype)
        matrix, clip = weight[...].astype(self.dtype), self.config.coef_clip
        if clip is not None and not self.deterministic:
            matrix = jnp.clip(matrix, -clip, clip)
        return modes_BTS @ matrix


class AltUpEnds(nnx.Module):
    """From the embedding to the streams, and from these to the final state; see `AltUpConfig`."""

    def __init__(self, config: AltUpConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.dtype = ctx.dtype
        shape, axes = (config.streams - 1, ctx.d_model, ctx.d_model), (None, "embed", "ffn")
        self.spread_SDD = ctx.weight(rngs, shape, axes, ctx.d_model)
        self.join_SDD = ctx.weight(rngs, shape, axes, ctx.d_model)

    def spread(self, x_BTD: jax.Array) -> jax.Array:
        """The streams below the first layer, [S, B, T, D]: the embedding, and maps of it of the same magnitude."""
        others_SBTD = jnp.einsum("btd,sde->sbte", x_BTD, self.spread_SDD[...].astype(self.dtype))
        return constrain(jnp.concatenate([x_BTD[None], _as_large(others_SBTD, x_BTD)]), STREAMS)

    def join(self, x_SBTD: jax.Array) -> jax.Array:
        """The final state before its norm, [B, T, D]: the mean of the first stream and maps of the others."""
        first_BTD = x_SBTD[0]
        others_SBTD = jnp.einsum("sbtd,sde->sbte", x_SBTD[1:], self.join_SDD[...].astype(self.dtype))
        joined_SBTD = jnp.concatenate([first_BTD[None], _as_large(others_SBTD, first_BTD)])
        return constrain(jnp.mean(joined_SBTD, axis=0), STREAMS[1:])


def _as_large(x_SBTD: jax.Array, like_BTD: jax.Array) -> jax.Array:
    """`x_SBTD` scaled to the root mean square of `like_BTD`, token by token."""

    def mean_square(x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)

    # The root of a mean square of 0 has no finite gradient.
    wanted = jnp.sqrt(jnp.maximum(mean_square(like_BTD), jnp.finfo(jnp.float32).tiny))
    factor = wanted * jax.lax.rsqrt(jnp.maximum(mean_square(x_SBTD), _EPS))
    return (x_SBTD.astype(jnp.float32) * factor).astype(x_SBTD.dtype)
