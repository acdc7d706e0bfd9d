"""The machine: its device and versions, what its datasheet promises, and what it reaches with a product and a copy."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.device.rows import OK, Job, Row
from benchmarks.timing import interleaved
from sparsezoo_jax.chips import chip_of
from sparsezoo_jax.pallas_kernels.tuning import TABLE, fitting, launch_of, target

PEAKS = "peaks"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pydantic")


class Peaks(NamedTuple):
    """Bounds of the device; None: its datasheet is not known."""

    flops: float | None
    """Dense bfloat16 FLOP/s."""
    bandwidth: float | None
    """Bytes a second."""

    def seconds(self, flops: float, moved: float) -> float | None:
        """The least time in which so many FLOPs can be made and bytes moved."""
        if self.flops is None or self.bandwidth is None:
            return None
        return max(flops / self.flops, moved / self.bandwidth)


def peaks_of(device: Any) -> Peaks:
    """By the datasheet."""
    chip = chip_of(device.device_kind)
    if chip is None:
        return Peaks(None, None)
    return Peaks(chip.bf16_flops / chip.devices, chip.hbm_bandwidth / chip.devices)


def describe(device: Any) -> dict[str, Any]:
    """What is known of the device and the software, in words and numbers."""
    found: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "count": jax.device_count()}
    for name in ("compute_capability", "core_count", "shared_memory_per_block_optin"):
        if (value := getattr(device, name, None)) is not None:
            found[name] = value
    stats = memory_stats(device)
    if "bytes_limit" in stats:
        found["memory bytes"] = stats["bytes_limit"]
    found["driver"] = _driver(device)
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    peaks = peaks_of(device)
    found["datasheet TFLOP/s"] = None if peaks.flops is None else peaks.flops / 1e12
    found["datasheet GB/s"] = None if peaks.bandwidth is None else peaks.bandwidth / 1e9
    return found


def memory_stats(device: Any) -> dict[str, int]:
    """Bytes by what they are for, empty where the device does not count."""
    try:
        return device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return {}


def _driver(device: Any) -> str:
    version = Path("/proc/driver/nvidia/version")
    if device.platform == "gpu" and version.exists():
        return version.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    return " ".join(device.client.platform_version.split())


def machine_rows(machine: dict[str, Any]) -> Iterator[Row]:
    """What is known, and the tiles that the device has no shared memory for and gets smaller ones of."""
    yield Row("machine", "device", OK, machine)
    kernels = sorted({key.kernel for key in TABLE})
    measured = sorted({key.kernel for key in TABLE if key.target == target().name and key.target is not None})
    yield Row("machine", "tiles", OK, {"kernels": len(kernels), "tuned here": ", ".join(measured) or "none"})
    if machine["platform"] != "tpu":
        yield from smaller_tiles()


def smaller_tiles() -> Iterator[Row]:
    """Of attention's kernels, whose tiles grow with the head, in bfloat16; half of a head is the predictor's."""
    for kernel, read_queries, read_keys, own in ATTENTION_TILES:
        for width in (64, 128, 256):
            launch = launch_of(f"spark_attention_{kernel}", itemsize=2, columns=width)
            fits = fitting(launch, 2 * read_queries * width // 2, 2 * read_keys * width // 2, own)
            if fits != launch:
                found = {"table": str(tuple(launch)), "used": "none" if fits is None else str(tuple(fits))}
                yield Row("machine", f"tiles of spark_attention_{kernel}, heads of {width}", OK, found)


#: Kernel; halves of a head that it reads of a query and of a key; which tile is the program's own.
ATTENTION_TILES = (("moments", 1, 1, 0), ("mix", 2, 4, 0), ("queries", 4, 4, 0), ("keys", 4, 4, 1))


def measured_peaks(tiny: bool) -> Job:
    """A large product, and a copy: what the device reaches at best."""

    def compiled() -> Callable[[], Iterator[Row]]:
        n, size = (64, 1 << 12) if tiny else (8192, 1 << 29)
        a = jnp.ones((n, n), jnp.bfloat16)
        x = jnp.ones((size,), jnp.bfloat16)
        product = jax.jit(lambda a: a @ a).lower(a).compile()
        copy = jax.jit(lambda x: x + 1).lower(x).compile()

        def run() -> Iterator[Row]:
            times = interleaved({"product": lambda: product(a), "copy": lambda: copy(x)}, 3 if tiny else 15)
            found = {name: statistics.median(values) for name, values in times.items()}
            peaks = peaks_of(jax.devices()[0])
            rate, bandwidth = 2 * n**3 / found["product"], 2 * x.nbytes / found["copy"]
            shares = {} if peaks.flops is None else {"of datasheet": rate / peaks.flops}
            yield Row("times", "product", OK, {"shape": f"{n}^3 bfloat16", "TFLOP/s": rate / 1e12} | shares, job=PEAKS)
            shares = {} if peaks.bandwidth is None else {"of datasheet": bandwidth / peaks.bandwidth}
            yield Row("times", "copy", OK, {"MB": 2 * x.nbytes / 1e6, "GB/s": bandwidth / 1e9} | shares, job=PEAKS)

        return run

    return Job(PEAKS, compiled)
