"""The device mesh, and the one table that says over which of its axes each kind of dimension is split.

Model code names dimensions ("batch", "embed", "ffn", ...), never mesh axes: parameters carry their names as metadata,
and activations are pinned by `constrain`. Where no mesh is active all of this does nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, ConfigError, require
from sparsezoo_jax.torus import all_gather, rings_of, use_rings

LogicalAxes = tuple[str | None, ...]

#: Mesh axes, slowest network first: `data` crosses slices, `tensor` lies on the closest neighbours.
AXES = ("data", "fsdp", "expert", "context", "tensor")

#: Name of a dimension -> mesh axes that split it. Names higher up choose first; an axis splits one dimension at most.
RULES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    # Copies of a parameter (`gather_copies`), one for each device that has tokens of its own.
    "copies": ("data", "fsdp", "expert", "context"),
    # Rows of a table that was gathered for its use.
    "words": ("tensor",),
    # Parameters, and the activations that they produce: tensor and expert parallelism.
    "experts": ("expert",),
    # Whole rows of the table, where all devices divide their number: a row is what a lookup reads.
    "vocab": ("tensor", "fsdp", "expert", "context"),
    "positions": ("tensor",),
    "ffn": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    # The width of the model (in the Spark FFN also the slice of it that the predictor reads): fully sharded parameters.
    # In activations these mesh axes already split batch and length, so the width is not split there.
    "embed": ("fsdp", "expert", "context"),
    "predictor": ("fsdp", "expert", "context"),
    # Latents of attention: by whatever the other dimension of the matrix, width or heads, leaves over.
    "latent": ("tensor", "fsdp", "expert", "context"),
    # Never split.
    "head_dim": (),
    "layers": (),
}


#: Columns of a tile of a TPU's memory: narrower pieces fill only a part of it.
LANES = 128


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """How devices are arranged; the product of all axes is the number of devices used."""

    data: int | None = None
    """Copies of the model, each with its part of the batch. None: as many as the other axes leave devices for."""
    fsdp: int = 1
    """Splits the batch as well as parameters, gradients and optimizer state."""
    expert: int = 1
    """Splits experts; batch and the other parameters too."""
    tensor: int = 1
    """Splits heads, FFN neurons and vocabulary."""
    context: int = 1
    """Splits sequences; parameters too."""
    slices: int = 1
    """Slices joined by a data-center network; `data` goes across them and is a multiple of this."""

    def __post_init__(self):
        for name in ("fsdp", "expert", "tensor", "context", "slices"):
            require(getattr(self, name) > 0, f"mesh.{name}", getattr(self, name), "must be above 0")
        if self.data is not None:
            require(self.data > 0, "mesh.data", self.data, "must be above 0, or none for all devices that are left")
            require(
                self.data % self.slices == 0, "mesh.data", self.data, f"must be a multiple of mesh.slices={self.slices}"
            )

    def shape(self, devices: int) -> dict[str, int]:
        """Size of every mesh axis on this many devices, in the order of `AXES`.

        Raises:
          ConfigError: the axes don't multiply to the number of devices.
        """
        others = self.fsdp * self.expert * self.tensor * self.context
        left = devices // others
        data = left if self.data is None else self.data
        asked = ", ".join(f"mesh.{name}={getattr(self, name)}" for name in AXES if name != "data")
        require(
            data * others == devices,
            "mesh.data",
            self.data,
            f"doesn't use all {devices} devices together with {asked}"
            if self.data is not None
            else f"can't be chosen: {asked} don't divide {devices} devices",
        )
        require(data % self.slices == 0, "mesh.slices", self.slices, f"must divide the data axis of {data}")
        return {name: data if name == "data" else getattr(self, name) for name in AXES}


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None, *, only_needed: bool = False) -> Mesh:
    """The mesh of `config` over `devices` (None: all there are), laid out for their network.

    With `only_needed` it is over the first of them, as many as the axes multiply to.

    Raises:
      ConfigError: the axes don't multiply to the number of devices, or `slices` is not what the devices have.
    """
    devices = list(jax.devices() if devices is None else devices)
    if only_needed and config.data is not None:
        needed = config.data * config.fsdp * config.expert * config.tensor * config.context
        axes = {name: getattr(config, name) for name in AXES if getattr(config, name) != 1}
        require(needed <= len(devices), "mesh", axes, f"needs {needed} devices, there are {len(devices)}")
        devices = devices[:needed]
    shape = config.shape(len(devices))
    found = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    # Devices of a CPU have no slices; several are accepted there so that a layout can be tried.
    on_network = found > 1 or devices[0].platform != "cpu"
    require(not on_network or found == config.slices, "mesh.slices", config.slices, f"the devices form {found} slices")
    sizes = tuple(shape.values())
    if config.slices > 1 and on_network:
        inner = (shape["data"] // config.slices, *sizes[1:])
        across = (config.slices, *(1 for _ in sizes[1:]))
        array = mesh_utils.create_hybrid_device_mesh(inner, across, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "cpu":
        array = np.asarray(devices).reshape(sizes)
    else:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(axes: LogicalAxes, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How an array is split: for each of its dimensions the mesh axes over which it is.

    A dimension takes the leading axes of its rule whose product divides it; `undivided` tells where that is not all.

    Raises:
      ConfigError: a name that is not in the table.
    """
    return PartitionSpec(*(names or None for names in _assigned(axes, shape, mesh)))


def _assigned(axes: LogicalAxes, shape: Sequence[int], mesh: Any) -> list[tuple[str, ...]]:
    for name in axes:
        require(name is None or name in RULES, "logical axis", name, f"must be one of {', '.join(RULES)}")
    assigned: list[tuple[str, ...]] = [() for _ in axes]
    used: set[str] = set()
    priority = list(RULES)
    named_dimensions = [(priority.index(name), i) for i, name in enumerate(axes) if name is not None]
    for rank, dimension in sorted(named_dimensions):
        size = 1
        for axis in RULES[priority[rank]]:
            if axis in used or mesh.shape[axis] == 1:
                continue
            size *= mesh.shape[axis]
            if shape[dimension] % size:
                break
            assigned[dimension] += (axis,)
            used.add(axis)
    return assigned


def undivided(axes: LogicalAxes, shape: Sequence[int], mesh: Any) -> dict[str, tuple[str, ...]]:
    """Names of dimensions that some mesh axis should split but can't, for it doesn't divide them; with those axes."""
    assigned = _assigned(axes, shape, mesh)
    used = {axis for names in assigned for axis in names}
    missing: dict[str, tuple[str, ...]] = {}
    for name in axes:
        left = tuple(axis for axis in RULES.get(name or "", ()) if mesh.shape[axis] > 1 and axis not in used)
        if name is not None and left:
            missing[name] = left
    return missing


def named_sharding(mesh: Mesh) -> Callable[[LogicalAxes, Sequence[int]], NamedSharding]:
    """The function from an array's logical axes and shape to its sharding on `mesh`."""
    return lambda axes, shape: NamedSharding(mesh, partition_spec(axes, shape, mesh))


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Make `mesh` the one that `constrain` and `shard_map` see while functions are traced; None: no mesh."""
    if mesh is None or mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh), use_rings(rings_of(mesh)):
        yield


def _active_mesh() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    # Within a shard_map the axes are manual: arrays are one device's shards there.
    usable = not mesh.empty and mesh.axis_names == AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if usable and mesh.size > 1 else None


def devices_in_use() -> Mesh | None:
    """The mesh of `use_mesh` with its devices, outside of traced functions; None where there is none."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def partitioned_by_compiler() -> bool:
    """Whether the compiler splits what is traced now over devices: not without a mesh, nor within a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types)


def mesh_is_active() -> bool:
    """Whether there is a mesh of `AXES` over which `shard_map` splits arrays: not within another shard_map."""
    return _active_mesh() is not None


def num_shards(name: str, size: int) -> int:
    """Into how many shards the compiler splits a dimension of this name and size; 1 without a mesh."""
    mesh = _active_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _assigned((name,), (size,), mesh)[0])


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Pin how an activation is split; `axes` name its dimensions (None: not split). Nothing happens without a mesh.

    Left to itself the compiler may as well gather activations where it should gather weights.
    """
    mesh = _active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_axis(w: jax.Array, axis: int) -> jax.Array:
    """`w` with all of one axis on every device, and its other axes split as they are; its gradient is left as it comes.

    For a matrix before a product with activations. Left to itself the TPU compiler may cut that product into one for
    each device's piece of the matrix, and add up whole results in memory, to hide the gather behind them.
    """
    if _active_mesh() is None:
        return w
    axes: list[Any] = [PartitionSpec.UNCONSTRAINED] * w.ndim
    axes[axis] = None
    return jax.lax.with_sharding_constraint(w, PartitionSpec(*axes))


gather_axis.defvjp(lambda w, axis: (gather_axis(w, axis), None), lambda axis, residuals, g: (g,))


def replicate(x: jax.Array) -> jax.Array:
    """`x` with all of it on every device."""
    return constrain(x, (None,) * x.ndim)


def shard_map(
    function: Callable[..., Any],
    arrays: Sequence[jax.Array | None],
    in_axes: Sequence[LogicalAxes],
    out_axes: Any,
) -> Any:
    """Call `function` on each device's shards of `arrays`, as a kernel that the compiler can't partition needs it.

    `jax.shard_map` by the names of dimensions, on the active mesh; without a mesh there is one shard.

    Args:
      function: called as `function(*shards, split)`; `split` maps the name of every dimension to the mesh axes that
        split it, as `jax.lax.psum` and `sum_shards` take them (an empty tuple where it is not split, over which they do
        nothing).
      arrays: None among them is passed on.
      in_axes: names of the dimensions of each array. An unnamed dimension is gathered.
      out_axes: names for the result, in its structure (a tuple of names for a single array).

    Raises:
      ConfigError: a dimension of one name would be split differently in two arrays.
    """
    names = {name for axes in in_axes for name in axes if name is not None}
    mesh = _active_mesh()
    if mesh is None:
        return function(*arrays, dict.fromkeys(names, ()))
    split: dict[str, tuple[str, ...]] = {}
    in_axes = [() if array is None else axes for array, axes in zip(arrays, in_axes, strict=True)]
    for array, axes in zip(arrays, in_axes, strict=True):
        shape = () if array is None else array.shape
        for name, assigned in zip(axes, _assigned(axes, shape, mesh), strict=True):
            if name is not None and split.setdefault(name, assigned) != assigned:
                raise ConfigError("mesh", dict(mesh.shape), f"splits '{name}' by {split[name]} and by {assigned}")
    for name in names - split.keys():  # in no array but None
        split[name] = ()

    def spec(axes: LogicalAxes) -> PartitionSpec:
        return PartitionSpec(*(split[name] or None if name is not None else None for name in axes))

    out_specs = jax.tree.map(spec, out_axes, is_leaf=_is_axes)
    return jax.shard_map(
        lambda *shards: function(*shards, split),
        in_specs=tuple(spec(axes) for axes in in_axes),
        out_specs=out_specs,
        check_vma=False,  # the abstract results of kernels don't say over which axes they vary
    )(*arrays)


def gather_copies(parameter: jax.Array, axes: LogicalAxes, dtype: jnp.dtype) -> jax.Array:
    """A copy of a parameter for each device with tokens of its own: [n, ...], n along "copies" and 1 without a mesh.

    Only `tensor` goes on splitting a dimension. Values travel, and gradients are summed, in `dtype`; the result has the
    parameter's own. What is done with a copy in `shard_map` gives it a gradient of its own, and those of all uses add
    up on their device before the one sum over devices that scatters it, which the compiler can't arrange: to it, a
    gathered array has one gradient on all devices.
    """
    mesh = _active_mesh()
    if mesh is None:
        return parameter.astype(dtype).astype(parameter.dtype)[None]
    assigned = _assigned(axes, parameter.shape, mesh)
    kept = [tuple(axis for axis in names if axis == "tensor") for names in assigned]

    def gather(shard: jax.Array) -> jax.Array:
        shard = shard.astype(dtype)
        for dimension, names in enumerate(assigned):
            for axis in reversed(names):
                if axis != "tensor":
                    shard = all_gather(shard, axis, dimension)
        return shard.astype(parameter.dtype)[None]

    copies = tuple(axis for axis in RULES["copies"] if mesh.shape[axis] > 1)
    if any(axis != "tensor" for names in assigned for axis in names):
        # The barrier stands between the gradient's sum over devices and its sum over micro-batches. A pass of XLA that
        # exchanges the two ends with an internal error at sums that scatter, on TPUs v5e and v6e.
        parameter = jax.lax.optimization_barrier(parameter)
    return jax.shard_map(
        gather,
        in_specs=PartitionSpec(*(names or None for names in assigned)),
        out_specs=PartitionSpec(copies or None, *(names or None for names in kept)),
        check_vma=False,
    )(parameter)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_shards(x: Any, axes: tuple[str, ...]) -> Any:
    """Sum of an array or tree over mesh axes, for a result of a function in `shard_map` that they don't split.

    As `jax.lax.psum`, without its second sum in the backward pass. There `shard_map` gives each of n devices the
    cotangent of such a result divided by n, for psum's own derivative is a sum over devices; multiplying gives the same
    and sends nothing.
    """
    return jax.lax.psum(x, axes)


def _sum_shards_backward(axes: tuple[str, ...], residuals: None, cotangents: Any) -> tuple[Any]:
    del residuals
    count = math.prod(jax.lax.axis_size(axis) for axis in axes)
    return (jax.tree.map(lambda g: g * jnp.asarray(count, g.dtype), cotangents),)


sum_shards.defvjp(lambda x, axes: (sum_shards(x, axes), None), _sum_shards_backward)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple) and all(item is None or isinstance(item, str) for item in value)


def check_batch(shape: Sequence[int], mesh: Mesh, *, accumulation: int = 1) -> None:
    """Raise `ConfigError` unless batches [B, T], cut into `accumulation` micro-batches, split evenly over `mesh`."""
    rows = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    context = mesh.shape["context"]
    spelled = " * ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in RULES["batch"] if mesh.shape[axis] > 1)
    wanted = f"must be a multiple of {spelled}" + (f" * train.accumulation={accumulation}" if accumulation > 1 else "")
    require(shape[0] % (rows * accumulation) == 0, "data.batch_size", shape[0], wanted)
    require(shape[1] % context == 0, "data.seq_len", shape[1], f"must be a multiple of mesh.context={context}")


def check_neurons(parameters: Mapping[str, Any], mesh: Mesh) -> None:
    """Raise `ConfigError` unless `tensor` divides the neurons of every expert and FFN.

    Its devices would otherwise all do the same work. `parameters` maps names to objects with `full_axes` and `shape`.
    """
    count = mesh.shape["tensor"]
    for name, parameter in parameters.items():
        for axis, size in zip(parameter.full_axes, parameter.shape, strict=True):
            allowed = f"must divide the {size} neurons or experts of {name} {tuple(parameter.shape)}"
            require(axis != "ffn" or size % count == 0, "mesh.tensor", count, allowed)


def narrow_columns(parameters: Mapping[str, Any], mesh: Mesh) -> str | None:
    """One line on columns of matrices that `mesh` cuts into pieces of less than `LANES`; None where there are none.

    On TPUs such pieces waste memory, and gathering them sends twice the bytes. The line names the mesh with the largest
    `fsdp` that avoids it, at the price of more copies of the parameters (`data`), if there is one. `parameters` as in
    `check_neurons`.
    """
    matrices = {
        name: parameter
        for name, parameter in parameters.items()
        if sum(axis != "layers" for axis in parameter.full_axes) > 1 and parameter.shape[-1] >= LANES
    }

    def narrowest(shape: Mapping[str, int]) -> tuple[int, str] | None:
        pieces = []
        for name, matrix in matrices.items():
            axes = _assigned(matrix.full_axes, matrix.shape, _Shape(shape))[-1]
            pieces.append((matrix.shape[-1] // math.prod(shape[axis] for axis in axes), name))
        return min((found for found in pieces if found[0] < LANES), default=None)

    found, fsdp = narrowest(mesh.shape), mesh.shape["fsdp"]
    if found is None:
        return None
    divisors = [n for n in range(fsdp, 0, -1) if fsdp % n == 0]
    others = ({**mesh.shape, "fsdp": n, "data": mesh.shape["data"] * fsdp // n} for n in divisors)
    better = next((shape for shape in others if narrowest(shape) is None), None)
    spelled = " ".join(f"--mesh.{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    avoided = "" if better is None else f"; --mesh.fsdp {better['fsdp']} --mesh.data {better['data']} avoids it"
    return f"{spelled} leaves {found[0]} columns of {found[1]} to a device, where a TPU's tiles have {LANES}{avoided}"


class _Shape(NamedTuple):
    """Sizes of axes in the form of a mesh."""

    shape: Mapping[str, int]


def addressable_rows(sharding: Sharding, shape: Sequence[int]) -> range:
    """The rows (first dimension) of a global array of this shape that the devices of this process hold.

    Raises:
      ConfigError: they are not one block, or blocks of several processes overlap in part.
    """
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    blocks = {index[0].indices(shape[0])[:2] for index in indices if index is not None}
    first, end = min(start for start, _ in blocks), max(stop for _, stop in blocks)
    size = end - first
    contiguous = sum(stop - start for start, stop in blocks) == size and shape[0] % size == 0 and first % size == 0
    require(
        contiguous, "mesh", sharding, "leaves this process with scattered rows of the batch; let data and fsdp lead"
    )
    return range(first, end)


def device_put(
    batch: Mapping[str, np.ndarray], sharding: Sharding, shape: Sequence[int], first_row: int = 0
) -> dict[str, Any]:
    """Global arrays of this shape on the devices, made from the rows of them, `first_row` on, that this process has.

    Arrays of more dimensions have the shape in their front.
    """
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)

    def rows(x: np.ndarray, index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        return x[(slice(start - first_row, stop - first_row), *index[1:])]

    shape = tuple(shape)
    return {
        name: jax.make_array_from_callback(
            (*shape, *x.shape[len(shape) :]), sharding, lambda index, x=x: rows(x, index)
        )
        for name, x in batch.items()
    }


def num_replicas(axes: LogicalAxes, shape: Sequence[int], mesh: Any) -> int:
    """How many devices of one copy of the model (all mesh axes but `data`) hold the same shard of an array."""
    shards = math.prod(mesh.shape[axis] for names in _assigned(axes, shape, mesh) for axis in names if axis != "data")
    return mesh.size // mesh.shape["data"] // shards
