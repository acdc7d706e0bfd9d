"""SparseLM (arXiv 2603.23198): Llama decoders with a ReLU gate, whose hidden units an L1 loss makes few.

All sizes have one width and differ in depth. The tables of the paper count embeddings, which are tied.

The weight of the loss is one for global means. In the authors' runs the trainer takes the cross-entropy as the mean
over the whole batch, but adds up the L1 loss over micro-batches and processes: their coefficient of 2e-5 counts
accumulation * processes = global batch / batch of a device = 512 / 8 = 64 times. Here it is 64 * 2e-5 = 1.28e-3, on
however many devices and micro-batches. (Equation 2 of the paper divides by the neurons, too; code and coefficients
don't.)

RoPE's base is that of the code and the released checkpoints, 1e5; the paper says 1e4. The coefficient of 2e-5 is the
released one of all sizes, whose steps are those of the paper's table.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.models.sparselm import L1, SparseLMFFNConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import FixedObjective
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.schedules import Cosine

#: Micro-batches of a step times processes, in the authors' runs: how often their coefficient counts.
ACCUMULATION_TIMES_PROCESSES = 512 // 8
RELEASED_COEFFICIENT = 2e-5


def l1(reference_c: float = RELEASED_COEFFICIENT) -> FixedObjective:
    """The L1 loss as the authors' coefficient `reference_c` weighs it in their runs."""
    return FixedObjective(loss=L1, weight=ACCUMULATION_TIMES_PROCESSES * reference_c)


ATTENTION = GQAConfig(heads=32, kv_heads=32, head_dim=64, rope=RopeConfig(base=1e5))
NORM = NormConfig(eps=1e-5)
INIT = InitConfig(kind="fixed", scale=0.02)
DATA = DataConfig(batch_size=512, seq_len=2048)


def recipe(steps: int) -> TrainConfig:
    """How all sizes were trained."""
    return TrainConfig(
        steps=steps,
        loss_chunk=256,
        schedule=Cosine(learning_rate=1e-3, warmup_steps=600, min_ratio=0.0),
        optimizer=AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_embeddings=True),
        objectives=(l1(),),
    )


# A step has 2,048 tokens, not a million: a neuron that is silent for so few is not dead yet.
TINY = RunConfig(
    arch="sparselm",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=32, rope=RopeConfig(base=1e5)),
        ffn=SparseLMFFNConfig(d_ff=512, dead_after=8),
        norm=NORM,
        embedding_scale="sqrt_d_model",  # or the table, at the other maps' rate, lags behind in a run this short
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1),
        # A narrow layer of few steps needs more than the 1.28e-3 of the large ones to come to 99 % zeros.
        objectives=(FixedObjective(loss=L1, weight=5.5e-3),),
    ),
)

# 511,739,904 parameters; 10.49 billion tokens.
SPARSELM_0_5B = RunConfig(
    arch="sparselm",
    size="0_5b",
    model=DecoderConfig(
        vocab_size=49_152,
        d_model=2048,
        layers=8,
        max_seq_len=2048,
        attention=ATTENTION,
        ffn=SparseLMFFNConfig(d_ff=5632),
        norm=NORM,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=recipe(10_000),
    data=DATA,
)

# 1,025,583,104 parameters; 20.97 billion tokens.
SPARSELM_1B = RunConfig(
    arch="sparselm",
    size="1b",
    model=DecoderConfig(
        vocab_size=49_152,
        d_model=2048,
        layers=18,
        max_seq_len=2048,
        attention=ATTENTION,
        ffn=SparseLMFFNConfig(d_ff=5632),
        norm=NORM,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=recipe(20_000),
    data=DATA,
)

# 1,539,426,304 parameters; 31.46 billion tokens.
SPARSELM_1_5B = RunConfig(
    arch="sparselm",
    size="1_5b",
    model=DecoderConfig(
        vocab_size=49_152,
        d_model=2048,
        layers=28,
        max_seq_len=2048,
        attention=ATTENTION,
        ffn=SparseLMFFNConfig(d_ff=5632),
        norm=NORM,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=recipe(30_000),
    data=DATA,
)

# The paper's form without a gate, of this size only: 1,510,066,176 parameters.
SPARSELM_1_5B_PLAIN = RunConfig(
    arch="sparselm",
    size="1_5b_plain",
    model=DecoderConfig(
        vocab_size=49_152,
        d_model=2048,
        layers=28,
        max_seq_len=2048,
        attention=ATTENTION,
        ffn=SparseLMFFNConfig(d_ff=8192, gated=False),
        norm=NORM,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=recipe(30_000),
    data=DATA,
)

# 2,053,269,504 parameters; 41.94 billion tokens.
SPARSELM_2B = RunConfig(
    arch="sparselm",
    size="2b",
    model=DecoderConfig(
        vocab_size=49_152,
        d_model=2048,
        layers=38,
        max_seq_len=2048,
        attention=ATTENTION,
        ffn=SparseLMFFNConfig(d_ff=5632),
        norm=NORM,
        init=INIT,
        dtype="bfloat16",
        remat="dots",
    ),
    train=recipe(40_000),
    data=DATA,
)

PRESETS = {
    preset.size: preset
    for preset in (TINY, SPARSELM_0_5B, SPARSELM_1B, SPARSELM_1_5B, SPARSELM_1_5B_PLAIN, SPARSELM_2B)
}
