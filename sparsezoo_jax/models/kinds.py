"""The package's own layer kinds: importing this registers them. A new one is a module, named here and nowhere else."""

from sparsezoo_jax.models import (
    attention,
    blockffn,
    deco,
    delta_ffn,
    ffn,
    laurel,
    mixer,
    mla,
    moe,
    moex,
    mohd,
    readme,
    residual,
    spark,
    sparselm,
    sparsified,
)

__all__ = [
    "attention",
    "blockffn",
    "deco",
    "delta_ffn",
    "ffn",
    "laurel",
    "mixer",
    "mla",
    "moe",
    "moex",
    "mohd",
    "readme",
    "residual",
    "spark",
    "sparselm",
    "sparsified",
]
