"""How a sublayer's output joins the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT
from sparsezoo_jax.models.common import BuildContext
from sparsezoo_jax.models.norms import NormConfig

Extra = TypeVar("Extra")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreNormConfig:
    """`x + scale * sublayer(norm(x))`, optionally with a norm after the sublayer too (Gemma 2)."""

    kind: Literal["pre_norm"] = "pre_norm"
    post_norm: bool = False
    """Normalise the sublayer's output before it is added."""
    scale: float = 1.0
    """Factor on what is added (MiniCPM: 1.4 / sqrt(layers))."""

    def build(self, ctx: BuildContext, norm: NormConfig, rngs: nnx.Rngs) -> PreNorm:
        return PreNorm(self, ctx, norm)


class PreNorm(nnx.Module):
    """Residual connection around one sublayer; see `PreNormConfig`."""

    def __init__(self, config: PreNormConfig, ctx: BuildContext, norm: NormConfig):
        self.config = config
        self.pre = norm.build(ctx)
        self.post = norm.build(ctx) if config.post_norm else None

    def __call__(
        self, x_BTD: jax.Array, sublayer: Callable[[jax.Array], tuple[jax.Array, Extra]]
    ) -> tuple[jax.Array, Extra]:
        """Return the stream after the sublayer, and whatever else the sublayer returned."""
        y, extra = sublayer(self.pre(x_BTD))
        if self.post is not None:
            y = self.post(y)
        if self.config.scale != 1.0:
            y = y * self.config.scale
        return x_BTD + y, extra
