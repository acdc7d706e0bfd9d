"""Checkpoints in Hugging Face's layout (config.json, safetensors, tokenizer) to run directories and back."""

from sparsezoo_jax.huggingface.conversion import Conversion, from_hf, to_hf

__all__ = ["Conversion", "from_hf", "to_hf"]
