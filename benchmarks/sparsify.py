"""Methods of sparsity after training at several sparsities, on one run: `python -m benchmarks.sparsify RUN`.

For each method and sparsity the run is calibrated and evaluated as `sparsezoo_jax.sparsify` does it, in a temporary
directory, and a token of its validation text is decoded by the native operations. Printed are the loss, what is needed
of the layers' linear maps (ideal), and the time of a token against the dense model's, whose layers are packed, too:
medians over rounds in which all variants take turns.

Small layers fit into a processor's caches, where reading fewer rows saves little; the ratio is that of the run's shape.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.decode import TURN, Trained, Variant, variant
from benchmarks.run_text import validation_text
from sparsezoo_jax import run_dir
from sparsezoo_jax.inference import Formats
from sparsezoo_jax.sparsification.config import CalibrationConfig
from sparsezoo_jax.sparsify import Sparsify, sparsify

METHODS = ("cats", "teal", "wina")
SPARSITIES = (0.25, 0.4, 0.5, 0.65)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory, not sparsified")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--sequences", type=int, default=128, help="of the calibration")
    parser.add_argument("--batches", type=int, default=16, help="of the validation split, for the loss")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()

    model, tokens, segments = validation_text(options.run, 64)
    text = tokens[segments > 0]

    def decoding(model) -> Variant:
        return variant(model.config, Formats(), options.context, "native", Trained(model, text))

    variants, rows = {"dense": decoding(model)}, {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            for sparsity in options.sparsities:
                name = f"{method} {sparsity:g}"
                command = Sparsify(
                    directory=options.run,
                    out=Path(folder) / name,
                    method=method,
                    sparsity=sparsity,
                    calibration=CalibrationConfig(sequences=options.sequences),
                    batches=options.batches,
                )
                rows[name] = sparsify(command)
                variants[name] = decoding(run_dir.load(command.out).model)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, made in variants.items():
            started = time.perf_counter()
            made.turn()
            times[name].append((time.perf_counter() - started) / TURN)

    dense_loss, base = next(iter(rows.values()))["loss_dense"], times["dense"]
    print(
        f"\n{options.run.name}, {model.config.d_model} wide, {model.config.layers} layers, context {options.context}\n"
    )
    print("| variant | loss | change | weights needed | ms a token | ratio | quartiles |")
    print("|---|---|---|---|---|---|---|")
    for name, own in times.items():
        ratios = [dense / sparse for dense, sparse in zip(base, own, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        loss = rows[name]["loss"] if name in rows else dense_loss
        needed = rows[name]["weights"] / rows[name]["weights_dense"] if name in rows else 1.0
        print(
            f"| {name} | {loss:.4f} | {loss - dense_loss:+.4f} | {needed:.1%} | {1e3 * statistics.median(own):.3f} "
            f"| {statistics.median(ratios):.2f} | {low:.2f} .. {high:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
