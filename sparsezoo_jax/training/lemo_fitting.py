"""What is measured for fine-tuning that leaves out blocks of tokens, before its first step (`training.lemo`).

Shape letters as in `models.elimination`, and S sequences.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.elimination import (
    BLOCK_INPUTS,
    BLOCK_SCORES,
    FFN_IMPORTANCE,
    Elimination,
    Network,
    pairs_of_blocks,
    predicted_importance,
    predicted_scores,
)
from sparsezoo_jax.sharding import device_put
from sparsezoo_jax.training.lemo import FILE, SUBLAYERS, Fitted, LeMoConfig, PredictorConfig, read_fitted
from sparsezoo_jax.training.state import ModelTemplate, Placement, flatten, nested
from sparsezoo_jax.training.warm_start import WarmStart

Batch = Mapping[str, Any]


class Observed(NamedTuple):
    """What layers make of some sequences; S sequences, L layers."""

    means: np.ndarray
    """float32 [L, 2, S, n, D]: mean inputs of blocks, of attention and FFN."""
    scores: np.ndarray
    """float32 [L, S, m, n]: of attention."""
    ffn: np.ndarray
    """float32 [L, S, n]: importance to FFNs."""
    segments: np.ndarray
    """int32 [S, T]."""

    def importance(self, name: str) -> np.ndarray:
        """Of blocks, float32 [L, S, n]."""
        return self.scores.sum(axis=2) if name == "attention" else self.ffn

    def part(self, sequences: slice) -> Observed:
        """Of some of the sequences."""
        own = (self.means[:, :, sequences], self.scores[:, sequences], self.ffn[:, sequences])
        return Observed(*own, self.segments[sequences])

    def valid(self, block: int) -> np.ndarray:
        """Blocks that have tokens, bool [S, n]."""
        sequences, length = self.segments.shape
        return np.any(self.segments.reshape(sequences, length // block, block) > 0, axis=-1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _observed(graphdef: nnx.GraphDef, block: int, pairs: Any, state: Any, batch: Batch) -> dict[str, jax.Array]:
    rule = Elimination(block=block, kept={}, pairs=pairs, observes=True)
    out = nnx.merge(graphdef, state)(
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        logits=False,
        eliminate=rule,
    )
    return {name: jnp.stack(out.records[name]) for name in (BLOCK_INPUTS, BLOCK_SCORES, FFN_IMPORTANCE)}


def observe(config: LeMoConfig, model: nnx.Module, batches: Iterable[Batch]) -> Observed:
    """What the layers of a dense model make of batches: dicts of [B, T] arrays tokens, segment_ids and positions."""
    graphdef, state = nnx.split(model)
    names = ("tokens", "segment_ids", "positions")
    found, segments = [], []
    for batch in batches:
        arrays = {name: batch[name] for name in names}
        found.append(jax.device_get(_observed(graphdef, config.block, config.pairs, state, arrays)))
        segments.append(np.asarray(batch["segment_ids"]))
    means, scores, ffn = (
        np.concatenate([part[name] for part in found], axis=axis)
        for name, axis in ((BLOCK_INPUTS, 2), (BLOCK_SCORES, 1), (FFN_IMPORTANCE, 1))
    )
    return Observed(means, scores, ffn, np.concatenate(segments))


def mean_importance(observed: Observed, block: int) -> dict[str, np.ndarray]:
    """Mean importance of the blocks of each layer, by sublayer [L]: thresholds as LeMo begins with them."""
    valid_Sn = observed.valid(block)
    return {name: observed.importance(name)[:, valid_Sn].mean(axis=1) for name in SUBLAYERS}


def capacities(observed: Observed, block: int, thresholds: Mapping[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
    """Share of all blocks whose importance is above the threshold of their layer, by sublayer."""
    valid_Sn = observed.valid(block)
    found = {}
    for name in SUBLAYERS:
        above_LSn = (observed.importance(name) > thresholds[name][:, None, None]) & valid_Sn
        found[name] = tuple(float(x) for x in above_LSn.sum(axis=(1, 2)) / valid_Sn.sum())
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _right(
    graphdef: nnx.GraphDef, block: int, pairs: Any, state: Any, batch: Batch, thresholds: Any
) -> tuple[jax.Array, jax.Array]:
    rule = Elimination(block=block, kept={}, pairs=pairs, thresholds=thresholds)
    out = nnx.merge(graphdef, state)(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], eliminate=rule
    )
    right_BT = jnp.argmax(out.logits, axis=-1) == batch["targets"]
    return jnp.sum(right_BT & batch["mask"]), jnp.sum(batch["mask"])


def ascended(
    config: LeMoConfig,
    accuracy: Callable[[Mapping[str, np.ndarray]], float],
    means: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Thresholds by sublayer [L] after `config.ascent.rounds` moves from `means`, in whose units they are moved."""
    units = {name: np.ones(len(own)) for name, own in means.items()}
    probe = config.ascent.probe

    def at(name: str, layer: int, by: float) -> float:
        moved = {other: np.array(own) for other, own in units.items()}
        moved[name][layer] += by
        return accuracy({other: np.asarray(means[other] * moved[other], np.float32) for other in means})

    for _ in range(config.ascent.rounds):
        slopes = {
            name: np.array([(at(name, i, probe) - at(name, i, -probe)) / (2 * probe) for i in range(len(own))])
            for name, own in units.items()
        }
        units = {name: own + config.ascent.rate * slopes[name] for name, own in units.items()}
    return {name: means[name] * own for name, own in units.items()}


def fit(config: LeMoConfig, model: nnx.Module, batches: Iterable[Batch], seed: int = 0) -> Fitted:
    """Measure capacities, and fit predictors where the configuration asks for them.

    Args:
      model: the dense model, whose adapters add nothing yet.
      batches: `config.predictor.batches` of them, of [B, T] arrays by name.
      seed: of the networks' first weights.
    """
    held_batches = list(batches)
    observed = observe(config, model, held_batches)
    graphdef, state = nnx.split(model)

    def accuracy(thresholds: Mapping[str, np.ndarray]) -> float:
        counts = [_right(graphdef, config.block, config.pairs, state, batch, thresholds) for batch in held_batches]
        right, targets = (sum(int(x) for x in counted) for counted in zip(*counts, strict=True))
        return right / max(targets, 1)

    thresholds = ascended(config, accuracy, mean_importance(observed, config.block))
    capacity = capacities(observed, config.block, thresholds)
    if config.scores == "exact":
        return Fitted(capacity)
    # The last of equal batches is held out.
    last = len(observed.segments) // config.predictor.batches
    fitted_to, held = (observed.part(own) for own in (slice(None, -last), slice(-last, None)))
    predictors = fit_predictors(config, fitted_to, jax.random.key(seed))
    elimination = config.elimination(observed.segments.shape[1], Fitted(capacity))
    assert elimination is not None
    recall = {name: recalls(config, predictors, held, name, elimination) for name in SUBLAYERS}
    return Fitted(capacity, predictors, recall)


def new_network(key: jax.Array, layers: int, width: int, rank: int, outputs: int) -> Network:
    """Networks [L, ...] with normal weights of variance 2 / inputs before non-linearities, 1 / inputs after them."""
    shapes = ((layers, width, rank), (layers, rank, width), (layers, width, outputs))
    keys = jax.random.split(key, 3)
    deviations = ((2 / width) ** 0.5, (2 / rank) ** 0.5, width**-0.5)
    drawn = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    return Network(*(deviation * x for deviation, x in zip(deviations, drawn, strict=True)))


def fit_predictors(config: LeMoConfig, observed: Observed, key: jax.Array) -> dict[str, Any]:
    """Networks of all layers: those of attention by the squared error of the scores of pairs of blocks, those of FFNs
    by that of importance, each in units of the layer's mean.
    """
    layers, width = observed.means.shape[0], observed.means.shape[-1]
    rank = config.predictor.rank or max(width // 8, 1)
    keys = jax.random.split(key, 3)
    segments = jnp.asarray(observed.segments)
    counted = pairs_of_blocks(segments, config.block, config.pairs)
    valid = jnp.asarray(observed.valid(config.block))

    def scores(networks: Any, means_SnD: jax.Array) -> jax.Array:
        return predicted_scores(networks, means_SnD)

    def importance(network: Any, means_SnD: jax.Array) -> jax.Array:
        return network(means_SnD)[..., 0]

    pair = {part: new_network(k, layers, width, rank, rank) for part, k in zip(("query", "key"), keys[:2], strict=True)}
    single = new_network(keys[2], layers, width, rank, 1)
    means = jnp.asarray(observed.means)
    return {
        "attention": _fit(config.predictor, scores, pair, means[:, 0], jnp.asarray(observed.scores), counted, valid),
        "ffn": _fit(config.predictor, importance, single, means[:, 1], jnp.asarray(observed.ffn), valid, valid),
    }


def _fit(
    config: PredictorConfig,
    predict: Callable[[Any, jax.Array], jax.Array],
    networks: Any,
    means_LSnD: jax.Array,
    targets_LS: jax.Array,
    counted_S: jax.Array,
    valid_Sn: jax.Array,
) -> Any:
    """`networks` [L, ...] fitted, and pruned on the way; targets [L, S, ...] count where `counted_S` is true."""
    optimizer = optax.adam(config.rate)
    sizes = jax.tree.leaves(networks, is_leaf=_is_network)[0].middle.shape[1:]
    weight = jnp.maximum(jnp.sum(counted_S), 1)
    axes = tuple(range(1, targets_LS.ndim))
    unit_L = jnp.sum(jnp.where(counted_S, targets_LS, 0), axis=axes, keepdims=True) / weight
    targets_LS = targets_LS / jnp.maximum(unit_L, 1e-30)

    def loss(networks: Any) -> jax.Array:
        errors = jax.vmap(predict)(networks, means_LSnD) - targets_LS
        return jnp.sum(jnp.where(counted_S, jnp.square(errors), 0)) / weight

    @partial(jax.jit, static_argnums=1)
    def fitted(networks: Any, epochs: int) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            networks, state = carry
            updates, state = optimizer.update(jax.grad(loss)(networks), state)
            return (optax.apply_updates(networks, updates), state), None

        return jax.lax.scan(step, (networks, optimizer.init(networks)), length=epochs)[0][0]

    pieces, left = config.prunings + 1 if config.prune else 1, config.epochs
    for i in range(pieces):
        epochs = left // (pieces - i)
        networks, left = fitted(networks, epochs), left - epochs
        if i < pieces - 1:
            kept = 1 - config.prune * (i + 1) / config.prunings
            counts = [max(1, round(kept * size)) for size in sizes]
            networks = jax.tree.map(
                lambda network: pruned_network(network, means_LSnD, valid_Sn, *counts),  # noqa: B023
                networks,
                is_leaf=_is_network,
            )
    return networks


def _is_network(x: Any) -> bool:
    return isinstance(x, Network)


def pruned_network(
    network: Network, means_LSnD: jax.Array, valid_Sn: jax.Array, inner_count: int, outer_count: int
) -> Network:
    """Networks [L, ...] with so many of their neurons: those that are 0 for the fewest blocks ("elastic size")."""

    def most_active(hidden_LSnR: jax.Array, count: int) -> jax.Array:
        zeros_LR = jnp.sum((hidden_LSnR == 0) & valid_Sn[..., None], axis=(1, 2))
        return jnp.sort(jnp.argsort(zeros_LR, axis=-1, stable=True)[:, :count], axis=-1)

    hidden = jax.vmap(Network.hidden)(network, means_LSnD)
    first, second = (most_active(x, n) for x, n in zip(hidden, (inner_count, outer_count), strict=True))
    inner = jnp.take_along_axis(network.inner, first[:, None], axis=2)
    middle = jnp.take_along_axis(network.middle, first[..., None], axis=1)
    middle = jnp.take_along_axis(middle, second[:, None], axis=2)
    return Network(inner, middle, jnp.take_along_axis(network.outer, second[..., None], axis=1))


def recalls(
    config: LeMoConfig, predictors: Mapping[str, Any], observed: Observed, name: Any, elimination: Elimination
) -> tuple[float, ...]:
    """By layer the share of the truly most important blocks among those that predictors choose, as many as are kept."""
    valid_Sn, place = observed.valid(config.block), SUBLAYERS.index(name)
    found = []
    for layer, true_Sn in enumerate(observed.importance(name)):
        own = jax.tree.map(lambda x: x[layer], predictors[name])  # noqa: B023
        means, segments = jnp.asarray(observed.means[layer, place]), jnp.asarray(observed.segments)
        guess_Sn = np.asarray(predicted_importance(own, name, means, segments, config.block, config.pairs))
        kept = elimination.count(name, layer, valid_Sn.shape[1])
        top = [
            np.argsort(-np.where(valid_Sn, x, -np.inf), axis=-1, kind="stable")[:, :kept] for x in (true_Sn, guess_Sn)
        ]
        shares = [len(set(a) & set(b)) / kept for a, b in zip(*top, strict=True)]
        found.append(float(np.mean(shares)))
    return tuple(found)


def fitted_for_run(
    settings: LeMoConfig,
    model: DecoderConfig,
    workdir: Path,
    batches: Callable[[int], Iterable[Any]],
    warm_start: WarmStart,
    place: Placement,
    *,
    seed: int,
    has_steps: bool,
) -> Fitted:
    """What a run needs measured: of one that has begun what it measured then, else by the model that it starts from.

    Args:
      batches: so many of the run's training batches, [B, T] arrays by name.
      place: of arrays by logical axes and shape; its mesh has to be active.
      has_steps: the run in `workdir` has checkpoints.

    Raises:
      ConfigError: several processes, or fewer batches than are asked for.
      StorageError: a run that has steps lacks what it measured, or the other run is damaged.
    """
    if has_steps or (workdir / FILE).exists():
        return read_fitted(workdir / FILE)
    asked = ("train.lemo.profile", True) if settings.profile else ("train.lemo.scores", settings.scores)
    require(jax.process_count() == 1, *asked, "is for one process; several can go on with a run that has begun")
    count = settings.predictor.batches
    read = list(batches(count))
    require(len(read) >= count, "train.lemo.predictor.batches", count, f"must be at most {len(read)}, all there are")
    shape = read[0]["tokens"].shape
    sharding = place(("batch", "length"), shape)
    dense = base_model(model, warm_start, place, seed)
    found = fit(settings, dense, (device_put(batch, sharding, shape) for batch in read), seed)
    for name, shares in found.capacity.items():
        text = f"blocks of {name} above the threshold, by layer: {' '.join(f'{x:.0%}' for x in shares)}"
        if name in found.recall:
            text += f"; of the kept ones predictors find {' '.join(f'{x:.0%}' for x in found.recall[name])}"
        print(text, file=sys.stderr)
    return found


def base_model(config: DecoderConfig, warm_start: WarmStart, place: Placement, seed: int) -> Decoder:
    """The decoder that a run of adapters starts as. New bottlenecks and random streams are its own."""
    template = ModelTemplate(lambda rngs: Decoder(config, rngs=rngs))
    params, variables = jax.jit(lambda: template.split(Decoder(config, rngs=nnx.Rngs(seed))))()
    base, others = warm_start.read(place)
    given = {path: x for path, x in flatten(others).items() if path not in template.streams}
    return template.merge(nested({**flatten(params), **flatten(base)}), nested({**flatten(variables), **given}))
