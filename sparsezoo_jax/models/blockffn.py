"""BlockFFN (arXiv 2507.08771): experts chosen by a ReLU router whose scores are RMS-normalised.

Any number of experts may be active for a token; two losses make the choice sparse and alike for neighbouring tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.chunks import activation_stats, chunks_of, has_predecessor
from sparsezoo_jax.models.common import BuildContext, CallContext, DType, LayerAux
from sparsezoo_jax.models.contract import FFN, FFNKind, MapSize, register_ffn
from sparsezoo_jax.models.experts import (
    channels_of_matrices,
    expert_channels,
    hidden_read,
    network_maps,
    show_experts,
)
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES, FFN_GATE, FFN_HIDDEN
from sparsezoo_jax.models.width import WHOLE
from sparsezoo_jax.pallas_kernels.block_ffn import block_ffn
from sparsezoo_jax.pallas_kernels.block_ffn.reference import scaled_hidden
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.grouped_ffn import Channels, weighted_ffn

ACTIVATION_LOCALITY = "activation_locality"
CHUNK_SPARSIFICATION = "chunk_sparsification"

SUM_EPS = 1e-5
"""Added to sums of scores before dividing by them, and inside the logarithm of the chunk loss."""


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class BlockFFNConfig(FFNKind):
    """`sum_e A_e W_down_e SiLU(W_up_e x)` with scores `A = RMSNorm(ReLU(W_router x))`; no shared expert, no top-k.

    Returns the auxiliary losses "activation_locality" and "chunk_sparsification", which train objectives weigh.
    """

    expert_maps: ClassVar[frozenset[str]] = frozenset({"gate", "up", "neurons", "down"})

    kind: Literal["blockffn"] = "blockffn"
    experts: int
    """Number of experts."""
    expert_width: int
    """Neurons of one expert."""
    gated: bool = False
    """Give experts a gate, SiLU(W_gate x) * (W_up x). The paper's do not have one: it ruins the router's sparsity."""
    norm_after_router: Literal["rms", "sum", "none"] = "rms"
    """rms: RMSNorm over all experts, with a learned scale for each; sum: divide by the sum; none: neither."""
    norm_eps: float = 1e-5
    """Added to the mean square."""
    norm_scale: float = 1.0
    """Factor on the sum under norm_after_router=sum."""
    router_dtype: DType = "float32"
    """Router product and norm. bfloat16 rounds as the released models do: after the product, the norm and its scale."""
    auxiliary_losses: bool = True
    """Return both losses, at about 1 % of a tiny train step; off for runs that train on neither."""
    locality_steepness: float = 100.0
    """Factor on router logits inside the sigmoids of the locality loss."""
    chunk_length: int = 64
    """Tokens in a chunk of the chunk loss."""
    reference_chunk_mean: bool = False
    """Chunk loss as the released code has it: whole windows across documents, all-padding windows counted too."""
    init_std: float | None = 0.02
    """Initial std of router and experts at d_model = 256; other widths divide by sqrt(d_model / 256). None: model.init
    as for any other matrix."""
    expected_density: float = 0.2
    """Share of active experts that FLOPs and bytes assume where none was measured; training has no such target. The
    paper's models reach 0.195, 0.158, 0.160 and 0.182."""
    dense_twin_d_ff: int | None = None
    """Width of the SwiGLU layer of equal parameters; None: the nearest whole number."""
    implementation: str | None = None
    """Kernel; None picks by platform."""

    def __post_init__(self):
        field = "model.ffn"
        for name in ("experts", "expert_width", "norm_eps", "norm_scale", "locality_steepness", "chunk_length"):
            require(getattr(self, name) > 0, f"{field}.{name}", getattr(self, name), "must be above 0")
        for name in ("init_std", "dense_twin_d_ff"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{field}.{name}", value, "must be above 0 or None")
        require(0 < self.expected_density <= 1, f"{field}.expected_density", self.expected_density, "must be in (0, 1]")

    @property
    def d_ff(self) -> int:
        """Neurons of all experts."""
        return self.experts * self.expert_width

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: `expected_density` of them) and the router."""
        active = self.expected_density * self.d_ff if active is None else active
        scales = self.experts if self.norm_after_router == "rms" else 0
        return d_model * self.experts + scales + (3 if self.gated else 2) * d_model * active

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token with `active` neurons (None: as in `weights`; a multiply-add counts 2)."""
        active = self.expected_density * self.d_ff if active is None else active
        return 2 * d_model * (self.experts + (3 if self.gated else 2) * active)

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The maps of a token's experts."""
        active = self.expected_density * self.d_ff if active is None else active
        return network_maps(d_model, self.expert_width, active, gated=self.gated)

    def weight_maps(self, d_model: int) -> dict[str, int]:
        """All of these but the neurons, which have no matrix of their own."""
        return channels_of_matrices(self.linear_maps(d_model))

    def expert_axis(self, name: str) -> tuple[int, int]:
        """Experts lie along the axis of the neurons."""
        return (0 if name == "down" else 1), self.experts

    def dense_twin(self) -> GatedFFNConfig:
        """The SwiGLU layer of (nearly) equal parameters: the norm's scales, and at most half a neuron, are missing."""
        matrices = (3 if self.gated else 2) * self.d_ff + self.experts
        width = round(matrices / 3) if self.dense_twin_d_ff is None else self.dense_twin_d_ff
        return GatedFFNConfig(d_ff=width, activation="silu")

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> BlockFFN:
        return BlockFFN(self, ctx, rngs)


class RouterScale(nnx.Module):
    """The learned factor of each expert's normalised score."""

    def __init__(self, ctx: BuildContext, experts: int):
        self.scale = ctx.constant(1.0, (experts,), ("ffn",))


class BlockFFN(FFN):
    """Feed-forward layer of ReLU-routed experts; see `BlockFFNConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {"gate": "gate_DF", "up": "up_DF", "down": "down_FD"}

    def __init__(self, config: BlockFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, e, f = ctx.d_model, config.experts, config.d_ff
        std = None if config.init_std is None else config.init_std * math.sqrt(256 / d)
        # Experts are split as their neurons are, which lie side by side: hence the name of the router's second axis.
        self.router_DE = ctx.weight(rngs, (d, e), ("embed", "ffn"), d, std=std)
        self.router_norm = RouterScale(ctx, e) if config.norm_after_router == "rms" else None
        self.gate_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), d, std=std) if config.gated else None
        self.up_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), d, std=std)
        self.down_FD = ctx.weight(rngs, (f, d), ("ffn", "embed"), f, std=std, output=True)

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down_FD[...]

    def route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Router logits, scores before and after the learned scale; [B, T, E] each, in the router's dtype."""
        dtype = jnp.dtype(self.config.router_dtype)
        logits_BTE = product(
            jnp.matmul(x_BTD.astype(dtype), self.router_DE[...].astype(dtype), precision=jax.lax.Precision.HIGHEST)
        )
        normed_BTE = normalised(jax.nn.relu(logits_BTE), self.config)
        if self.router_norm is None:
            return logits_BTE, normed_BTE, normed_BTE
        return logits_BTE, normed_BTE, normed_BTE * self.router_norm.scale[...].astype(dtype)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        config = self.config
        logits_BTE, normed_BTE, scores_BTE = self.route(x_BTD)
        up_DF, down_FD = self.up_DF[...].astype(self.dtype), self.down_FD[...].astype(self.dtype)
        gate_DF = None if self.gate_DF is None else self.gate_DF[...].astype(self.dtype)
        channels = None
        if ctx.width is WHOLE:
            y = block_ffn(
                x_BTD,
                scores_BTE,
                up_DF,
                down_FD,
                gate_DF,
                expert_width=config.expert_width,
                implementation=config.implementation,
            )
        else:
            y, channels = self._shown(x_BTD, scores_BTE, ctx)
        losses = {}
        if config.auxiliary_losses:
            losses = {
                ACTIVATION_LOCALITY: activation_locality(logits_BTE, ctx, config.locality_steepness),
                CHUNK_SPARSIFICATION: chunk_sparsification(
                    normed_BTE, ctx, config.chunk_length, reference_mean=config.reference_chunk_mean
                ),
            }

        def hidden(whole: bool = False) -> jax.Array:
            if channels is not None:
                up_EDW, _, gate_EDW = self._by_expert(self.dtype)
                return hidden_read(x_BTD, scores_BTE, up_EDW, gate_EDW, jax.nn.silu, channels, whole=whole)
            return scaled_hidden(x_BTD, scores_BTE, up_DF, gate_DF, expert_width=config.expert_width)

        records = {EXPERT_SCORES: lambda: scores_BTE, FFN_GATE: lambda: hidden(True), FFN_HIDDEN: hidden}
        return y, LayerAux(losses, activation_stats(scores_BTE != 0, ctx), ctx.recorded(records))

    def _by_expert(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Maps of all experts in `dtype`: up [E, D, W], down [E, W, D] and, for gated experts, gate [E, D, W]."""
        experts, d = self.config.experts, self.up_DF.shape[0]

        def columns(weight: nnx.Param) -> jax.Array:
            return jnp.moveaxis(weight[...].astype(dtype).reshape(d, experts, -1), 1, 0)

        gate_EDW = None if self.gate_DF is None else columns(self.gate_DF)
        return columns(self.up_DF), self.down_FD[...].astype(dtype).reshape(experts, -1, d), gate_EDW

    def _shown(self, x_BTD: jax.Array, scores_BTE: jax.Array, ctx: CallContext) -> tuple[jax.Array, Channels | None]:
        """The output by the channels that `ctx.width` leaves, which is told what is read; and these."""
        channels = expert_channels(ctx.width, *self._by_expert(self.up_DF.dtype))
        up_EDW, down_EWD, gate_EDW = self._by_expert(self.dtype)
        # `block_ffn` multiplies one input by all experts; here each has its own.
        form: Any = {"activation": jax.nn.silu, "channels": channels}
        found = weighted_ffn(x_BTD, scores_BTE, up_EDW, down_EWD, gate_EDW, **form)
        y_BTD, counts = (found, {}) if channels is None else found
        show_experts(x_BTD, up_EDW, gate_EDW, jax.nn.silu, scores_BTE != 0, channels, counts, ctx)
        return y_BTD, channels


def normalised(active_BTE: jax.Array, config: BlockFFNConfig) -> jax.Array:
    """Non-negative router outputs [..., E] under `config.norm_after_router`, without the learned scale, same dtype."""
    wide = active_BTE.astype(jnp.float32)
    if config.norm_after_router == "rms":
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    elif config.norm_after_router == "sum":
        wide = wide / (jnp.sum(wide, axis=-1, keepdims=True) * config.norm_scale + SUM_EPS)
    return wide.astype(active_BTE.dtype)


def activation_locality(logits_BTE: jax.Array, ctx: CallContext, steepness: float = 100.0) -> jax.Array:
    """Cross-entropy of each token's experts, as soft labels, under its predecessor's; float32 scalar.

    Mean over experts and tokens with a predecessor in their document of `softplus(z) - label * z`, where
    z = steepness * logits of the predecessor, label = sigmoid(steepness * logits of the token). Both sides learn. 0
    where no token has a predecessor. Its minimum is the labels' entropy, not 0.

    Source: BlockFFN (arXiv 2507.08771), section 3.2.
    """
    logits_BTE = logits_BTE.astype(jnp.float32) * steepness
    earlier, label = logits_BTE[:, :-1], jax.nn.sigmoid(logits_BTE[:, 1:])
    entropy_BT = jnp.mean(jax.nn.softplus(earlier) - label * earlier, axis=-1)
    pairs_BT = has_predecessor(ctx)[:, 1:].astype(jnp.float32)
    return jnp.sum(entropy_BT * pairs_BT) / jnp.maximum(jnp.sum(pairs_BT), 1)


def chunk_sparsification(
    normed_BTE: jax.Array, ctx: CallContext, length: int = 64, *, reference_mean: bool = False
) -> jax.Array:
    """Probability that a chunk picks an expert if each of its tokens drew one from its scores; float32 scalar.

    Mean over chunks and experts of `1 - exp(sum_t log(1 - p_te + 1e-5))`, p = scores / (their sum + 1e-5), without the
    router's learned scale. Chunks end with their document and hold no padding.

    Args:
      normed_BTE: normalised scores before the learned scale, not negative.
      length: tokens in a chunk.
      reference_mean: whole windows of `length` positions instead, whatever the documents; padding picks nothing, and
        windows of nothing else count (as 1 - (1 + 1e-5)^length each), as in the released code.

    Source: BlockFFN (arXiv 2507.08771), section 3.2.
    """
    normed_BTE = normed_BTE.astype(jnp.float32)
    p_BTE = normed_BTE / (jnp.sum(normed_BTE, axis=-1, keepdims=True) + SUM_EPS)
    chunks = chunks_of(ctx, length)
    if reference_mean:
        windows_BCNE = chunks.windows(p_BTE * ctx.valid_BT[..., None])
        return 1 - jnp.mean(jnp.exp(jnp.sum(jnp.log(1 - windows_BCNE + SUM_EPS), axis=2)))
    return chunks.mean(1 - jnp.exp(chunks.sums(jnp.log(1 - p_BTE + SUM_EPS))))
