"""Masked autoencoders (arXiv 2111.06377): a vision transformer sees a quarter of the patches, a small one makes others.

`tiny` is for generated shapes, `digits` for those of scikit-learn; `b16` needs a set that fits into memory.
"""

import dataclasses

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.images import ImagesConfig, MAEConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Cosine

TINY = RunConfig(
    arch="vit_mae",
    size="tiny",
    model=DecoderConfig(
        vocab_size=6,
        d_model=96,
        layers=4,
        max_seq_len=64,
        images=ImagesConfig(
            patch=4, size=32, positions="sine", mae=MAEConfig(hidden_share=0.75, width=48, layers=1, heads=4)
        ),
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=24, rope=None, bias=True),
        ffn=PlainFFNConfig(d_ff=384, activation="relu", bias=True),
        norm=NormConfig(kind="layer", bias=True),
        tie_embeddings=False,
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(steps=800, eval_every=200, schedule=Cosine(learning_rate=2e-3, warmup_steps=0.1)),
    data=DataConfig(dataset="shapes", batch_size=64, seq_len=64),
)
DIGITS = dataclasses.replace(
    TINY,
    size="digits",
    model=dataclasses.replace(
        TINY.model,
        vocab_size=10,
        max_seq_len=16,
        images=dataclasses.replace(TINY.model.images, patch=2, size=8, channels=1),
    ),
    data=DataConfig(dataset="digits", batch_size=64, seq_len=16),
)

# The encoder of ViT-B/16 and the decoder of the paper: 8 layers of width 512.
B16 = RunConfig(
    arch="vit_mae",
    size="b16",
    model=DecoderConfig(
        vocab_size=1000,
        d_model=768,
        layers=12,
        max_seq_len=196,
        images=ImagesConfig(
            patch=16, size=224, positions="sine", mae=MAEConfig(hidden_share=0.75, width=512, layers=8, heads=16)
        ),
        attention=GQAConfig(heads=12, kv_heads=12, head_dim=64, rope=None, bias=True),
        ffn=PlainFFNConfig(d_ff=3072, activation="relu", bias=True),
        norm=NormConfig(kind="layer", bias=True),
        tie_embeddings=False,
        dtype="bfloat16",
    ),
    # 800 epochs of 1,281,167 images in batches of 4,096, base rate 1.5e-4 for 256 images.
    train=TrainConfig(steps=250_000, schedule=Cosine(learning_rate=2.4e-3, warmup_steps=12_500)),
    data=DataConfig(dataset="tfds:imagenet2012", batch_size=4096, seq_len=196),
)

PRESETS = {preset.size: preset for preset in (TINY, DIGITS, B16)}
