"""DECO (arXiv 2605.10933): ReLU-routed NormSiLU experts beside a shared one, over plain multi-head attention.

Sizes, rates and steps are those of the released training scripts (`run.sh`, which overrides the scripts' defaults). The
vocabulary is MiniCPM4's, whose tokenizer is not included.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.deco import ROUTED_DENSITY, ROUTER_ENTROPY, DECOConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import DensityTarget
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.schedules import WSD

#: Every matrix decays, tables too; vectors (norm scales, the routers' factors, NormSiLU's scale) do not.
OPTIMIZER = AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_embeddings=True)


def init(std: float) -> InitConfig:
    """One std for all; maps of attention, dense layers and shared experts to the stream by 1 / sqrt(2 layers) of it."""
    return InitConfig(kind="fixed", scale=std, embedding_std=std, output_std=std, residual_depth_scaling=True)


def sparsity_control(factor: float, weight: float = 1e-8, target: float = 0.2) -> tuple[DensityTarget, ...]:
    """The weight of the routers' entropy: times `factor` after a step with more than `target` active, else divided."""
    return (
        DensityTarget(
            loss=ROUTER_ENTROPY,
            target=target,
            statistic=ROUTED_DENSITY,
            weight=weight,
            floor=1e-8,
            factor=factor,
            decimals=2,
        ),
    )


# With the paper's factor of 1.002 the weight would take 5,800 steps to get from 1e-8 to the 1e-3 at which it acts: a
# short run starts near it and moves in larger steps. Larger ones than these overshoot: experts that entropy has
# switched off for all tokens do not come back, for ReLU gives them no gradient.
TINY = RunConfig(
    arch="deco",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=32),
        first_layers=1,
        first_ffn=GatedFFNConfig(d_ff=496, activation="silu"),
        ffn=DECOConfig(experts=20, expert_width=32, shared_width=64, dense_twin_d_ff=496),
        norm=NormConfig(eps=1e-5),
        init=init(0.05),
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        schedule=WSD(learning_rate=0.004, warmup_steps=0.1, decay_steps=0.2, decay="halving"),
        optimizer=OPTIMIZER,
        objectives=sparsity_control(1.005, weight=4.2e-4),
    ),
)


def _sized(
    size: str,
    *,
    d_model: int,
    layers: int,
    experts: int,
    dense_width: int,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
    steps: int,
    factor: float,
) -> RunConfig:
    """One of the paper's sizes."""
    heads = d_model // 128
    return RunConfig(
        arch="deco",
        size=size,
        model=DecoderConfig(
            vocab_size=73_448,
            d_model=d_model,
            layers=layers,
            max_seq_len=4096,
            attention=GQAConfig(heads=heads, kv_heads=heads, head_dim=128),
            first_layers=1,
            first_ffn=GatedFFNConfig(d_ff=dense_width, activation="silu"),
            ffn=DECOConfig(experts=experts, dense_twin_d_ff=dense_width),
            norm=NormConfig(eps=1e-5),
            tie_embeddings=False,
            init=init(0.01),
            dtype="bfloat16",
            remat="full",
        ),
        train=TrainConfig(
            steps=steps,
            accumulation=accumulation,
            loss_chunk=512,
            schedule=WSD(learning_rate=learning_rate, warmup_steps=100, decay_steps=1000, decay="halving"),
            optimizer=OPTIMIZER,
            objectives=sparsity_control(factor),
        ),
        data=DataConfig(batch_size=batch_size, seq_len=4096),
    )


# 109,038,390 parameters without embeddings.
DECO_0_1B = _sized(
    "0_1b",
    d_model=768,
    layers=16,
    experts=42,
    dense_width=1920,
    learning_rate=1.1175e-3,
    batch_size=64,
    accumulation=1,
    steps=15_000,
    factor=1.002,
)
# 242,325,755 parameters without embeddings.
DECO_0_2B = _sized(
    "0_2b",
    d_model=1024,
    layers=20,
    experts=57,
    dense_width=2560,
    learning_rate=9.3e-4,
    batch_size=128,
    accumulation=2,
    steps=15_000,
    factor=1.002,
)
# 533,273,426 parameters without embeddings.
DECO_0_5B = _sized(
    "0_5b",
    d_model=1280,
    layers=27,
    experts=77,
    dense_width=3360,
    learning_rate=7.8e-4,
    batch_size=256,
    accumulation=4,
    steps=20_000,
    factor=1.001,
)
# 1,187,533,082 parameters without embeddings.
DECO_1_2B = _sized(
    "1_2b",
    d_model=1792,
    layers=32,
    experts=102,
    dense_width=4480,
    learning_rate=6.54e-4,
    batch_size=512,
    accumulation=8,
    steps=23_000,
    factor=1.001,
)

PRESETS = {preset.size: preset for preset in (TINY, DECO_0_1B, DECO_0_2B, DECO_0_5B, DECO_1_2B)}
