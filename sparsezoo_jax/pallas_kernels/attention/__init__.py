"""Softmax attention to all visible keys: of whole sequences, and of one query per sequence over a cache."""

from __future__ import annotations

from sparsezoo_jax.pallas_kernels.attention.flash import dense_attention, flash_attention
from sparsezoo_jax.pallas_kernels.attention.rows import attention_rows

__all__ = ["attention_rows", "dense_attention", "flash_attention"]
