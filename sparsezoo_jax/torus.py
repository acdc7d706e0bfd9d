"""Rings of the physical network that make up a mesh axis, and gathers that go along one ring after another.

A mesh axis of 64 devices on a torus of 4 x 4 x 4 is three rings of 4. XLA for TPUs gathers over all of it at once by an
all-reduce of the whole result, and sums gradients likewise, which sends twice the bytes; ring by ring it gathers and
scatters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

Rings = tuple[tuple[str, tuple[int, ...]], ...]
"""Mesh axes with the sizes of their rings, neighbours on the axis first."""

#: Part of the keys of jax's caches: functions are traced again when it changes.
_RINGS: Any = jax.make_user_context(default_value=())


def rings_of(mesh: Mesh) -> Rings:
    """The rings that the axes of `mesh` consist of, for axes that are several and whose devices lie on a grid."""
    found = []
    for i, axis in enumerate(mesh.axis_names):
        line = np.moveaxis(mesh.devices, i, 0).reshape(mesh.devices.shape[i], -1)[:, 0]
        sizes = ring_sizes([_place(device) for device in line])
        if len(sizes) > 1:
            found.append((axis, sizes))
    return tuple(found)


def _place(device: Any) -> tuple[int, ...]:
    coordinates = tuple(getattr(device, "coords", None) or ())
    return (getattr(device, "slice_index", 0) or 0, *coordinates, getattr(device, "core_on_chip", 0) or 0)


def ring_sizes(places: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Sizes of the rings that a line of devices with these coordinates is made of, the one of neighbours first.

    Their product is the length of the line; it is one size where the line follows no grid.
    """
    sizes, stride, count = [], 1, len(places)
    while stride < count:
        steps = [_differing(places[0], place) for place in places[::stride]]
        # How far one coordinate alone changes along the line.
        size = next((i for i, step in enumerate(steps) if i and (len(step) != 1 or step != steps[1])), len(steps))
        if size == 1 or (count // stride) % size:
            return (count,)
        sizes.append(size)
        stride *= size
    return tuple(sizes)


def _differing(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


@contextlib.contextmanager
def use_rings(rings: Rings) -> Iterator[None]:
    """Let `all_gather` go along these rings in what is traced within."""
    with _RINGS(rings):
        yield


def all_gather(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """Shards joined along dimension `axis` in the order of a mesh axis, within `jax.shard_map`.

    Its transpose sums and scatters, ring by ring as well.
    """
    count, stride = jax.lax.axis_size(axis_name), 1
    for size in dict(_RINGS.value).get(axis_name, (count,)):
        period = stride * size
        firsts = (first + lane for first in range(0, count, period) for lane in range(stride))
        groups = [list(range(first, first + period, stride)) for first in firsts]
        x = jax.lax.all_gather(x, axis_name, axis=axis, tiled=True, axis_index_groups=groups if size < count else None)
        stride = period
    return x


def largest_ring(axis_name: str, devices: int) -> int:
    """Size of the longest ring of a mesh axis of so many devices."""
    return max(dict(_RINGS.value).get(axis_name, (devices,)))
