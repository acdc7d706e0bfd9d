"""Gemma 2, Llama and GPT-2 as Hugging Face stores them: their `config.json` and their tensors' names as tables.

A row of a table names a tensor and the parameters it holds. Transposing, splitting and reshaping is all that happens
between the two, so a checkpoint survives the way there and back bit by bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparsezoo_jax.config import flatten
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.fields import ACTIVATIONS, Fields
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import LayerType
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.models.rope import RopeConfig


class Entry(NamedTuple):
    """One row: a tensor's name ('{layer}' in those of a layer) and our parameters' paths within the layer or model."""

    name: str
    paths: tuple[str, ...]
    """Several are joined along the outputs (GPT-2's queries, keys and values)."""
    inputs: int = 0
    """How many leading dimensions of our parameter are inputs; 0: a vector."""
    transposed: bool = False
    """Stored as [out, in] (torch's Linear) instead of [in, out] (GPT-2's Conv1D, embeddings)."""


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints is stored."""

    model_type: str
    architecture: str
    """Name of the transformers class."""
    prefix: str
    """What the names of a bare base model lack."""
    entries: tuple[Entry, ...]
    ignored: str
    """Regular expression of tensors that are no parameters, prefix left out."""
    read: Callable[[Fields], dict[str, Any]]
    """From config.json to the fields of `DecoderConfig`."""
    write: Callable[[Any], dict[str, Any]]
    """And back."""
    ffn_kind: str

    def key(self, name: str) -> str:
        """A tensor's name without the prefix."""
        return name.removeprefix(self.prefix)

    def is_ignored(self, key: str, *, tied: bool) -> bool:
        """Whether a tensor holds nothing to convert; with tied embeddings a stored head is a copy."""
        return re.fullmatch(self.ignored, key) is not None or (tied and key == "lm_head.weight")


def _vector(name: str, path: str) -> Entry:
    return Entry(name, (path,))


def _linear(name: str, path: str, inputs: int = 1) -> tuple[Entry, Entry]:
    bias = re.sub(r"_[A-Z]+$", "_bias", path)
    return Entry(f"{name}.weight", (path,), inputs, True), Entry(f"{name}.bias", (bias,))


# Rows whose parameters a model does not have (biases, an output matrix of its own) don't apply to it.
_HEAD = Entry("lm_head.weight", ("output_DV",), 1, True)
_COMMON = (
    Entry("model.embed_tokens.weight", ("embedding_VD",), 1),
    _vector("model.norm.weight", "final_norm/scale"),
    _HEAD,
    *_linear("model.layers.{layer}.self_attn.q_proj", "attention/projections/q_DNH"),
    *_linear("model.layers.{layer}.self_attn.k_proj", "attention/projections/k_DKH"),
    *_linear("model.layers.{layer}.self_attn.v_proj", "attention/projections/v_DKH"),
    *_linear("model.layers.{layer}.self_attn.o_proj", "attention/projections/o_NHD", 2),
    *_linear("model.layers.{layer}.mlp.gate_proj", "ffn/gate_DF"),
    *_linear("model.layers.{layer}.mlp.up_proj", "ffn/up_DF"),
    *_linear("model.layers.{layer}.mlp.down_proj", "ffn/down_FD"),
    _vector("model.layers.{layer}.input_layernorm.weight", "attention_residual/pre/scale"),
)
_QKV = ("q", "k", "v")
_GPT2 = (
    Entry("transformer.wte.weight", ("embedding_VD",), 1),
    Entry("transformer.wpe.weight", ("positions_PD",), 1),
    _vector("transformer.ln_f.weight", "final_norm/scale"),
    _vector("transformer.ln_f.bias", "final_norm/bias"),
    _HEAD,
    _vector("transformer.h.{layer}.ln_1.weight", "attention_residual/pre/scale"),
    _vector("transformer.h.{layer}.ln_1.bias", "attention_residual/pre/bias"),
    Entry(
        "transformer.h.{layer}.attn.c_attn.weight",
        tuple(f"attention/projections/{x}" for x in ("q_DNH", "k_DKH", "v_DKH")),
        1,
    ),
    Entry("transformer.h.{layer}.attn.c_attn.bias", tuple(f"attention/projections/{x}_bias" for x in _QKV)),
    Entry("transformer.h.{layer}.attn.c_proj.weight", ("attention/projections/o_NHD",), 2),
    _vector("transformer.h.{layer}.attn.c_proj.bias", "attention/projections/o_bias"),
    _vector("transformer.h.{layer}.ln_2.weight", "ffn_residual/pre/scale"),
    _vector("transformer.h.{layer}.ln_2.bias", "ffn_residual/pre/bias"),
    Entry("transformer.h.{layer}.mlp.c_fc.weight", ("ffn/up_DF",), 1),
    _vector("transformer.h.{layer}.mlp.c_fc.bias", "ffn/up_bias"),
    Entry("transformer.h.{layer}.mlp.c_proj.weight", ("ffn/down_FD",), 1),
    _vector("transformer.h.{layer}.mlp.c_proj.bias", "ffn/down_bias"),
)
_LAYER_TYPES: dict[str, LayerType] = {"sliding_attention": "local", "full_attention": "global"}


def _sizes(f: Fields, max_seq_len: int, *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": f.integer("hidden_size"),
        "layers": f.integer("num_hidden_layers"),
        "max_seq_len": f.integer("max_position_embeddings", max_seq_len),
        "tie_embeddings": f.flag("tie_word_embeddings", tied),
    }


def _write_sizes(model: DecoderConfig) -> dict[str, Any]:
    attention = model.attention
    assert isinstance(attention, GQAConfig)  # other kinds were refused before
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm.eps,
        "rope_theta": 10_000.0 if attention.rope is None else attention.rope.base,
        "attention_bias": attention.bias,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _activation_name(ours: str, preferred: str | None = None) -> str:
    if preferred is not None and ACTIVATIONS[preferred] == ours:
        return preferred
    return next(name for name, value in ACTIVATIONS.items() if value == ours)


def _read_gemma2(f: Fields) -> dict[str, Any]:
    heads, width = f.integer("num_attention_heads"), f.integer("head_dim", 256)
    scalar = f.number("query_pre_attn_scalar", 256)
    f.require("use_bidirectional_attention", False)
    return {
        **_sizes(f, 8192, tied=True),
        "layer_pattern": _read_layer_types(f),
        "attention": {
            "heads": heads,
            "kv_heads": f.integer("num_key_value_heads", 4),
            "head_dim": width,
            "window": f.integer("sliding_window", 4096),
            "rope": RopeConfig(base=f.rope_base()),
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


def _read_layer_types(f: Fields) -> tuple[LayerType, ...]:
    """The shortest pattern that repeats to `layer_types`; without that field layers alternate, local first."""
    names = f.values.get("layer_types")
    if names is None:
        return ("local", "global")
    if not isinstance(names, list) or not all(name in _LAYER_TYPES for name in names):
        f.problems.append(f"layer_types={names}: must list {' and '.join(_LAYER_TYPES)}")
        return ("local", "global")
    if len(names) != f.values.get("num_hidden_layers"):
        f.problems.append(f"layer_types=<{len(names)} values>: must have one for each of num_hidden_layers")
    types: tuple[LayerType, ...] = tuple(_LAYER_TYPES[name] for name in names)
    for width in range(1, len(types)):
        if all(kind == types[i % width] for i, kind in enumerate(types)):
            return types[:width]
    return types or ("global",)


def _write_gemma2(model: Any) -> dict[str, Any]:
    attention = model.attention
    scalar = float(attention.head_dim) if attention.query_scale is None else attention.query_scale**-2
    # Undo what rounding does to 144 ** -0.5 on the way back.
    scalar = round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar
    names = {ours: name for name, ours in _LAYER_TYPES.items()}
    activation = _activation_name(model.ffn.activation)
    return {
        **_write_sizes(model),
        "hidden_act": activation,
        "hidden_activation": activation,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": model.final_softcap,
        "sliding_window": attention.window or 4096,
        "layer_types": [names[spec.layer_type] for spec in model.layer_specs()],
    }


def _read_llama(f: Fields) -> dict[str, Any]:
    heads = f.integer("num_attention_heads")
    return {
        **_sizes(f, 2048, tied=False),
        "attention": {
            "heads": heads,
            "kv_heads": f.integer("num_key_value_heads", heads),
            "head_dim": f.integer("head_dim", f.integer("hidden_size", 1) // heads),
            "rope": RopeConfig(base=f.rope_base()),
            "bias": f.flag("attention_bias", False),
        },
        "ffn": {
            "d_ff": f.integer("intermediate_size"),
            "activation": f.activation(("hidden_act",), "silu"),
            "bias": f.flag("mlp_bias", False),
        },
        "norm": NormConfig(eps=f.number("rms_norm_eps", 1e-6)),
    }


def _write_llama(model: Any) -> dict[str, Any]:
    return {
        **_write_sizes(model),
        "hidden_act": _activation_name(model.ffn.activation),
        "mlp_bias": model.ffn.bias,
    }


def _read_gpt2(f: Fields) -> dict[str, Any]:
    width, heads = f.integer("n_embd"), f.integer("n_head")
    f.require("scale_attn_weights", True)
    f.require("scale_attn_by_inverse_layer_idx", False)
    f.require("add_cross_attention", False)
    if width % heads:
        f.problems.append(f"n_head={heads}: must divide n_embd={width}")
    return {
        "vocab_size": f.integer("vocab_size"),
        "d_model": width,
        "layers": f.integer("n_layer"),
        "max_seq_len": f.integer("n_positions", f.integer("n_ctx", 1024)),
        "tie_embeddings": f.flag("tie_word_embeddings", True),
        "attention": {"heads": heads, "kv_heads": heads, "head_dim": width // heads, "rope": None, "bias": True},
        "ffn": {
            "d_ff": f.integer("n_inner", 4 * width),
            "activation": f.activation(("activation_function",), "gelu_new"),
            "bias": True,
        },
        "norm": NormConfig(kind="layer", eps=f.number("layer_norm_epsilon", 1e-5), bias=True),
        "learned_positions": True,
    }


def _write_gpt2(model: Any) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.d_model,
        "n_layer": model.layers,
        "n_head": model.attention.heads,
        "n_positions": model.max_seq_len,
        "n_inner": None if model.ffn.d_ff == 4 * model.d_model else model.ffn.d_ff,
        "activation_function": _activation_name(model.ffn.activation, "gelu_new"),
        "layer_norm_epsilon": model.norm.eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


_INV_FREQ = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
_FFN_NORM = ("ffn_residual/pre/scale",)
LAYOUTS = {
    layout.model_type: layout
    for layout in (
        Layout(
            "gemma2",
            "Gemma2ForCausalLM",
            "model.",
            (
                *_COMMON,
                _vector("model.layers.{layer}.post_attention_layernorm.weight", "attention_residual/post/scale"),
                Entry("model.layers.{layer}.pre_feedforward_layernorm.weight", _FFN_NORM),
                _vector("model.layers.{layer}.post_feedforward_layernorm.weight", "ffn_residual/post/scale"),
            ),
            _INV_FREQ,
            _read_gemma2,
            _write_gemma2,
            "gated",
        ),
        Layout(
            "llama",
            "LlamaForCausalLM",
            "model.",
            (*_COMMON, Entry("model.layers.{layer}.post_attention_layernorm.weight", _FFN_NORM)),
            _INV_FREQ,
            _read_llama,
            _write_llama,
            "gated",
        ),
        Layout(
            "gpt2",
            "GPT2LMHeadModel",
            "transformer.",
            _GPT2,
            r"h\.\d+\.attn\.(bias|masked_bias)",  # causal masks
            _read_gpt2,
            _write_gpt2,
            "plain",
        ),
    )
}


def read_model(values: Mapping[str, Any], source: object) -> tuple[Layout, DecoderConfig]:
    """The layout of a `config.json` and the decoder it describes.

    Raises:
      UserError: another model type, or fields that are missing or not supported, all in one message.
    """
    layout = LAYOUTS.get(str(values.get("model_type")))
    if layout is None:
        raise UserError(f"{source}: model_type={values.get('model_type')}: must be one of {', '.join(LAYOUTS)}")
    fields = Fields(values)
    found = layout.read(fields)
    if fields.problems:
        raise UserError(f"{source}: {'; '.join(dict.fromkeys(fields.problems))}")
    ffn = GatedFFNConfig if layout.ffn_kind == "gated" else PlainFFNConfig
    try:
        model = DecoderConfig(
            **{**found, "attention": GQAConfig(**found["attention"]), "ffn": ffn(**found["ffn"])},
        )
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return layout, model


#: What says how a model starts or runs, not what it computes: a Hugging Face checkpoint has no place for it.
_NOT_STORED = ("init", "dtype", "param_dtype", "scan_layers", "remat", "layer_pattern")


def write_model(model: DecoderConfig, source: object) -> tuple[Layout, dict[str, Any]]:
    """The layout that can hold a decoder, and its `config.json`.

    Raises:
      UserError: the decoder has parts that no layout can hold, all in one message.
    """
    plain = model.learned_positions or model.norm.kind == "layer"
    layout = LAYOUTS["gpt2" if plain else "gemma2" if model.residual.post_norm else "llama"]
    kinds = {"model.attention.kind": (model.attention.kind, "gqa"), "model.ffn.kind": (model.ffn.kind, layout.ffn_kind)}
    wrong = [f"{name}={kind}: only {wanted}" for name, (kind, wanted) in kinds.items() if kind != wanted]
    if not wrong:
        values = {"architectures": [layout.architecture], "model_type": layout.model_type, **layout.write(model)}
        _, again = read_model(values, source)
        ours, theirs = _compared(model), _compared(again)
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        wrong = [f"model.{name}={ours.get(name)}: only {theirs.get(name)}" for name in names]
        if not wrong:
            return layout, values
    raise UserError(f"{source}: a {layout.architecture} checkpoint can't hold {'; '.join(wrong)}")


def _compared(model: DecoderConfig) -> dict[str, Any]:
    flat = {name: value for name, value in flatten(model).items() if name.partition(".")[0] not in _NOT_STORED}
    flat["layer_types"] = tuple(spec.layer_type for spec in model.layer_specs())
    if "local" not in flat["layer_types"]:
        flat.pop("attention.window", None)
    attention = model.attention
    if isinstance(attention, GQAConfig) and attention.query_scale == attention.head_dim**-0.5:
        flat["attention.query_scale"] = None
    return flat
