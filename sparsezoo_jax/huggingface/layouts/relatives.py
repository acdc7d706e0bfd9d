"""Mistral, Qwen 2, Qwen 3 (dense) and OLMo 2: relatives of Llama, each a few fields away from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.llama import (
    COMMON,
    LLAMA,
    Relative,
    read_layer_types,
    read_llama,
    read_window,
    shortest_pattern,
    write_llama,
    written_layer_types,
)
from sparsezoo_jax.huggingface.layouts.rows import vector
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.residual import PreNormConfig

_MISTRAL = Relative(biases=(), kv_heads=8, max_seq_len=4096 * 32)
_QWEN2 = Relative(biases=(), kv_heads=32, max_seq_len=32_768)
_QWEN3 = dataclasses.replace(_QWEN2, biases=("attention_bias",), head_dim=128)
_OLMO2 = Relative(biases=("attention_bias",), eps=1e-5)
QK_NORMS = (
    vector("model.layers.{layer}.self_attn.q_norm.weight", "attention/projections/q_norm/scale"),
    vector("model.layers.{layer}.self_attn.k_norm.weight", "attention/projections/k_norm/scale"),
)


def _attention(model: DecoderConfig) -> GQAConfig | None:
    """The attention of a decoder with norms before its sublayers alone."""
    residual, attention = model.residual, model.attention
    plain = isinstance(residual, PreNormConfig) and not residual.post_norm
    return attention if plain and isinstance(attention, GQAConfig) else None


def _with_attention(found: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**found, "attention": {**found["attention"], **fields}}


def _read_mistral(f: Fields) -> dict[str, Any]:
    found = read_llama(f, _MISTRAL)
    return {**found, **read_window(f, found)}


def _write_mistral(model: Any) -> dict[str, Any]:
    window = model.attention.window if "local" in model.layer_pattern else None
    return {**write_llama(model, _MISTRAL), "sliding_window": window}


def _is_mistral(model: DecoderConfig) -> bool:
    return _attention(model) is not None and {spec.layer_type for spec in model.layer_specs()} == {"local"}


def _read_qwen_windows(f: Fields, found: dict[str, Any]) -> dict[str, Any]:
    """`found` with the windows of Qwen: of the layers from `max_window_layers` on, or of those `layer_types` names."""
    window = f.optional_integer("sliding_window", 4096) if f.flag("use_sliding_window", False) else None
    first = f.count("max_window_layers", 28)
    # Read even where there are no windows, so that a window that is listed and has no width is a fault.
    listed = read_layer_types(f, ("global",))
    if window is None:
        if "local" in listed:
            f.problems.append(
                "layer_types: lists sliding_attention, but use_sliding_window or sliding_window gives none"
            )
        return found
    if f.values.get("layer_types") is None:
        listed = shortest_pattern(tuple("local" if i >= first else "global" for i in range(found["layers"])))
    return {**_with_attention(found, window=window), "layer_pattern": listed}


def _write_qwen(model: Any, family: Relative) -> dict[str, Any]:
    types = written_layer_types(model)
    windows = "sliding_attention" in types
    return {
        **write_llama(model, family),
        "use_sliding_window": windows,
        "sliding_window": model.attention.window if windows else None,
        "max_window_layers": types.index("sliding_attention") if windows else model.layers,
        "layer_types": types,
    }


def _read_qwen2(f: Fields) -> dict[str, Any]:
    return _read_qwen_windows(f, _with_attention(read_llama(f, _QWEN2), bias=True, output_bias=False))


def _is_qwen2(model: DecoderConfig) -> bool:
    attention = _attention(model)
    return attention is not None and attention.bias and attention.output_bias is False


def _read_qwen3(f: Fields) -> dict[str, Any]:
    found = read_llama(f, _QWEN3)
    return _read_qwen_windows(f, _with_attention(found, qk_norm=True, qk_norm_eps=found["norm"].eps))


def _is_qwen3(model: DecoderConfig) -> bool:
    attention = _attention(model)
    return attention is not None and attention.qk_norm and attention.qk_norm_over == "head"


def _read_olmo2(f: Fields) -> dict[str, Any]:
    found = read_llama(f, _OLMO2)
    norms = {"qk_norm": True, "qk_norm_over": "heads", "qk_norm_eps": found["norm"].eps}
    return {**_with_attention(found, **norms), "residual": PreNormConfig(input_norm=False, post_norm=True)}


MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read_mistral,
    write=_write_mistral,
    suits=_is_mistral,
)
QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=_read_qwen2,
    write=lambda model: _write_qwen(model, _QWEN2),
    suits=_is_qwen2,
)
QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    entries=(*LLAMA.entries, *QK_NORMS),
    read=_read_qwen3,
    write=lambda model: _write_qwen(model, _QWEN3),
    suits=_is_qwen3,
)
OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    entries=(
        *COMMON,
        *QK_NORMS,
        vector("model.layers.{layer}.post_attention_layernorm.weight", "attention_residual/post/scale"),
        vector("model.layers.{layer}.post_feedforward_layernorm.weight", "ffn_residual/post/scale"),
    ),
    read=_read_olmo2,
    write=lambda model: write_llama(model, _OLMO2),
    suits=lambda model: isinstance(model.residual, PreNormConfig) and not model.residual.input_norm,
)
