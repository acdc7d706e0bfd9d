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


# TPUs: the "System architecture" page of each generation in Google Cloud's TPU documentation. H100: NVIDIA's datasheet
# of the SXM5 card (dense, without structured sparsity).
CHIPS = {
    "v4": Chip(32 * GIB, 1.228e12, 275e12, 300e9),
    "v5e": Chip(16 * GIB, 0.819e12, 197e12, 200e9),
    "v5p": Chip(95 * GIB, 2.765e12, 459e12, 600e9),
    "v6e": Chip(32 * GIB, 1.638e12, 918e12, 400e9),
    "tpu7x": Chip(192 * GIB, 7.38e12, 2307e12, 1200e9, devices=2),
    "h100": Chip(80 * GIB, 3.35e12, 989e12, 900e9),
}
