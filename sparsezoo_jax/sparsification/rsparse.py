"""R-Sparse (arXiv 2504.19449): the largest channels of a map's input exactly, the others through a low-rank map.

Shape letters: I channels of the input, O outputs, R rank, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsezoo_jax.evaluation import evaluate_model
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.masks import ActivationSparsity
from sparsezoo_jax.models.matrices import layer_matrices
from sparsezoo_jax.sparsification.calibration import Calibration, threshold
from sparsezoo_jax.sparsification.config import RSparseConfig
from sparsezoo_jax.sparsification.conversion import sparsified_config, with_cuts, wrapped
from sparsezoo_jax.sparsification.placement import batch_on_devices, like
from sparsezoo_jax.sparsification.progress import Progress

#: Of the search: chance that a map of a layer gets a new alpha, and what alphas are multiples of.
MUTATION, GRID = 0.1, 0.05


def left_out(share: float, alpha: float) -> float:
    """Share of the channels that are not read exactly: `1 - (1 - s) alpha`."""
    return 1 - (1 - share) * alpha


def rank_of(inputs: int, outputs: int, share: float, alpha: float) -> int:
    """Rank of the map of the others: `floor(I O (1 - s) (1 - alpha) / (I + O))`, at least 1; 0 for an alpha of 1.

    Its weights and those of the exact channels are a share 1 - s of the matrix.
    """
    if alpha >= 1:
        return 0
    return max(math.floor(inputs * outputs * (1 - share) * (1 - alpha) / (inputs + outputs) + 1e-6), 1)


def low_rank(weight_IO: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [I, R] and B [R, O], float64, whose product is the closest of that rank: `U S` and `V^T` of the SVD of W."""
    u_IR, s_R, v_RO = np.linalg.svd(weight_IO.astype(np.float64), full_matrices=False)
    return u_IR[:, :rank] * s_R[:rank], v_RO[:rank]


class Found(NamedTuple):
    """The model with low-rank maps, and how it shares what a token reads."""

    model: Decoder
    alphas: dict[str, np.ndarray]
    """By map [L]; NaN where a layer does not have the map."""
    ranks: dict[str, np.ndarray]
    """By map int [L], of the layers' low-rank maps; the arrays have the largest, filled up with zeros."""
    cuts: dict[str, np.ndarray]
    """By map [L]: thresholds."""


def rsparse(
    dense: Decoder,
    sparsity: ActivationSparsity,
    calibration: Calibration,
    batches: Sequence[Mapping[str, Any]],
    config: RSparseConfig,
    progress: Progress | None = None,
) -> Found:
    """The sparsified model of `dense`.

    Args:
      dense: a decoder without masks.
      sparsity: a threshold for each map; it has no ranks yet.
      calibration: of the same maps and scores, without masks.
      batches: whose loss the search measures.
      config: one alpha for all, or how they are searched for.
      progress: losses that the search measured before, and where they are kept. None: nowhere.
    """
    progress = Progress() if progress is None else progress
    matrices = _matrices(dense, sparsity.maps)
    present = {
        name: np.array([layer in by_layer for layer in range(dense.config.layers)])
        for name, by_layer in matrices.items()
    }

    def everywhere(alpha: float) -> dict[str, np.ndarray]:
        return {name: np.where(there, alpha, np.nan) for name, there in present.items()}

    if config.alpha is not None:
        return _built(dense, sparsity, calibration, matrices, everywhere(config.alpha))
    factors = {name: {} for name in matrices}
    largest = _built(dense, sparsity, calibration, matrices, everywhere(0.0), factors)

    # The search draws the same settings again, so that the losses of those it had measured are all that it needs.
    known = progress.value("search")
    measured, seen = [] if known is None else [float(x) for x in known["losses"]], 0

    def loss(alphas: dict[str, np.ndarray]) -> float:
        nonlocal seen
        seen += 1
        if seen > len(measured):
            _set(largest.model, alphas, sparsity.target, calibration, factors)
            measured.append(evaluate_model(largest.model, batches, to_device=batch_on_devices).loss)
            progress.set_value("search", {"losses": np.array(measured)})
        return measured[seen - 1]

    start = [everywhere(alpha) for alpha in (1.0, 0.95, 0.9, 0.8)]
    alphas = search(start, loss, config)
    return _built(dense, sparsity, calibration, matrices, alphas)


def search(
    start: list[dict[str, np.ndarray]], loss: Callable[[dict[str, np.ndarray]], float], config: RSparseConfig
) -> dict[str, np.ndarray]:
    """Alphas of little loss, by evolution: the best quarter stays, and pairs of them are mixed and changed.

    Args:
      start: the first settings; the first generation has changed ones of these beside them.
      loss: of a setting.
    """
    draw = np.random.default_rng(config.seed)

    def changed(alphas: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = {}
        for name, values in alphas.items():
            new = GRID * draw.integers(0, round(1 / GRID) + 1, values.shape)
            made[name] = np.where(np.isnan(values) | (draw.random(values.shape) >= MUTATION), values, new)
        return made

    def mixed(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.where(draw.random(values.shape) < 0.5, values, other[name]) for name, values in one.items()}

    settings = [*start, *(changed(start[i % len(start)]) for i in range(config.population - len(start)))]
    scored = [(loss(alphas), alphas) for alphas in settings]
    for _ in range(config.generations):
        scored = sorted(scored, key=lambda pair: pair[0])[: config.population // 4]
        parents = [alphas for _, alphas in scored]
        for _ in range(config.population - len(parents)):
            i, j = draw.integers(0, len(parents), 2)
            child = changed(mixed(parents[i], parents[j]))
            scored.append((loss(child), child))
    return min(scored, key=lambda pair: pair[0])[1]


def _rank(weight_IO: np.ndarray, share: float, alpha: float) -> int:
    inputs, outputs = weight_IO.shape
    return rank_of(inputs, outputs, share, alpha)


def _matrices(dense: Decoder, maps: tuple[str, ...]) -> dict[str, dict[int, np.ndarray]]:
    """By map and layer, W [I, O]."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for matrix in layer_matrices(dense):
        if matrix.name not in maps:
            continue
        for index, layer in enumerate(matrix.layers):
            spec = dense.config.layer_specs()[layer]
            sizes = {**spec.attention.linear_maps(dense.config.d_model), **spec.ffn.linear_maps(dense.config.d_model)}
            weight = np.asarray(matrix.param[index] if matrix.stacked else matrix.param[...])
            found.setdefault(matrix.name, {})[layer] = weight.reshape(sizes[matrix.name].channels, -1)
    return found


def _built(
    dense: Decoder,
    sparsity: ActivationSparsity,
    calibration: Calibration,
    matrices: dict[str, dict[int, np.ndarray]],
    alphas: dict[str, np.ndarray],
    factors: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] | None = None,
) -> Found:
    """The model for these alphas; `factors` gets the matrices' low-rank forms by map and layer."""
    factors = {name: {} for name in matrices} if factors is None else factors
    ranks = {name: np.zeros(dense.config.layers, int) for name in matrices}
    for name, by_layer in matrices.items():
        for layer, weight_IO in by_layer.items():
            rank = _rank(weight_IO, sparsity.target, float(alphas[name][layer]))
            ranks[name][layer] = rank
            if rank:
                factors[name][layer] = low_rank(weight_IO, rank)
    needed = tuple(int(ranks[name].max()) if name in ranks else 0 for name in sparsity.maps)
    own = dataclasses.replace(sparsity, ranks=needed if any(needed) else ())
    model = wrapped(dense, sparsified_config(dense.config, own))
    cuts = _set(model, alphas, sparsity.target, calibration, factors)
    return Found(model, alphas, ranks, cuts)


def _set(
    model: Decoder,
    alphas: dict[str, np.ndarray],
    share: float,
    calibration: Calibration,
    factors: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]],
) -> dict[str, np.ndarray]:
    """Set thresholds and low-rank maps of a sparsified model; of factors of a higher rank the first ones count."""
    cuts = {name: np.full(model.config.layers, np.nan, np.float32) for name in alphas}
    for name, map in calibration.maps.items():
        for layer, counts in zip(map.layers, map.counts, strict=True):
            cuts[name][layer] = threshold(counts, left_out(share, float(alphas[name][layer])))
    with_cuts(model, cuts)
    first = 0
    for segment in model.segments:
        for place, block in enumerate(segment.blocks):
            layers = range(first + place, first + segment.layers, len(segment.blocks))
            for part in (block.attention, block.ffn):
                for name, map in getattr(part, "bypass", {}).items():
                    a: Any = np.zeros(map.a_IR[...].shape, np.float64)
                    b: Any = np.zeros(map.b_RO[...].shape, np.float64)
                    for index, layer in enumerate(layers):
                        inputs, outputs = a.shape[-2], b.shape[-1]
                        rank = rank_of(inputs, outputs, share, float(alphas[name][layer]))
                        if rank:
                            full_a, full_b = factors[name][layer]
                            a[index, :, :rank], b[index, :rank] = full_a[:, :rank], full_b[:rank]
                    map.a_IR[...] = like(a, map.a_IR[...])
                    map.b_RO[...] = like(b, map.b_RO[...])
        first += segment.layers
    return cuts
