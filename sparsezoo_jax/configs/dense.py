"""Dense decoders: the twins that the sparse architectures are measured against, and three well-known shapes.

`tiny` trains on the embedded corpus in two to three minutes on two CPU cores.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Cosine

TINY = RunConfig(
    arch="dense",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        layer_pattern=("local", "global"),
        attention=GQAConfig(heads=4, kv_heads=2, head_dim=32, window=128, softcap=50.0),
        ffn=GatedFFNConfig(d_ff=512),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
        scan_layers=False,  # on a CPU a step is 1.3 times as fast, and four layers compile as quickly
    ),
    train=TrainConfig(steps=300, eval_every=100, schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1)),
)

# Gemma 2 2B as its technical report gives it: 2,024,517,888 parameters without the embedding.
GEMMA2_2B = RunConfig(
    arch="dense",
    size="gemma2_2b",
    model=DecoderConfig(
        vocab_size=256_128,
        d_model=2304,
        layers=26,
        max_seq_len=8192,
        layer_pattern=("local", "global"),
        attention=GQAConfig(heads=8, kv_heads=4, head_dim=256, window=4096, softcap=50.0),
        ffn=GatedFFNConfig(d_ff=9216),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(loss_chunk=2048),
    data=DataConfig(batch_size=512, seq_len=8192),
)

# Llama style: no post-norms, SwiGLU, untied head. 0.1B.
LLAMA_0_1B = RunConfig(
    arch="dense",
    size="0_1b",
    model=DecoderConfig(
        vocab_size=32_000,
        d_model=768,
        layers=12,
        max_seq_len=2048,
        attention=GQAConfig(heads=12, kv_heads=4, head_dim=64),
        ffn=GatedFFNConfig(d_ff=2048, activation="silu"),
        norm=NormConfig(eps=1e-5),
        tie_embeddings=False,
        init=InitConfig(kind="fixed", scale=0.02),
        dtype="bfloat16",
    ),
)

# GPT-2 small: learned positions, LayerNorm and biases everywhere, plain GELU FFN. 124,439,808 parameters.
GPT2 = RunConfig(
    arch="dense",
    size="gpt2",
    model=DecoderConfig(
        vocab_size=50_257,
        d_model=768,
        layers=12,
        max_seq_len=1024,
        attention=GQAConfig(heads=12, kv_heads=12, head_dim=64, rope=None, bias=True),
        ffn=PlainFFNConfig(d_ff=3072, bias=True),
        norm=NormConfig(kind="layer", eps=1e-5, bias=True),
        learned_positions=True,
        init=InitConfig(kind="fixed", scale=0.02, residual_depth_scaling=True),
        dtype="bfloat16",
    ),
)

PRESETS = {preset.size: preset for preset in (TINY, GEMMA2_2B, LLAMA_0_1B, GPT2)}
