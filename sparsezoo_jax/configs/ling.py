"""Ling 2.0 (arXiv 2510.22115): one of 32 experts for a token, chosen in groups by sigmoids and balanced by a bias.

`mini`, `flash` and `1t` are the released sizes (report, and the configuration of the released checkpoints); the peak
learning rates are the report's, batches are its numbers of sequences, rounded to what 256 devices divide. `tiny` trains
on the embedded corpus in about three minutes on two CPU cores.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import FixedObjective
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.schedules import Constant

OPTIMIZER = AdamW(b1=0.9, b2=0.95, weight_decay=0.1, decay_embeddings=True)


def objectives(routing: int) -> tuple[FixedObjective, ...]:
    """3.5e-6 times the routers' z-loss in each of `routing` layers (losses are means over these), and the MTP loss."""
    return FixedObjective(loss="router_z", weight=3.5e-6 * routing), FixedObjective(loss="mtp", weight=0.1)


TINY = RunConfig(
    arch="ling",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=GQAConfig(heads=4, kv_heads=2, head_dim=32, qk_norm=True, rope=RopeConfig(fraction=0.5)),
        first_layers=1,
        first_ffn=GatedFFNConfig(d_ff=320, activation="silu"),
        ffn=MoEFFNConfig(
            router="ling",
            experts=33,
            shared_experts=1,
            expert_width=32,
            k=5,
            groups=4,
            kept_groups=2,
            routed_scale=2.5,
            gated=True,
        ),
        mtp_layers=1,
        embedding_scale="sqrt_d_model",  # or the table, at the other maps' rate, lags behind in a run this short
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        checkpoint_every=10,
        keep_best=False,
        merge_last=5,
        schedule=Constant(learning_rate=8e-3, warmup_steps=0.1),
        optimizer=OPTIMIZER,
        objectives=objectives(4),
    ),
)


def _sized(
    size: str,
    *,
    d_model: int,
    layers: int,
    dense: int,
    d_ff: int,
    expert_width: int,
    heads: int,
    kv_heads: int,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
) -> RunConfig:
    return RunConfig(
        arch="ling",
        size=size,
        model=DecoderConfig(
            vocab_size=157_184,
            d_model=d_model,
            layers=layers,
            max_seq_len=4096,
            attention=GQAConfig(
                heads=heads, kv_heads=kv_heads, head_dim=128, qk_norm=True, rope=RopeConfig(fraction=0.5)
            ),
            first_layers=dense,
            first_ffn=GatedFFNConfig(d_ff=d_ff, activation="silu"),
            ffn=MoEFFNConfig(
                router="ling",
                experts=257,
                shared_experts=1,
                expert_width=expert_width,
                k=9,
                groups=8,
                kept_groups=4,
                routed_scale=2.5,
                gated=True,
                router_std=0.006,
            ),
            mtp_layers=1,
            tie_embeddings=False,
            init=InitConfig(kind="fixed", scale=0.006),
            dtype="bfloat16",
            remat="full",
        ),
        train=TrainConfig(
            steps=round(20e12 / (batch_size * 4096)),
            checkpoint_every=round(5e9 / (batch_size * 4096)),
            keep_best=False,
            merge_last=32,
            accumulation=accumulation,
            loss_chunk=512,
            schedule=Constant(learning_rate=learning_rate, warmup_steps=2000),
            optimizer=OPTIMIZER,
            objectives=objectives(layers - dense + 1),
        ),
        data=DataConfig(batch_size=batch_size, seq_len=4096),
    )


MINI = _sized(
    "mini",
    d_model=2048,
    layers=20,
    dense=1,
    d_ff=5120,
    expert_width=512,
    heads=16,
    kv_heads=4,
    learning_rate=3.36e-4,
    batch_size=4352,
    accumulation=17,
)
FLASH = _sized(
    "flash",
    d_model=4096,
    layers=32,
    dense=1,
    d_ff=9216,
    expert_width=1024,
    heads=32,
    kv_heads=4,
    learning_rate=2.61e-4,
    batch_size=8448,
    accumulation=33,
)
ONE_T = _sized(
    "1t",
    d_model=8192,
    layers=80,
    dense=4,
    d_ff=18_432,
    expert_width=2048,
    heads=64,
    kv_heads=8,
    learning_rate=1.86e-4,
    batch_size=18_432,
    accumulation=36,
)

PRESETS = {preset.size: preset for preset in (TINY, MINI, FLASH, ONE_T)}
