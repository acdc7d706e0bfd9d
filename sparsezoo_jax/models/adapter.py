"""Bottleneck adapters: small networks between a layer's sublayers and the residual stream (arXiv 1902.00751)."""

from __future__ import annotations

from typing import Literal

import jax
from flax import nnx
from pydantic import Field
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import ActivationName, BuildContext, CallContext, activation_fn
from sparsezoo_jax.models.contract import Extra, Sublayer, SublayerName
from sparsezoo_jax.models.ffn import linear
from sparsezoo_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterConfig:
    """`y + W_up act(W_down y + b_down) + b_up` for what a sublayer returns, before it joins the residual stream.

    W_up and b_up start at 0, so that a model with new adapters computes what it computes without them. Whether anything
    else trains is the optimizer's matter: `--train.lora.whole _adapter/` freezes the rest.
    """

    width: int | None = None
    """Width of the bottleneck (DEFT, arXiv 2402.01911: the model's over 16). None: no adapters."""
    activation: ActivationName = "gelu_tanh"
    """Non-linearity."""
    after: tuple[Literal["attention", "ffn"], ...] = Field(default=("attention", "ffn"), min_length=1)
    """Sublayers that have one: both (Houlsby et al.), or the feed-forward network alone (Pfeiffer et al.)."""

    def __post_init__(self):
        require(self.width is None or self.width > 0, "model.adapter.width", self.width, "must be above 0 or None")
        allowed = "must name each sublayer once"
        require(len(set(self.after)) == len(self.after), "model.adapter.after", self.after, allowed)

    def weights(self, d_model: int) -> int:
        """Weights in a layer, biases included; every token needs all."""
        return 0 if self.width is None else len(self.after) * (2 * d_model * self.width + self.width + d_model)

    def flops(self, d_model: int) -> int:
        """FLOPs per token in a layer (a multiply-add counts 2)."""
        return 0 if self.width is None else len(self.after) * 4 * d_model * self.width

    def build(self, ctx: BuildContext, rngs: nnx.Rngs, sublayer: SublayerName) -> Adapter | None:
        """The adapter after one sublayer, None where there is none."""
        return None if self.width is None or sublayer not in self.after else Adapter(self, self.width, ctx, rngs)


class Adapter(nnx.Module):
    """One adapter; see `AdapterConfig`. R is the width of the bottleneck."""

    def __init__(self, config: AdapterConfig, width: int, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype, d = config, ctx.dtype, ctx.d_model
        self.down_DR = ctx.weight(rngs, (d, width), ("embed", "ffn"), d)
        self.down_bias = ctx.constant(0.0, (width,), ("ffn",))
        self.up_RD = ctx.constant(0.0, (width, d), ("ffn", "embed"))
        self.up_bias = ctx.constant(0.0, (d,), ("embed",))

    def __call__(self, y_BTD: jax.Array) -> jax.Array:
        """What joins the stream, [B, T, D]."""
        inner = linear(y_BTD, self.down_DR, self.down_bias, self.dtype)
        inner = constrain(activation_fn(self.config.activation)(inner), ("batch", "length", "ffn"))
        return y_BTD + linear(inner, self.up_RD, self.up_bias, self.dtype)


def adapted(sublayer: Sublayer[Extra], adapter: Adapter | None) -> Sublayer[Extra]:
    """`sublayer` with an adapter after it."""
    if adapter is None:
        return sublayer

    def call(h_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, Extra]:
        y_BTD, extra = sublayer(h_BTD, ctx)
        return adapter(y_BTD), extra

    return call
