"""Spark Transformer (arXiv 2506.06644): Gemma 2 with predicted, statistically thresholded FFN and attention.

Every preset has the parameter count of its dense twin: the FFN is 1.5 times as wide, for its two input matrices see
disjoint halves of the input. About 8 % of the neurons and at most about `attention.top_k` keys are active per token.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Cosine

TINY = RunConfig(
    arch="spark",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        layer_pattern=("local", "global"),
        attention=SparkAttentionConfig(heads=4, kv_heads=2, head_dim=32, top_k=32, r=16, window=128, softcap=50.0),
        ffn=SparkFFNConfig(d_ff=768, top_k=61, r=64),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
        scan_layers=False,  # on a CPU a step is 1.3 times as fast, and four layers compile as quickly
    ),
    train=TrainConfig(steps=300, eval_every=100, schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1)),
)

# About 100M parameters with a 32k vocabulary: a day on one accelerator rather than a month on many.
SMALL = RunConfig(
    arch="spark",
    size="small",
    model=DecoderConfig(
        vocab_size=32_000,
        d_model=768,
        layers=12,
        max_seq_len=2048,
        layer_pattern=("local", "global"),
        attention=SparkAttentionConfig(heads=12, kv_heads=4, head_dim=64, top_k=128, r=32, window=1024, softcap=50.0),
        ffn=SparkFFNConfig(d_ff=3072, top_k=246, r=384),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
        dtype="bfloat16",
    ),
)

# The paper's model: Gemma 2 2B's 2,024,517,888 parameters without the embedding.
SPARK_2B = RunConfig(
    arch="spark",
    size="2b",
    model=DecoderConfig(
        vocab_size=256_128,
        d_model=2304,
        layers=26,
        max_seq_len=8192,
        layer_pattern=("local", "global"),
        attention=SparkAttentionConfig(heads=8, kv_heads=4, head_dim=256, top_k=256, r=128, window=4096, softcap=50.0),
        ffn=SparkFFNConfig(d_ff=13_824, top_k=1106, r=1024),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(loss_chunk=2048),  # logits of 8,192 positions of 256k words would take 8.4 GB a sequence
    data=DataConfig(batch_size=512, seq_len=8192),
)

# Gemma 2 9B's shape under the same rule (the paper trains 2B only): 8,324,201,984 parameters without the embedding.
SPARK_9B = RunConfig(
    arch="spark",
    size="9b",
    model=DecoderConfig(
        vocab_size=256_128,
        d_model=3584,
        layers=42,
        max_seq_len=8192,
        layer_pattern=("local", "global"),
        attention=SparkAttentionConfig(heads=16, kv_heads=8, head_dim=256, top_k=256, r=128, window=4096, softcap=50.0),
        ffn=SparkFFNConfig(d_ff=21_504, top_k=1720, r=1792),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
        dtype="bfloat16",
        remat="full",
    ),
    train=TrainConfig(loss_chunk=512),  # logits of 8,192 positions of 256k words would take 8.4 GB a sequence
    data=DataConfig(batch_size=512, seq_len=8192),
)

PRESETS = {preset.size: preset for preset in (TINY, SMALL, SPARK_2B, SPARK_9B)}
