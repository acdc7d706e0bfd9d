"""Vision transformers (arXiv 2010.11929) with ReLU, which classify images; Lazy Neuron's vision half.

`tiny` is for generated shapes, `digits` for those of scikit-learn; `b16` needs a set that fits into memory. Images are
pooled by the mean over their patches, which is a choice. In sizes with `_topk` a patch keeps its k largest hidden units
(Lazy Neuron, arXiv 2210.06313; k is a choice).
"""

import dataclasses

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.images import ImagesConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Cosine

TINY = RunConfig(
    arch="vit",
    size="tiny",
    model=DecoderConfig(
        vocab_size=6,
        d_model=96,
        layers=4,
        max_seq_len=64,
        images=ImagesConfig(patch=4, size=32),
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=24, rope=None, bias=True),
        ffn=PlainFFNConfig(d_ff=384, activation="relu", bias=True),
        norm=NormConfig(kind="layer", bias=True),
        tie_embeddings=False,
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(steps=400, eval_every=100, schedule=Cosine(learning_rate=2e-3, warmup_steps=0.1)),
    data=DataConfig(dataset="shapes", batch_size=64, seq_len=64),
)
DIGITS = dataclasses.replace(
    TINY,
    size="digits",
    model=dataclasses.replace(
        TINY.model, vocab_size=10, max_seq_len=16, images=ImagesConfig(patch=2, size=8, channels=1)
    ),
    data=DataConfig(dataset="digits", batch_size=64, seq_len=16),
)
TINY_TOPK = dataclasses.replace(
    TINY,
    size="tiny_topk",
    model=dataclasses.replace(TINY.model, ffn=PlainFFNConfig(d_ff=384, activation="relu", bias=True, top_k=32)),
)

# ViT-B/16 of images of 224 pixels, of whose hidden units 6.3 % are not 0 in the paper: 86,566,120 parameters.
B16 = RunConfig(
    arch="vit",
    size="b16",
    model=DecoderConfig(
        vocab_size=1000,
        d_model=768,
        layers=12,
        max_seq_len=196,
        images=ImagesConfig(patch=16, size=224),
        attention=GQAConfig(heads=12, kv_heads=12, head_dim=64, rope=None, bias=True),
        ffn=PlainFFNConfig(d_ff=3072, activation="relu", bias=True),
        norm=NormConfig(kind="layer", bias=True),
        tie_embeddings=False,
        dtype="bfloat16",
    ),
    # 300 epochs of 1,281,167 images in batches of 1,024; the rate is a choice.
    train=TrainConfig(steps=375_000, schedule=Cosine(learning_rate=1e-3, warmup_steps=10_000)),
    data=DataConfig(dataset="tfds:imagenet2012", batch_size=1024, seq_len=196),
)
B16_TOPK = dataclasses.replace(
    B16,
    size="b16_topk",
    model=dataclasses.replace(B16.model, ffn=PlainFFNConfig(d_ff=3072, activation="relu", bias=True, top_k=128)),
)

PRESETS = {preset.size: preset for preset in (TINY, TINY_TOPK, DIGITS, B16, B16_TOPK)}
