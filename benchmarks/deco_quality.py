"""Loss of DECO tiny against its dense twin at equal parameters and tokens: `python -m benchmarks.deco_quality`.

Both have the preset's backbone, first layer and recipe; the twin has a SwiGLU in every layer. Each trains at every rate
and seed. Finished runs are kept in `--runs` and not repeated; an unfinished one resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from benchmarks.training_runs import figures_of
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import count_parameters, dense_twin
from sparsezoo_jax.models.deco import ROUTED_DENSITY, DECOConfig


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/deco_quality"))
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    model = preset("deco").model
    twin = dense_twin(model)
    assert isinstance(model.ffn, DECOConfig)
    assert twin is not None
    dense = {
        "model.ffn.kind": "gated",
        "model.ffn.d-ff": model.ffn.dense_twin().d_ff,
        "model.ffn.activation": "silu",
        "train.objectives": "[]",
    }
    print("| architecture | parameters | learning rate | seed | loss, nats/token | active experts | by layer |")
    print("|---|---|---|---|---|---|---|")
    for name, config, flags in (("dense", twin, dense), ("deco", model, {})):
        parameters = count_parameters(config).total
        for rate in options.rates:
            for seed in options.seeds:
                given = {"train.schedule.learning-rate": rate, "train.seed": seed, "data.seed": seed, **flags}
                figures = figures_of(options.runs / f"{name}-lr{rate:g}-seed{seed}", "deco", given)
                routed = [share for share in figures.get(ROUTED_DENSITY, ()) if not _absent(share)]
                mean = f"{statistics.mean(routed):.2%}" if routed else "-"
                layers = " ".join(f"{share:.1%}" for share in routed) or "-"
                cells = (name, f"{parameters:,}", f"{rate:g}", str(seed), f"{figures['loss']:.4f}", mean, layers)
                print(f"| {' | '.join(cells)} |", flush=True)


def _absent(share: float | None) -> bool:
    """Whether a layer is dense: null in JSON."""
    return share is None or math.isnan(share)


if __name__ == "__main__":
    main()
