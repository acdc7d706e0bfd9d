"""SparseLM's feed-forward network (arXiv 2603.23198): a ReLU gate whose hidden units an L1 loss makes few.

Nothing selects neurons: they are sparse because a ReLU makes exact zeros and the loss rewards them. Neurons that no
token of a step uses get a part of their weights drawn anew, after each step.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.common import BuildContext, CallContext, LayerAux
from sparsezoo_jax.models.contract import FFN, FFNKind, Observed, register_ffn
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig, or_target
from sparsezoo_jax.models.records import FFN_GATE, FFN_HIDDEN, FFN_SCORES
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.relu_ffn import Storage, relu_ffn, scores

#: Name of the loss that objectives weigh.
L1 = "l1"


class SilentSteps(nnx.Variable):
    """For how many optimizer steps in a row each neuron was 0 in all tokens: no parameter."""


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparseLMFFNConfig(FFNKind):
    """`W_down (relu(W_gate x) * (W_up x))`, or without a gate `W_down relu(W_up x)`; with an L1 loss "l1".

    Fields say where their choice comes from: [paper], [code] of the authors, or [ours].
    """

    kind: Literal["sparselm"] = "sparselm"
    d_ff: int
    """Neurons."""
    gated: bool = True
    """Whether a gate multiplies the neurons [paper: both, with 5632 gated neurons or 8192 without]."""
    revival: float = 0.1
    """Share of a dead neuron's weights, those of the map before the ReLU, that is drawn anew after each step [paper,
    appendix C.3; not in the code]. 0 revives none."""
    revival_std: float | None = None
    """Standard deviation of what is drawn [paper: 0.02]. None: that of the weights at the start, which is the same."""
    dead_after: int = 1
    """Optimizer steps without a non-zero hidden unit, on any device, after which a neuron is dead [paper, appendix D.1;
    the code counts the tokens of one process]."""
    stored_neurons: int | None = None
    """Keep so many active neurons of a token for the backward pass, in place of all neurons [code: 128]. Gradients are
    the same; tokens that have more are kept whole, or computed again. None keeps all."""
    stored_tokens: float = 0.125
    """Largest share of a sequence's tokens that are kept whole, in (0, 1) or 0 [paper: an eighth]. Beyond that, the
    layer's scores are computed again."""
    implementation: Literal["xla", "native", "pallas_gpu", "pallas_gpu_interpret"] | None = None
    """Implementation of the layer while it trains: "xla" computes all neurons; "native", on CPUs, those that a token
    uses where they are few; "pallas_gpu" for a block of tokens those that one of them uses (see `relu_ffn`), which was
    not measured on a device. None: "native" on CPUs where it can, else "xla"."""

    def __post_init__(self):
        name = "model.ffn"
        require(self.d_ff > 0, f"{name}.d_ff", self.d_ff, "must be above 0")
        require(0 <= self.revival <= 1, f"{name}.revival", self.revival, "must be from 0 to 1")
        std = self.revival_std
        require(std is None or std > 0, f"{name}.revival_std", std, "must be above 0 or None")
        require(self.dead_after > 0, f"{name}.dead_after", self.dead_after, "must be above 0")
        kept = self.stored_neurons
        allowed = f"must be from 1 to model.ffn.d_ff={self.d_ff}, or None"
        require(kept is None or 0 < kept <= self.d_ff, f"{name}.stored_neurons", kept, allowed)
        require(0 <= self.stored_tokens < 1, f"{name}.stored_tokens", self.stored_tokens, "must be in [0, 1)")

    @property
    def storage(self) -> Storage | None:
        """What the backward pass has room for."""
        return None if self.stored_neurons is None else Storage(self.stored_neurons, self.stored_tokens)

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: all); the first map is always computed whole."""
        return d_model * (self.d_ff + (2 if self.gated else 1) * or_target(active, self))

    def dense_twin(self) -> GatedFFNConfig | PlainFFNConfig:
        """The layer of equal parameters that computes all neurons: SwiGLU, or without a gate one of GELUs."""
        if self.gated:
            return GatedFFNConfig(d_ff=self.d_ff, activation="silu")
        return PlainFFNConfig(d_ff=self.d_ff)

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> SparseLMFFN:
        return SparseLMFFN(self, ctx, rngs)


class SparseLMFFN(FFN):
    """Sparse feed-forward layer; see `SparseLMFFNConfig`."""

    def __init__(self, config: SparseLMFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, f = ctx.d_model, config.d_ff
        self.gate_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), ctx.fan_in) if config.gated else None
        self.up_DF = ctx.weight(rngs, (d, f), ("embed", "ffn"), ctx.fan_in)
        self.down_FD = ctx.weight(rngs, (f, d), ("ffn", "embed"), f, output=True)
        self.silent_F = SilentSteps(jnp.zeros(f, jnp.int32), axes=("ffn",))
        self.revival_std = ctx.deviation(ctx.fan_in) if config.revival_std is None else config.revival_std

    @property
    def dictionary(self) -> jax.Array:
        """What each hidden unit adds to the output when it is 1, [F, D]."""
        return self.down_FD[...]

    def weights(self) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        """Maps of gate (None where there is none), up and down, in the activations' dtype."""
        gate = None if self.gate_DF is None else self.gate_DF[...].astype(self.dtype)
        return gate, self.up_DF[...].astype(self.dtype), self.down_FD[...].astype(self.dtype)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        """As in `FFN`, with the loss "l1": the mean over real tokens of the sum over neurons of |h|.

        The paper's equation 2 divides by the number of neurons, too; its code and its coefficients don't.

        Source: Sparser, Faster, Lighter Transformer Language Models (arXiv 2603.23198), section 2 and appendices C, D.
        """
        config, weights = self.config, self.weights()
        found = relu_ffn(x_BTD, *weights, ctx.valid_BT, storage=config.storage, implementation=config.implementation)
        l0 = ctx.mean_over_tokens(found.active)
        stats = {
            "ffn_density": l0 / config.d_ff,
            "l0": l0,
            "largest_l0": jnp.max(found.active * ctx.valid_BT),
            "dead_share": jnp.mean(self.silent_F[...] >= config.dead_after, dtype=jnp.float32),
        }
        if config.storage is not None:
            stats["stored"] = found.stored
        if "pallas" in (config.implementation or ""):
            stats["union"] = found.union

        def before_relu() -> jax.Array:
            return scores(x_BTD, *weights[:2])[0]

        def gate() -> jax.Array:
            return jax.nn.relu(before_relu())

        def hidden() -> jax.Array:
            return gate() if weights[0] is None else gate() * matmul(x_BTD, weights[1])

        aux = LayerAux(
            losses={L1: ctx.mean_over_tokens(found.l1)},
            stats=stats,
            records=ctx.recorded({FFN_SCORES: before_relu, FFN_GATE: gate, FFN_HIDDEN: hidden}),
            observed={"fired": found.fired, "tokens": jnp.any(ctx.valid_BT).astype(jnp.float32)},
        )
        return found.y, aux

    def after_step(self, observed: Observed, key: jax.Array) -> None:
        """Count the steps in which a neuron was silent, and draw a part of dead neurons' weights anew.

        Only the rows of the map before the ReLU move; the other maps and the optimizer's moments stay.

        Args:
          observed: "fired", above 0 where a neuron was not 0 in some token of the step's batch, [F] or [layers, F], and
            "tokens", above 0 if there were any.
          key: of what is drawn.

        Source: arXiv 2603.23198, appendix C.3.
        """
        counted = (observed["tokens"] > 0).astype(jnp.int32)[..., None]
        silent = jnp.where(observed["fired"] > 0, 0, self.silent_F[...] + counted)
        self.silent_F[...] = silent
        if self.config.revival == 0:
            return
        weight = self.up_DF if self.gate_DF is None else self.gate_DF
        old, share = weight[...], self.config.revival
        drawn = self.revival_std * jax.random.normal(key, old.shape, old.dtype)
        dead = (silent >= self.config.dead_after)[..., None, :]
        weight[...] = jnp.where(dead, (1 - share) * old + share * drawn, old)
