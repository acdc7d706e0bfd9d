"""Lazy Neuron (arXiv 2210.06313): feed-forward networks whose ReLUs grow sparse by themselves, or keep k units.

The `t5_*` sizes are the shapes of T5's stacks, as decoders: the paper's text models are T5's encoder-decoders. `tiny`
trains on the embedded corpus in about three minutes on two CPU cores. In sizes with `_topk` a token keeps its k largest
hidden units.
"""

import dataclasses

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Cosine

TINY = RunConfig(
    arch="lazy",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=32),
        ffn=PlainFFNConfig(d_ff=768, activation="relu"),
        embedding_scale="sqrt_d_model",  # or the table, at the other maps' rate, lags behind in a run this short
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(steps=300, eval_every=100, schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1)),
)
TINY_TOPK = dataclasses.replace(
    TINY,
    size="tiny_topk",
    model=dataclasses.replace(TINY.model, ffn=PlainFFNConfig(d_ff=768, activation="relu", top_k=32)),
)

# 2^19 steps of 2^16 tokens, as T5 was trained; the rate and its decay are a choice.
TRAIN = TrainConfig(steps=524_288, loss_chunk=128, schedule=Cosine(learning_rate=1e-3, warmup_steps=10_000))
DATA = DataConfig(batch_size=128, seq_len=512)

# A decoder of T5-Small's stack: 18,881,024 parameters without the embedding.
T5_SMALL = RunConfig(
    arch="lazy",
    size="t5_small",
    model=DecoderConfig(
        vocab_size=32_128,
        d_model=512,
        layers=6,
        max_seq_len=512,
        attention=GQAConfig(heads=8, kv_heads=8, head_dim=64),
        ffn=PlainFFNConfig(d_ff=2048, activation="relu"),
        dtype="bfloat16",
    ),
    train=TRAIN,
    data=DATA,
)

# Of T5-Base's, for which the paper has 3.0 % of the hidden units not 0: 84,953,856.
T5_BASE = RunConfig(
    arch="lazy",
    size="t5_base",
    model=DecoderConfig(
        vocab_size=32_128,
        d_model=768,
        layers=12,
        max_seq_len=512,
        attention=GQAConfig(heads=12, kv_heads=12, head_dim=64),
        ffn=PlainFFNConfig(d_ff=3072, activation="relu"),
        dtype="bfloat16",
    ),
    train=TRAIN,
    data=DATA,
)
T5_BASE_TOPK = dataclasses.replace(
    T5_BASE,
    size="t5_base_topk",
    model=dataclasses.replace(T5_BASE.model, ffn=PlainFFNConfig(d_ff=3072, activation="relu", top_k=128)),
)

# Of T5-Large's: 302,040,064.
T5_LARGE = RunConfig(
    arch="lazy",
    size="t5_large",
    model=DecoderConfig(
        vocab_size=32_128,
        d_model=1024,
        layers=24,
        max_seq_len=512,
        attention=GQAConfig(heads=16, kv_heads=16, head_dim=64),
        ffn=PlainFFNConfig(d_ff=4096, activation="relu"),
        dtype="bfloat16",
        remat="dots",
    ),
    train=TRAIN,
    data=DATA,
)

PRESETS = {preset.size: preset for preset in (TINY, TINY_TOPK, T5_SMALL, T5_BASE, T5_BASE_TOPK, T5_LARGE)}
