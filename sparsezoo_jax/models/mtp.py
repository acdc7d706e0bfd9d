"""Multi-token prediction (MTP): modules that predict tokens after the next one while a decoder trains.

Source: DeepSeek-V3 (arXiv 2412.19437), section 2.2; the order of norms and joined states is that of Ling 2.0's
released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.models.common import CallContext, LayerAux
from sparsezoo_jax.models.contract import Observed
from sparsezoo_jax.models.layers import STREAM, Passed, Segment
from sparsezoo_jax.models.remat import Remat
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.sharding import constrain

if TYPE_CHECKING:
    from sparsezoo_jax.models.config import DecoderConfig


class Ahead(NamedTuple):
    """What the module of depth d makes: at position t it predicts token t + d + 1."""

    hidden: jax.Array
    """Final state after its norm [B, T, D], for `Decoder.logits_of`."""
    valid: jax.Array
    """bool [B, T]: token t + d is there, and of the same document as token t."""


class MTPModule(nnx.Module):
    """`Block(W [norm(embedding of token t + d); norm(state of depth d - 1)])`, and a final norm.

    The block is one more layer like the decoder's last; embedding and output projection are the decoder's.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        ctx, d = config.build_context(), config.d_model
        self.remat: Remat = config.remat
        self.scan = config.scan_layers
        self.embedding_norm = config.norm.build(ctx)
        self.hidden_norm = config.norm.build(ctx)
        self.joint_ED = ctx.weight(rngs, (2 * d, d), ("embed", "ffn"), 2 * d)
        self.segment = Segment.build(config, config.mtp_segment(), rngs)
        self.final_norm = config.norm.build(ctx)
        self.head = config.residual.build_head(ctx, rngs)

    def __call__(
        self, embedded_BTD: jax.Array, hidden_BTD: jax.Array, ctx: CallContext
    ) -> tuple[jax.Array, LayerAux, LayerAux]:
        """The final state [B, T, D], and the auxiliary results of the layer and of the head."""
        joined = jnp.concatenate([self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        x_BTD = constrain(matmul(joined, self.joint_ED[...].astype(joined.dtype)), STREAM)
        passed, (aux,), _ = self.segment(Passed(x_BTD), ctx, None, scan=self.scan, remat=self.remat)
        hidden_BTD, head_aux = self.head(passed.x, self.final_norm, ctx)
        return hidden_BTD, aux, head_aux

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Let the layer and the head move their variables by what they observed."""
        self.segment.after_step([observed["layer"]], jax.random.fold_in(key, 0))
        if observed["head"]:
            self.head.after_step(observed["head"], jax.random.fold_in(key, 1))


def shifted(x_BT: jax.Array, by: int) -> jax.Array:
    """`x[:, t + by]` at position t, and zeros (or false) at the last `by` positions."""
    return jnp.pad(x_BT[:, by:], ((0, 0), (0, by)))


def same_document(segment_ids_BT: jax.Array, depth: int) -> jax.Array:
    """Whether token t + depth is there and of the document of token t, bool [B, T]; false for padding."""
    return (segment_ids_BT > 0) & (shifted(segment_ids_BT, depth) == segment_ids_BT)
