"""One folder per operation: its definition in plain JAX, and the kernels that must agree with it."""

from sparsezoo_jax.pallas_kernels.block_ffn import block_ffn, block_ffn_union
from sparsezoo_jax.pallas_kernels.spark_attention import spark_attention
from sparsezoo_jax.pallas_kernels.spark_ffn import spark_ffn
from sparsezoo_jax.pallas_kernels.statistical_topk import statistical_topk

__all__ = ["block_ffn", "block_ffn_union", "spark_attention", "spark_ffn", "statistical_topk"]
