"""Devices of a named topology, to compile for: TPUs by libtpu, GPUs by the CUDA plugin. None of them has to exist."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from sparsezoo_jax.chips import CHIPS, GPUS, Chip
from sparsezoo_jax.errors import ConfigError, UserError

#: What libtpu wants to know on a machine without a TPU; without it, it prints complaints and asks the network.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    # libtpu otherwise lets a single process of a machine load it, for the sake of chips that are not used here.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

#: Extra arguments that a generation's topologies need.
_ARGUMENTS = {"v4": {"chip_config_name": "megacore"}}

EXAMPLES = (
    "v4:2x2x2, v5e:2x4, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4 (chips along each side), h100:1x1x8 (slices x hosts x GPUs), "
    "a100:1x1x8, l40s:1x1x1"
)
MAX_CHIPS = 1024


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    """As asked for."""
    generation: str
    """Key of `CHIPS`."""
    devices: tuple[Any, ...]
    """Compile-only JAX devices of all slices."""

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.devices


@contextlib.contextmanager
def lowering_for(device: Any) -> Iterator[None]:
    """Lower functions of a single device for `device`, which may not exist.

    jax 0.12 asks the mesh which GPU Triton kernels are for, and without one the machine's; jax 0.10 takes the device
    from the arguments' shardings, and the mesh of one device changes nothing.
    """
    import jax  # reads the environment that `prepare_environment` sets
    import numpy as np
    from jax.sharding import Mesh

    from sparsezoo_jax.pallas_kernels.tuning import compiling_for

    mesh = Mesh(np.array([device]), ("device",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh), compiling_for(device):
        yield


def prepare_environment() -> None:
    """Set what libtpu and the CUDA plugin read from the environment, where the user has not; before they load."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The process itself computes nothing: no need to look for accelerators.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def open_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a topology such as "v5p:4x4x4", `slices` times.

    Raises:
      ConfigError: no such generation, or a shape that it does not come in.
      UserError: the package that compiles for it is not installed.
    """
    prepare_environment()
    generation, _, layout = name.lower().partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", layout):
        raise ConfigError("--topology", name, f"no such topology; there are {EXAMPLES}")
    sides = [int(side) for side in layout.split("x")]
    if not 0 < math.prod(sides) * (1 if generation in GPUS else slices) <= MAX_CHIPS:
        raise ConfigError("--topology", name, f"must have from 1 to {MAX_CHIPS} chips in all slices")
    opened = _open_gpus(name, sides, slices) if generation in GPUS else _open_tpus(name, sides, slices)
    return Topology(name, generation, tuple(opened))


def _needed(module: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"--topology: compiling for {what} needs {module}: pip install 'sparsezoo-jax[aot]'")


def _open_tpus(name: str, sides: list[int], slices: int) -> Any:
    _needed("libtpu", "TPUs")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    arguments: dict[str, Any] = dict(_ARGUMENTS.get(name.lower().partition(":")[0], {}))
    if math.prod(sides) == 1:
        arguments["chips_per_host_bounds"] = (1, 1, 1)  # the default is a host of four chips
    if slices > 1:
        arguments["num_slices"] = slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name.lower(), **arguments).devices
    except (JaxRuntimeError, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError("--topology", name, f"{why}; for example {EXAMPLES}") from None


def _open_gpus(name: str, sides: list[int], slices: int) -> Any:
    _needed("jax_cuda12_plugin", "GPUs")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    if len(sides) != 3 or sides[0] != slices:
        raise ConfigError("--topology", name, f"must be {slices}xHOSTSxGPUS for mesh.slices={slices}")
    generation, _, layout = name.lower().partition(":")
    target = resources.files("sparsezoo_jax.compilation").joinpath(f"{generation}.textproto").read_text()
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=target, topology=layout).devices
    except (JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError("--topology", name, str(error).splitlines()[0]) from None
