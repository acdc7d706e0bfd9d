"""What is known of each kind of device: memory, bandwidths and peak arithmetic, per chip, from public datasheets."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator."""

    hbm_bytes: int
    """Memory of a chip."""
    hbm_bandwidth: float
    """Bytes a second."""
    bf16_flops: float
    """Dense bfloat16 FLOP/s."""
    interconnect: float
    """Bytes a second over all links between chips, as the datasheet adds them up."""
    devices: int = 1
    """JAX devices on a chip; each has an equal share of the above."""

    @property
    def device_hbm(self) -> int:
        """Memory of a device, bytes."""
        return self.hbm_bytes // self.devices


# TPUs: the "System architecture" page of each generation in Google Cloud's TPU documentation. GPUs: NVIDIA's
# datasheets, of the SXM cards where there are some; dense FLOP/s, without structured sparsity. Where there is no NVLink
# the interconnect is PCI Express.
CHIPS = {
    "v4": Chip(32 * GIB, 1.228e12, 275e12, 300e9),
    "v5e": Chip(16 * GIB, 0.819e12, 197e12, 200e9),
    "v5p": Chip(95 * GIB, 2.765e12, 459e12, 600e9),
    "v6e": Chip(32 * GIB, 1.638e12, 918e12, 400e9),
    "tpu7x": Chip(192 * GIB, 7.38e12, 2307e12, 1200e9, devices=2),
    "h100": Chip(80 * GIB, 3.35e12, 989e12, 900e9),
    "a100": Chip(80 * GIB, 2.039e12, 312e12, 600e9),
    "l40s": Chip(48 * GIB, 0.864e12, 362e12, 64e9),
}
#: Those that are GPUs.
GPUS = ("h100", "a100", "l40s")

#: Chips by the beginning of what a JAX device calls its kind, the longer ones first.
_KINDS = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5e": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6": CHIPS["v6e"],
    "TPU7x": CHIPS["tpu7x"],
    "NVIDIA H100 PCIe": Chip(80 * GIB, 2.0e12, 756e12, 600e9),
    "NVIDIA H100": CHIPS["h100"],
    "NVIDIA H200": Chip(141 * 10**9, 4.8e12, 989e12, 900e9),
    "NVIDIA B200": Chip(180 * 10**9, 8.0e12, 2250e12, 1800e9),
    "NVIDIA A100-SXM4-40GB": Chip(40 * GIB, 1.555e12, 312e12, 600e9),
    "NVIDIA A100-SXM4-80GB": CHIPS["a100"],
    "NVIDIA A100 80GB PCIe": Chip(80 * GIB, 1.935e12, 312e12, 600e9),
    "NVIDIA L40S": CHIPS["l40s"],
    "NVIDIA L4": Chip(24 * GIB, 0.3e12, 121e12, 64e9),
    "NVIDIA GeForce RTX 4090": Chip(24 * GIB, 1.008e12, 165.2e12, 64e9),
}


def chip_of(kind: str) -> Chip | None:
    """The chip of a JAX device's `device_kind`, or None where its datasheet is not in the table."""
    names = [name for name in _KINDS if kind == name or kind.startswith((f"{name} ", f"{name}e", f"{name}p"))]
    return _KINDS[max(names, key=len)] if names else None
