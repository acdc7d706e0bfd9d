"""BlockFFN (arXiv 2507.08771): ReLU-routed experts over MLA, in MiniCPM's scalings; 0.1B to 2.8B as published.

Where the paper's decay stage belongs (another data mix), the presets end at the peak rate.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs.minicpm import INIT, OPTIMIZER, groups
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.blockffn import ACTIVATION_LOCALITY, CHUNK_SPARSIFICATION, BlockFFNConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import AdaptiveFactor, FixedObjective, ObjectiveConfig
from sparsezoo_jax.training.schedules import WSD


def objectives(locality: float, chunk: float, start: int = 1000, interval: int = 100) -> tuple[ObjectiveConfig, ...]:
    """Both losses, on from the first step; the chunk loss's weight follows its own progress."""
    return (
        FixedObjective(loss=ACTIVATION_LOCALITY, weight=locality),
        AdaptiveFactor(loss=CHUNK_SPARSIFICATION, weight=chunk, start=start, interval=interval),
    )


# Widths as in the other tiny presets. The learning rate of matrices is theirs too; d_model / 256 would double it. The
# losses' weights are a tenth and two fifths of the paper's, under which a run this short ends with the same few experts
# for all tokens.
TINY = RunConfig(
    arch="blockffn",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=MLAConfig(
            heads=4,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            kv_up_init_std=0.02,
        ),
        ffn=BlockFFNConfig(experts=24, expert_width=32),
        residual=PreNormConfig(scale=0.7),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=4.0,
        init=INIT,
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        schedule=WSD(learning_rate=0.01, warmup_steps=0.1, decay_steps=0.2),
        optimizer=OPTIMIZER,
        groups=groups(0.8),
        objectives=objectives(2e-4, 2e-2, start=60, interval=15),
    ),
)

# 119,383,552 parameters without embeddings.
SMALL = RunConfig(
    arch="blockffn",
    size="small",
    model=DecoderConfig(
        vocab_size=122_753,
        d_model=768,
        layers=16,
        max_seq_len=4096,
        attention=MLAConfig(heads=6, kv_up_init_std=0.02),
        ffn=BlockFFNConfig(experts=48, expert_width=64, expected_density=0.195, dense_twin_d_ff=2064),
        residual=PreNormConfig(scale=1.4 / 16**0.5),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=3.0,
        tie_embeddings=False,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=10_000,
        accumulation=4,
        loss_chunk=512,
        schedule=WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=0),
        optimizer=OPTIMIZER,
        groups=groups(256 / 768),
        objectives=objectives(2e-3, 5e-2),
    ),
    data=DataConfig(batch_size=384, seq_len=4096),
)

# 494,721,848 parameters without embeddings.
MEDIUM = RunConfig(
    arch="blockffn",
    size="medium",
    model=DecoderConfig(
        vocab_size=122_753,
        d_model=1280,
        layers=27,
        max_seq_len=4096,
        attention=MLAConfig(heads=10, kv_up_init_std=0.02),
        ffn=BlockFFNConfig(experts=40, expert_width=128, expected_density=0.158, dense_twin_d_ff=3440),
        residual=PreNormConfig(scale=1.4 / 27**0.5),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=5.0,
        tie_embeddings=False,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=20_000,
        accumulation=8,
        loss_chunk=512,
        schedule=WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=0),
        optimizer=OPTIMIZER,
        groups=groups(256 / 1280),
        objectives=objectives(2e-3, 5e-2),
    ),
    data=DataConfig(batch_size=768, seq_len=4096),
)

# 817,236,992 parameters without embeddings.
LARGE = RunConfig(
    arch="blockffn",
    size="large",
    model=DecoderConfig(
        vocab_size=122_753,
        d_model=1536,
        layers=32,
        max_seq_len=4096,
        attention=MLAConfig(heads=12, kv_up_init_std=0.02),
        ffn=BlockFFNConfig(experts=48, expert_width=128, expected_density=0.16, dense_twin_d_ff=4128),
        residual=PreNormConfig(scale=1.4 / 32**0.5),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=6.0,
        tie_embeddings=False,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=30_000,
        accumulation=6,
        loss_chunk=512,
        schedule=WSD(learning_rate=0.01, warmup_steps=50, decay_steps=0),
        optimizer=OPTIMIZER,
        groups=groups(256 / 1536),
        objectives=objectives(1e-3, 5e-2),
    ),
    data=DataConfig(batch_size=576, seq_len=4096),
)

# 1,187,830,952 parameters without embeddings.
XLARGE = RunConfig(
    arch="blockffn",
    size="xlarge",
    model=DecoderConfig(
        vocab_size=122_753,
        d_model=1792,
        layers=35,
        max_seq_len=4096,
        attention=MLAConfig(heads=14, kv_up_init_std=0.02),
        ffn=BlockFFNConfig(experts=56, expert_width=128, expected_density=0.182, dense_twin_d_ff=4816),
        residual=PreNormConfig(scale=1.4 / 35**0.5),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=7.0,
        tie_embeddings=False,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=40_000,
        accumulation=8,
        loss_chunk=512,
        schedule=WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=0),
        optimizer=OPTIMIZER,
        groups=groups(256 / 1792),
        objectives=objectives(2e-3, 5e-2),
    ),
    data=DataConfig(batch_size=768, seq_len=4096),
)

# Heads, vocabulary and tying are inferred from the published sizes: 2,802,997,760 parameters without the embedding.
BLOCKFFN_2_8B = RunConfig(
    arch="blockffn",
    size="2_8b",
    model=DecoderConfig(
        vocab_size=73_448,
        d_model=2048,
        layers=36,
        max_seq_len=4096,
        attention=GQAConfig(heads=16, kv_heads=4, head_dim=128),
        ffn=BlockFFNConfig(experts=128, expert_width=128, expected_density=0.125),
        residual=PreNormConfig(scale=1.4 / 36**0.5),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=8.0,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=25_000,
        accumulation=8,
        loss_chunk=512,
        schedule=WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=0),
        optimizer=OPTIMIZER,
        groups=groups(256 / 2048),
        objectives=objectives(2e-3, 1e-1),
    ),
    data=DataConfig(batch_size=768, seq_len=4096),
)

PRESETS = {preset.size: preset for preset in (TINY, SMALL, MEDIUM, LARGE, XLARGE, BLOCKFFN_2_8B)}
