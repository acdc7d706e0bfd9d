"""The autoencoder as functions of its parameters: codes, reconstruction, losses.

Shape letters: N tokens, D width of the activations, F features. Rows of `w_dec_FD` have unit norm. A transcoder reads
activations x and makes others, y, of another width perhaps; an autoencoder makes x itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparsezoo_jax.autoencoders import jump, selection
from sparsezoo_jax.autoencoders.config import (
    GBASAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    Normalisation,
    SAEConfig,
    TopKSAE,
)

Arrays = dict[str, jax.Array]


class Encoder(Protocol):
    """Anything that turns activations into features, for evaluations of features: an autoencoder, a wide MLP."""

    def encode(self, x: jax.Array) -> jax.Array:
        """Features [..., F] of activations [..., D], not negative for ReLU codes; 0 where a feature does not fire."""
        ...


class Codes(NamedTuple):
    """What an encoder made of a batch."""

    pre_NF: jax.Array
    """ReLU of the pre-activations, for gated of the gate's; for gba and jump_relu the pre-activations themselves."""
    kept_NF: jax.Array
    """True where the code is kept."""
    code_NF: jax.Array
    """The codes, 0 where they are not kept."""


def unit_rows(w: jax.Array) -> jax.Array:
    """`w` with rows of norm 1."""
    return w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-12)


def initial_parameters(
    config: SAEConfig, key: jax.Array, x_ND: jax.Array, y_ND: jax.Array | None = None, *, skip: bool = False
) -> Arrays:
    """Encoder = transposed decoder with random unit rows; the decoder's bias is the geometric median of what is made.

    A transcoder, which makes `y_ND`, has random unit rows of its own in the encoder; its skip map starts at 0.
    """
    made_ND = x_ND if y_ND is None else y_ND
    w_FD = unit_rows(jax.random.normal(key, (config.features, made_ND.shape[1])))
    params = {"w_dec_FD": w_FD, "b_dec_D": geometric_median(made_ND)}
    if config.kind == "gba":
        return params | {"scale_F": jnp.ones(config.features)}
    if isinstance(config, TopKSAE) and config.tied:
        return params
    encoder_FD = w_FD
    if y_ND is not None:
        encoder_FD = unit_rows(jax.random.normal(jax.random.fold_in(key, 1), (config.features, x_ND.shape[1])))
    if skip:
        params["w_skip_DD"] = jnp.zeros((x_ND.shape[1], made_ND.shape[1]))
    params["w_enc_DF"] = encoder_FD.T
    if isinstance(config, GatedSAE):
        zeros_F = jnp.zeros(config.features)
        return params | {"b_gate_F": zeros_F, "b_mag_F": zeros_F, "r_mag_F": zeros_F}
    if isinstance(config, JumpReLUSAE):
        params["threshold_F"] = jnp.full(config.features, config.threshold)
    return params | {"b_enc_F": jnp.zeros(config.features)}


def geometric_median(x_ND: jax.Array, rounds: int = 50) -> jax.Array:
    """The point of least total distance to the rows of `x_ND`, by Weiszfeld's iteration, [D]."""

    def step(_, point_D):
        weight_N = 1 / jnp.maximum(jnp.linalg.norm(x_ND - point_D, axis=-1), 1e-6)
        return weight_N @ x_ND / jnp.sum(weight_N)

    return jax.lax.fori_loop(0, rounds, step, jnp.mean(x_ND, axis=0))


def transcodes(state: Arrays) -> bool:
    """Whether activations other than the encoder's inputs are made."""
    return "target_scale" in state


def pre_activations(config: SAEConfig, params: Arrays, state: Arrays, x_ND: jax.Array) -> jax.Array:
    """`(x - b_dec) W_enc + b_enc`, [N, F]; for gba with the decoder's rows and biases that get no gradient.

    Tied encoders of other kinds have no bias. For gated it is the gate's. A transcoder's inputs are not centred.
    """
    centred = centred_inputs(params, state, x_ND)
    if isinstance(config, GBASAE):
        return centred @ unit_rows(params["w_dec_FD"]).T + jax.lax.stop_gradient(state["bias_F"])
    if isinstance(config, TopKSAE) and config.tied:
        return centred @ params["w_dec_FD"].T
    return centred @ params["w_enc_DF"] + params["b_gate_F" if isinstance(config, GatedSAE) else "b_enc_F"]


def centred_inputs(params: Arrays, state: Arrays, x_ND: jax.Array) -> jax.Array:
    """What the encoder's matrix multiplies."""
    return x_ND if transcodes(state) else x_ND - params["b_dec_D"]


def training_codes(config: SAEConfig, params: Arrays, state: Arrays, x_ND: jax.Array) -> Codes:
    """Codes of a training batch, whose tokens may compete for features.

    Feature Choice is mutual while `state["choosing"]` is 0.
    """
    raw_NF = pre_activations(config, params, state, x_ND)
    if isinstance(config, GBASAE):
        return _biased(config, state, raw_NF)
    if isinstance(config, GatedSAE):
        return _gated(params, state, x_ND, raw_NF)
    if isinstance(config, JumpReLUSAE):
        threshold_F = params["threshold_F"]
        return Codes(raw_NF, raw_NF > threshold_F, jump.jump_relu(raw_NF, threshold_F, config.bandwidth))
    pre_NF = jax.nn.relu(raw_NF)
    if isinstance(config, TopKSAE):
        kept_NF = selection.token_choice(pre_NF, config.k)
    elif isinstance(config, BatchTopKSAE):
        kept_NF = selection.mutual_choice(pre_NF, config.k * len(x_ND))
    elif isinstance(config, FeatureChoiceSAE):
        kept_NF = jax.lax.cond(
            state["choosing"] > 0,
            lambda z: selection.feature_choice(z, state["budgets_F"]),
            lambda z: selection.mutual_choice(z, config.k * len(x_ND)),
            jax.lax.stop_gradient(pre_NF),
        )
    else:
        kept_NF = pre_NF > 0
    return Codes(pre_NF, kept_NF, jnp.where(kept_NF, pre_NF, 0))


def _biased(config: GBASAE, state: Arrays, raw_NF: jax.Array) -> Codes:
    kept_NF = raw_NF > 0
    code_NF = raw_NF - state["bias_F"] if config.activation == "jump_relu" else raw_NF
    return Codes(raw_NF, kept_NF, jnp.where(kept_NF, code_NF, 0))


def _gated(params: Arrays, state: Arrays, x_ND: jax.Array, gate_NF: jax.Array) -> Codes:
    """`1[pi > 0] ReLU(exp(r) (x - b_dec) W_gate + b_mag)`, which has no gradient by the gate pi (arXiv 2404.16014)."""
    shared_NF = centred_inputs(params, state, x_ND) @ params["w_enc_DF"]
    size_NF = jax.nn.relu(jnp.exp(params["r_mag_F"]) * shared_NF + params["b_mag_F"])
    kept_NF = gate_NF > 0
    return Codes(jax.nn.relu(gate_NF), kept_NF, jnp.where(kept_NF, size_NF, 0))


def inference_codes(config: SAEConfig, params: Arrays, state: Arrays, x_ND: jax.Array) -> jax.Array:
    """Codes [N, F] that depend on their own token only: where tokens competed, thresholds stand for the others."""
    raw_NF = pre_activations(config, params, state, x_ND)
    if isinstance(config, GBASAE):
        return _biased(config, state, raw_NF).code_NF
    if isinstance(config, GatedSAE):
        return _gated(params, state, x_ND, raw_NF).code_NF
    if isinstance(config, JumpReLUSAE):
        return jnp.where(raw_NF > params["threshold_F"], raw_NF, 0)
    pre_NF = jax.nn.relu(raw_NF)
    if isinstance(config, TopKSAE):
        return jnp.where(selection.token_choice(pre_NF, config.k), pre_NF, 0)
    if isinstance(config, BatchTopKSAE | FeatureChoiceSAE):
        return jnp.where(pre_NF > state["threshold_F"], pre_NF, 0)
    return pre_NF


def decoded(config: SAEConfig, params: Arrays, code_NF: jax.Array, x_ND: jax.Array) -> jax.Array:
    """What is made of codes, [N, D], with the decoder's bias and where there is one the linear map of the inputs."""
    if isinstance(config, GBASAE):
        return (code_NF * params["scale_F"]) @ unit_rows(params["w_dec_FD"]) + params["b_dec_D"]
    if isinstance(config, TopKSAE):
        code_NF = code_NF * config.output_scale
    made_ND = code_NF @ params["w_dec_FD"] + params["b_dec_D"]
    return made_ND + x_ND @ params["w_skip_DD"] if "w_skip_DD" in params else made_ND


def gate_loss(params: Arrays, gate_NF: jax.Array, x_ND: jax.Array, y_ND: jax.Array) -> jax.Array:
    """How well the gate alone would do: mean of `|y - decode(ReLU(pi))|^2`, a decoder without gradient.

    Args:
      gate_NF: ReLU(pi).

    Source: the auxiliary loss of arXiv 2404.16014.
    """
    frozen = jax.lax.stop_gradient({name: x for name, x in params.items() if name in _DECODER})
    made_ND = gate_NF @ frozen["w_dec_FD"] + frozen["b_dec_D"]
    if "w_skip_DD" in frozen:
        made_ND = made_ND + x_ND @ frozen["w_skip_DD"]
    return jnp.mean(jnp.sum(jnp.square(y_ND - made_ND), axis=-1))


_DECODER = ("w_dec_FD", "b_dec_D", "w_skip_DD")


def auxiliary_loss(
    pre_NF: jax.Array, eligible_F: jax.Array, w_dec_FD: jax.Array, residual_ND: jax.Array, aux_k: int
) -> jax.Array:
    """How badly the `aux_k` largest codes among eligible (dead) features explain the residual; a float32 scalar.

    `sum |E - Ehat|^2 / sum |E - mean(E)|^2`, E the residual without gradient, Ehat decoded without bias; 0 where no
    feature is eligible.

    Source: aux_k of Gao et al. (arXiv 2406.04093), appendix A.2.
    """
    residual_ND = jax.lax.stop_gradient(residual_ND)
    codes_NF = jnp.where(eligible_F, jax.nn.relu(pre_NF), -1)
    best_NK, index_NK = jax.lax.top_k(codes_NF, aux_k)
    code_NF = jnp.zeros_like(codes_NF).at[jnp.arange(len(pre_NF))[:, None], index_NK].set(jax.nn.relu(best_NK))
    error = jnp.sum(jnp.square(residual_ND - code_NF @ w_dec_FD))
    spread = jnp.sum(jnp.square(residual_ND - jnp.mean(residual_ND, axis=0)))
    ratio = jnp.where(spread > 0, error / jnp.where(spread > 0, spread, 1), 0)
    return jnp.where(jnp.any(eligible_F), ratio, 0)


def normalised(kind: Normalisation, scale: jax.Array | float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs [..., D] as the autoencoder sees them, and what they were divided by ([..., 1] or a scalar)."""
    if kind == "token":
        divisor = jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    else:
        divisor = jnp.asarray(1.0 if kind == "none" else scale, x.dtype)
    return x / divisor, divisor


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class SparseAutoencoder:
    """A trained autoencoder; a pytree of its arrays."""

    config: SAEConfig
    params: Arrays
    state: Arrays
    """Thresholds or biases, and the scales of inputs and, of a transcoder, of what it makes."""

    def encode(self, x: jax.Array) -> jax.Array:
        """Features [..., F] of activations [..., D]; not normalised activations, as the model has them."""
        inputs, _ = normalised(self.config.normalisation, self.state["input_scale"], self._flat(x))
        return inference_codes(self.config, self.params, self.state, inputs).reshape(*x.shape[:-1], -1)

    def reconstruct(self, x: jax.Array) -> jax.Array:
        """Activations [..., D] put together again from their features; of a transcoder those that it makes of them."""
        inputs, divisor = normalised(self.config.normalisation, self.state["input_scale"], self._flat(x))
        codes = inference_codes(self.config, self.params, self.state, inputs)
        made = decoded(self.config, self.params, codes, inputs)
        if transcodes(self.state):
            _, divisor = normalised(self.config.normalisation, self.state["target_scale"], made)
        return (made * divisor).reshape(*x.shape[:-1], -1).astype(x.dtype)

    def _flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    def tree_flatten(self) -> tuple[tuple[Arrays, Arrays], SAEConfig]:
        return (self.params, self.state), self.config

    @classmethod
    def tree_unflatten(cls, config: SAEConfig, children: Any) -> SparseAutoencoder:
        return cls(config, *children)
