"""Feed-forward networks of delta activations over tokens (arXiv 2107.07305, with tokens for frames).

What enters the second map, the first, or both is rounded to learned steps. While the network decodes it then needs
of a map only what belongs to channels that differ from those of the token before (`inference.delta`).
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.chunks import has_predecessor
from sparsezoo_jax.models.common import ActivationName, BuildContext, CallContext, LayerAux, activation_fn
from sparsezoo_jax.models.contract import FFN, FFNKind, register_ffn
from sparsezoo_jax.models.delta import round_to_steps, spike_loss, spikes
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig, density, linear, or_target
from sparsezoo_jax.models.records import FFN_GATE, FFN_HIDDEN, FFN_SCORES
from sparsezoo_jax.sharding import constrain

#: Name of the loss of what changes from token to token.
DELTA_SPIKES = "delta_spikes"
#: Names of the statistics of what changes: shares of hidden units, and of channels of the input.
CHANGED, CHANGED_INPUTS = "temporal_density", "input_temporal_density"


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeltaFFNConfig(FFNKind):
    """`W_down round(act(W_up x))`, or gated `W_down round(act(W_gate x) * (W_up x))`, with a loss "delta_spikes"."""

    kind: Literal["delta"] = "delta"
    d_ff: int
    """Inner width."""
    gated: bool = False
    """Whether a gate multiplies the units."""
    activation: ActivationName = "relu"
    """Non-linearity, of the gate if there is one."""
    rounded: Literal["hidden", "input", "both"] = "hidden"
    """What is rounded to learned steps: the hidden units, the network's input, or both."""
    step_per: Literal["channel", "layer"] = "channel"
    """What has a step of its own: each channel, or the layer. A channel is a neuron here."""
    step_init: float = 0.1
    """Step at the start [the authors' code]; the input is normalised to a mean square of 1."""

    def __post_init__(self):
        require(self.d_ff > 0, "model.ffn.d_ff", self.d_ff, "must be above 0")
        allowed = "must be above 0, and finite"
        require(0 < self.step_init < math.inf, "model.ffn.step_init", self.step_init, allowed)

    @property
    def inner_maps(self) -> int:
        """Maps from the stream."""
        return 2 if self.gated else 1

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs by itself with `active` units (None: all): the maps from the stream whole.

        After another token it needs fewer, as many as changed; that depends on the text and is measured.
        """
        return self.flops(d_model, active) / 2 + self._steps(d_model)

    def flops(self, d_model: int, active: float | None = None) -> float:
        """FLOPs per token by itself with `active` units (None: all; a multiply-add counts 2)."""
        return 2 * d_model * (self.inner_maps * self.d_ff + or_target(active, self))

    def _steps(self, d_model: int) -> int:
        each = self.step_per == "channel"
        of_input = 0 if self.rounded == "hidden" else d_model if each else 1
        return of_input + (0 if self.rounded == "input" else self.d_ff if each else 1)

    def dense_twin(self) -> GatedFFNConfig | PlainFFNConfig:
        """The layer of the same maps that rounds nothing; it lacks the steps."""
        if self.gated:
            return GatedFFNConfig(d_ff=self.d_ff, activation=self.activation)
        return PlainFFNConfig(d_ff=self.d_ff, activation=self.activation)

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> DeltaFFN:
        return DeltaFFN(self, ctx, rngs)


class DeltaFFN(FFN):
    """Feed-forward layer of rounded activations; see `DeltaFFNConfig`."""

    def __init__(self, config: DeltaFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        # The decoder averages losses over the layers that have them; the authors add them up.
        self.summed_layers = ctx.layers - ctx.first_layers
        d, f = ctx.d_model, config.d_ff
        self.gate_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), ctx.fan_in) if config.gated else None
        self.up_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), ctx.fan_in)
        self.down_FD = ctx.weight(rngs, (f, d), ("ffn", "embed"), f, output=True)
        each = config.step_per == "channel"

        def step(size: int, axis: str) -> nnx.Param:
            return ctx.constant(config.step_init, (size if each else 1,), (axis if each else None,))

        # Steps are vectors, which decay spares.
        self.input_step = step(d, "embed") if config.rounded != "hidden" else None
        self.hidden_step = step(f, "ffn") if config.rounded != "input" else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        x_BTD = self.rounded(x_BTD, self.input_step)
        scores, hidden = self.hidden(*self.inner(x_BTD))
        return self.output(hidden), self.found(x_BTD, scores, hidden, ctx)

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down_FD[...]

    def rounded(self, x: jax.Array, step: nnx.Param | None) -> jax.Array:
        """`x` in whole steps, where there are any."""
        return x if step is None else round_to_steps(x, jnp.abs(step[...]))

    def inner(self, x_BTD: jax.Array) -> tuple[jax.Array, ...]:
        """What the maps from the stream make, [B, T, F] each: the gate if there is one, then what it multiplies."""
        maps = (self.up_DF,) if self.gate_DF is None else (self.gate_DF, self.up_DF)
        return tuple(linear(x_BTD, each, None, self.dtype) for each in maps)

    def hidden(self, first_BTF: jax.Array, *up_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores before the non-linearity, and hidden units in whole steps, [B, T, F] each."""
        units = activation_fn(self.config.activation)(first_BTF)
        for up in up_BTF:
            units = units * up
        return first_BTF, constrain(self.rounded(units, self.hidden_step), ("batch", "length", "ffn"))

    def output(self, hidden_BTF: jax.Array) -> jax.Array:
        """The map back to the stream, [B, T, D]."""
        return linear(hidden_BTF, self.down_FD, None, self.dtype)

    def found(self, x_BTD: jax.Array, scores_BTF: jax.Array, hidden_BTF: jax.Array, ctx: CallContext) -> LayerAux:
        """Losses, statistics and records of a call."""
        pairs_BT = has_predecessor(ctx)
        of_hidden = spikes(hidden_BTF, pairs_BT)
        loss = jnp.float32(0)
        stats = {"ffn_density": density(hidden_BTF, ctx), CHANGED: of_hidden.density}
        if self.hidden_step is not None:
            loss += spike_loss(of_hidden, x_BTD.shape[-1])
            stats["hidden_step"] = jnp.mean(jnp.abs(self.hidden_step[...]))
        if self.input_step is not None:
            of_inputs = spikes(x_BTD, pairs_BT)
            loss += spike_loss(of_inputs, self.config.inner_maps * self.config.d_ff)
            stats |= {CHANGED_INPUTS: of_inputs.density, "input_step": jnp.mean(jnp.abs(self.input_step[...]))}
        return LayerAux(
            losses={DELTA_SPIKES: self.summed_layers * loss},
            stats=stats,
            records=ctx.recorded(
                {FFN_SCORES: lambda: scores_BTF, FFN_GATE: lambda: hidden_BTF, FFN_HIDDEN: lambda: hidden_BTF}
            ),
        )
