"""Weights that become 0: scores of weights, and which of them a comparison keeps.

A matrix is taken as W [I, O], `y = x W`: I channels of the input, O outputs; a row of weights that are compared is one
output's. Nothing is trained and no other weight moves.

Sources: magnitude (arXiv 1506.02626), Wanda (arXiv 2306.11695), GBLM-Pruner (arXiv 2311.04902).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import ConfigError, require
from sparsezoo_jax.evaluation.cross_entropy import call_model, token_loss
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.layers import Block
from sparsezoo_jax.models.matrices import block_matrices
from sparsezoo_jax.sharding import constrain
from sparsezoo_jax.sparsification.layers import LayerInputs, Place, layers_of, places_of, walk
from sparsezoo_jax.sparsification.methods import LINEAR_MAPS
from sparsezoo_jax.sparsification.placement import like, placed
from sparsezoo_jax.sparsification.progress import Arrays, Progress, Stage
from sparsezoo_jax.training.state import ModelTemplate, flatten, nested

Compare = Literal["row", "matrix"]
GradientNorm = Literal["l1", "l2"]
#: Methods, and what their weights are compared with as their authors do it.
PRUNING: dict[str, Compare] = {"magnitude": "matrix", "wanda": "row", "gblm": "row"}
#: Among what is kept of a layer, the share of zeros of a map: this and its name; all else are paths of matrices.
_ZEROS = "zeros of "
#: Likewise the numbers of the experts that got too few tokens.
_FEW = "too few tokens of "
#: Of an array of a parameter's shape, for all layers, the entries of one matrix [I, O].
Own = Callable[[np.ndarray], np.ndarray]
#: All maps that can be pruned.
PRUNED_MAPS = LINEAR_MAPS


class Pattern(NamedTuple):
    """At most `kept` weights that are not 0 among `of` of consecutive inputs of an output."""

    kept: int
    of: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.of


def parse_pattern(text: str) -> Pattern | None:
    """The pattern that `--pattern` names; None for unstructured.

    Raises:
      ConfigError: another text.
    """
    if text == "unstructured":
        return None
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    allowed = "must be unstructured, or N:M such as 2:4, N below M of M consecutive inputs kept"
    pattern = Pattern(*map(int, found.groups())) if found else Pattern(0, 0)
    require(0 < pattern.kept < pattern.of, "--pattern", text, allowed)
    return pattern


def weight_scores(
    weight_IO: np.ndarray, norms_I: np.ndarray | None = None, gradients_IO: np.ndarray | None = None, alpha: float = 0.0
) -> np.ndarray:
    """`|W|`; with norms `|W| ||X||` (Wanda); with gradients, too, `|W| ||X|| + alpha |W| G` (GBLM). float32 [I, O].

    Args:
      weight_IO: the matrix.
      norms_I: of each channel of its input, over the calibration text.
      gradients_IO: norms over sequences of the gradients of their mean losses.
      alpha: weight of these.
    """
    magnitude_IO = np.abs(weight_IO.astype(np.float32))
    if norms_I is None:
        return magnitude_IO
    factor_IO = norms_I.astype(np.float32)[:, None]
    return magnitude_IO * (factor_IO if gradients_IO is None else factor_IO + np.float32(alpha) * gradients_IO)


def kept_weights(score_IO: np.ndarray, share: float, compare: Compare, pattern: Pattern | None = None) -> np.ndarray:
    """Which weights stay, bool [I, O].

    Of every output's I weights (or of the matrix's) the floor(share * I) with the lowest scores go; of equal ones the
    first. With a pattern those of each group of consecutive inputs go, whatever the share.

    Raises:
      ConfigError: a pattern whose groups don't divide I.
    """
    inputs, outputs = score_IO.shape
    if pattern is not None:
        require(inputs % pattern.of == 0, "--pattern", f"{pattern.kept}:{pattern.of}", f"must divide {inputs} inputs")
        groups = score_IO.reshape(-1, pattern.of, outputs)
        return _without_lowest(groups, pattern.of - pattern.kept, 1).reshape(score_IO.shape)
    if compare == "row":
        return _without_lowest(score_IO, _count(share, inputs), 0)
    return _without_lowest(score_IO.reshape(-1), _count(share, score_IO.size), 0).reshape(score_IO.shape)


def kept_while_activating(
    score_IO: np.ndarray,
    weight_IO: np.ndarray,
    movement_IO: np.ndarray,
    share: float,
    activate: float,
    compare: Compare,
) -> np.ndarray:
    """As `kept_weights`, but of the share that goes a part `activate` is chosen otherwise, bool [I, O].

    That part is of the negative weights among those left, the ones that moved least; where these are too few, of the
    lowest scores. Negative weights that go let units be 0 for fewer tokens.

    Source: Activate-while-Pruning (arXiv 2212.06145), with q = `activate`.
    """
    if compare == "matrix":
        score, weight, movement = (x.reshape(-1, 1) for x in (score_IO, weight_IO, movement_IO))
        return kept_while_activating(score, weight, movement, share, activate, "row").reshape(score_IO.shape)
    kept_IO = kept_weights(score_IO, share - activate, "row")
    group_IO = np.where(kept_IO, np.where(weight_IO < 0, 1, 2), 0)
    order_IO = np.lexsort((np.where(group_IO == 1, movement_IO, score_IO), group_IO), axis=0)
    np.put_along_axis(kept_IO, order_IO[: _count(share, len(score_IO))], False, axis=0)
    return kept_IO


def _count(share: float, of: int) -> int:
    """floor(share * of), where the product's rounding does not count."""
    return math.floor(share * of + 1e-6)


def _without_lowest(score: np.ndarray, count: int, axis: int) -> np.ndarray:
    kept = np.ones(score.shape, bool)
    lowest = np.take(np.argsort(score, axis=axis, kind="stable"), np.arange(count), axis=axis)
    np.put_along_axis(kept, lowest, False, axis=axis)
    return kept


def gradient_norms(
    model: Decoder,
    batches: Iterable[Mapping[str, Any]],
    paths: Iterable[str],
    norm: GradientNorm,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Of each parameter named, norms over sequences of the gradient of a sequence's mean loss, float32, its shape.

    "l1": sum of magnitudes; "l2": root of the sum of squares. They grow with the number of sequences. All devices of a
    mesh share one sequence after another, and the sums lie on them as the parameters do.

    Args:
      model: the decoder.
      batches: dicts of [B, T] arrays with targets and mask.
      paths: of the parameters, as `training.state.flatten` has them.
      norm: see above.
      progress: what was found before, and where it is kept when all batches are read. None: nowhere.
    """
    progress = Progress() if progress is None else progress
    if (kept := progress.value("gradients")) is not None:
        return kept
    template = ModelTemplate(lambda rngs: Decoder(model.config, rngs=rngs))
    params, variables = template.split(model)
    flat, wanted = flatten(params), set(paths)
    chosen = {path: x for path, x in flat.items() if path in wanted}
    others = {path: x for path, x in flat.items() if path not in wanted}

    def loss(chosen: dict[str, jax.Array], others: dict[str, jax.Array], sequence: dict[str, jax.Array]) -> jax.Array:
        merged = template.merge(nested({**others, **chosen}), variables)
        out = token_loss(call_model(merged, sequence).logits, sequence["targets"], sequence["mask"])
        return out.cross_entropy_sum / jnp.maximum(out.count, 1)

    @partial(jax.jit, donate_argnums=0)
    def added(totals: dict[str, jax.Array], chosen: Any, others: Any, batch: dict[str, jax.Array]) -> Any:
        def body(totals: dict[str, jax.Array], sequence: dict[str, jax.Array]):
            found = jax.grad(loss)(chosen, others, {name: x[None] for name, x in sequence.items()})
            wide = jax.tree.map(lambda g: jnp.abs(g.astype(jnp.float32)), found)
            return jax.tree.map(lambda t, g: t + (g if norm == "l1" else jnp.square(g)), totals, wide), None

        found, _ = jax.lax.scan(body, totals, batch)
        return {path: constrain(total, template.parameters[path].full_axes) for path, total in found.items()}

    totals = {path: like(np.zeros(x.shape, np.float32), x, jnp.float32) for path, x in chosen.items()}
    for batch in batches:
        arrays = {name: batch[name] for name in ("tokens", "segment_ids", "positions", "targets", "mask")}
        totals = jax.block_until_ready(added(totals, chosen, others, arrays))
    found = {path: np.asarray(total) for path, total in totals.items()}
    found = found if norm == "l1" else {path: np.sqrt(total) for path, total in found.items()}
    progress.set_value("gradients", found)
    return found


class Pruned(NamedTuple):
    """A model with weights that are 0."""

    model: Decoder
    zeros: dict[str, list[float]]
    """For each map the share of zeros by layer; NaN where a layer does not have the map."""
    few: dict[str, list[tuple[int, int]]] = {}
    """For each map of experts those, by layer and number, that got too few tokens and were compared without norms."""


def matrix_paths(model: Decoder, maps: tuple[str, ...]) -> list[str]:
    """Paths, as `training.state.flatten` has them, of the matrices of these maps."""
    found = []
    for i, segment in enumerate(model.segments):
        for j, block in enumerate(segment.blocks):
            for name, sublayer, path, _ in block_matrices(block, model.config.d_model):
                if name in maps:
                    found.append(f"segments/{i}/blocks/{j}/{sublayer}/{path}")
    return found


def check_matrices(config: DecoderConfig, taken: Mapping[str, tuple[str, ...]], pattern: Pattern | None) -> None:
    """Raise `ConfigError` for kinds whose matrices are unknown, and for inputs that a pattern does not divide.

    `taken`: maps by field of the configuration, as `conversion.maps_taken` gives them.
    """
    template = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    known = {name for segment in template.segments for block in segment.blocks for name in _names(block, config)}
    for field, maps in taken.items():
        kind = getattr(config, field)
        unknown = ", ".join(name for name in maps if name not in known)
        allowed = f"does not say which matrices its maps {unknown} have (`matrices` of the module)"
        require(not unknown, f"model.{field}.kind", kind.kind, allowed)
        for name, channels in kind.weight_maps(config.d_model).items():
            if name in maps and pattern is not None and channels % pattern.of:
                text = f"{pattern.kept}:{pattern.of}"
                raise ConfigError("--pattern", text, f"must divide the {channels} inputs of the map {name}")


def _names(block: Block, config: DecoderConfig) -> list[str]:
    return [name for name, *_ in block_matrices(block, config.d_model)]


def _matrices(x: np.ndarray, channels: int, axis: int, experts: int) -> np.ndarray:
    """[E, I, O], of an array along one of whose axes so many matrices of I channels lie one after another."""
    apart = x.reshape(*x.shape[:axis], experts, -1, *x.shape[axis + 1 :])
    return np.moveaxis(apart, axis, 0).reshape(experts, channels, -1)


def _together(parts: Sequence[np.ndarray], shape: tuple[int, ...], axis: int, experts: int) -> np.ndarray:
    """The array of this shape that has these matrices."""
    own = (*shape[:axis], shape[axis] // experts, *shape[axis + 1 :])
    return np.moveaxis(np.stack([part.reshape(own) for part in parts]), 0, axis).reshape(shape)


def _own_of(layer: int, lie: tuple[int, int, int], expert: int, x: np.ndarray) -> np.ndarray:
    return _matrices(x[layer], *lie)[expert]


class Earlier(NamedTuple):
    """A model from which the weights came, and what it is for."""

    model: Decoder
    activate: float
    """As in `kept_while_activating`; movements are since this model."""
    rewind: bool
    """All parameters get their values of this model, weights that go aside."""


def prune(
    model: Decoder,
    maps: tuple[str, ...],
    share: float,
    score: Callable[[str, Own, np.ndarray, np.ndarray | None], np.ndarray],
    compare: Compare,
    pattern: Pattern | None,
    batches: Iterable[Mapping[str, Any]] | None,
    earlier: Earlier | None = None,
    stage: Stage | None = None,
) -> Pruned:
    """The model with weights of these maps set to 0, layer by layer: each reads what the pruned ones below it make.

    Args:
      model: the decoder.
      maps: their matrices are pruned, in layers that have them.
      share: of the weights that become 0; see `kept_weights`, as for `compare` and `pattern`.
      score: of a matrix [I, O]: called with the parameter's path, what takes the matrix's entries from an array of all
        layers, the matrix, and the norms of its input's channels [I] (None without batches). Of experts each is one
        matrix; for one that gets less than `layers.FEWEST` tokens the norms are 1.
      batches: the text, as for `layers.walk`; None: the scores don't need any.
      earlier: see `Earlier`.
      stage: where what is found is kept (`layers.layer_by_layer`).
    """
    template = ModelTemplate(lambda rngs: Decoder(model.config, rngs=rngs))
    params, variables = template.split(model)
    flat = flatten(params)
    before = None if earlier is None else flatten(template.split(earlier.model)[0])
    rewinding = earlier is not None and earlier.rewind

    def one(path: str, own_of: Own, weight_IO: np.ndarray, norms_I: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """A matrix without the weights that go, as the next layers read it and as it ends."""
        score_IO = score(path, own_of, weight_IO, norms_I)
        before_IO = None if before is None else own_of(np.asarray(before[path]))
        if earlier is not None and before_IO is not None and earlier.activate:
            movement_IO = np.abs(weight_IO.astype(np.float32) - before_IO.astype(np.float32))
            kept_IO = kept_while_activating(score_IO, weight_IO, movement_IO, share, earlier.activate, compare)
        else:
            kept_IO = kept_weights(score_IO, share, compare, pattern)
        zero = np.zeros((), weight_IO.dtype)
        result_IO = before_IO if rewinding and before_IO is not None else weight_IO
        return np.where(kept_IO, weight_IO, zero), np.where(kept_IO, result_IO, zero)

    def visit(place: Place, block: Block, inputs: LayerInputs | None) -> tuple[bool, Arrays]:
        found: Arrays = {}
        for name, sublayer, local, param in block_matrices(block, model.config.d_model):
            if name not in maps:
                continue
            path, value = f"{place.path}/{sublayer}/{local}", np.asarray(param[...])
            kind = getattr(block.spec, sublayer)
            channels = kind.weight_maps(model.config.d_model)[name]
            norms = None if inputs is None else inputs.norms(name)
            of_experts = sublayer == "ffn" and name in kind.expert_maps
            axis, experts = kind.expert_axis(name) if of_experts else (0, 1)
            lie = (channels, axis, experts)
            few = () if inputs is None else inputs.too_few(name)
            parts = []
            for e, weight_IO in enumerate(_matrices(value, *lie)):
                own = norms[e] if of_experts and norms is not None else norms
                own = np.ones(channels) if e in few else own
                parts.append(one(path, partial(_own_of, place.index, lie, e), weight_IO, own))
            kept, result = (_together(arrays, value.shape, axis, experts) for arrays in zip(*parts, strict=True))
            if of_experts:
                found[_FEW + name] = np.asarray(few, int)
            param[...] = like(kept, param[...])
            found[path] = result
            found[_ZEROS + name] = np.asarray(np.mean(result == 0))
        return True, found

    if batches is None:
        layers = [visit(place, block, None)[1] for place, block in layers_of(model)]
    else:
        layers = walk(model, batches, visit, stage)
    changed: dict[str, np.ndarray] = {}
    few: dict[str, list[tuple[int, int]]] = {}
    zeros: dict[str, list[float]] = {name: [math.nan] * model.config.layers for name in maps}
    for place, found in zip(places_of(model), layers, strict=True):
        for path, value in found.items():
            if path.startswith(_FEW):
                few.setdefault(path.removeprefix(_FEW), []).extend((place.layer, int(e)) for e in value)
                continue
            if path.startswith(_ZEROS):
                zeros[path.removeprefix(_ZEROS)][place.layer] = float(value)
                continue
            if path not in changed:
                changed[path] = np.array(flat[path])
            changed[path][place.index] = value
    zeros = {name: shares for name, shares in zeros.items() if not all(map(math.isnan, shares))}
    rest = before if rewinding and before is not None else flat
    return Pruned(placed(template.merge(nested({**rest, **changed}), variables)), zeros, few)
