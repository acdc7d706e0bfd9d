"""MoHD's ablations on the embedded corpus: `python -m benchmarks.mohd_ablations`.

Every variant is mohd tiny (twice the width of dense tiny, half of it active) with one thing changed, at the same
learning rate and tokens. The control has shared blocks only, no fusion, the norm after the mask and a masked head: a
vanilla model of the active width. Finished runs are kept in `--runs` and not repeated; an unfinished one resumes.
All variants of the first seed come before those of the second, and `--table` prints what there is without training.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.ablations import Variant, run
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models.mohd import MoHDConfig


def variants() -> list[Variant]:
    """The rows, the unchanged model first."""
    residual = preset("mohd", "tiny").model.residual
    assert isinstance(residual, MoHDConfig)
    active = residual.active

    def changed(group: str, name: str, **fields: Any) -> Variant:
        flags = {f"model.residual.{field.replace('_', '-')}": value for field, value in fields.items()}
        return Variant(group, name, flags, "mohd")

    def no_loss(variant: Variant) -> Variant:
        return variant._replace(flags={**variant.flags, "train.objectives": "[]"})

    vanilla = {"shared": active, "shared_gate": "hard", "fusion": "none", "norm_after_mask": True, "masked_head": True}
    return [
        Variant("", "mohd tiny: 8 of 16 blocks, 6 of them shared, monarch, rms", {}, "mohd"),
        Variant("", "dense tiny: the active width alone", {}, "dense"),
        no_loss(changed("control", "a vanilla model of the active width", **vanilla)),
        *(changed("shared of 8 active", f"{shared}", shared=shared) for shared in (0, 2, 4)),
        no_loss(changed("shared of 8 active", f"{active}: nothing routed", shared=active)),
        changed("router", "random", router="random"),
        changed("router", "one for a layer", routers="layer"),
        changed("router", "a second one for the output", output_blocks="routed"),
        *(changed("scaling", name, scale_mode=name) for name in ("none", "mean", "y_literal")),
        changed("scaling", "norm after the mask", norm_after_mask=True),
        changed("shared gate", "hard", shared_gate="hard"),
        *(changed("fusion", name, fusion=name) for name in ("none", "block_diagonal", "square")),
        no_loss(changed("balance", "no loss")),
        no_loss(changed("balance", "bias instead of the loss", balance="bias")),
        changed("balance", "unnormalised", balance="unnormalised"),
        *(changed("masked", f"{name} only", sublayers=name) for name in ("attention", "ffn")),
        changed("masked", "the head, too", masked_head=True),
        *(changed("blocks", f"{count}", blocks=count, active=count // 2, shared=count * 3 // 8)
          for count in (4, 8, 32, 64)),
        changed("sparsity", "all blocks at first, 50 % after 30 steps", warmup_steps=30, implementation="dense"),
        changed("initial weights", "by the whole width", init_fan_in="all"),
    ]  # fmt: skip


def main() -> None:
    """Train what is missing and print the table."""

    def load(figures: dict[str, Any]) -> str:
        return f"{statistics.mean(figures['width_max_load']):.2f}" if "width_max_load" in figures else "–"

    run(variants(), {"largest / mean load": load}, Path("runs/mohd_ablations"), __doc__ or "")


if __name__ == "__main__":
    main()
