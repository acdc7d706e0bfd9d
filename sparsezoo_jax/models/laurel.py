"""LAuReL: a residual connection with a learned low-rank map beside the sublayer.

Source: "LAuReL: Learned Augmented Residual Layer" (arXiv 2411.07501), section 2 (LAuReL-LR), in the form of Gemma 3n's
released code: around attention alone, of the normalised stream, with a norm after the low-rank map.
"""

from __future__ import annotations

from typing import Literal

import jax
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import BuildContext, CallContext
from sparsezoo_jax.models.contract import (
    Extra,
    Joined,
    Residual,
    ResidualKind,
    Sublayer,
    SublayerName,
    register_residual,
)
from sparsezoo_jax.models.ffn import linear
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNorm, PreNormConfig
from sparsezoo_jax.sharding import constrain


@register_residual
@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaurelConfig(ResidualKind):
    """`(x + norm(attention(h)) + h + norm(R L h)) / sqrt(2)` for `h = norm(x)`; pre-norm around the FFN."""

    kind: Literal["laurel"] = "laurel"
    rank: int = 64
    """Width of the low-rank map (Gemma 3n: 64)."""
    post_norm: bool = True
    """Normalise the outputs of sublayers before they are added (Gemma 2 and later)."""

    def __post_init__(self):
        require(self.rank > 0, "model.residual.rank", self.rank, "must be above 0")

    def weights(self, d_model: int, sublayer: SublayerName | Literal["head"]) -> float:
        """Weights of the low-rank map; every token needs all."""
        return 2 * d_model * self.rank if sublayer == "attention" else 0

    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, sublayer: SublayerName) -> Residual:
        if sublayer != "attention":
            return PreNorm(PreNormConfig(post_norm=self.post_norm), ctx, norm)
        return Laurel(self, ctx, norm, rngs)


class LowRank(nnx.Module):
    """`norm(R L h)`; the letter R of shapes is the rank."""

    def __init__(self, rank: int, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs):
        self.dtype = ctx.dtype
        self.left_DR = ctx.weight(rngs, (ctx.d_model, rank), ("embed", "ffn"), ctx.d_model)
        self.right_RD = ctx.weight(rngs, (rank, ctx.d_model), ("ffn", "embed"), rank, output=True)
        self.norm = norm.build(ctx)

    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        inner = constrain(linear(h_BTD, self.left_DR, None, self.dtype), ("batch", "length", "ffn"))
        return self.norm(linear(inner, self.right_RD, None, self.dtype))


class Laurel(Residual):
    """Residual connection around attention; see `LaurelConfig`."""

    def __init__(self, config: LaurelConfig, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs):
        self.pre = norm.build(ctx)
        self.post = norm.build(ctx) if config.post_norm else None
        self.low_rank = LowRank(config.rank, ctx, norm, rngs)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, sublayer: Sublayer[Extra]) -> Joined[Extra]:
        h_BTD = self.pre(x_BTD)
        y_BTD, extra = sublayer(h_BTD, ctx)
        if self.post is not None:
            y_BTD = self.post(y_BTD)
        joined = (x_BTD + y_BTD + (h_BTD + self.low_rank(h_BTD))) * 2**-0.5
        return Joined(joined, extra, routing=ctx.routing)

    def maps(self) -> tuple[nnx.Module, ...]:
        """The low-rank map."""
        return (self.low_rank,)
