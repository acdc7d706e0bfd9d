"""Gemma 2 and Llama."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsezoo_jax.huggingface.fields import Fields, rope_scaling
from sparsezoo_jax.huggingface.layouts.rows import (
    EMBEDDING_AND_NORMS,
    FFN_NORM,
    GROUPED_QUERY,
    INV_FREQ,
    Entry,
    Layout,
    activation_name,
    linear,
    vector,
    written_gate,
)
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import LayerType
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.untrusted import MAX_LAYERS

COMMON = (
    *EMBEDDING_AND_NORMS,
    *GROUPED_QUERY,
    *linear("model.layers.{layer}.mlp.gate_proj", "ffn/gate_DF"),
    *linear("model.layers.{layer}.mlp.up_proj", "ffn/up_DF"),
    *linear("model.layers.{layer}.mlp.down_proj", "ffn/down_FD"),
)
BIASES = ("attention_bias", "mlp_bias")
_LAYER_TYPES: dict[str, LayerType] = {"sliding_attention": "local", "full_attention": "global"}


def read_sizes(f: Fields, max_seq_len: int, *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": f.integer("hidden_size"),
        "layers": f.integer("num_hidden_layers", most=MAX_LAYERS),
        "max_seq_len": f.integer("max_position_embeddings", max_seq_len),
        "tie_embeddings": f.flag("tie_word_embeddings", tied),
    }


def write_sizes(model: DecoderConfig) -> dict[str, Any]:
    attention = model.attention
    assert isinstance(attention, GQAConfig)  # other kinds were refused before
    scaled = None if attention.rope is None else attention.rope.scaling
    scaling = None if attention.rope is None else rope_scaling(attention.rope)
    length = scaled.original_length if scaled is not None and scaled.kind == "dynamic" else None
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": model.max_seq_len if length is None else length,
        "rms_norm_eps": model.norm.eps,
        "rope_theta": 10_000.0 if attention.rope is None else attention.rope.base,
        **({} if scaling is None else {"rope_scaling": scaling}),
        "attention_bias": attention.bias,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _read_gemma2(f: Fields) -> dict[str, Any]:
    heads, width = f.integer("num_attention_heads"), f.integer("head_dim", 256)
    scalar = f.number("query_pre_attn_scalar", 256)
    f.require("use_bidirectional_attention", False)
    return {
        **read_sizes(f, 8192, tied=True),
        "layer_pattern": read_layer_types(f, ("local", "global")),  # alternating, local first
        "attention": {
            "heads": heads,
            "kv_heads": f.integer("num_key_value_heads", 4),
            "head_dim": width,
            "window": f.integer("sliding_window", 4096),
            "rope": f.rope(),
            "query_scale": None if scalar == width else scalar**-0.5,
            "softcap": f.optional_number("attn_logit_softcapping", 50.0),
            "bias": f.flag("attention_bias", False),
        },
        "ffn": {
            "d_ff": f.integer("intermediate_size"),
            "activation": f.activation(("hidden_activation", "hidden_act"), "gelu_pytorch_tanh"),
        },
        "residual": PreNormConfig(post_norm=True),
        "norm": NormConfig(eps=f.number("rms_norm_eps", 1e-6), zero_centered=True),
        "embedding_scale": "sqrt_d_model",
        "final_softcap": f.optional_number("final_logit_softcapping", 30.0),
    }


def read_layer_types(f: Fields, default: tuple[LayerType, ...]) -> tuple[LayerType, ...]:
    """The shortest pattern that repeats to `layer_types`; `default` without that field."""
    names = f.values.get("layer_types")
    if names is None:
        return default
    known = isinstance(names, list) and all(isinstance(name, str) and name in _LAYER_TYPES for name in names)
    if not known or len(names) > MAX_LAYERS:
        f.problems.append(f"layer_types={names}: must list at most {MAX_LAYERS} {' and '.join(_LAYER_TYPES)}")
        return default
    if len(names) != f.values.get("num_hidden_layers"):
        f.problems.append(f"layer_types=<{len(names)} values>: must have one for each of num_hidden_layers")
    return shortest_pattern(tuple(_LAYER_TYPES[name] for name in names))


def shortest_pattern(types: tuple[LayerType, ...]) -> tuple[LayerType, ...]:
    """The pattern that repeats to these types of layers."""
    for width in range(1, len(types)):
        if all(kind == types[i % width] for i, kind in enumerate(types)):
            return types[:width]
    return types or ("global",)


def written_layer_types(model: DecoderConfig) -> list[str]:
    """What `read_layer_types` reads."""
    names = {ours: name for name, ours in _LAYER_TYPES.items()}
    return [names[spec.layer_type] for spec in model.layer_specs()]


def _write_gemma2(model: Any) -> dict[str, Any]:
    attention = model.attention
    scalar = float(attention.head_dim) if attention.query_scale is None else attention.query_scale**-2
    # Undo what rounding does to 144 ** -0.5 on the way back.
    scalar = round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar
    activation = activation_name(model.ffn.activation)
    return {
        **write_sizes(model),
        "hidden_act": activation,
        "hidden_activation": activation,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": model.final_softcap,
        "sliding_window": attention.window or 4096,
        "layer_types": written_layer_types(model),
    }


@dataclass(frozen=True)
class Relative:
    """What the `config.json` of Llama or of a relative may say, and what holds where it says nothing."""

    biases: tuple[str, ...] = BIASES
    """Fields that give biases to matrices, of those of Llama."""
    fatrelu: bool = False
    """Whether the gate may be a ReLU with a threshold."""
    tied: bool = False
    kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: the width over the heads."""
    max_seq_len: int = 2048
    eps: float = 1e-6


def read_llama(f: Fields, family: Relative = Relative()) -> dict[str, Any]:
    """The decoder's fields, without what `family` has beside Llama's."""
    for name in BIASES:
        if name not in family.biases:
            f.require(name, False)
    heads = f.integer("num_attention_heads")
    rope, sizes = f.rope(scaled=True), read_sizes(f, family.max_seq_len, tied=family.tied)
    if rope.scaling is not None and rope.scaling.kind == "dynamic":
        # The field is the length from which on the base grows.
        sizes["max_seq_len"] = math.floor(sizes["max_seq_len"] * rope.scaling.factor)
    gate = f.gate(fatrelu=family.fatrelu)
    sparse = gate["activation"] == "relu"
    return {
        **sizes,
        "attention": {
            "heads": heads,
            "kv_heads": f.integer("num_key_value_heads", family.kv_heads or heads),
            "head_dim": f.integer("head_dim", family.head_dim or f.integer("hidden_size", 1) // heads),
            "rope": rope,
            "bias": "attention_bias" in family.biases and f.flag("attention_bias", False),
        },
        "ffn": {
            "d_ff": f.integer("intermediate_size"),
            **gate,
            "bias": "mlp_bias" in family.biases and f.flag("mlp_bias", False),
            # The loss that ProSparse goes on with; it weighs nothing until an objective names it.
            "l1": sparse,
        },
        "norm": NormConfig(eps=f.number("rms_norm_eps", family.eps)),
        "arch": "prosparse" if sparse else "dense",
    }


def write_llama(model: Any, family: Relative = Relative()) -> dict[str, Any]:
    """What `read_llama` reads."""
    gate = written_gate(model.ffn, fatrelu=family.fatrelu)
    values = {**write_sizes(model), **gate, "mlp_bias": model.ffn.bias}
    return {name: value for name, value in values.items() if name not in BIASES or name in family.biases}


def read_window(f: Fields, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a decoder `found`, the fields that give all layers the window of `sliding_window`."""
    window = f.optional_integer("sliding_window", 4096)
    if window is None:
        return {}
    return {"attention": {**found["attention"], "window": window}, "layer_pattern": ("local",)}


GEMMA2 = Layout(
    "gemma2",
    "Gemma2ForCausalLM",
    "model.",
    (
        *COMMON,
        vector("model.layers.{layer}.post_attention_layernorm.weight", "attention_residual/post/scale"),
        Entry("model.layers.{layer}.pre_feedforward_layernorm.weight", FFN_NORM),
        vector("model.layers.{layer}.post_feedforward_layernorm.weight", "ffn_residual/post/scale"),
    ),
    INV_FREQ,
    _read_gemma2,
    _write_gemma2,
    ("gqa",),
    "gated",
    lambda model: isinstance(model.residual, PreNormConfig) and model.residual.post_norm,
)
LLAMA = Layout(
    "llama",
    "LlamaForCausalLM",
    "model.",
    (*COMMON, Entry("model.layers.{layer}.post_attention_layernorm.weight", FFN_NORM)),
    INV_FREQ,
    read_llama,
    write_llama,
    ("gqa",),
    "gated",
    lambda model: True,
)
