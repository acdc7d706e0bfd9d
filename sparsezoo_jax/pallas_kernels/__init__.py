"""One folder per operation: its definition in plain JAX, and the kernels that must agree with it.

Operations that end in `_rows`, and `linear`, are for decoding: a few tokens, with weights laid out for
inference (`rows.py`); `gemm` and `token_rows` take many tokens to the same weights.
"""

from sparsezoo_jax.pallas_kernels.active_rows import active_rows
from sparsezoo_jax.pallas_kernels.attention import attention_rows, flash_attention
from sparsezoo_jax.pallas_kernels.block_ffn import block_ffn, block_ffn_union
from sparsezoo_jax.pallas_kernels.block_ffn.rows import block_ffn_rows
from sparsezoo_jax.pallas_kernels.deco_ffn.rows import deco_ffn_rows
from sparsezoo_jax.pallas_kernels.dispatch import without_kernels
from sparsezoo_jax.pallas_kernels.expert_rows import expert_products, expert_rows
from sparsezoo_jax.pallas_kernels.gated_ffn import gated_ffn_rows
from sparsezoo_jax.pallas_kernels.gemm import gemm
from sparsezoo_jax.pallas_kernels.grouped_linear.rows import from_blocks_rows, to_blocks_rows
from sparsezoo_jax.pallas_kernels.linear import linear
from sparsezoo_jax.pallas_kernels.put_slots import put_slots
from sparsezoo_jax.pallas_kernels.spark_attention import spark_attention
from sparsezoo_jax.pallas_kernels.spark_attention.rows import spark_attention_rows
from sparsezoo_jax.pallas_kernels.spark_ffn import spark_ffn
from sparsezoo_jax.pallas_kernels.spark_ffn.rows import spark_ffn_rows
from sparsezoo_jax.pallas_kernels.statistical_topk import statistical_topk
from sparsezoo_jax.pallas_kernels.token_rows import token_rows

__all__ = [
    "active_rows",
    "attention_rows",
    "block_ffn",
    "block_ffn_rows",
    "block_ffn_union",
    "deco_ffn_rows",
    "expert_products",
    "expert_rows",
    "flash_attention",
    "from_blocks_rows",
    "gated_ffn_rows",
    "gemm",
    "linear",
    "put_slots",
    "spark_attention",
    "spark_attention_rows",
    "spark_ffn",
    "spark_ffn_rows",
    "statistical_topk",
    "to_blocks_rows",
    "token_rows",
    "without_kernels",
]
