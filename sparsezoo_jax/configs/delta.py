"""Delta activations (arXiv 2107.07305) over tokens: a plain ReLU layer whose units come in learned steps.

The paper has clips for data; as a language model this is ours. `tiny` is the tiny size of Lazy Neuron with rounded
units: without rounding it is that run. The weight of the loss is the paper's rate; its value is from smaller runs
(docs/delta.md).
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.delta_ffn import DELTA_SPIKES, DeltaFFNConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import FixedObjective
from sparsezoo_jax.training.schedules import Cosine

TINY = RunConfig(
    arch="delta",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=32),
        ffn=DeltaFFNConfig(d_ff=768),
        embedding_scale="sqrt_d_model",  # or the table, at the other maps' rate, lags behind in a run this short
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        schedule=Cosine(learning_rate=8e-3, warmup_steps=0.1),
        objectives=(FixedObjective(loss=DELTA_SPIKES, weight=1e-4),),
    ),
)

PRESETS = {preset.size: preset for preset in (TINY,)}
