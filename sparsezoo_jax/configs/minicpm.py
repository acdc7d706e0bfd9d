"""What BlockFFN (arXiv 2507.08771) and its baselines share: MiniCPM's initialisation and learning rates.

The learning rate is that of embeddings, output head and norms; matrices train at it divided by d_model / 256, and the
router is clipped by itself.
"""

from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.training.config import ParameterGroup
from sparsezoo_jax.training.optimizers import AdamW

INIT = InitConfig(kind="fixed", scale=0.1, width_base=256, embedding_std=0.1, output_std=0.1)
OPTIMIZER = AdamW(weight_decay=0.1, decay_embeddings=True)
MATRICES = r"/attention/(q_a|q_b|kv_a|kv_b|o)_[A-Z]|/attention/projections/|/ffn/"


def groups(multiplier: float) -> tuple[ParameterGroup, ...]:
    """The router, clipped by itself; all other matrices and the router's scales; the rest. Everything decays."""
    return (
        ParameterGroup(pattern="/ffn/router_DE", lr_multiplier=multiplier, clip=1.0, weight_decay=0.1),
        ParameterGroup(pattern=MATRICES, lr_multiplier=multiplier, weight_decay=0.1),
        ParameterGroup(pattern=".", weight_decay=0.1),
    )
