"""Mixtures of experts, the baselines of BlockFFN (arXiv 2507.08771): `--model.ffn.router` picks the router.

Experts, their width and the budget k of each size are the paper's, whose four sizes activate 10 of 48, 6 of 40, 8 of 48
and 10 of 56 experts; all else is as in BlockFFN's presets. The routers train with a balance loss; ReMoE's regulariser
takes its place in the presets `<size>_remoe`.
"""

import dataclasses

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs.minicpm import INIT, OPTIMIZER, groups
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import DensityTarget, FixedObjective
from sparsezoo_jax.training.schedules import WSD

BALANCE = FixedObjective(loss="balance", weight=1e-4)

# Backbone and recipe of BlockFFN's tiny preset.
TINY = RunConfig(
    arch="moe",
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
        ffn=MoEFFNConfig(experts=24, expert_width=32, k=5),
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
        objectives=(BALANCE,),
    ),
)


def _sized(
    size: str, *, d_model: int, layers: int, ffn: MoEFFNConfig, batch_size: int, accumulation: int, steps: int
) -> RunConfig:
    """One of the paper's sizes: BlockFFN's backbone and recipe around `ffn`."""
    return RunConfig(
        arch="moe",
        size=size,
        model=DecoderConfig(
            vocab_size=122_753,
            d_model=d_model,
            layers=layers,
            max_seq_len=4096,
            attention=MLAConfig(heads=d_model // 128, kv_up_init_std=0.02),
            ffn=ffn,
            residual=PreNormConfig(scale=1.4 / layers**0.5),
            norm=NormConfig(eps=1e-5),
            embedding_scale=12.0,
            logit_divisor=d_model / 256,
            tie_embeddings=False,
            init=INIT,
            dtype="bfloat16",
            remat="full",
        ),
        train=TrainConfig(
            steps=steps,
            accumulation=accumulation,
            loss_chunk=512,
            schedule=WSD(learning_rate=0.01, warmup_steps=0.01, decay_steps=0),
            optimizer=OPTIMIZER,
            groups=groups(256 / d_model),
            objectives=(BALANCE,),
        ),
        data=DataConfig(batch_size=batch_size, seq_len=4096),
    )


SMALL = _sized(
    "small",
    d_model=768,
    layers=16,
    ffn=MoEFFNConfig(experts=48, expert_width=64, k=10),
    batch_size=384,
    accumulation=4,
    steps=10_000,
)
MEDIUM = _sized(
    "medium",
    d_model=1280,
    layers=27,
    ffn=MoEFFNConfig(experts=40, expert_width=128, k=6),
    batch_size=768,
    accumulation=8,
    steps=20_000,
)
LARGE = _sized(
    "large",
    d_model=1536,
    layers=32,
    ffn=MoEFFNConfig(experts=48, expert_width=128, k=8),
    batch_size=576,
    accumulation=6,
    steps=30_000,
)
XLARGE = _sized(
    "xlarge",
    d_model=1792,
    layers=35,
    ffn=MoEFFNConfig(experts=56, expert_width=128, k=10),
    batch_size=768,
    accumulation=8,
    steps=40_000,
)


def _remoe(preset: RunConfig) -> RunConfig:
    """The preset with ReLU routing, its density steered to the same budget."""
    ffn = preset.model.ffn
    assert isinstance(ffn, MoEFFNConfig)
    budget = DensityTarget(loss="l1_balance", target=ffn.k / ffn.experts)
    return dataclasses.replace(
        preset,
        size=f"{preset.size}_remoe",
        model=dataclasses.replace(preset.model, ffn=dataclasses.replace(ffn, router="remoe")),
        train=dataclasses.replace(preset.train, objectives=(budget,)),
    )


_SIZES = (TINY, SMALL, MEDIUM, LARGE, XLARGE)
PRESETS = {preset.size: preset for preset in (*_SIZES, *map(_remoe, _SIZES))}
