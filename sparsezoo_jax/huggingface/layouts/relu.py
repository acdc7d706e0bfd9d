"""Released models that were made sparse with ReLUs: ProSparse's Llamas, Bamboo and TurboSparse's Mistral."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsezoo_jax.huggingface.fields import FATRELU, Fields
from sparsezoo_jax.huggingface.layouts.llama import LLAMA, Relative, read_llama, read_window, write_llama
from sparsezoo_jax.huggingface.layouts.rows import auto_map
from sparsezoo_jax.models import DecoderConfig


def _threshold(model: DecoderConfig) -> float:
    return getattr(model.ffn, "threshold", 0.0)


_LLAMA = Relative(biases=("attention_bias",), fatrelu=True)
_BAMBOO = Relative(biases=(), kv_heads=8, max_seq_len=4096 * 32)
PROSPARSE = dataclasses.replace(
    LLAMA,
    model_type="sparsellama",
    architecture="SparseLlamaForCausalLM",
    read=lambda f: read_llama(f, _LLAMA),
    write=lambda model: {**auto_map("sparsellama", "SparseLlama"), **write_llama(model, _LLAMA)},
    suits=lambda model: _threshold(model) > 0,
    recognises=lambda values: values.get("model_type") == "llama" and values.get("hidden_act") == FATRELU,
    needs_code=True,
)


def _read_bamboo(f: Fields) -> dict[str, Any]:
    found = read_llama(f, _BAMBOO)
    ffn = found["ffn"]
    return {**found, **read_window(f, found), "ffn": {**ffn, "up_activation": ffn["activation"]}}


def _write_bamboo(model: Any) -> dict[str, Any]:
    return {**auto_map("bamboo", "Bamboo"), **write_llama(model, _BAMBOO), "sliding_window": model.attention.window}


BAMBOO = dataclasses.replace(
    LLAMA,
    model_type="bamboo",
    architecture="BambooForCausalLM",
    read=_read_bamboo,
    write=_write_bamboo,
    suits=lambda model: getattr(model.ffn, "up_activation", None) is not None,
    left_out=(
        r"layers\.\d+\.mlp\.predictor\..*",
        "predictors of active neurons (mlp.predictor) are left out: what they drop of the neurons that are not 0 stays",
    ),
    needs_code=True,
)
