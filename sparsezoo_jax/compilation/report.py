"""Compile a step and put together what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sparsezoo_jax.compilation.collectives import find_collectives
from sparsezoo_jax.compilation.estimate import step_seconds, utilisation
from sparsezoo_jax.compilation.hlo import parse
from sparsezoo_jax.compilation.kernels import find_kernels, scheduled_cycles
from sparsezoo_jax.compilation.memory import (
    Buffer,
    compiled_memory,
    estimated_buffers,
    listed_buffers,
    needed_bytes,
    suggestions,
)
from sparsezoo_jax.compilation.steps import LoweredStep, OutOfMemoryError, StepName, compile_step, lower_step
from sparsezoo_jax.compilation.topologies import Topology
from sparsezoo_jax.compilation.traffic import step_traffic
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.sharding import build_mesh


@dataclass(frozen=True)
class Report:
    """What compiling a step for a topology tells. Sizes are bytes on one device, FLOPs and times those of one device.

    Everything is computed, nothing was measured on a device.
    """

    arch: str
    size: str
    step: StepName
    topology: str
    chips: int
    devices: int
    mesh: dict[str, int]
    tokens: int
    """Tokens of a step on all devices."""
    param_dtype: str
    dtype: str
    fits: bool
    hbm: int
    """Memory of a device."""
    memory: dict[str, int]
    """By kind; empty if the compiler gave up."""
    arguments: dict[str, int]
    """Parts of the arguments, from their shardings; tiles of the layout not counted."""
    flops: dict[str, float]
    """sparse: with the sparsity aimed at, no recomputation. dense: the same of the decoder of equal parameters that
    computes everything. traced: the matrix products of the traced step.
    xla: the compiler's count, in which the body of a loop counts once."""
    bounds: dict[str, float]
    """Lower bounds of the step time, seconds: compute (traced FLOPs at the datasheet's peak), hbm (every argument read
    and every output written once), interconnect (bytes sent within a slice at the sum of all
    links)."""
    tokens_per_second_per_chip: float
    """At the largest of the bounds."""
    collectives: list[dict[str, Any]]
    unknown_loops: list[str]
    """Loops whose trips could not be read; their collectives count once."""
    lower_seconds: float
    compile_seconds: float
    kernels: list[dict[str, Any]] = field(default_factory=list)
    """Pallas kernels with their calls, and by their own estimates FLOPs and bytes, in a step."""
    cycles: float = 0.0
    """Scheduled by the TPU compiler for its own operations, without kernels; 0 on GPUs."""
    traffic: float | None = None
    """Bytes to and from HBM, estimated from the compiled program (`traffic.step_traffic`); None if there is none."""
    traffic_by_part: dict[str, float] = field(default_factory=dict)
    """The same by part of the model and the step, largest first."""
    parts: dict[str, float] = field(default_factory=dict)
    """Estimated seconds of each part by itself: compute (traced FLOPs at `matmul_efficiency` of the peak), hbm (the
    traffic at the datasheet's bandwidth) and interconnect (as in `bounds`)."""
    matmul_efficiency: float = 1.0
    """Share of the peak that matrix products were taken to reach in `parts`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Estimated step time by how the parts overlap (`estimate.step_seconds`)."""
    mfu: dict[str, dict[str, float]] = field(default_factory=dict)
    """Model FLOPs utilisation at these times, counting dense and sparse FLOPs, of the whole peak."""
    xla_bytes: float | None = None
    """The compiler's count of bytes accessed, in which the body of a loop counts once; None: it has none."""
    needed: int | None = None
    """Memory that is needed according to the compiler, if it gave up."""
    buffers: list[Buffer] = field(default_factory=list)
    """Largest buffers of a step that does not fit."""
    notes: list[str] = field(default_factory=list)
    """How the mesh's devices share the work of layers, where there is a choice."""
    suggestions: list[str] = field(default_factory=list)
    """Flags that would help it to fit."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compile_report(
    config: RunConfig, topology: Topology, step: StepName, context: int, matmul_efficiency: float = 1.0
) -> Report:
    """Compile a step of `config` for a topology.

    Args:
      matmul_efficiency: share of the peak that matrix products are taken to reach in estimates of time.

    Raises:
      ConfigError: the mesh does not fit the topology, or sizes don't divide.
      UserError: the compiler refuses the step for another reason than memory.
    """
    mesh = build_mesh(config.mesh, topology.devices)
    lowered = lower_step(config, mesh, step, context)
    axes, limit = dict(mesh.shape), topology.chip.device_hbm
    try:
        compiled, seconds = compile_step(lowered)
    except OutOfMemoryError as error:
        return _report(config, topology, step, context, axes, lowered, message=str(error))
    memory = compiled_memory(compiled)
    module = parse(compiled.as_text())
    costs = compiled.cost_analysis() or {}
    return _report(
        config,
        topology,
        step,
        context,
        axes,
        lowered,
        fits=max(memory["total"], memory["peak"]) <= limit,
        memory=memory,
        collectives=[asdict(found) for found in find_collectives(module, axes)],
        unknown_loops=module.runs()[1],
        xla_flops=costs.get("flops"),
        kernels=[asdict(found) for found in find_kernels(module, lowered.kernels)],
        cycles=scheduled_cycles(module),
        traffic_by_part=step_traffic(module),
        matmul_efficiency=matmul_efficiency,
        xla_bytes=costs.get("bytes accessed"),
        compile_seconds=seconds,
    )


def _report(
    config: RunConfig,
    topology: Topology,
    step: StepName,
    context: int,
    mesh: dict[str, int],
    lowered: LoweredStep,
    *,
    message: str = "",
    fits: bool = False,
    memory: dict[str, int] | None = None,
    collectives: list[dict[str, Any]] | None = None,
    unknown_loops: list[str] | None = None,
    xla_flops: float | None = None,
    compile_seconds: float = 0.0,
    traffic_by_part: dict[str, float] | None = None,
    matmul_efficiency: float = 1.0,
    **compiled: Any,
) -> Report:
    chip, devices = topology.chip, len(topology.devices)
    memory, collectives = memory or {}, collectives or []
    flops = {
        "sparse": lowered.sparse_flops / devices,
        "dense": lowered.dense_flops / devices,
        "traced": lowered.traced_flops / devices,
    }
    if xla_flops is not None and xla_flops > 0:
        flops["xla"] = xla_flops
    touched = sum(lowered.arguments.values()) + memory.get("outputs", 0)
    peak, bandwidth = chip.bf16_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    bounds = {
        "compute": flops["traced"] / peak,
        "hbm": touched / bandwidth,
        "interconnect": sum(item["moved"] for item in collectives if "between slices" not in item["kind"])
        / (chip.interconnect / chip.devices),
    }
    estimated_time: dict[str, Any] = {}
    traffic = None if traffic_by_part is None else sum(traffic_by_part.values())
    if traffic is not None:
        parts = {**bounds, "compute": bounds["compute"] / matmul_efficiency, "hbm": traffic / bandwidth}
        seconds = step_seconds(parts)
        useful = {name: flops[name] for name in ("dense", "sparse")}
        estimated_time = {"parts": parts, "seconds": seconds, "mfu": utilisation(useful, seconds, peak)}
    buffers, advice = [], []
    if not fits:
        estimated = estimated_buffers(
            config, mesh, step, context, lowered.tokens // config.data.batch_size if step != "train" else 0
        )
        state = [Buffer(f"{name} (argument)", size) for name, size in lowered.arguments.items() if size]
        buffers = listed_buffers(message) or sorted(estimated + state, key=lambda item: -item.bytes)
        kept = sum(
            lowered.arguments[name] for name in ("parameters", "optimizer", "cache") if name in lowered.arguments
        )
        advice = suggestions(config, mesh, step, kept, estimated, chip.device_hbm)
    return Report(
        arch=config.arch,
        size=config.size,
        step=step,
        topology=topology.name,
        chips=topology.chips,
        devices=devices,
        mesh=mesh,
        tokens=lowered.tokens,
        notes=lowered.notes,
        param_dtype=config.model.param_dtype if step == "train" else config.model.dtype,
        dtype=config.model.dtype,
        fits=fits,
        hbm=chip.device_hbm,
        memory=memory,
        arguments=lowered.arguments,
        flops=flops,
        bounds=bounds,
        tokens_per_second_per_chip=lowered.tokens / topology.chips / max(bounds.values()),
        collectives=collectives,
        unknown_loops=unknown_loops or [],
        lower_seconds=lowered.seconds,
        compile_seconds=compile_seconds,
        traffic=traffic,
        traffic_by_part=traffic_by_part or {},
        matmul_efficiency=matmul_efficiency,
        **estimated_time,
        **compiled,
        needed=needed_bytes(message) if message else None,
        buffers=buffers[:6],
        suggestions=advice,
    )
