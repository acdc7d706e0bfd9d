"""Mixtures of experts, the baselines of BlockFFN (arXiv 2507.08771): `--model.ffn.router` picks the router.

Experts, their width and the budget k of each size are the paper's, whose four sizes activate 10 of 48, 6 of 40, 8 of 48
and 10 of 56 experts. The presets train the routers with a balance loss; ReMoE's regulariser takes its place in the
presets `<size>_remoe`.
"""

import dataclasses

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.kinds import AttentionConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.training.config import Cosine, TrainConfig
from sparsezoo_jax.training.objectives import DensityTarget, FixedObjective

BALANCE = FixedObjective(loss="balance", weight=1e-4)

TINY = RunConfig(
    arch="moe",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        layer_pattern=("local", "global"),
        attention=GQAConfig(heads=4, kv_heads=2, head_dim=32, window=128, softcap=50.0),
        ffn=MoEFFNConfig(experts=24, expert_width=32, k=5),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        embedding_scale="sqrt_d_model",
        final_softcap=30.0,
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300, eval_every=100, schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1), objectives=(BALANCE,)
    ),
)


def _attention(heads: int) -> AttentionConfig:
    """Attention of the paper's sizes; theirs is multi-head latent attention."""
    return GQAConfig(heads=heads, kv_heads=heads, head_dim=128)


def _sized(size: str, d_model: int, layers: int, ffn: MoEFFNConfig, batch_size: int, steps: int) -> RunConfig:
    return RunConfig(
        arch="moe",
        size=size,
        model=DecoderConfig(
            vocab_size=122_753,
            d_model=d_model,
            layers=layers,
            max_seq_len=4096,
            attention=_attention(d_model // 128),
            ffn=ffn,
            norm=NormConfig(eps=1e-5),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        train=TrainConfig(steps=steps, loss_chunk=512, objectives=(BALANCE,)),
        data=DataConfig(batch_size=batch_size, seq_len=4096),
    )


SMALL = _sized("small", 768, 16, MoEFFNConfig(experts=48, expert_width=64, k=10), 384, 10_000)
MEDIUM = _sized("medium", 1280, 27, MoEFFNConfig(experts=40, expert_width=128, k=6), 768, 20_000)
LARGE = _sized("large", 1536, 32, MoEFFNConfig(experts=48, expert_width=128, k=8), 576, 30_000)
XLARGE = _sized("xlarge", 1792, 35, MoEFFNConfig(experts=56, expert_width=128, k=10), 768, 40_000)


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
