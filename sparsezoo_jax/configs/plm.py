"""PLM-1.8B (arXiv 2503.12167): latent attention whose queries are not compressed, squared ReLUs without a gate, WSDC.

`1_8b` is the released configuration; its output projection is the embedding, which the parameters' number decides.
`tiny` trains on the embedded corpus in about three minutes on two CPU cores.
"""

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.schedules import WSDC

OPTIMIZER = AdamW(b1=0.9, b2=0.95, weight_decay=0.1)

TINY = RunConfig(
    arch="plm",
    size="tiny",
    model=DecoderConfig(
        vocab_size=4096,
        d_model=128,
        layers=4,
        max_seq_len=1024,
        attention=MLAConfig(
            heads=4, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32
        ),
        ffn=PlainFFNConfig(d_ff=768, activation="relu2"),
        embedding_scale="sqrt_d_model",  # or the table, at the other maps' rate, lags behind in a run this short
        scan_layers=False,  # on a CPU a step is faster, and four layers compile as quickly
    ),
    train=TrainConfig(
        steps=300,
        eval_every=100,
        schedule=WSDC(learning_rate=8e-3, warmup_steps=0.1, stable_steps=0.5, decay_steps=0.3),
        optimizer=OPTIMIZER,
    ),
)

PLM_1_8B = RunConfig(
    arch="plm",
    size="1_8b",
    model=DecoderConfig(
        vocab_size=151_936,
        d_model=2048,
        layers=32,
        max_seq_len=4096,
        attention=MLAConfig(heads=16, q_lora_rank=None, kv_lora_rank=512, rope=RopeConfig(base=1e5)),
        ffn=PlainFFNConfig(d_ff=8192, activation="relu2"),
        init=InitConfig(kind="fixed", scale=0.02),
        dtype="bfloat16",
        remat="full",
    ),
    train=TrainConfig(
        steps=590_000,  # 2.48T tokens
        accumulation=4,
        loss_chunk=512,
        schedule=WSDC(learning_rate=3e-4, warmup_steps=2000, stable_steps=0.7, decay_steps=0.2),
        optimizer=OPTIMIZER,
    ),
    data=DataConfig(batch_size=1024, seq_len=4096),
)

PRESETS = {preset.size: preset for preset in (TINY, PLM_1_8B)}
