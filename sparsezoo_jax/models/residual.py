"""How a sublayer's output joins the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.norms import NormConfig

Extra = TypeVar("Extra")
SublayerName = Literal["attention", "ffn"]
Sublayer = Callable[[jax.Array, CallContext], tuple[jax.Array, Extra]]


class Joined(NamedTuple, Generic[Extra]):
    """What a residual connection around a sublayer returns."""

    stream_BTD: jax.Array
    """The stream after the sublayer."""
    extra: Extra
    """Whatever the sublayer returned beside its output."""
    aux: LayerAux = LayerAux()
    """Losses, statistics and observations of the connection itself."""
    routing: Any = None
    """What the next connection of the same layer finds as `CallContext.routing`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreNormConfig:
    """`x + scale * sublayer(norm(x))`, optionally with a norm after the sublayer too (Gemma 2)."""

    kind: Literal["pre_norm"] = "pre_norm"
    post_norm: bool = False
    """Normalise the sublayer's output before it is added."""
    scale: float = 1.0
    """Factor on what is added (MiniCPM: 1.4 / sqrt(layers))."""

    def check(self, d_model: int, attention: Any, ffn: Any) -> None:
        """Raise `ConfigError` for a decoder that this can't be the residual connection of: there is none."""

    def fan_in(self, d_model: int) -> int:
        """Dimensions by which sublayers scale the initial weights that read the stream."""
        return d_model

    def active_width(self, d_model: int, sublayer: SublayerName | Literal["head"]) -> int:
        """Dimensions of the stream that a token's sublayer (or the output projection) reads or writes."""
        return d_model

    def weights(self, d_model: int, sublayer: SublayerName | Literal["head"]) -> float:
        """Matrix weights of the connection that one token needs."""
        return 0

    def dense_twin(self) -> PreNormConfig:
        """The connection whose sublayers see all of the stream: this one."""
        return self

    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs, sublayer: SublayerName) -> PreNorm:
        return PreNorm(self, ctx, norm)

    def build_head(self, ctx: BuildContext, rngs: nnx.Rngs) -> None:
        """What chooses the part of the final state that the output projection reads: nothing, it reads all."""


class PreNorm(nnx.Module):
    """Residual connection around one sublayer; see `PreNormConfig`."""

    def __init__(self, config: PreNormConfig, ctx: BuildContext, norm: NormConfig):
        self.config = config
        self.pre = norm.build(ctx)
        self.post = norm.build(ctx) if config.post_norm else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext, sublayer: Sublayer[Extra]) -> Joined[Extra]:
        y, extra = sublayer(self.pre(x_BTD), ctx)
        if self.post is not None:
            y = self.post(y)
        if self.config.scale != 1.0:
            y = y * self.config.scale
        return Joined(x_BTD + y, extra, routing=ctx.routing)
