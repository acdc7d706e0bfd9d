"""ProSparse (arXiv 2402.13516): a ReLU gate, an L1 loss that grows in sine stages, a threshold at inference.

The paper's sizes go on from a SiLU model (`--train.init-from`): while the weight is 0, the model gets used to the ReLU.
Weights are for means over tokens and neurons, summed over layers; the paper does not say what its norm is divided by,
and a weight is best checked against the loss "mean_l1" of a run's first steps.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs.minicpm import INIT, OPTIMIZER, groups
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.ffn import MEAN_L1, GatedFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import SineProgressive
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.schedules import WSD, Cosine

# From scratch: after the warm-up of the learning rate a flat stage, two sine stages, and the last weight to the end.
TINY = RunConfig(
    arch="prosparse",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=32),
        ffn=GatedFFNConfig(d_ff=512, activation="relu", l1=True, threshold=0.01),
        norm=NormConfig(eps=1e-5),
        embedding_scale="sqrt_d_model",  # or the table, at the other maps' rate, lags behind in a run this short
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1),
        objectives=(
            SineProgressive(loss=MEAN_L1, peaks=(0.0, 2.5e-2, 2.5e-2, 0.1, 0.3), steps=(30, 31, 60, 180, 270)),
        ),
    ),
)

# 1,247,442,432 parameters without the embedding, 1,360,246,272 in all. The threshold is that of the released model; the
# paper's last stage, of fine-tuning with a weight of 1e-2, has other data.
PROSPARSE_1B = RunConfig(
    arch="prosparse",
    size="1b",
    model=DecoderConfig(
        vocab_size=73_440,
        d_model=1536,
        layers=52,
        max_seq_len=4096,
        attention=GQAConfig(heads=24, kv_heads=8, head_dim=64),
        ffn=GatedFFNConfig(d_ff=3840, activation="relu", l1=True, threshold=0.03),
        residual=PreNormConfig(scale=1.4 / 52**0.5),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=6.0,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=95_000,
        accumulation=8,
        loss_chunk=512,
        # The weight stays where the decay begins.
        schedule=WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=60_000),
        optimizer=OPTIMIZER,
        groups=groups(256 / 1536),
        objectives=(
            SineProgressive(
                loss=MEAN_L1, peaks=(0.0, 1e-3, 5e-3, 5e-3, 5e-2), steps=(10_000, 15_000, 20_000, 25_000, 35_000)
            ),
        ),
    ),
    # About the 473e9 tokens of the paper's 101,000 steps.
    data=DataConfig(batch_size=1152, seq_len=4096),
)

# Llama 2 7B: 6,738,415,616 parameters; 34.6e9 tokens.
PROSPARSE_7B = RunConfig(
    arch="prosparse",
    size="7b",
    model=DecoderConfig(
        vocab_size=32_000,
        d_model=4096,
        layers=32,
        max_seq_len=4096,
        attention=GQAConfig(heads=32, kv_heads=32, head_dim=128),
        ffn=GatedFFNConfig(d_ff=11_008, activation="relu", l1=True, threshold=0.01),
        norm=NormConfig(eps=1e-5),
        tie_embeddings=False,
        init=InitConfig(kind="fixed", scale=0.02),
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=16_500,
        accumulation=4,
        loss_chunk=512,
        schedule=Cosine(learning_rate=3e-5),
        optimizer=AdamW(weight_decay=0.1),
        objectives=(
            SineProgressive(
                loss=MEAN_L1,
                peaks=(0.0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1),
                steps=(5_000, 6_000, 10_000, 12_000, 16_000, 16_500),
            ),
        ),
    ),
    data=DataConfig(batch_size=512, seq_len=4096),
)

# Llama 2 13B: 13,015,864,320 parameters; 134e9 tokens.
PROSPARSE_13B = RunConfig(
    arch="prosparse",
    size="13b",
    model=DecoderConfig(
        vocab_size=32_000,
        d_model=5120,
        layers=40,
        max_seq_len=4096,
        attention=GQAConfig(heads=40, kv_heads=40, head_dim=128),
        ffn=GatedFFNConfig(d_ff=13_824, activation="relu", l1=True, threshold=0.01),
        norm=NormConfig(eps=1e-5),
        tie_embeddings=False,
        init=InitConfig(kind="fixed", scale=0.02),
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=16_000,
        accumulation=16,
        loss_chunk=512,
        schedule=Cosine(learning_rate=5e-5),
        optimizer=AdamW(weight_decay=0.1),
        objectives=(
            SineProgressive(
                loss=MEAN_L1,
                peaks=(0.0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2),
                steps=(5_500, 6_750, 10_750, 11_000, 15_000, 16_000),
            ),
        ),
    ),
    data=DataConfig(batch_size=2048, seq_len=4096),
)

PRESETS = {preset.size: preset for preset in (TINY, PROSPARSE_1B, PROSPARSE_7B, PROSPARSE_13B)}
