"""Time of a train step of every architecture against its own dense twin: `python -m benchmarks.step_times`.

The whole step (forward, backward, AdamW, objectives) of the tiny presets, in rounds in which the two and the preset
`dense` take turns. Wall time is what a user waits; processor time is the work, which other programs on the machine
disturb less. Weights are those that a run starts with: what grows sparse in training (ReLUs under a loss) is not sparse
yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

from benchmarks.timing import interleaved_by, ratios
from benchmarks.train_step import random_batch, step_of
from benchmarks.zoo import ARCHS
from sparsezoo_jax import platforms
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import DecoderConfig, dense_twin
from sparsezoo_jax.models.ffn import PlainFFNConfig


def twin_of(model: DecoderConfig) -> DecoderConfig:
    """The dense decoder of equal parameters; of plain layers that with GELUs."""
    if isinstance(model.ffn, PlainFFNConfig):
        return dataclasses.replace(model, ffn=dataclasses.replace(model.ffn, activation="gelu_tanh", top_k=None))
    twin = dense_twin(model)
    assert twin is not None
    return twin


def main() -> None:
    """Time the pairs and print the table."""
    platforms.keep_freed_memory()  # as training does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sparse = [arch for arch in ARCHS if arch != "dense"]
    parser.add_argument("--archs", nargs="+", default=sparse, choices=sparse)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(
        "| architecture | step ms | against its dense twin, wall time | processor time | against `dense`, wall time |"
    )
    print("|---|---|---|---|---|")
    for arch in options.archs:
        config = preset(arch, "tiny")
        model, dense = (
            dataclasses.replace(of, scan_layers=False, remat="none") for of in (config.model, preset("dense").model)
        )
        batch = random_batch(model, config.data.batch_size, config.data.seq_len)
        steps: dict[str, Any] = {
            "twin": step_of(twin_of(model), batch),
            "dense": step_of(dense, batch),
            arch: step_of(model, batch, config.train.objectives),
        }
        wall, processor = interleaved_by(steps, options.rounds, (time.perf_counter, time.process_time))
        compared = (ratios(wall, "twin"), ratios(processor, "twin"), ratios(wall, "dense"))
        shown = [f"{mid:.2f} ({low:.2f} .. {high:.2f})" for low, mid, high in (of[arch] for of in compared)]
        print(f"| {arch} | {1e3 * statistics.median(wall[arch]):.0f} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
