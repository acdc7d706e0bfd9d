"""Training of an autoencoder on batches of activations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsezoo_jax.autoencoders import jump, model
from sparsezoo_jax.autoencoders.bias_adaptation import adapted_biases, assign_groups, target_frequencies
from sparsezoo_jax.autoencoders.config import (
    GBASAE,
    TRANSCODER,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    SAEConfig,
    SAETrainConfig,
    StandardSAE,
    check_pair,
)
from sparsezoo_jax.autoencoders.model import Arrays, SparseAutoencoder
from sparsezoo_jax.autoencoders.selection import whole_budgets, zipf_shares

ANNEAL_VALUES = 10
"""Values of p on its way down, and batches over which the penalty's weight is matched."""
EMA = 0.999
"""Decay of thresholds and densities."""


class Trainer:
    """Trains one autoencoder; `step` takes activations [N, D], N = `train.batch_size`.

    Those of a transcoder are [N, 2 D]: what the FFN reads and, behind it, what it returns.
    """

    def __init__(self, config: SAEConfig, train: SAETrainConfig, first_ND: jax.Array | np.ndarray):
        """Initialise; `first_ND` are activations from which scales and centre are taken.

        Raises:
          ConfigError: a kind that can't be trained at `train.site`.
        """
        check_pair(config, train)
        self.config, self.train, self.steps_made = config, train, 0
        x_ND, y_ND = _inputs_and_targets(train, jnp.asarray(first_ND, jnp.float32))
        scales = {"input_scale": _scale(x_ND)} | ({} if y_ND is None else {"target_scale": _scale(y_ND)})
        self.state = _initial_state(config, train) | scales
        self.params = model.initial_parameters(
            config, jax.random.key(train.seed), *_seen(config, self.state, x_ND, y_ND), skip=train.skip
        )
        self.optimizer = _optimizer(train)
        self.opt_state = self.optimizer.init(self.params)

    def step(self, x_ND: jax.Array | np.ndarray) -> dict[str, jax.Array]:
        """One optimizer step; returns scalars: loss, auxiliary, l0, fvu, dead."""
        self.params, self.opt_state, self.state, metrics = _step(
            self.config, self.train, self.params, self.opt_state, self.state, x_ND
        )
        self.steps_made += 1
        return metrics

    def fit(self, batches: Iterable[jax.Array | np.ndarray]) -> dict[str, float]:
        """Step over `batches` until `train.steps` are made; the last step's metrics."""
        metrics: dict[str, jax.Array] = {}
        for x_ND in batches:
            if self.steps_made >= self.train.steps:
                break
            metrics = self.step(x_ND)
        return {name: float(value) for name, value in metrics.items()}

    @property
    def autoencoder(self) -> SparseAutoencoder:
        """The autoencoder as trained so far."""
        kept = ("input_scale", "target_scale", "threshold_F", "bias_F", "group_F")
        return SparseAutoencoder(self.config, self.params, {k: v for k, v in self.state.items() if k in kept})


def _optimizer(train: SAETrainConfig) -> optax.GradientTransformation:
    rate = optax.linear_schedule(0.0, train.learning_rate, max(train.warmup_steps, 1))
    rate = rate if train.warmup_steps else train.learning_rate
    return optax.chain(optax.clip_by_global_norm(train.grad_clip), optax.adam(rate, b1=0.9, b2=0.999))


def _inputs_and_targets(train: SAETrainConfig, rows_ND: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """What is read, and what is to be made where that is something else."""
    if train.site != TRANSCODER:
        return rows_ND, None
    x_ND, y_ND = jnp.split(rows_ND, 2, axis=-1)
    return x_ND, y_ND


def _scale(x_ND: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x_ND)))


def _seen(
    config: SAEConfig, state: Arrays, x_ND: jax.Array, y_ND: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Inputs and targets as the autoencoder sees them."""
    x_ND, _ = model.normalised(config.normalisation, state["input_scale"], x_ND)
    return x_ND, None if y_ND is None else model.normalised(config.normalisation, state["target_scale"], y_ND)[0]


def _initial_state(config: SAEConfig, train: SAETrainConfig) -> Arrays:
    f = config.features
    state: dict[str, Any] = {
        "step": jnp.int32(0),
        "silent_F": jnp.zeros(f),  # tokens since each feature fired
        "density_F": jnp.zeros(f),
    }
    if isinstance(config, StandardSAE | GatedSAE):
        state |= {"penalty": jnp.float32(config.penalty), "p_index": jnp.int32(0)}
        state |= {"powers_2Q": jnp.zeros((2, ANNEAL_VALUES))}
    if isinstance(config, BatchTopKSAE | FeatureChoiceSAE):
        state |= {"threshold_F": jnp.zeros(f)}
    if isinstance(config, FeatureChoiceSAE):
        state |= {"choosing": jnp.int32(0), "budgets_F": jnp.zeros(f, jnp.int32)}
    if isinstance(config, GBASAE):
        groups = jnp.asarray(assign_groups(f, config.groups, train.seed))
        state |= {"bias_F": jnp.zeros(f), "group_F": groups, "fired_F": jnp.zeros(f), "largest_F": jnp.zeros(f)}
    return state


def anneal_powers(config: StandardSAE | GatedSAE) -> jax.Array:
    """The values that p takes one after another, [10] from 1 to `anneal_end`."""
    return jnp.linspace(1.0, config.anneal_end, ANNEAL_VALUES)


def matched_penalty(penalty: jax.Array, old_Q: jax.Array, new_Q: jax.Array) -> jax.Array:
    """The weight with which the next power's penalty weighs as much as this one's, over a queue of batches."""
    return penalty * jnp.mean(old_Q) / jnp.maximum(jnp.mean(new_Q), 1e-20)


@partial(jax.jit, static_argnums=(0, 1))
def _step(config: SAEConfig, train: SAETrainConfig, params: Arrays, opt_state: Any, state: Arrays, x_ND: jax.Array):
    x_ND, y_ND = _seen(config, state, *_inputs_and_targets(train, x_ND.astype(jnp.float32)))
    state = _before(config, train, state, len(x_ND))
    loss = partial(_loss, config, train)
    gradients, (codes, metrics, powers) = jax.grad(loss, has_aux=True)(params, state, x_ND, y_ND)
    if not isinstance(config, GBASAE):
        # Growth along a row is undone by the normalisation below: only turning counts, for Adam's moments too.
        rows, g = params["w_dec_FD"], gradients["w_dec_FD"]
        gradients["w_dec_FD"] = g - jnp.sum(g * rows, axis=-1, keepdims=True) * rows
    updates, opt_state = _optimizer(train).update(gradients, opt_state, params)
    moved: Any = optax.apply_updates(params, updates)
    moved = moved | {"w_dec_FD": model.unit_rows(moved["w_dec_FD"])}
    if isinstance(config, JumpReLUSAE):
        moved["threshold_F"] = jnp.maximum(moved["threshold_F"], 0)
    state = _after(config, train, state, codes, powers, len(x_ND))
    return moved, opt_state, state, metrics | {"dead": jnp.sum(state["silent_F"] >= train.dead_after)}


def _loss(
    config: SAEConfig, train: SAETrainConfig, params: Arrays, state: Arrays, x_ND: jax.Array, y_ND: jax.Array | None
):
    wanted_ND = x_ND if y_ND is None else y_ND
    codes = model.training_codes(config, params, state, x_ND)
    residual_ND = wanted_ND - model.decoded(config, params, codes.code_NF, x_ND)
    squared = jnp.mean(jnp.sum(jnp.square(residual_ND), axis=-1))
    auxiliary, powers = jnp.float32(0), jnp.zeros(2)
    warm = jnp.minimum(1.0, (state["step"] + 1) / max(train.warmup_steps, 1))
    if isinstance(config, GBASAE):
        squared = squared / 2
    elif isinstance(config, StandardSAE | GatedSAE):
        values = anneal_powers(config)
        now, following = (values[jnp.minimum(state["p_index"] + i, ANNEAL_VALUES - 1)] for i in (0, 1))
        penalised_NF = codes.pre_NF if isinstance(config, GatedSAE) else codes.code_NF
        powers = jnp.stack([_power_sum(penalised_NF, p) for p in (now, following)])
        auxiliary = state["penalty"] * warm * powers[0]
        if isinstance(config, GatedSAE):
            auxiliary += model.gate_loss(params, codes.pre_NF, x_ND, wanted_ND)
    elif isinstance(config, JumpReLUSAE):
        auxiliary = config.penalty * warm * count_loss(codes.pre_NF, params["threshold_F"], config)
    else:
        aux_k = max(1, x_ND.shape[1] // 2) if config.aux_k is None else config.aux_k
        auxiliary = config.aux_weight * model.auxiliary_loss(
            codes.pre_NF,
            _eligible(config, train, state),
            params["w_dec_FD"],
            residual_ND,
            min(aux_k, config.features),
        )
    spread = jnp.mean(jnp.sum(jnp.square(wanted_ND - jnp.mean(wanted_ND, axis=0)), axis=-1))
    error = jnp.mean(jnp.sum(jnp.square(residual_ND), axis=-1))
    metrics = {
        "loss": squared + auxiliary,
        "auxiliary": auxiliary,
        "l0": jnp.mean(jnp.sum(codes.code_NF > 0, axis=-1, dtype=jnp.float32)),
        "fvu": error / jnp.maximum(spread, 1e-20),
    }
    return squared + auxiliary, (codes, metrics, jax.lax.stop_gradient(powers))


def count_loss(raw_NF: jax.Array, threshold_F: jax.Array, config: JumpReLUSAE) -> jax.Array:
    """Features of a token, mean L0 over the batch, or with `target_l0` (L0 / target_l0 - 1)^2 (arXiv 2407.14435).

    Args:
      raw_NF: pre-activations.
    """
    l0 = jnp.mean(jnp.sum(jump.step(raw_NF, threshold_F, config.bandwidth), axis=-1))
    return l0 if config.target_l0 is None else jnp.square(l0 / config.target_l0 - 1)


def _power_sum(code_NF: jax.Array, p: jax.Array) -> jax.Array:
    """Mean over tokens of `sum_j f_j^p` over the features that fire."""
    fires = code_NF > 0
    # The power's derivative is infinite at 0, so features that don't fire must not reach it.
    return jnp.mean(jnp.sum(jnp.where(fires, jnp.where(fires, code_NF, 1.0) ** p, 0), axis=-1))


def _eligible(config: Any, train: SAETrainConfig, state: Arrays) -> jax.Array:
    """Features of the auxiliary loss: dead ones, or those below the density that a Zipf law gives their rank."""
    if isinstance(config, FeatureChoiceSAE) and config.aux == "zipf_proposed":
        return dying_features(state["density_F"], config.k, config.zipf_exponent, config.zipf_offset)
    return state["silent_F"] >= train.dead_after


def dying_features(density_F: jax.Array, k: float, exponent: float = 1.0, offset: float = 0.0) -> jax.Array:
    """True for features whose density is below the one that the law gives to their rank, k times its share."""
    expected = jnp.asarray(k * zipf_shares(len(density_F), exponent, offset), density_F.dtype)
    return density_F < expected[_ranks(density_F)]


def _ranks(density_F: jax.Array) -> jax.Array:
    """Rank of each feature by density, the densest 0."""
    return jnp.argsort(jnp.argsort(-density_F, stable=True))


def _before(config: SAEConfig, train: SAETrainConfig, state: Arrays, tokens: int) -> Arrays:
    """State on which this step's choices depend."""
    if not isinstance(config, FeatureChoiceSAE):
        return state
    f = config.features
    law = zipf_shares(f, config.zipf_exponent, config.zipf_offset) if config.budget == "zipf" else zipf_shares(f, 0.0)
    by_rank = jnp.asarray(whole_budgets(law, config.k * tokens, tokens))
    choosing = state["step"] >= round(config.mutual_choice * train.steps)
    return state | {"choosing": choosing.astype(jnp.int32), "budgets_F": by_rank[_ranks(state["density_F"])]}


def _after(config: SAEConfig, train: SAETrainConfig, state: Arrays, codes: Any, powers: jax.Array, tokens: int):
    fires_NF = codes.code_NF > 0
    fired_F = jnp.sum(fires_NF, axis=0, dtype=jnp.float32)
    # As in Adam the average is that of the steps made, not of an earlier zero.
    weight = jnp.maximum(1 - EMA, 1 / (state["step"] + 1))
    new = state | {
        "step": state["step"] + 1,
        "silent_F": jnp.where(fired_F > 0, 0, state["silent_F"] + tokens),
        "density_F": state["density_F"] + weight * (fired_F / tokens - state["density_F"]),
    }
    if isinstance(config, BatchTopKSAE | FeatureChoiceSAE):
        smallest_F = jnp.min(jnp.where(fires_NF, codes.code_NF, jnp.inf), axis=0)
        everywhere = jnp.broadcast_to(jnp.min(smallest_F), smallest_F.shape)
        if isinstance(config, FeatureChoiceSAE):
            smallest_F = jnp.where(state["choosing"] > 0, smallest_F, everywhere)
            # When features begin to choose, thresholds of all begin anew.
            first = round(config.mutual_choice * train.steps)
            since = state["step"] - jnp.where(state["choosing"] > 0, first, 0)
            weight = jnp.maximum(1 - EMA, 1 / (since + 1))
        else:
            smallest_F = everywhere
        moved = state["threshold_F"] + weight * (smallest_F - state["threshold_F"])
        new["threshold_F"] = jnp.where(jnp.isfinite(smallest_F), moved, state["threshold_F"])
    if isinstance(config, StandardSAE | GatedSAE) and config.anneal_start is not None:
        new |= _annealed(config, train, new, powers)
    if isinstance(config, GBASAE):
        new |= _adapted(config, new, codes.pre_NF, tokens)
    return new


def _annealed(config: StandardSAE | GatedSAE, train: SAETrainConfig, state: Arrays, powers: jax.Array) -> Arrays:
    start = config.anneal_start or 0
    queue = jnp.roll(state["powers_2Q"], 1, axis=1).at[:, 0].set(powers)
    interval = max((train.steps - start) // ANNEAL_VALUES, ANNEAL_VALUES)
    wanted = jnp.clip((state["step"] - start) // interval, 0, ANNEAL_VALUES - 1)
    moves = wanted > state["p_index"]
    return {
        "powers_2Q": queue,
        "p_index": jnp.maximum(wanted, state["p_index"]).astype(jnp.int32),
        "penalty": jnp.where(moves, matched_penalty(state["penalty"], queue[0], queue[1]), state["penalty"]),
    }


def _adapted(config: GBASAE, state: Arrays, pre_NF: jax.Array, tokens: int) -> Arrays:
    fired_F = state["fired_F"] + jnp.sum(pre_NF > 0, axis=0, dtype=jnp.float32)
    largest_F = jnp.maximum(state["largest_F"], jnp.max(pre_NF, axis=0))
    target_G = jnp.asarray(target_frequencies(config.groups, config.highest, config.lowest), jnp.float32)
    bias_F = adapted_biases(
        state["bias_F"],
        fired_F / (config.interval * tokens),
        largest_F,
        state["group_F"],
        target_G,
        decrease=config.decrease,
        increase=config.increase,
        silent=config.silent,
    )
    due = state["step"] % config.interval == 0
    return {
        "bias_F": jnp.where(due, bias_F, state["bias_F"]),
        "fired_F": jnp.where(due, 0, fired_F),
        "largest_F": jnp.where(due, 0, largest_F),
    }
