"""What this machine's accelerator computes, and how fast: `python -m benchmarks.device` (docs/device.md)."""
