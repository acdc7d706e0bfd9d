"""How a sublayer's output joins the residual stream."""

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
from sparsezoo_jax.models.norms import NormConfig


@register_residual
@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreNormConfig(ResidualKind):
    """`x + scale * sublayer(norm(x))`, with a norm after the sublayer too (Gemma 2) or there alone (OLMo 2)."""

    kind: Literal["pre_norm"] = "pre_norm"
    input_norm: bool = True
    """Normalise what the sublayer reads of the stream."""
    post_norm: bool = False
    """Normalise the sublayer's output before it is added."""
    scale: float = 1.0
    """Factor on what is added (MiniCPM: 1.4 / sqrt(layers))."""

    def __post_init__(self):
        allowed = "needs model.residual.post_norm=True: a sublayer has a norm before it, after it, or both"
        require(self.input_norm or self.post_norm, "model.residual.input_norm", self.input_norm, allowed)

    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, sublayer: SublayerName) -> PreNorm:
        return PreNorm(self, ctx, norm)


class PreNorm(Residual):
    """Residual connection around one sublayer; see `PreNormConfig`."""

    def __init__(self, config: PreNormConfig, ctx: BuildContext, norm: NormConfig):
        self.config = config
        self.pre = norm.build(ctx) if config.input_norm else None
        self.post = norm.build(ctx) if config.post_norm else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, sublayer: Sublayer[Extra]) -> Joined[Extra]:
        y, extra = sublayer(x_BTD if self.pre is None else self.pre(x_BTD), ctx)
        if self.post is not None:
            y = self.post(y)
        if self.config.scale != 1.0:
            y = y * self.config.scale
        return Joined(x_BTD + y, extra, routing=ctx.routing)
