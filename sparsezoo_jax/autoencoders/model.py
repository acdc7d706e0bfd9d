"""The autoencoder as functions of its parameters: codes, reconstruction, losses.

Shape letters: N tokens, D width of the activations, F features. Rows of `w_dec_FD` have unit norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sparsezoo_jax.autoencoders import selection
from sparsezoo_jax.autoencoders.config import (
    GBASAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
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
    """ReLU of the pre-activations; for gba the pre-activations themselves, bias included."""
    kept_NF: jax.Array
    """True where the code is kept."""
    code_NF: jax.Array
    """The codes, 0 where they are not kept."""


def unit_rows(w: jax.Array) -> jax.Array:
    """`w` with rows of norm 1."""
    return w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-12)


def initial_parameters(config: SAEConfig, key: jax.Array, x_ND: jax.Array) -> Arrays:
    """Encoder = transposed decoder with random unit rows; the decoder's bias is the geometric median of `x_ND`."""
    w_FD = unit_rows(jax.random.normal(key, (config.features, x_ND.shape[1])))
    params = {"w_dec_FD": w_FD, "b_dec_D": geometric_median(x_ND)}
    if config.kind == "gba":
        return params | {"scale_F": jnp.ones(config.features)}
    if isinstance(config, TopKSAE) and config.tied:
        return params
    return params | {"w_enc_DF": w_FD.T, "b_enc_F": jnp.zeros(config.features)}


def geometric_median(x_ND: jax.Array, rounds: int = 50) -> jax.Array:
    """The point of least total distance to the rows of `x_ND`, by Weiszfeld's iteration, [D]."""

    def step(_, point_D):
        weight_N = 1 / jnp.maximum(jnp.linalg.norm(x_ND - point_D, axis=-1), 1e-6)
        return weight_N @ x_ND / jnp.sum(weight_N)

    return jax.lax.fori_loop(0, rounds, step, jnp.mean(x_ND, axis=0))


def pre_activations(config: SAEConfig, params: Arrays, state: Arrays, x_ND: jax.Array) -> jax.Array:
    """`(x - b_dec) W_enc + b_enc`, [N, F]; for gba with the decoder's rows and biases that get no gradient.

    Tied encoders of other kinds have no bias.
    """
    centred = x_ND - params["b_dec_D"]
    if isinstance(config, GBASAE):
        return centred @ unit_rows(params["w_dec_FD"]).T + jax.lax.stop_gradient(state["bias_F"])
    if isinstance(config, TopKSAE) and config.tied:
        return centred @ params["w_dec_FD"].T
    return centred @ params["w_enc_DF"] + params["b_enc_F"]


def training_codes(config: SAEConfig, params: Arrays, state: Arrays, x_ND: jax.Array) -> Codes:
    """Codes of a training batch, whose tokens may compete for features.

    Feature Choice is mutual while `state["choosing"]` is 0.
    """
    raw_NF = pre_activations(config, params, state, x_ND)
    if isinstance(config, GBASAE):
        return _biased(config, state, raw_NF)
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


def inference_codes(config: SAEConfig, params: Arrays, state: Arrays, x_ND: jax.Array) -> jax.Array:
    """Codes [N, F] that depend on their own token only: where tokens competed, thresholds stand for the others."""
    raw_NF = pre_activations(config, params, state, x_ND)
    if isinstance(config, GBASAE):
        return _biased(config, state, raw_NF).code_NF
    pre_NF = jax.nn.relu(raw_NF)
    if isinstance(config, TopKSAE):
        return jnp.where(selection.token_choice(pre_NF, config.k), pre_NF, 0)
    if isinstance(config, BatchTopKSAE | FeatureChoiceSAE):
        return jnp.where(pre_NF > state["threshold_F"], pre_NF, 0)
    return pre_NF


def decoded(config: SAEConfig, params: Arrays, code_NF: jax.Array) -> jax.Array:
    """The reconstruction without the decoder's bias, [N, D]."""
    if isinstance(config, GBASAE):
        return (code_NF * params["scale_F"]) @ unit_rows(params["w_dec_FD"])
    if isinstance(config, TopKSAE):
        code_NF = code_NF * config.output_scale
    return code_NF @ params["w_dec_FD"]


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
    """Thresholds or biases, and the inputs' scale."""

    def encode(self, x: jax.Array) -> jax.Array:
        """Features [..., F] of activations [..., D]; not normalised activations, as the model has them."""
        inputs, _ = normalised(self.config.normalisation, self.state["input_scale"], self._flat(x))
        return inference_codes(self.config, self.params, self.state, inputs).reshape(*x.shape[:-1], -1)

    def reconstruct(self, x: jax.Array) -> jax.Array:
        """Activations [..., D] put together again from their features."""
        inputs, divisor = normalised(self.config.normalisation, self.state["input_scale"], self._flat(x))
        codes = inference_codes(self.config, self.params, self.state, inputs)
        made = decoded(self.config, self.params, codes) + self.params["b_dec_D"]
        return (made * divisor).reshape(x.shape).astype(x.dtype)

    def _flat(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    def tree_flatten(self) -> tuple[tuple[Arrays, Arrays], SAEConfig]:
        return (self.params, self.state), self.config

    @classmethod
    def tree_unflatten(cls, config: SAEConfig, children: Any) -> SparseAutoencoder:
        return cls(config, *children)
