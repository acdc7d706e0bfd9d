"""What a sparsified run leaves out by map, and what that saves in weights, FLOPs and bytes; zeros of a pruned one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.models import AttentionKind, Decoder, DecoderConfig, FFNKind
from sparsezoo_jax.models.masks import DENSITY
from sparsezoo_jax.models.matrices import layer_matrices
from sparsezoo_jax.models.records import MAPS
from sparsezoo_jax.models.sparsified import SparsifiedAttentionConfig, SparsifiedFFNConfig
from sparsezoo_jax.untrusted import read_json

#: File of a run directory with the figures of how it was made.
RECORD = "sparsify.json"
_FIGURES = ("method", "sparsity", "loss_dense", "loss", "tokens")
_OPTIONAL = ("pattern", "widths", "domains")
#: What a token needs of the layers' linear maps; of the run that was sparsified under the name with "_dense".
COSTS = ("weights", "flops", "bytes")


def needed(config: DecoderConfig, stats: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What one token needs of the linear maps of all layers, by the share of their channels that it reads.

    Args:
      config: a decoder.
      stats: per layer, as `Evaluation.stats` has them.

    Returns:
      "left_out": mean share over layers by map, and "left_out_by_layer" (NaN where a layer does not have the map);
      "weights", "flops" and "bytes" (of weights, in the activations' dtype) of a token, and "weights_dense" and so
      on of one that leaves nothing out. Attention over keys and the output projection are not among them. Empty
      for a decoder that is not sparsified.
    """
    densities = {name: np.asarray(stats[DENSITY + name]) for name in MAPS if DENSITY + name in stats}
    if not densities:
        return {}
    weights = dense_weights = flops = dense_flops = 0.0
    for layer, spec in enumerate(config.layer_specs()):
        for kind in (spec.attention, spec.ffn):
            saved, dense = 0.0, kind
            if isinstance(kind, SparsifiedAttentionConfig | SparsifiedFFNConfig):
                dense = kind.of
                saved -= config.d_model**2 * kind.sparsity.rotated(dense.linear_maps(config.d_model))
                for name, size in dense.linear_maps(config.d_model).items():
                    if name in kind.sparsity.maps:
                        saved += size.weights * max(0.0, size.read - densities[name][layer] * size.channels)
                        saved -= kind.sparsity.rank(name) * (size.channels + size.weights)
            whole, work = _costs(dense, config.d_model)
            weights, dense_weights = weights + whole - saved, dense_weights + whole
            flops, dense_flops = flops + work - 2 * saved, dense_flops + work
    size = jnp.dtype(config.dtype).itemsize
    left_out = {name: 1 - values for name, values in densities.items()}
    return {
        "left_out": {name: float(np.nanmean(values)) for name, values in left_out.items()},
        "left_out_by_layer": {name: [float(x) for x in values] for name, values in left_out.items()},
        "weights": weights,
        "weights_dense": dense_weights,
        "flops": flops,
        "flops_dense": dense_flops,
        "bytes": weights * size,
        "bytes_dense": dense_weights * size,
    }


def _costs(kind: AttentionKind | FFNKind, d_model: int) -> tuple[float, float]:
    """Weights and FLOPs of the linear maps of one token."""
    if isinstance(kind, AttentionKind):
        return kind.projection_weights(d_model), kind.projection_flops(d_model)
    return kind.weights(d_model), kind.flops(d_model)


def made(directory: Path) -> dict[str, Any]:
    """How a run was sparsified: its method, sparsity and losses on the tokens that were read then; empty if it was not.

    Of a run with fewer neurons or with experts also `COSTS`; of others they are measured (`needed`).

    Raises:
      UserError: a file that holds something else.
    """
    found = recorded(directory)
    smaller = [f"{name}{end}" for name in COSTS for end in ("", "_dense")] if {"widths", "domains"} & set(found) else []
    return {name: found[name] for name in (*_FIGURES, *_OPTIONAL, *smaller) if name in found}


def recorded(directory: Path) -> dict[str, Any]:
    """All that a run's `sparsify.json` holds; empty if there is none. Raises as `made`."""
    path = directory / RECORD
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    if not isinstance(found, dict) or not all(name in found for name in _FIGURES):
        raise UserError(f"{path}: must hold {', '.join(_FIGURES)}")
    numbers = {name: found[name] for name in found if name in _FIGURES[1:] or name.removesuffix("_dense") in COSTS}
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise UserError(f"{path}: {name} must be a number")
    return found


def zeros(model: Decoder) -> dict[str, Any]:
    """Weights of a model's layers that are 0.

    Returns:
      "zeros": mean share over layers by map, "zeros_by_layer" (NaN where a layer does not have the map), "weights" of
      these matrices, and "nonzero", those of them that are not 0.
    """
    shares: dict[str, list[float]] = {}
    weights = nonzero = 0
    for matrix in layer_matrices(model):
        value = matrix.param[...] if matrix.stacked else matrix.param[...][None]
        counts_L = np.asarray(jnp.count_nonzero(value, axis=tuple(range(1, value.ndim))))
        size = math.prod(value.shape[1:])
        own = shares.setdefault(matrix.name, [math.nan] * model.config.layers)
        for layer, count in zip(matrix.layers, counts_L, strict=True):
            own[layer] = 1 - int(count) / size
        weights, nonzero = weights + size * len(counts_L), nonzero + int(counts_L.sum())
    means = {name: float(np.nanmean(values)) for name, values in shares.items()}
    return {"zeros": means, "zeros_by_layer": shares, "weights": weights, "nonzero": nonzero}
