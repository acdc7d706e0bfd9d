"""A feed-forward kind from outside the package: `V relu(top_k(K x))^2`, the k largest neurons of each token.

    python -m sparsezoo_jax.train --plugins topk_relu2 --arch topk_relu2

trains it where this file can be imported (in the current directory, say, or on PYTHONPATH). Every command that opens
the run needs `--plugins topk_relu2` too, unless an installed package names the module as an entry point.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.configs import preset, register_arch
from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.inference import DecodingLayout, Formats, packs
from sparsezoo_jax.inference.matrices import Rows, assign, few_tokens
from sparsezoo_jax.models import FFN, BuildContext, CallContext, FFNKind, LayerAux, register_ffn
from sparsezoo_jax.models.records import FFN_GATE, FFN_SCORES


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopKReLU2Config(FFNKind):
    """`V relu(top_k(K x))^2`."""

    kind: Literal["topk_relu2"] = "topk_relu2"
    d_ff: int
    """Neurons."""
    top_k: int = 64
    """Neurons of a token."""

    def __post_init__(self):
        require(0 < self.top_k <= self.d_ff, "model.ffn.top_k", self.top_k, f"must be from 1 to d_ff={self.d_ff}")

    @property
    def target_active(self) -> float:
        return self.top_k

    def weights(self, d_model: int, active: float | None = None) -> float:
        return d_model * (self.d_ff + (self.top_k if active is None else active))

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> TopKReLU2:
        return TopKReLU2(self, ctx, rngs)


class TopKReLU2(FFN):
    """The trained layer."""

    def __init__(self, config: TopKReLU2Config, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        self.up_DF = ctx.weight(rngs, (ctx.d_model, config.d_ff), ("embed", "ffn"), ctx.d_model)
        self.down_FD = ctx.weight(rngs, (config.d_ff, ctx.d_model), ("ffn", "embed"), config.d_ff, output=True)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        scores = x_BTD @ self.up_DF[...].astype(self.dtype)
        smallest = jax.lax.top_k(scores, self.config.top_k)[0][..., -1:]
        hidden = jnp.where(scores >= smallest, jnp.square(jax.nn.relu(scores)), 0)
        density = ctx.mean_over_tokens(jnp.mean(hidden != 0, axis=-1))
        records = ctx.recorded({FFN_SCORES: lambda: scores, FFN_GATE: lambda: hidden})
        return hidden @ self.down_FD[...].astype(self.dtype), LayerAux(stats={"ffn_density": density}, records=records)


register_arch(
    "topk_relu2",
    {
        "tiny": dataclasses.replace(
            preset("dense"),
            arch="topk_relu2",
            model=dataclasses.replace(preset("dense").model, ffn=TopKReLU2Config(d_ff=768)),
        )
    },
)


# That is all that training, evaluation and the report need. What follows makes decoding read active neurons only.


@packs(TopKReLU2)
def pack(source: TopKReLU2, formats: Formats, active: float | None) -> PackedTopKReLU2:
    return PackedTopKReLU2(source, formats)


class PackedTopKReLU2(FFN, DecodingLayout):
    """The layer with both maps by rows of neurons: a few tokens read the second map of their k neurons only."""

    def __init__(self, source: TopKReLU2, formats: Formats):
        self.config = source.config
        self.up = Rows(source.up_DF[...].T, formats.weights, source.dtype)
        self.down = Rows(source.down_FD[...], formats.weights, source.dtype)

    def restore(self, source: TopKReLU2) -> None:
        assign(source.up_DF, self.up.restored().T)
        assign(source.down_FD, self.down.restored())

    def bytes_read(self, density: float = 1.0) -> float:
        return self.up.nbytes + density * self.down.nbytes

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        best, neurons = jax.lax.top_k(self.up.product(x_BTD), self.config.top_k)
        hidden = jnp.square(jax.nn.relu(best))
        density_BT = jnp.sum(hidden != 0, axis=-1) / self.config.d_ff
        aux = LayerAux(stats={"ffn_density": ctx.mean_over_tokens(density_BT)})
        stored_FD, scale_F = self.down.arrays
        if few_tokens(x_BTD) is None:
            wide_F = jnp.zeros((*x_BTD.shape[:2], self.config.d_ff), hidden.dtype)
            wide_F = jnp.put_along_axis(wide_F, neurons, hidden, axis=-1, inplace=False)
            return wide_F @ self.down.restored(), aux
        rows = stored_FD[neurons].astype(x_BTD.dtype)
        if scale_F is not None:
            hidden = hidden * scale_F[neurons].astype(hidden.dtype)
        return jnp.einsum("btk,btkd->btd", hidden, rows), aux
