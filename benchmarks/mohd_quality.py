"""Loss of MoHD tiny against the vanilla model of its base width: `python -m benchmarks.mohd_quality`.

Expansion to 2 and 4 times the width at the activated parameters of dense tiny, and compression to 50 % of its width.
The learning rate is searched for each on its own (first seed), then each trains with its best one on further seeds.
Finished runs are kept in `--runs` and not repeated; an unfinished one resumes from its checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality import compare
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import activated_parameters, count_parameters

MODELS = {
    "dense": ("dense", "tiny"),
    "mohd 2x": ("mohd", "tiny"),
    "mohd 4x": ("mohd", "tiny_x4"),
    "mohd 50 %": ("mohd", "tiny_c50"),
}


def main() -> None:
    """Print parameters, then search, train and print the tables."""
    compare(MODELS, Path("runs/mohd_quality"), __doc__ or "")
    print("\n| model | parameters | without embeddings | activated in layers | with the output projection |")
    print("|---|---|---|---|---|")
    for name, (arch, size) in MODELS.items():
        model = preset(arch, size).model
        count, active = count_parameters(model), activated_parameters(model)
        print(f"| {name} | {count.total:,} | {count.non_embedding:,} | {active.layers:,.0f} | {active.total:,.0f} |")


if __name__ == "__main__":
    main()
