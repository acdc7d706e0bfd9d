"""Norms of gradients, parameters and updates by part of the model."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.training.state import flatten

_CONTAINERS = {"segments", "blocks", "layers"}


def part_of(path: str) -> str:
    """Part of the model that a parameter belongs to: 'ffn' of 'segments/0/blocks/1/ffn/v_FD', 'embedding' of
    'embedding_VD'.
    """
    names = (name for name in path.split("/") if not name.isdigit() and name not in _CONTAINERS)
    return re.sub(r"_[A-Z]+$", "", next(names, path))


def norms_by_part(tree: Any) -> dict[str, jax.Array]:
    """Float32 norm over all parameters of a part, by part."""
    sums: dict[str, jax.Array] = {}
    for path, x in flatten(tree).items():
        part = part_of(path)
        total = jnp.sum(jnp.square(x.astype(jnp.float32)))
        sums[part] = sums[part] + total if part in sums else total
    return {part: jnp.sqrt(total) for part, total in sums.items()}


def norm_metrics(grads: Any, params: Any, updates: Any) -> dict[str, jax.Array]:
    """`grad_norms/<part>`, and `update_ratios/<part>`: norm of the update divided by that of the parameters."""
    weights, changes = norms_by_part(params), norms_by_part(updates)
    ratios = {f"update_ratios/{part}": changes[part] / jnp.maximum(weights[part], 1e-20) for part in weights}
    return {**{f"grad_norms/{part}": norm for part, norm in norms_by_part(grads).items()}, **ratios}


def norms_by_layer(name: str, tree: Any, stacked: dict[str, int]) -> dict[str, jax.Array]:
    """`<name>/<path>`: float32 norms of each parameter's layers, [layers] where `stacked` (dimensions of layers, by
    path) is above 0, else a scalar.
    """

    def norm(path: str, x: jax.Array) -> jax.Array:
        axes = tuple(range(stacked.get(path, 0), x.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes)).reshape(-1).squeeze()

    return {f"{name}/{path}": norm(path, x) for path, x in flatten(tree).items()}
