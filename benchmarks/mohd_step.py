"""Time of a MoHD train step, grouped (active blocks only) against masked: `python -m benchmarks.mohd_step`.

The whole step (forward, backward, AdamW) of a preset with fewer layers and a vocabulary cut by as much, so that the
output projection keeps its share; in interleaved rounds. Beside them: vanilla models of the whole and the active width.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from benchmarks.timing import interleaved, print_ratios
from benchmarks.train_step import step_of
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import DecoderConfig, dense_twin
from sparsezoo_jax.models.mohd import MoHDConfig


def main() -> None:
    """Time the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="355m_c50")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    model = preset("mohd", options.size).model
    residual = model.residual
    assert isinstance(residual, MoHDConfig)
    # Unrolled and in float32: what a CPU runs best, for all variants alike.
    model = dataclasses.replace(
        model,
        layers=options.layers,
        vocab_size=model.vocab_size * options.layers // model.layers,
        scan_layers=False,
        remat="none",
        dtype="float32",
    )
    twin = dense_twin(model)
    assert twin is not None
    draw = np.random.default_rng(0)
    shape = (options.batch_size, options.seq_len)
    batch = {
        "tokens": draw.integers(0, model.vocab_size, shape, np.int32),
        "targets": draw.integers(0, model.vocab_size, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "mask": np.ones(shape, bool),
    }

    def implemented(name: str) -> DecoderConfig:
        return dataclasses.replace(model, residual=dataclasses.replace(residual, implementation=name))

    configs = {
        "masked": implemented("dense"),
        "grouped, native": implemented("native"),
        "grouped, a loop": implemented("loop"),
        "vanilla, whole width": twin,
        "vanilla, active width": dataclasses.replace(twin, d_model=residual.active_width(model.d_model, "ffn")),
    }
    variants = {name: step_of(config, batch) for name, config in configs.items()}
    sizes = f"{model.layers} layers, {shape[0]} x {shape[1]} tokens, {options.rounds} rounds"
    print(f"mohd {options.size}, {residual.active} of {residual.blocks} blocks, {sizes}\n")
    print_ratios(interleaved(variants, options.rounds), "masked")


if __name__ == "__main__":
    main()
