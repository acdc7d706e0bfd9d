"""Dense feed-forward networks: gated (GeGLU, SwiGLU, ReGLU; Gemma 3n's sparse gate; ProSparse; dReLU) and plain (GELU,
ReLU, ReLU^2; Lazy Neuron's top-k).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import (
    EXACT_ZERO_ACTIVATIONS,
    ActivationName,
    BuildContext,
    CallContext,
    LayerAux,
    activation_fn,
)
from sparsezoo_jax.models.contract import FFN, FFNKind, MapSize, register_ffn
from sparsezoo_jax.models.records import FFN_GATE, FFN_HIDDEN, FFN_SCORES
from sparsezoo_jax.models.topk import top_k_mask
from sparsezoo_jax.models.width import Width
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.spark_ffn import Selection, select_neurons
from sparsezoo_jax.sharding import constrain

#: Name of the loss of `GatedFFNConfig.l1`.
MEAN_L1 = "mean_l1"
#: Name of the loss of `smooth_density`.
SMOOTH_DENSITY = "smooth_density"


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class GatedFFNConfig(FFNKind):
    """`W_down (act(W_gate x) * (W_up x))`."""

    partial_width: ClassVar[bool] = True
    records_hidden: ClassVar[bool] = True

    kind: Literal["gated"] = "gated"
    d_ff: int
    """Inner width."""
    activation: ActivationName = "gelu_tanh"
    """Non-linearity of the gate."""
    up_activation: ActivationName | None = None
    """Non-linearity of what the gate multiplies (TurboSparse, arXiv 2406.05955: relu, as that of the gate, which makes
    dReLU). None: there is none."""
    bias: bool = False
    """Biases on the three maps."""
    activation_sparsity_pattern: tuple[float, ...] = ()
    """Per layer, the target share of zeros among the gates (Gemma 3n: 0.95 in the first ten layers); 0 is dense."""
    selection: Selection = "statistical"
    """Rule that zeroes gates where the pattern asks for it."""
    ddof: int = 0
    """Divisor of that rule's variance is d_ff - ddof (Gemma 3n: 0)."""
    l1: bool = False
    """Whether there is a loss "mean_l1": the mean over tokens and neurons of |hidden units|, summed over the layers
    (ProSparse, arXiv 2402.13516, step 2, where the norm is not said to be a mean [ours])."""
    threshold: float = 0.0
    """Gates of a ReLU below it are 0 except in training (FATReLU: ProSparse, step 3)."""

    def __post_init__(self):
        require(self.d_ff > 0, "model.ffn.d_ff", self.d_ff, "must be above 0")
        for value in self.activation_sparsity_pattern:
            require(0 <= value < 1, "model.ffn.activation_sparsity_pattern", value, "must be in [0, 1)")
        require(0 <= self.threshold < math.inf, "model.ffn.threshold", self.threshold, "must be at least 0, and finite")
        allowed = f"must be 0 with model.ffn.activation={self.activation}: a threshold is for relu"
        require(self.threshold == 0 or self.activation == "relu", "model.ffn.threshold", self.threshold, allowed)

    def for_layer(self, layer: int, layers: int) -> GatedFFNConfig:
        """The configuration of one layer: its own entry of the pattern."""
        if not self.activation_sparsity_pattern:
            return self
        require(
            len(self.activation_sparsity_pattern) in (1, layers),
            "model.ffn.activation_sparsity_pattern",
            f"<{len(self.activation_sparsity_pattern)} values>",
            f"must have one value for each of the {layers} layers (or one for all)",
        )
        pattern = self.activation_sparsity_pattern
        return dataclasses.replace(self, activation_sparsity_pattern=(pattern[layer if len(pattern) > 1 else 0],))

    @property
    def target_active(self) -> float | None:
        """Neurons that a layer's selection aims at; None where nothing is selected by count."""
        sparsity = self.activation_sparsity_pattern[0] if self.activation_sparsity_pattern else 0.0
        by_count = sparsity > 0 and self.selection not in ("relu", "none")
        return (1 - sparsity) * self.d_ff if by_count else None

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: the target); the gate is always computed whole, and
        so is what it multiplies where that decides, too, whether a neuron is active.
        """
        active = or_target(active, self)
        biases = (self._whole_maps * self.d_ff + (2 - self._whole_maps) * active + d_model) if self.bias else 0
        return self._map_weights(d_model, active) + biases

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token with `active` neurons (None: the target; a multiply-add counts 2)."""
        return 2 * self._map_weights(d_model, or_target(active, self))

    @property
    def _whole_maps(self) -> int:
        """Of the two maps from the stream, those of all neurons."""
        return 2 if self.up_activation in EXACT_ZERO_ACTIVATIONS else 1

    def _map_weights(self, d_model: int, active: float) -> float:
        return d_model * (self._whole_maps * self.d_ff + (3 - self._whole_maps) * active)

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The three maps, and the neurons that the gate decides on."""
        f, active = self.d_ff, or_target(active, self)
        up = f if self._whole_maps == 2 else active
        return {
            "gate": MapSize(d_model, f, d_model),
            "up": MapSize(d_model, up, d_model),
            "neurons": MapSize(f, (3 - self._whole_maps) * d_model, active),
            "down": MapSize(f, d_model, active),
        }

    def dense_twin(self) -> GatedFFNConfig:
        """The layer of equal parameters that computes all neurons."""
        return dataclasses.replace(self, activation_sparsity_pattern=(), threshold=0.0)

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> GatedFFN:
        return GatedFFN(self, ctx, rngs)


class GatedFFN(FFN):
    """Gated feed-forward layer; see `GatedFFNConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {"gate": "gate_DF", "up": "up_DF", "down": "down_FD"}

    deterministic = True
    """Whether this is not training: `Module.train` and `Module.eval` set it."""

    def __init__(self, config: GatedFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        # The decoder averages losses over the layers that have them.
        self.summed_layers = ctx.layers - ctx.first_layers
        d, f = ctx.d_model, config.d_ff
        self.gate_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), ctx.fan_in)
        self.up_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), ctx.fan_in)
        self.down_FD = ctx.weight(rngs, (f, d), ("ffn", "embed"), f, output=True)
        self.gate_bias = ctx.constant(0.0, (f,), ("ffn",)) if config.bias else None
        self.up_bias = ctx.constant(0.0, (f,), ("ffn",)) if config.bias else None
        self.down_bias = ctx.constant(0.0, (d,), ("embed",)) if config.bias else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        config = self.config
        sparsity = config.activation_sparsity_pattern[0] if config.activation_sparsity_pattern else 0.0
        gate, up = self.gate_and_up(x_BTD, ctx.width)
        scores = gate
        if sparsity > 0:
            gate = select_neurons(gate, (1 - sparsity) * config.d_ff, config.selection, ddof=config.ddof)
        gate = activation_fn(config.activation)(gate)
        if config.threshold > 0 and self.deterministic:
            gate = jnp.where(gate >= config.threshold, gate, 0)
        gate = ctx.width.channels("neurons", gate)
        if config.up_activation is not None:
            up = activation_fn(config.up_activation)(up)
        hidden = constrain(gate * up, ("batch", "length", "ffn"))
        hidden = ctx.width.channels("down", hidden, lambda: self.dictionary)
        losses = {}
        if config.l1:
            mean_BT = jnp.mean(jnp.abs(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))), axis=-1)
            losses = {MEAN_L1: self.summed_layers * ctx.mean_over_tokens(mean_BT)}
        decides = hidden if config.up_activation in EXACT_ZERO_ACTIVATIONS else gate
        exact_zeros = decides is hidden or sparsity > 0 or config.activation in EXACT_ZERO_ACTIVATIONS
        aux = LayerAux(
            losses=losses | smooth_density(gate, ctx),
            stats={"ffn_density": density(decides, ctx) if exact_zeros else jnp.float32(1)},
            records=ctx.recorded({FFN_SCORES: lambda: scores, FFN_GATE: lambda: gate, FFN_HIDDEN: lambda: hidden}),
        )
        return self.output(hidden, ctx.width), aux

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down_FD[...]

    def gate_and_up(self, x_BTD: jax.Array, stream: Width) -> tuple[jax.Array, jax.Array]:
        """Gates before their non-linearity, and what they multiply: [B, T, F] each."""
        to_gate = stream.channels("gate", x_BTD, lambda: self.gate_DF[...])
        to_up = stream.channels("up", x_BTD, lambda: self.up_DF[...])
        gate = linear(to_gate, self.gate_DF, self.gate_bias, self.dtype, stream.read)
        up = linear(to_up, self.up_DF, self.up_bias, self.dtype, stream.read)
        return stream.added("gate", gate), stream.added("up", up)

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return stream.added("down", linear(hidden_BTF, self.down_FD, self.down_bias, self.dtype, stream.write))


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlainFFNConfig(FFNKind):
    """`W_down act(W_up x)`, or of the activated units only a token's k largest."""

    partial_width: ClassVar[bool] = True
    records_hidden: ClassVar[bool] = True

    kind: Literal["plain"] = "plain"
    d_ff: int
    """Inner width."""
    activation: ActivationName = "gelu_tanh"
    """Non-linearity."""
    bias: bool = False
    """Biases on both maps."""
    top_k: int | None = None
    """Activated units that a token keeps, its largest; the others are 0 and have no gradient (Lazy Neuron,
    arXiv 2210.06313: the Top-k Transformer). Of equal units the first ones are kept. None: all."""

    def __post_init__(self):
        require(self.d_ff > 0, "model.ffn.d_ff", self.d_ff, "must be above 0")
        if self.top_k is None:
            return
        require(0 < self.top_k <= self.d_ff, "model.ffn.top_k", self.top_k, f"must be from 1 to d_ff={self.d_ff}")
        allowed = f"must be none with model.ffn.activation={self.activation}: the largest are for relu and relu2"
        require(self.activation in EXACT_ZERO_ACTIVATIONS, "model.ffn.top_k", self.top_k, allowed)

    @property
    def target_active(self) -> float | None:
        """Units that a token keeps at most; None where all that are not 0 are kept."""
        return self.top_k

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: the target, or all); the first map is always
        computed whole.
        """
        active = or_target(active, self)
        biases = self.d_ff + d_model if self.bias else 0
        return d_model * (self.d_ff + active) + biases

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token with `active` neurons (None: the target, or all; a multiply-add counts 2)."""
        return 2 * d_model * (self.d_ff + or_target(active, self))

    def linear_maps(self, d_model: int, active: float | None = None) -> dict[str, MapSize]:
        """The two maps."""
        return {
            "up": MapSize(d_model, self.d_ff, d_model),
            "down": MapSize(self.d_ff, d_model, or_target(active, self)),
        }

    def dense_twin(self) -> PlainFFNConfig:
        """The layer of equal parameters that computes all neurons."""
        return dataclasses.replace(self, top_k=None)

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> PlainFFN:
        return PlainFFN(self, ctx, rngs)


class PlainFFN(FFN):
    """Two-matrix feed-forward layer; see `PlainFFNConfig`."""

    matrices: ClassVar[Mapping[str, str]] = {"up": "up_DF", "down": "down_FD"}

    def __init__(self, config: PlainFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, f = ctx.d_model, config.d_ff
        self.up_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), ctx.fan_in)
        self.down_FD = ctx.weight(rngs, (f, d), ("ffn", "embed"), f, output=True)
        self.up_bias = ctx.constant(0.0, (f,), ("ffn",)) if config.bias else None
        self.down_bias = ctx.constant(0.0, (d,), ("embed",)) if config.bias else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        scores = self.scores(x_BTD, ctx.width)
        hidden = constrain(activation_fn(self.config.activation)(scores), ("batch", "length", "ffn"))
        if self.config.top_k is not None:
            hidden = jnp.where(top_k_mask(hidden, self.config.top_k), hidden, 0)
        hidden = ctx.width.channels("down", hidden, lambda: self.dictionary)
        exact_zeros = self.config.activation in EXACT_ZERO_ACTIVATIONS
        aux = LayerAux(
            losses=smooth_density(hidden, ctx),
            stats={"ffn_density": density(hidden, ctx) if exact_zeros else jnp.float32(1)},
            records=ctx.recorded({FFN_SCORES: lambda: scores, FFN_GATE: lambda: hidden, FFN_HIDDEN: lambda: hidden}),
        )
        return self.output(hidden, ctx.width), aux

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down_FD[...]

    def scores(self, x_BTD: jax.Array, stream: Width) -> jax.Array:
        """Neurons before their non-linearity, [B, T, F]."""
        x_BTD = stream.channels("up", x_BTD, lambda: self.up_DF[...])
        return stream.added("up", linear(x_BTD, self.up_DF, self.up_bias, self.dtype, stream.read))

    def output(self, hidden_BTF: jax.Array, stream: Width) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return stream.added("down", linear(hidden_BTF, self.down_FD, self.down_bias, self.dtype, stream.write))


def or_target(active: float | None, config) -> float:
    """`active`, or else the number of neurons that `config` aims at, or else all of its neurons."""
    if active is None:
        active = config.target_active
    return config.d_ff if active is None else active


def linear(
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None,
    dtype: jnp.dtype,
    product: Callable[[jax.Array, jax.Array], jax.Array] = matmul,
) -> jax.Array:
    """`x W + b` in `dtype`, for x [..., inputs] and W [inputs, outputs]; `product` makes `x W`."""
    y = product(x, weight[...].astype(dtype))
    return y if bias is None else y + bias[...].astype(dtype)


def density(hidden_BTF: jax.Array, ctx: CallContext) -> jax.Array:
    """Share of non-zero entries of `hidden_BTF`, averaged over real tokens."""
    return ctx.mean_over_tokens(jnp.mean(hidden_BTF != 0, axis=-1, dtype=jnp.float32))


def smooth_density(activated_BTF: jax.Array, ctx: CallContext) -> dict[str, jax.Array]:
    """The loss "smooth_density" if the call gives a `density_eps`: mean of a^2 / (a^2 + eps), float32.

    The mean is over real tokens and neurons; a are outputs of the non-linearity (of a gated FFN, the gate). Its
    gradient, 2 a eps / (a^2 + eps)^2, moves small values, most of all those near sqrt(eps / 3).

    Source: DEFT (arXiv 2402.01911), as in its authors' code (IBM/DEFT), which hooks the activation modules.
    """
    eps = ctx.density_eps
    if eps is None:
        return {}
    # a^2 / (a^2 + eps) itself has a derivative that is the difference of two nearly equal numbers where a^2 >> eps.
    dense_BTF = 1 - eps / (jnp.square(activated_BTF.astype(jnp.float32)) + eps)
    return {SMOOTH_DENSITY: ctx.mean_over_tokens(jnp.mean(dense_BTF, axis=-1))}
