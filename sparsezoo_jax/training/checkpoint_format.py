"""What every reader and writer of checkpoints shares: metadata, fingerprints of arrays, and errors in one line."""

from __future__ import annotations

import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.training.state import PureDict, flatten

# Orbax logs what it raises as well, once a thread with a traceback, and warns of each option it derives from
# read_only. What it raises becomes one StorageError; pages before that line would hide it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class DamagedCheckpointError(Exception):
    """A step that can't be read back as it was written."""


def nested(flat: dict[str, Any]) -> PureDict:
    """Nested dicts by the parts of the path, whatever containers (tuples, optax states) the leaves came from."""
    tree: PureDict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    """Sum of bits * (2 * index + 1) modulo 2^32: one flipped bit always changes it.

    Integer sums do not depend on their order, so the number is the same on every mesh.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    if bits.ndim < 3:
        return _weighted_sum(bits, jnp.uint32(0))
    # A stack of layers is read layer by layer, for XLA for CPU makes room for all summands of a sum.
    offsets = jnp.arange(bits.shape[0], dtype=jnp.uint32) * jnp.uint32(math.prod(bits.shape[1:]) % 2**32)
    total, _ = jax.lax.scan(lambda sum, row: (sum + _weighted_sum(*row), None), jnp.uint32(0), (bits, offsets))
    return total


def _weighted_sum(bits: jax.Array, offset: jax.Array) -> jax.Array:
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * (index + offset) + 1), dtype=jnp.uint32)


def describe(items: PureDict) -> dict[str, list[Any]]:
    """Shape, type and fingerprint of every array by path."""
    arrays = flatten(items)
    # One program an array, for a program over all of them held a copy of them all; and one after another, for the
    # sums of several at a time would meet in another order in every process.
    return {path: [list(x.shape), str(x.dtype), int(_fingerprint(x))] for path, x in arrays.items()}


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        missing = {"step", "data", "arrays"} - set(meta)
    except Exception as error:
        raise DamagedCheckpointError(f"its meta data can't be read: {brief(error)}") from error
    if missing:
        raise DamagedCheckpointError(f"its meta data lacks {', '.join(sorted(missing))}")
    return meta


def check_fits(directory: Path, saved: dict[str, list[Any]], wanted: dict[str, dict[str, Any]]) -> None:
    here = {f"{n}/{path}": [list(x.shape), str(x.dtype)] for n, flat in wanted.items() for path, x in flat.items()}
    there = {path: entry[:2] for path, entry in saved.items()}
    differing = sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
    if differing:
        path = differing[0]
        saved_as, wanted_as = (f"{e[1]}{e[0]}" if e else "absent" for e in (there.get(path), here.get(path)))
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise UserError(
            f"checkpoint {directory} is of another configuration: {path} is {saved_as} there, {wanted_as} here{more}; "
            "resume with the run's own config.json, or choose another workdir"
        )


def read_arrays(
    manager: ocp.CheckpointManager, step: int, wanted: dict[str, PureDict], saved: dict[str, list[Any]]
) -> dict[str, PureDict]:
    try:
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        restored = manager.restore(step, args=ocp.args.Composite(**args))
        items = {name: restored[name] for name in wanted}
    except Exception as error:
        raise DamagedCheckpointError(brief(error)) from error
    for path, (_, _, fingerprint) in describe(items).items():
        if fingerprint != saved[path][2]:
            raise DamagedCheckpointError(f"{path} is not what was saved")
    return items


def brief(error: BaseException) -> str:
    """The first line of an error that may come with pages of storage details."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", text)
    if number is not None:
        return os.strerror(int(number[1]))
    lines = re.split(r"\s*(?:\n|See full TensorStore details)", text.strip())
    return lines[0][:300]
