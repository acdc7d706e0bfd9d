"""MoHD, mixture of hidden dimensions (arXiv 2412.05644): each sublayer reads and writes a routed part of the width.

A size is a vanilla model and what is made of it. `c50`, `c75` (compression): its width, of which 50 % or 75 % are
active. `x2`, `x3`, `x4` (expansion): 2 to 4 times its width, of which as much as the base has is active; heads and FFN
keep the base's size, so that activated parameters do. Three quarters of the active blocks are shared.

`tiny` is `dense` tiny with twice the width, and trains on the embedded corpus in two to three minutes on two CPU cores.
"""

import dataclasses

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.mohd import WIDTH_BALANCE, MoHDConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import FixedObjective
from sparsezoo_jax.training.schedules import Cosine

BALANCE = FixedObjective(loss=WIDTH_BALANCE, weight=0.01)

TINY = RunConfig(
    arch="mohd",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=256,
        layers=4,
        max_seq_len=1024,
        layer_pattern=("local", "global"),
        attention=GQAConfig(heads=4, kv_heads=2, head_dim=32, window=128, softcap=50.0),
        ffn=GatedFFNConfig(d_ff=512),
        residual=MoHDConfig(blocks=16, active=8, shared=6, post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
    ),
    train=TrainConfig(
        steps=300, eval_every=100, schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1), objectives=(BALANCE,)
    ),
)


def _tiny(size: str, d_model: int, active: int, shared: int) -> RunConfig:
    """`tiny` at another width and active share."""
    residual = MoHDConfig(blocks=16, active=active, shared=shared, post_norm=True)
    model = dataclasses.replace(TINY.model, d_model=d_model, residual=residual)
    return dataclasses.replace(TINY, size=size, model=model)


TINY_C50 = _tiny("tiny_c50", 128, 8, 6)
TINY_X4 = _tiny("tiny_x4", 512, 4, 3)

#: Width, FFN neurons and layers of the vanilla models.
BASES = {"355m": (1024, 2560, 24), "495m": (1536, 4096, 14), "1_13b": (2048, 4096, 24)}
#: Times the base's width, and blocks: all, active, shared.
VARIANTS = {"c50": (1, 16, 8, 6), "c75": (1, 16, 12, 9), "x2": (2, 16, 8, 6), "x3": (3, 24, 8, 6), "x4": (4, 16, 4, 3)}


def _sized(base: str, variant: str) -> RunConfig:
    width, d_ff, layers = BASES[base]
    times, blocks, active, shared = VARIANTS[variant]
    d_model = times * width
    # Fusion along the blocks would pass 5 % of a layer at large widths.
    fusion = "square" if d_model >= 2048 else "monarch"
    return RunConfig(
        arch="mohd",
        size=f"{base}_{variant}",
        model=DecoderConfig(
            vocab_size=32_000,
            d_model=d_model,
            layers=layers,
            max_seq_len=4096,
            attention=GQAConfig(heads=width // 128, kv_heads=width // 128, head_dim=128),
            ffn=GatedFFNConfig(d_ff=d_ff, activation="silu"),
            residual=MoHDConfig(blocks=blocks, active=active, shared=shared, fusion=fusion),
            norm=NormConfig(eps=1e-5),
            init=InitConfig(kind="fixed", scale=0.02),
            dtype="bfloat16",
            remat="full",
        ),
        train=TrainConfig(
            steps=50_000,
            schedule=Cosine(learning_rate=3e-4, warmup_steps=0.03),
            objectives=(BALANCE,),
            loss_chunk=512,
        ),
        data=DataConfig(batch_size=256, seq_len=4096),
    )


PRESETS = {
    preset.size: preset
    for preset in (
        TINY,
        TINY_C50,
        TINY_X4,
        *(_sized(base, variant) for base in BASES for variant in VARIANTS),
    )
}
