"""MoE-X (arXiv 2503.07639): mixtures of wide ReLU experts whose gate picks the sparsest, on a GPT-2 backbone.

Eight experts, two of them a token, each as wide as the MLP of the dense model (4 times the model's width). The balance
loss is the mean over layers here and the paper's a sum, 0.001 a layer: hence its weight. Two final learning rates are
documented, 3e-5 (the presets') and 1e-4 (`--train.schedule.min-ratio 0.3333`). `chess` follows the paper's table of
600,000 steps; its text says 60,000.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import FixedObjective
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.schedules import Cosine

NORM = NormConfig(kind="layer", eps=1e-5)
INIT = InitConfig(kind="fixed", scale=0.02, residual_depth_scaling=True)


def balance(layers: int) -> FixedObjective:
    """The balance loss with the paper's 0.001 for each layer."""
    return FixedObjective(loss="balance", weight=0.001 * layers)


# A standard deviation of 0.02 is GPT-2's at its width; at this one weights by fan-in train better.
TINY = RunConfig(
    arch="moex",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=32, rope=None),
        ffn=MoEXFFNConfig(expert_width=512),
        norm=NORM,
        learned_positions=True,
        init=InitConfig(residual_depth_scaling=True),
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1),
        objectives=(balance(4),),
    ),
)

# Characters of chess games: 143,155,200 parameters, 42,491,904 of them a token's, as in the dense model twice as wide.
CHESS = RunConfig(
    arch="moex",
    size="chess",
    model=DecoderConfig(
        vocab_size=32,
        d_model=512,
        layers=8,
        max_seq_len=1023,
        attention=GQAConfig(heads=8, kv_heads=8, head_dim=64, rope=None),
        ffn=MoEXFFNConfig(expert_width=2048),
        norm=NORM,
        learned_positions=True,
        init=INIT,
        dtype="bfloat16",
    ),
    train=TrainConfig(
        steps=600_000,
        schedule=Cosine(learning_rate=3e-4, warmup_steps=2000, min_ratio=0.1),
        optimizer=AdamW(decay_embeddings=True),
        objectives=(balance(8),),
    ),
    data=DataConfig(dataset="chess", tokenizer="chess", batch_size=100, seq_len=1023),
)

# 520,699,392 parameters, 180,960,768 of them a token's.
SMALL = RunConfig(
    arch="moex",
    size="small",
    model=DecoderConfig(
        vocab_size=50_257,
        d_model=768,
        layers=12,
        max_seq_len=1024,
        attention=GQAConfig(heads=12, kv_heads=12, head_dim=64, rope=None),
        ffn=MoEXFFNConfig(expert_width=3072),
        norm=NORM,
        learned_positions=True,
        init=INIT,
        dtype="bfloat16",
    ),
    train=TrainConfig(
        steps=100_000,
        loss_chunk=256,
        schedule=Cosine(learning_rate=3e-4, warmup_steps=5000, min_ratio=0.1),
        optimizer=AdamW(decay_embeddings=True),
        objectives=(balance(12),),
    ),
    data=DataConfig(batch_size=320, seq_len=1024),
)

# 1,763,837,952 parameters, 555,878,400 of them a token's.
MEDIUM = RunConfig(
    arch="moex",
    size="medium",
    model=DecoderConfig(
        vocab_size=50_257,
        d_model=1024,
        layers=24,
        max_seq_len=1024,
        attention=GQAConfig(heads=16, kv_heads=16, head_dim=64, rope=None),
        ffn=MoEXFFNConfig(expert_width=4096),
        norm=NORM,
        learned_positions=True,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=TrainConfig(
        steps=100_000,
        loss_chunk=256,
        schedule=Cosine(learning_rate=3e-4, warmup_steps=5000, min_ratio=0.1),
        optimizer=AdamW(decay_embeddings=True),
        objectives=(balance(24),),
    ),
    data=DataConfig(batch_size=320, seq_len=1024),
)

PRESETS = {preset.size: preset for preset in (TINY, CHESS, SMALL, MEDIUM)}
