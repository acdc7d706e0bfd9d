"""Learning task after task, and telling the classes of all of them apart.

Shapes: B examples of a batch, N of a task, F hidden features, O units of a later layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsezoo_jax.continual.config import ContinualConfig
from sparsezoo_jax.continual.losses import contrastive_loss, nearest_vote
from sparsezoo_jax.continual.memory import Kept, kept_of
from sparsezoo_jax.continual.network import ContinualNetwork
from sparsezoo_jax.continual.tasks import Outcome, Task
from sparsezoo_jax.continual.units import (
    PLASTIC,
    chosen_units,
    covered_share,
    frozen_units,
    older,
    rewired,
    with_candidates,
)
from sparsezoo_jax.errors import DataError

#: Examples that are read at once where nothing is learnt.
READ = 512


class Learner:
    """A network, the ages of its units, and what it keeps of the tasks that it has learnt.

    Source: SHARP (arXiv 2305.18563) and its authors' code, as far as `ContinualConfig` says; seeds draw connections,
    weights, batches, new connections and what is kept.
    """

    def __init__(self, config: ContinualConfig, image_shape: tuple[int, int, int], classes: int, seed: int = 0):
        self.config = config
        self.network = ContinualNetwork(config, image_shape, classes, nnx.Rngs(seed))
        self.draw = np.random.default_rng(seed)
        self.keys = nnx.Rngs(draws=seed + 1)
        self.ages = [np.full(width, PLASTIC) for width in config.widths]
        self.kept: list[Kept] = []
        self.graphdef, _ = nnx.split(self.network)
        self.optimizer = optax.adam(config.learning_rate)
        self._step = jax.jit(self._updated, static_argnames="from_images")

    @property
    def early_fixed(self) -> bool:
        """Whether the early layers stay as they are, so that the network learns from what they make of images."""
        return self.config.replay == "hidden" and len(self.kept) > 0

    def learn(self, task: Task) -> None:
        """Train on a task of new classes, then keep some of it.

        Raises:
          DataError: the task has no images.
        """
        if len(task.labels) == 0:
            raise DataError("a task has no images to learn from")
        config, fixed = self.config, self.early_fixed
        inputs = self._hidden(task.images) if fixed else task.images
        replayed = self._replayed()
        frozen = self._frozen()
        _, params, rest = nnx.split(self.network, nnx.Param, ...)
        moments = self.optimizer.init(params)
        for phase in range(config.phases):
            for _ in range(config.epochs):
                for x, labels in self._batches(inputs, task.labels, replayed):
                    params, moments, _ = self._step(params, rest, moments, x, labels, frozen, from_images=not fixed)
            nnx.update(self.network, params)
            if config.rewiring:
                self._choose(inputs, phase, from_images=not fixed)
                _, params, rest = nnx.split(self.network, nnx.Param, ...)
        if config.rewiring:
            self.ages = [older(ages) for ages in self.ages]
            self._start_plastic_units_anew()
        if config.replay != "none":
            values = self._hidden(task.images) if config.replay == "hidden" else task.images
            self.kept.append(kept_of(values, task.labels, config.kept, self.draw))

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The class of each image, int [N], among those learnt so far."""
        if self.config.loss == "cross_entropy":
            return np.argmax(self._read(images, _scores), axis=1)
        kept = np.concatenate([self._of_kept(part) for part in self.kept])
        labels = np.concatenate([part.labels for part in self.kept])
        units = self.ages[-1] > PLASTIC if self.config.rewiring else np.ones(self.config.widths[-1], bool)
        return nearest_vote(self._read(images, _last_units), kept, labels, units, self.config.neighbours)

    def _updated(
        self, params: Any, rest: Any, moments: Any, x: jax.Array, labels: jax.Array, frozen: Any, *, from_images: bool
    ) -> tuple[Any, Any, jax.Array]:
        """Parameters and moments after a step, and the loss."""
        config = self.config

        def loss_of(params: Any) -> jax.Array:
            network = nnx.merge(self.graphdef, params, rest)
            units = network.units(network.hidden(x) if from_images else x)[-1]
            if config.loss == "contrastive":
                return contrastive_loss(units, labels, config.temperature)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(_head(network, units), labels))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, moments = self.optimizer.update(gradients, moments, params)
        network, new = (nnx.merge(self.graphdef, each, rest) for each in (params, optax.apply_updates(params, updates)))
        for before, after, frozen_O in zip(network.later, new.later, frozen, strict=True):
            # Zeroed gradients would not do: moments of earlier steps move weights as well.
            after.weight[...] = jnp.where(frozen_O, before.weight[...], after.weight[...])
            after.bias[...] = jnp.where(frozen_O, before.bias[...], after.bias[...])
        return nnx.split(new, nnx.Param, ...)[1], moments, loss

    def _frozen(self) -> list[np.ndarray]:
        tasks = len(self.kept) if self.config.replayed_tasks is None else self.config.replayed_tasks
        if not self.config.freezing:
            return [np.zeros(len(ages), bool) for ages in self.ages]
        return [frozen_units(ages, tasks) for ages in self.ages]

    def _replayed(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Kept examples that are shown again, as the network reads them; None where there are none."""
        tasks = self.config.replayed_tasks
        parts = self.kept if tasks is None else self.kept[-tasks:]
        if not parts:
            return None
        return np.concatenate([part.values for part in parts]), np.concatenate([part.labels for part in parts])

    def _batches(
        self, inputs: np.ndarray, labels: np.ndarray, replayed: tuple[np.ndarray, np.ndarray] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of one epoch of a task, in another order each time; what is left over is left out."""
        size = self.config.batch_size
        again = 0 if replayed is None else round(size * self.config.replayed_share)
        new = min(size - again, len(labels))
        order = self.draw.permutation(len(labels))
        for start in range(0, len(order) - new + 1, new):
            chosen = order[start : start + new]
            x, y = inputs[chosen], labels[chosen]
            if replayed is not None:
                shown = self.draw.integers(0, len(replayed[1]), again)
                x, y = np.concatenate([x, replayed[0][shown]]), np.concatenate([y, replayed[1][shown]])
            yield x, y

    def _choose(self, inputs: np.ndarray, phase: int, *, from_images: bool) -> None:
        """Choose candidates by what a task activates, and rewire."""
        config = self.config
        share = covered_share(phase, config.cosine_phases, config.least_covered)
        read = _all_units if from_images else _all_units_of_hidden
        activations = np.split(self._read(inputs, read).sum(axis=0), np.cumsum(config.widths)[:-1])
        plastic_inputs = np.zeros(self.network.features, bool)  # the early layers have no ages
        for layer, (module, activation) in enumerate(zip(self.network.later, activations, strict=True)):
            ages = with_candidates(self.ages[layer], chosen_units(activation, share))
            connected, new = rewired(np.asarray(module.connected[...]), plastic_inputs, ages, self.draw)
            module.connected[...] = jnp.asarray(connected)
            module.weight[...] = jnp.where(new, 0, module.weight[...])
            self.ages[layer], plastic_inputs = ages, ages == PLASTIC

    def _start_plastic_units_anew(self) -> None:
        for module, ages in zip(self.network.later, self.ages, strict=True):
            plastic = jnp.asarray(ages == PLASTIC)
            drawn = module.drawn(self.keys.draws(), module.weight.shape)
            module.weight[...] = jnp.where(plastic, drawn, module.weight[...])
            module.bias[...] = jnp.where(plastic, 0, module.bias[...])

    def _hidden(self, images: np.ndarray) -> np.ndarray:
        return self._read(images, _hidden)

    def _of_kept(self, part: Kept) -> np.ndarray:
        return self._read(part.values, _last_units if part.scale is None else _last_units_of_hidden)

    def _read(self, inputs: np.ndarray, function: Any) -> np.ndarray:
        """`function(network, inputs)` by batches of one size, [N, ...]."""
        parts = []
        for start in range(0, len(inputs), READ):
            part = inputs[start : start + READ]
            filled = np.zeros((READ, *part.shape[1:]), part.dtype)
            filled[: len(part)] = part
            parts.append(np.asarray(_call(function, self.network, jnp.asarray(filled)))[: len(part)])
        return np.concatenate(parts)


@partial(nnx.jit, static_argnums=0)
def _call(function: Any, network: ContinualNetwork, inputs: jax.Array) -> jax.Array:
    return function(network, inputs)


def _head(network: ContinualNetwork, units_BO: jax.Array) -> jax.Array:
    assert network.head is not None
    return units_BO @ network.head.effective() + network.head.bias[...]


def _hidden(network: ContinualNetwork, images: jax.Array) -> jax.Array:
    return network.hidden(images)


def _scores(network: ContinualNetwork, images: jax.Array) -> jax.Array:
    return _head(network, network.units(network.hidden(images))[-1])


def _last_units(network: ContinualNetwork, images: jax.Array) -> jax.Array:
    return network.units(network.hidden(images))[-1]


def _last_units_of_hidden(network: ContinualNetwork, hidden_BF: jax.Array) -> jax.Array:
    return network.units(hidden_BF)[-1]


def _all_units(network: ContinualNetwork, images: jax.Array) -> jax.Array:
    return jnp.concatenate(network.units(network.hidden(images)), axis=1)


def _all_units_of_hidden(network: ContinualNetwork, hidden_BF: jax.Array) -> jax.Array:
    return jnp.concatenate(network.units(hidden_BF), axis=1)


def learn(config: ContinualConfig, tasks: Sequence[Task], classes: int, seed: int = 0) -> Outcome:
    """Learn tasks one after another, and test all that were learnt after each of them."""
    learner = Learner(config, tasks[0].images.shape[1:], classes, seed)
    accuracy, densities = np.full((len(tasks), len(tasks)), np.nan), []
    for i, task in enumerate(tasks):
        learner.learn(task)
        densities.append(learner.network.densities())
        for j, earlier in enumerate(tasks[: i + 1]):
            accuracy[i, j] = np.mean(learner.predict(earlier.test_images) == earlier.test_labels)
    return Outcome(accuracy, densities, sum(part.nbytes for part in learner.kept))
