"""MLP-Mixer (arXiv 2105.01601) with ReLU, which classifies images: patches are mixed by a feed-forward network, too.

`tiny` is for generated shapes; `b16` needs a set that fits into memory.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.images import ImagesConfig
from sparsezoo_jax.models.mixer import MixerConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Cosine

TINY = RunConfig(
    arch="mixer",
    size="tiny",
    model=DecoderConfig(
        vocab_size=6,
        d_model=96,
        layers=4,
        max_seq_len=64,
        images=ImagesConfig(patch=4, size=32),
        attention=MixerConfig(tokens=64, d_tokens=64, activation="relu"),
        ffn=PlainFFNConfig(d_ff=384, activation="relu", bias=True),
        norm=NormConfig(kind="layer", bias=True),
        tie_embeddings=False,
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(steps=400, eval_every=100, schedule=Cosine(learning_rate=2e-3, warmup_steps=0.1)),
    data=DataConfig(dataset="shapes", batch_size=64, seq_len=64),
)

# Mixer-B/16 of images of 224 pixels: the paper's table 1. The positions, which the paper has not, are a choice.
B16 = RunConfig(
    arch="mixer",
    size="b16",
    model=DecoderConfig(
        vocab_size=1000,
        d_model=768,
        layers=12,
        max_seq_len=196,
        images=ImagesConfig(patch=16, size=224),
        attention=MixerConfig(tokens=196, d_tokens=384, activation="relu"),
        ffn=PlainFFNConfig(d_ff=3072, activation="relu", bias=True),
        norm=NormConfig(kind="layer", bias=True),
        tie_embeddings=False,
        dtype="bfloat16",
    ),
    train=TrainConfig(steps=375_000, schedule=Cosine(learning_rate=1e-3, warmup_steps=10_000)),
    data=DataConfig(dataset="tfds:imagenet2012", batch_size=1024, seq_len=196),
)

PRESETS = {preset.size: preset for preset in (TINY, B16)}
