"""Spark Transformer (arXiv 2506.06644): FFN and attention whose first-r input dimensions select what is computed.

The predictor is part of the function, not an approximation of one: nothing else of a neuron or key enters the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.attention import (
    GQA,
    GQAConfig,
    NormOver,
    Projections,
    check_heads,
    projection_flops,
    projection_maps,
    projection_weights,
)
from sparsezoo_jax.models.cache import LayerCache
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.contract import (
    FFN,
    Attention,
    AttentionKind,
    FFNKind,
    MapSize,
    register_attention,
    register_ffn,
)
from sparsezoo_jax.models.ffn import GatedFFNConfig, density, or_target
from sparsezoo_jax.models.records import (
    ATTENTION_SCORES,
    ATTENTION_SELECTED,
    ATTENTION_VISIBLE,
    FFN_GATE,
    FFN_HIDDEN,
    FFN_SCORES,
)
from sparsezoo_jax.models.rope import RopeConfig, RopeScaling, apply_rope
from sparsezoo_jax.models.width import WHOLE
from sparsezoo_jax.pallas_kernels.matmul import from_stream, matmul, to_stream
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility, predicted_keys, spark_attention
from sparsezoo_jax.pallas_kernels.spark_ffn import Selection, select_neurons, spark_ffn
from sparsezoo_jax.sharding import constrain


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparkFFNConfig(FFNKind):
    """`V [GELU(StatTop_k(K1^T x[:r])) * (K2^T x[r:])]`; 1.5 times the width of a gated FFN of equal parameters."""

    kind: Literal["spark"] = "spark"
    d_ff: int
    """Neurons."""
    top_k: int
    """Target number of active neurons for each token; must be below d_ff."""
    r: int
    """Input dimensions that select neurons; must be below d_model. About d_model / 2 is best."""
    ddof: int = 1
    """Divisor of the variance is d_ff - ddof."""
    huber_delta: float = 0.0
    """Width of the smooth start of the soft threshold; 0 is the plain one, which the paper trains with."""
    selection: Selection = "statistical"
    """Rule that picks neurons. The others are controls: sorted, by approx_max_k, positive ones, all."""
    v_init_scale: float = 1.0
    """Factor on the down-projection's initial std. Without a norm after the FFN, about 4.6 restores a dense scale."""
    implementation: str | None = None
    """Kernel; None picks by platform."""

    def __post_init__(self):
        field = "model.ffn"
        require(self.d_ff > 1, f"{field}.d_ff", self.d_ff, "must be above 1")
        require(
            0 < self.top_k < self.d_ff,
            f"{field}.top_k",
            self.top_k,
            f"must be between 1 and d_ff - 1 = {self.d_ff - 1}",
        )
        require(self.r > 0, f"{field}.r", self.r, "must be above 0")
        require(self.ddof in (0, 1), f"{field}.ddof", self.ddof, "must be 0 or 1")
        require(self.huber_delta >= 0, f"{field}.huber_delta", self.huber_delta, "must be 0 or above")

    def check(self, d_model: int) -> None:
        """Raise `ConfigError` where no input dimension is left beside the predictor's."""
        require(self.r < d_model, "model.ffn.r", self.r, f"must be below model.d_model={d_model}")

    @property
    def target_active(self) -> float | None:
        """Neurons that the selection aims at; None where nothing is selected by count."""
        return None if self.selection in ("relu", "none") else self.top_k

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: the target): `r F + (D - r) k + D k`."""
        return self.r * self.d_ff + (2 * d_model - self.r) * or_target(active, self)

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token with `active` neurons (None: the target): `2 (r F + (D - r) k + D k)` (paper, section 2)."""
        return 2 * self.weights(d_model, active)

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The predictor as "gate", the map of the other dimensions as "up", "down", and the selected neurons."""
        f, rest, active = self.d_ff, d_model - self.r, or_target(active, self)
        return {
            "gate": MapSize(self.r, f, self.r),
            "up": MapSize(rest, active, rest),
            "neurons": MapSize(f, rest + d_model, active),
            "down": MapSize(f, d_model, active),
        }

    def dense_twin(self) -> GatedFFNConfig | None:
        """The gated layer of equal parameters, two thirds as wide; None where that is no whole number."""
        return GatedFFNConfig(d_ff=self.d_ff // 3 * 2) if self.d_ff % 3 == 0 else None

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> SparkFFN:
        return SparkFFN(self, ctx, rngs)


class SparkFFN(FFN):
    """Feed-forward layer with a built-in predictor; see `SparkFFNConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {"gate": "k1_RF", "up": "k2_DF", "down": "v_FD"}

    def __init__(self, config: SparkFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, f, r = ctx.d_model, config.d_ff, config.r
        # K1's input axis is not sharded with the model width: its r rows are a slice of it.
        self.k1_RF = ctx.weight(rngs, (r, f), ("predictor", "ffn"), r)
        self.k2_DF = ctx.weight(rngs, (d - r, f), ("embed", "ffn"), d - r)
        self.v_FD = ctx.weight(rngs, (f, d), ("ffn", "embed"), f, scale=config.v_init_scale, output=True)

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.v_FD[...]

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        config, k1_RF = self.config, self.k1_RF[...].astype(self.dtype)
        if ctx.width is not WHOLE:
            return self.by_maps(x_BTD, ctx)
        y, gate = spark_ffn(
            x_BTD,
            k1_RF,
            self.k2_DF[...].astype(self.dtype),
            self.v_FD[...].astype(self.dtype),
            top_k=config.top_k,
            ddof=config.ddof,
            huber_delta=config.huber_delta,
            selection=config.selection,
            return_gate=True,
            implementation=config.implementation,
        )
        # The kernel keeps its scores to itself: who wants them has them computed again.
        records = {
            FFN_SCORES: lambda: matmul(x_BTD[..., : config.r], k1_RF),
            FFN_GATE: lambda: gate,
            FFN_HIDDEN: lambda: gate * matmul(x_BTD[..., config.r :], self.k2_DF[...].astype(self.dtype)),
        }
        stats = {"ffn_density": density(jax.lax.stop_gradient(gate), ctx)}
        return y, LayerAux(stats=stats, records=ctx.recorded(records))

    def weight(self, name: str) -> jax.Array:
        """The matrix of one map, in the activations' dtype."""
        return getattr(self, self.matrices[name])[...].astype(self.dtype)

    def mapped(self, name: str, x: jax.Array, gate_BTF: jax.Array | None = None) -> jax.Array:
        """What one map makes of its input [B, T, ...]; the neurons' gates tell which of them "up" is needed for."""
        del gate_BTF  # all are made
        if name == "down":
            return to_stream(x, self.weight(name))
        return constrain(from_stream(x, self.weight(name)), ("batch", "length", "ffn"))

    def by_maps(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        """The same by its definition, map by map, each of which reads the channels that `ctx.width` leaves it."""
        config, width = self.config, ctx.width
        to_gate_BTR = width.channels("gate", x_BTD[..., : config.r], partial(self.weight, "gate"))
        to_up = width.channels("up", x_BTD[..., config.r :], partial(self.weight, "up"))
        scores_BTF = width.added("gate", self.mapped("gate", to_gate_BTR))
        selected_BTF = select_neurons(
            scores_BTF, config.top_k, config.selection, ddof=config.ddof, huber_delta=config.huber_delta
        )
        gate_BTF = width.channels("neurons", jax.nn.gelu(selected_BTF, approximate=True))
        hidden_BTF = gate_BTF * width.added("up", self.mapped("up", to_up, gate_BTF))
        hidden_BTF = width.channels("down", hidden_BTF, partial(self.weight, "down"))
        y_BTD = width.added("down", self.mapped("down", hidden_BTF))
        records = {FFN_SCORES: lambda: scores_BTF, FFN_GATE: lambda: gate_BTF, FFN_HIDDEN: lambda: hidden_BTF}
        stats = {"ffn_density": density(jax.lax.stop_gradient(gate_BTF), ctx)}
        return y_BTD, LayerAux(stats=stats, records=ctx.recorded(records))


@register_attention
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparkAttentionConfig(AttentionKind):
    """`V [softmax(StatTop_k^-inf(K1^T q[:r])) * softplus(K2^T q[r:])]` per head; no parameters beyond GQA's."""

    # What `Projections` reads of an attention's configuration, and this one leaves as it is.
    qk_norm_over: ClassVar[NormOver] = "head"
    qk_norm_eps: ClassVar[float] = 1e-6
    qk_norm_zero_centered: ClassVar[bool] = False
    value_norm: ClassVar[bool] = False
    output_bias: ClassVar[bool | None] = None

    kind: Literal["spark"] = "spark"
    heads: int
    """Query heads; each selects its own keys."""
    kv_heads: int
    """Key/value heads; must divide the query heads."""
    head_dim: int
    """Width of one head."""
    top_k: int
    """Target number of attended keys for each query."""
    r: int
    """Head dimensions that select keys; must be even and below head_dim."""
    window: int | None = None
    """Keys that a query of a local layer sees, itself included."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary embeddings, applied to the first r and the other dimensions separately."""
    predictor_scale: float | None = None
    """Factor on the selecting scores; None: r^-1/2."""
    value_scale: float | None = None
    """Factor on the softplus's argument; None: (head_dim - r)^-1/2."""
    softcap: float | None = None
    """Cap on the selecting scores, before their statistics."""
    softcap_values: float | None = None
    """Cap on the softplus's argument."""
    ddof: int = 1
    """Divisor of the variance is n - ddof for n visible keys."""
    selection: Literal["statistical", "exact", "none"] = "statistical"
    """Rule that picks keys; "exact" (sorted) and "none" (all visible) are controls."""
    weighting: Literal["softplus", "none"] = "softplus"
    """Factor on the softmax's weights; "none" leaves the head's other dimensions unused."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, before the split."""
    bias: bool = False
    """Biases on the four projections."""
    implementation: str | None = None
    """Kernel; None picks by platform."""

    def __post_init__(self):
        field = "model.attention"
        check_heads(self.heads, self.kv_heads, self.head_dim, self.window, self.rope)
        require(self.top_k > 0, f"{field}.top_k", self.top_k, "must be above 0")
        limit = self.head_dim if self.weighting == "none" else self.head_dim - 1
        require(
            0 < self.r <= limit, f"{field}.r", self.r, f"must be between 1 and {limit} for head_dim={self.head_dim}"
        )
        require(
            self.rope is None or self.r % 2 == 0, f"{field}.r", self.r, "must be even, for each part rotates separately"
        )
        require(self.ddof in (0, 1), f"{field}.ddof", self.ddof, "must be 0 or 1")

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The four projections."""
        return projection_maps(d_model, self.heads, self.kv_heads, self.head_dim)

    def projection_flops(self, d_model: int) -> int:
        """FLOPs per token of the four projections (a multiply-add counts 2)."""
        return projection_flops(d_model, self.heads, self.kv_heads, self.head_dim)

    @property
    def score_heads(self) -> int:
        """Heads by which tensor parallelism can split the scores."""
        return self.kv_heads

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Per token: keys and values, [heads, width] each."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def target_keys(self) -> int | None:
        """Keys that each query's selection aims at; None where all visible keys are attended."""
        return None if self.selection == "none" else self.top_k

    def mixing_flops(self, keys: int, target: float | None = None) -> float:
        """FLOPs per token over `keys` visible keys, of which at most `target` (None: `top_k`) are weighed and mixed."""
        return 2 * self.heads * (self.r * keys + self._gathered_width * self._attended(keys, target))

    def projection_weights(self, d_model: int) -> int:
        """Weights of the four projections; every token needs all."""
        return projection_weights(self, d_model)

    def cache_reads(self, keys: int, target: float | None = None) -> float:
        """Numbers that one token reads from a cache of `keys` visible keys.

        The predictor's `r` dimensions of all keys, the rest of key and value where a query head attends. Heads that
        share a key/value head are taken to attend to different keys, which is the most that they can read.
        """
        rows = min(keys, self.heads // self.kv_heads * self._attended(keys, target))
        return self.kv_heads * (self.r * keys + self._gathered_width * rows)

    @property
    def _gathered_width(self) -> int:
        """Dimensions of key and value that only attended keys need."""
        return self.head_dim + (0 if self.weighting == "none" else self.head_dim - self.r)

    def _attended(self, keys: int, target: float | None) -> float:
        target = self.target_keys if target is None else target
        return keys if target is None else min(target, keys)

    def dense_twin(self) -> GQAConfig:
        """Attention of equal parameters to all visible keys."""
        shared = {field.name for field in dataclasses.fields(GQAConfig)} - {"kind", "query_scale"}
        return GQAConfig(**{name: getattr(self, name) for name in shared})

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> SparkAttention:
        return SparkAttention(self, ctx, rngs)


def apply_split_rope(
    x_BTNH: jax.Array, positions_BT: jax.Array, r: int, base: float, fraction: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Rotate the first r head dimensions and the others, each within itself.

    Rotating the whole head and slicing afterwards would put the two members of a pair into different parts, and the
    predictor's scores would no longer depend on relative position only.
    """
    width = x_BTNH.shape[-1]
    if width == r:
        return apply_rope(x_BTNH, positions_BT, base, fraction, scaling)
    if width == 2 * r:  # parts that rotate alike, as heads side by side
        split = x_BTNH.reshape(*x_BTNH.shape[:2], -1, r)
        return apply_rope(split, positions_BT, base, fraction, scaling).reshape(x_BTNH.shape)
    parts = (x_BTNH[..., :r], x_BTNH[..., r:])
    return jnp.concatenate([apply_rope(part, positions_BT, base, fraction, scaling) for part in parts], axis=-1)


class SparkAttention(Attention):
    """Attention over about `top_k` selected keys; see `SparkAttentionConfig`."""

    matrices: ClassVar[Mapping[str, str]] = GQA.matrices

    def __init__(self, config: SparkAttentionConfig, ctx: BuildContext, rngs: nnx.Rngs):
        super().__init__(config, ctx)
        self.projections = Projections(config, ctx, rngs)

    def __call__(
        self, x_BTD: jax.Array, ctx: CallContext, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerAux, LayerCache | None]:
        config = self.config
        q, k, v = self.projections.qkv(x_BTD, ctx.width)
        if config.rope is not None:
            rope = (config.r, *config.rope.of(self.layer_type))
            q = apply_split_rope(q, ctx.positions_BT, *rope)
            k = apply_split_rope(k, ctx.positions_BT, *rope)
        cache = None if cache is None else cache.updated(k, v, ctx.cache_end)
        keys_values = (k, v) if cache is None else cache
        visible = ctx.visible[self.layer_type]
        y, attended_BTN = self.attend(q, keys_values, visible)
        attended = ctx.mean_over_tokens(jnp.mean(attended_BTN, axis=-1))
        aux = LayerAux(stats={"attended_keys": attended}, records=self._records(q, keys_values, visible, ctx))
        return self.projections.output(y, ctx.width), aux, cache

    @property
    def form(self) -> dict[str, Any]:
        """What `spark_attention` is called with beside arrays."""
        config = self.config
        return {
            "r": config.r,
            "top_k": config.top_k,
            "ddof": config.ddof,
            "predictor_scale": config.predictor_scale,
            "value_scale": config.value_scale,
            "softcap": config.softcap,
            "softcap_values": config.softcap_values,
            "selection": config.selection,
            "weighting": config.weighting,
        }

    def attend(self, q: jax.Array, keys_values: Any, visible: Visibility) -> tuple[jax.Array, jax.Array]:
        """The mixed values [B, T, N, H] of rotated queries, and the keys that each attends to [B, T, N].

        Keys and values are [B, S, K, H].
        """
        k, v = keys_values
        return spark_attention(q, k, v, visible, implementation=self.config.implementation, **self.form)

    def _records(self, q: jax.Array, keys_values: Any, visible: Visibility, ctx: CallContext) -> dict[str, jax.Array]:
        if not ctx.record:
            return {}
        mask_BTS = visible.mask
        config = self.config
        scores, selected = predicted_keys(
            q,
            keys_values[0],
            mask_BTS,
            r=config.r,
            top_k=config.top_k,
            ddof=config.ddof,
            predictor_scale=config.predictor_scale,
            softcap=config.softcap,
            selection=config.selection,
        )
        arrays = {ATTENTION_SCORES: scores, ATTENTION_SELECTED: selected, ATTENTION_VISIBLE: mask_BTS}
        return {name: array for name, array in arrays.items() if name in ctx.record}
