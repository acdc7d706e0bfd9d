"""One training step as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsezoo_jax.evaluation.cross_entropy import count_further_targets, model_loss
from sparsezoo_jax.models.elimination import Elimination, Predictors
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.lora import adapters_of
from sparsezoo_jax.training.norms import norm_metrics, norms_by_layer
from sparsezoo_jax.training.objectives import call_arguments
from sparsezoo_jax.training.optimizer import clip_gradients
from sparsezoo_jax.training.optimizers import is_embedding, is_matrix
from sparsezoo_jax.training.schedules import build_schedule
from sparsezoo_jax.training.state import ModelTemplate, PureDict, TrainState, Variable, map_with_path

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]


class Totals(NamedTuple):
    """Counts of a whole batch, float32, by which its micro-batches are weighed."""

    targets: jax.Array
    """Target tokens."""
    tokens: jax.Array
    """`real_tokens`, at least 1."""
    further_targets: jax.Array
    """Of each module of multi-token prediction, [depths]."""


def real_tokens(batch: Batch) -> jax.Array:
    """Number of tokens that are no padding, over which layers average; float32."""
    return jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)


def build_train_step(
    config: TrainConfig,
    template: ModelTemplate,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    by_layer: bool = False,
    elimination: Elimination | None = None,
) -> TrainStep:
    """The function (state, batch, loss_limit=None, predictors=None) -> (state, metrics); pure.

    It is meant to be jitted, with the state donated.

    The batch is a dict of [B, T] arrays: tokens, targets, segment_ids, positions (int) and mask (bool); B is a multiple
    of `config.accumulation`. Gradients are those of

        (sum of cross-entropy + z_loss * sum of log^2 Z) / target tokens + sum over objectives of coefficient * loss

    over the whole batch, however many micro-batches it is cut into. Auxiliary losses and statistics of micro-batches
    are averaged with their real tokens (of a segment other than 0) as weights: exact for means over real tokens; a loss
    that is not one (a product of averages, as in load balancing) is taken within each micro-batch. The loss of
    multi-token prediction is that of the whole batch's targets; other losses and statistics of its modules are means
    over the tokens of the micro-batch that have a token ahead.

    The model is called in training mode (`model.train()`). What it returns as `observed` is averaged like statistics
    and given, with a key of this step, to its method `after_step`, after the optimizer's update. That may change
    parameters too (dead neurons); moments of the optimizer stay as they are.

    With `config.keep_zeros` weights of matrices that are 0 stay 0, whatever moves the others.

    With `config.lora` the parameters of the state are adapters, and gradients, updates and norms are theirs; parameters
    that do not train themselves, `after_step` does not change either.

    With `elimination` layers leave out blocks of tokens, by `predictors` where these are given (`training.lemo`).

    If loss or gradient norm is not finite, or the loss above `loss_limit` (a scalar), parameters, optimizer, objectives
    and model state stay as they are and the step is counted in `skipped`.

    Metrics are float32 scalars: `loss` (nats a target token), `z_loss` (mean log^2 Z), `losses/<name>` (unweighted),
    `coefficients/<name>`, what objectives add to the model's call by name (`density_eps`), `lr`, `grad_norm` (before
    clipping), `param_norm` (before the step), `tokens` (target tokens), `skipped`, `consecutive_skipped`;
    `grad_norms/<part>` (before clipping) and `update_ratios/<part>` (update to parameters) for the parts of the model;
    and the model's statistics by name, [L]. With `by_layer`, norms of each parameter's layers, too.
    """
    schedule = build_schedule(config.schedule, config.steps)
    count = config.accumulation
    adapters = adapters_of(config.lora, template.parameters)
    trained_parameters = template.parameters if adapters is None else adapters.parameters

    def model_of(params: PureDict, frozen: PureDict, model_state: PureDict) -> Any:
        return template.merge(params if adapters is None else adapters.merged(params, frozen), model_state)

    def objective_sum(
        params: PureDict,
        frozen: PureDict,
        model_state: PureDict,
        batch: Batch,
        coefficients: dict[str, jax.Array],
        arguments: dict[str, jax.Array],
        whole: Totals,
        predictors: Predictors | None,
    ):
        model = model_of(params, frozen, model_state)
        model.train()
        share = real_tokens(batch) / whole.tokens
        further = whole.further_targets * share
        rule: Any = {} if elimination is None else {"eliminate": replace(elimination, predictors=predictors)}
        trained, sums, out = model_loss(model, batch, config.loss_chunk, config.z_loss, {**arguments, **rule}, further)
        # Weights of micro-batches add up to the target tokens, by which everything is divided in the end.
        weight = whole.targets * share
        auxiliary = sum((coefficients[name] * out.losses[name] for name in coefficients), jnp.float32(0.0))
        total = trained + weight * auxiliary
        averages = {**{f"losses/{name}": loss for name, loss in out.losses.items()}, **out.stats}
        weighted = {name: weight * value.astype(jnp.float32) for name, value in averages.items()}
        _, model_state = template.split(model)
        metrics = {"loss": sums.cross_entropy_sum, "z_loss": sums.z_sum, **weighted}
        # A model without `after_step` observes nothing.
        observed = jax.tree.map(lambda x: weight * x, getattr(out, "observed", ()))
        return total, (model_state, sums.count, (metrics, observed))

    gradient = jax.grad(objective_sum, has_aux=True)

    def accumulated(
        state: TrainState,
        batch: Batch,
        coefficients: dict[str, jax.Array],
        arguments: dict[str, jax.Array],
        predictors: Predictors | None,
    ):
        """Gradient, target tokens, (metrics, observed), each summed over micro-batches; and the last model state."""
        params, frozen, model_state = state.params, state.frozen, state.model_state
        modules = getattr(model_of(params, frozen, model_state), "mtp", ())
        whole = Totals(
            targets=jnp.sum(batch["mask"], dtype=jnp.float32),
            tokens=jnp.maximum(real_tokens(batch), 1),
            further_targets=count_further_targets(batch, len(modules)),
        )
        if count == 1:
            grads, (model_state, tokens, metrics) = gradient(
                params, frozen, model_state, batch, coefficients, arguments, whole, predictors
            )
            return grads, model_state, tokens, metrics
        # Row i goes to micro-batch i % count: a batch sharded over devices stays sharded, without communication.
        micro = {k: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}

        def body(carry: Any, batch: Batch):
            grads, model_state, tokens, metrics = carry
            new_grads, (model_state, new_tokens, new_metrics) = gradient(
                params, frozen, model_state, batch, coefficients, arguments, whole, predictors
            )
            # Sums are float32 also for bfloat16 parameters.
            sums = jax.tree.map(
                lambda a, b: a + b.astype(a.dtype), (grads, tokens, metrics), (new_grads, new_tokens, new_metrics)
            )
            return (sums[0], model_state, sums[1], sums[2]), None

        first = {name: x[0] for name, x in micro.items()}
        shapes = jax.eval_shape(
            gradient, params, frozen, model_state, first, coefficients, arguments, whole, predictors
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (shapes[0], shapes[1][1], shapes[1][2]))
        (grads, model_state, tokens, metrics), _ = jax.lax.scan(
            body, (zeros[0], model_state, zeros[1], zeros[2]), micro
        )
        return grads, model_state, tokens, metrics

    def train_step(
        state: TrainState,
        batch: Batch,
        loss_limit: jax.Array | None = None,
        predictors: Predictors | None = None,
    ) -> tuple[TrainState, Metrics]:
        coefficients = {
            objective.loss: objective.coefficient(objective_state, state.step)
            for objective, objective_state in zip(config.objectives, state.objectives, strict=True)
        }
        arguments = call_arguments(config.objectives, state.step)
        grads, model_state, tokens, sums = accumulated(state, batch, coefficients, arguments, predictors)
        total = jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / total, grads)
        metrics, observed = jax.tree.map(lambda value: value / total, sums)
        raw_grads = grads
        with jax.named_scope("optimizer"):
            grads, grad_norm = clip_gradients(grads, config)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        objectives = tuple(
            objective.update(objective_state, metrics, state.step)
            for objective, objective_state in zip(config.objectives, state.objectives, strict=True)
        )

        trained = [
            metrics["loss"],
            grad_norm,
            *(coefficients[name] * metrics[f"losses/{name}"] for name in coefficients),
        ]
        good = jnp.all(jnp.isfinite(jnp.stack(trained)))
        if loss_limit is not None:
            good &= metrics["loss"] <= loss_limit
        norms = norm_metrics(raw_grads, state.params, updates)
        if by_layer:
            stacked = {path: len(v.shape) - len(v.axes or v.shape) for path, v in trained_parameters.items()}
            norms |= norms_by_layer("grad_norms_by_layer", raw_grads, stacked)
            norms |= norms_by_layer("param_norms_by_layer", state.params, stacked)
            norms |= norms_by_layer("update_norms_by_layer", updates, stacked)
        with jax.named_scope("optimizer"):
            params: Any = optax.apply_updates(state.params, updates)
        if jax.tree.leaves(observed):
            model = model_of(params, state.frozen, model_state)
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            model.after_step(jax.lax.stop_gradient(observed), key)
            moved, model_state = template.split(model)
            params = moved if adapters is None else adapters.divided(moved, params)[0]
        if config.keep_zeros:
            params = _with_zeros_of(state.params, params, trained_parameters)
        new = (params, model_state, opt_state, objectives)
        old = (state.params, state.model_state, state.opt_state, state.objectives)
        params, model_state, opt_state, objectives = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        bad = 1 - good.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            objectives=objectives,
            skipped=state.skipped + bad,
            consecutive_skipped=(state.consecutive_skipped + bad) * bad,
            frozen=state.frozen,
        )
        metrics |= {f"coefficients/{name}": value for name, value in coefficients.items()} | arguments | norms
        metrics |= {
            "lr": schedule(state.step),
            "grad_norm": grad_norm,
            "param_norm": optax.global_norm(state.params),
            "tokens": tokens,
            "skipped": new_state.skipped,
            "consecutive_skipped": new_state.consecutive_skipped,
        }
        return new_state, metrics

    return train_step


def _with_zeros_of(before: PureDict, after: PureDict, variables: Mapping[str, Variable]) -> PureDict:
    """`after` with zeros where matrices of `before` have them; embeddings are not among them."""

    def kept(path: str, old: jax.Array, new: jax.Array) -> jax.Array:
        variable = variables[path]
        return jnp.where(old == 0, old, new) if is_matrix(variable) and not is_embedding(variable) else new

    return map_with_path(kept, before, after)
