"""DECO as its authors' converter writes it: Megatron's spelling of the configuration, experts in one matrix each way.

The released repositories' own `config.json` was not seen; the inference engine reads some fields under other names.
Both spellings are read, and sizes that neither gives are taken from the shapes of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sparsezoo_jax.configs.deco import OPTIMIZER, init, sparsity_control
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.rows import (
    EMBEDDING_AND_NORMS,
    FFN_NORM,
    GROUPED_QUERY,
    INV_FREQ,
    Entry,
    Layout,
    vector,
)
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import WSD
from sparsezoo_jax.untrusted import MAX_LAYERS

_MLP = "model.layers.{layer}.mlp"


def _gated(name: str, path: str) -> tuple[Entry, ...]:
    """The three maps of a SwiGLU."""
    return tuple(
        Entry(f"{name}.{part}_proj.weight", (f"{path}/{part}_{axes}",), 1, True)
        for part, axes in (("gate", "DF"), ("up", "DF"), ("down", "FD"))
    )


_ENTRIES = (
    *EMBEDDING_AND_NORMS,
    Entry("model.layers.{layer}.post_attention_layernorm.weight", FFN_NORM),
    *GROUPED_QUERY,
    *_gated(_MLP, "ffn"),
    Entry(f"{_MLP}.moe_router.weight", ("ffn/router_DE",), 1, True),
    vector(f"{_MLP}.router_norm.weight", "ffn/router_scale_E"),
    Entry(f"{_MLP}.expert_up_proj.weight", ("ffn/expert_up_DF",), 1, True),
    vector(f"{_MLP}.expert_act.rms_norm.weight", "ffn/norm_scale_W"),
    Entry(f"{_MLP}.expert_down_proj.weight", ("ffn/expert_down_FD",), 1, True),
    *_gated(f"{_MLP}.shared_experts", "ffn/shared"),
)

#: Megatron's names of the fields that others spell otherwise.
_SPELLINGS = {
    "num_layers": "num_hidden_layers",
    "num_query_groups": "num_key_value_heads",
    "norm_epsilon": "rms_norm_eps",
}
_ACTIVATIONS = {
    "norm_silu": "norm_silu",
    "norm_silu_nomean": "no_mean",
    "norm_silu_norms": "no_rms",
    "silu": "silu",
}
_ROUTER = r"layers\.(\d+)\.mlp\.moe_router\.weight$"
_SIZES_BY_TENSOR = {
    "num_experts": _ROUTER,
    "moe_ffn_hidden_size": r"\.mlp\.expert_act\.rms_norm\.weight$",
    "moe_shared_expert_intermediate_size": r"\.mlp\.shared_experts\.gate_proj\.weight$",
    "ffn_hidden_size": r"\.mlp\.gate_proj\.weight$",
}


def _spelled(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` under Megatron's names, too."""
    found = dict(values)
    for name, other in _SPELLINGS.items():
        if found.get(name) is None and found.get(other) is not None:
            found[name] = found[other]
    return found


def _completed(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes that `values` lack are the first dimensions of tensors; which layers are dense, those without a router."""
    found = _spelled(values)
    for name, pattern in _SIZES_BY_TENSOR.items():
        sizes = [shape[0] for key, shape in shapes.items() if shape and re.search(pattern, key)]
        if found.get(name) is None and sizes:
            found[name] = sizes[0]
    layers = found.get("num_layers")
    if found.get("moe_layer_freq") is None and isinstance(layers, int) and 0 < layers <= MAX_LAYERS:
        routed = {int(match[1]) for match in (re.search(_ROUTER, key) for key in shapes) if match}
        found["moe_layer_freq"] = [int(layer in routed) for layer in range(layers)]
    return found


def _read(f: Fields) -> dict[str, Any]:
    f.values = _spelled(f.values)
    width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    layers = f.integer("num_layers", most=MAX_LAYERS)
    eps = f.number("norm_epsilon", 1e-5)
    # Of a checkpoint of other parts there is no reading, and a field that is absent says nothing against this one.
    f.require("use_mup", False)
    f.require("router_act_func", "relu")
    f.require("router_norm_type", "simple")
    f.require("router_norm_scalar", False)
    f.require("router_norm_fixed", False)
    f.require("expert_not_gated", True)
    f.require("moe_router_enable_expert_bias", False)
    f.require("attention_bias", False)
    if width % heads:
        f.problems.append(f"num_attention_heads={heads}: must divide hidden_size={width}")
    activation = "norm_silu"
    if f.values.get("expert_act_func") is not None:
        activation = _ACTIVATIONS[f.choice("expert_act_func", tuple(_ACTIVATIONS))]
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": width,
        "layers": layers,
        "max_seq_len": f.integer("max_position_embeddings", 4096),
        "attention": {
            "kind": "gqa",
            "heads": heads,
            "kv_heads": f.integer("num_query_groups", heads),
            "head_dim": f.integer("head_dim", max(width // heads, 1)),
            "rope": f.rope(),
        },
        **_first_layers(f, layers),
        "ffn": {
            "kind": "deco",
            "experts": f.integer("num_experts"),
            "expert_width": f.integer("moe_ffn_hidden_size"),
            "shared_width": f.integer("moe_shared_expert_intermediate_size"),
            "expert_activation": activation,
            "norm_eps": eps,
        },
        "norm": NormConfig(eps=eps),
        "tie_embeddings": f.flag("tie_word_embeddings", False),
        "init": init(0.01),
    }


def _first_layers(f: Fields, layers: int) -> dict[str, Any]:
    """The first layers, which `moe_layer_freq` leaves dense."""
    pattern = f.values.get("moe_layer_freq", [0] + [1] * (layers - 1))
    dense = pattern.count(0) if isinstance(pattern, list) else layers
    if dense >= layers or pattern != [0] * dense + [1] * (layers - dense):
        shown = f"<{len(pattern)} values>" if isinstance(pattern, list) and len(pattern) != layers else pattern
        f.problems.append(f"moe_layer_freq={shown}: must be a list of {layers}, zeros and then ones")
    elif dense:
        first = GatedFFNConfig(d_ff=f.integer("ffn_hidden_size"), activation="silu")
        return {"first_layers": dense, "first_ffn": first}
    return {}


def _write(model: Any) -> dict[str, Any]:
    attention, ffn = model.attention, model.ffn
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    values = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_layers": model.layers,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_query_groups": attention.kv_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": model.max_seq_len,
        "norm_epsilon": model.norm.eps,
        "rms_norm_eps": model.norm.eps,
        "rope_theta": RopeConfig().base if attention.rope is None else attention.rope.base,
        "tie_word_embeddings": model.tie_embeddings,
        "intermediate_size": ffn.d_ff,
        **({"ffn_hidden_size": model.first_ffn.d_ff} if model.first_layers else {}),
        "num_experts": ffn.experts,
        "moe_ffn_hidden_size": ffn.expert_width,
        "moe_shared_expert_intermediate_size": ffn.shared_width,
        "moe_layer_freq": [int(layer >= model.first_layers) for layer in range(model.layers)],
        "use_blockffn": True,
        "router_act_func": "relu",
        "router_norm_type": "simple",
        "router_norm_scalar": False,
        "router_norm_fixed": False,
        "router_norm_init_var": ffn.scale_init,
        "expert_act_func": activations[ffn.expert_activation],
        "expert_not_gated": True,
        "moe_router_enable_expert_bias": False,
        "use_mup": False,
    }
    return values


def _train(model: DecoderConfig) -> TrainConfig:
    """The recipe of pre-training, for an unknown number of steps."""
    return TrainConfig(
        schedule=WSD(learning_rate=1.1175e-3, warmup_steps=100, decay_steps=0.05, decay="halving"),
        optimizer=OPTIMIZER,
        objectives=sparsity_control(1.002),
    )


DECO = Layout(
    "deco",
    "DECOForCausalLM",
    "model.",
    _ENTRIES,
    INV_FREQ,
    _read,
    _write,
    ("gqa",),
    "deco",
    lambda model: model.ffn.kind == "deco",
    not_stored=("ffn.scale_init", "ffn.expected_density", "ffn.dense_twin_d_ff"),
    arch="deco",
    train=_train,
    recognises=lambda values: values.get("use_blockffn") is True or values.get("router_norm_type") is not None,
    completed=_completed,
    needs_code=True,
)
