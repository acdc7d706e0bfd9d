"""Gemma 3n's language models (`gemma3n_text`): Gemma 3 with AltUp, LAuReL, per-layer embeddings, keys and values that
layers share, and statistical top-k in the feed-forward networks of the first layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.gemma3 import GEMMA3
from sparsezoo_jax.huggingface.layouts.rows import Entry, activation_name, linear, vector
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.altup import MAX_STREAMS, AltUpConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.laurel import LaurelConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.per_layer import PerLayerConfig

#: What transformers takes where a field is absent, where that is not what it takes for Gemma 3.
_ABSENT = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 2,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "sliding_window_pattern": 5,
}
#: And for which sparsity of feed-forward networks in how many layers at the bottom, of more than these.
_SPARSITY, _SPARSE_LAYERS = 0.95, 10
_LAYER = "model.layers.{layer}"
_ENTRIES = (
    Entry("model.embed_tokens_per_layer.weight", ("per_layer/table_VP",), 1),
    Entry("model.per_layer_model_projection.weight", ("per_layer/projection_DP",), 1, True),
    vector("model.per_layer_projection_norm.weight", "per_layer/norm/scale"),
    # Matrices of a stack are told apart as those of experts are.
    Entry("model.altup_projections.{expert}.weight", ("altup/spread_SDD",), 1, True),
    Entry("model.altup_unembed_projections.{expert}.weight", ("altup/join_SDD",), 1, True),
    vector(f"{_LAYER}.altup.correct_output_scale", "per_layer/scale"),
    Entry(f"{_LAYER}.altup.correction_coefs.weight", ("altup/correction_SS",), 1, True),
    Entry(f"{_LAYER}.altup.prediction_coefs.weight", ("altup/prediction_SC",), 1, True),
    Entry(f"{_LAYER}.altup.modality_router.weight", ("altup/router_DS",), 1, True),
    vector(f"{_LAYER}.altup.router_norm.weight", "altup/router_norm/scale"),
    *linear(f"{_LAYER}.laurel.linear_left", "attention_residual/low_rank/left_DR"),
    *linear(f"{_LAYER}.laurel.linear_right", "attention_residual/low_rank/right_RD"),
    vector(f"{_LAYER}.laurel.post_laurel_norm.weight", "attention_residual/low_rank/norm/scale"),
    *linear(f"{_LAYER}.per_layer_input_gate", "per_layer/gate_DP"),
    *linear(f"{_LAYER}.per_layer_projection", "per_layer/out_PD"),
    vector(f"{_LAYER}.post_per_layer_input_norm.weight", "per_layer/norm/scale"),
)


def _read(f: Fields) -> dict[str, Any]:
    widths = f.values.get("intermediate_size")
    if isinstance(widths, list):
        if len(widths) != f.values.get("num_hidden_layers") or any(width != widths[0] for width in widths):
            f.problems.append("intermediate_size=<a list>: must have one value, the same for each of num_hidden_layers")
        widths = next(iter(widths), None)
    # Scores are not scaled, for queries and keys are normalised.
    as_gemma3 = Fields({**_ABSENT, **f.values, "intermediate_size": widths, "query_pre_attn_scalar": 1})
    found = GEMMA3.read(as_gemma3)
    f.problems += as_gemma3.problems
    f.require("altup_active_idx", 0)
    f.require("altup_correct_scale", True)
    streams = f.integer("altup_num_inputs", 4, most=MAX_STREAMS)
    if streams == 1:
        f.problems.append(f"altup_num_inputs=1: must be an integer from 2 to {MAX_STREAMS}")
    eps = found["norm"].eps
    attention = {**found["attention"], "qk_norm_zero_centered": False, "value_norm": True, "softcap": None}
    pattern = _read_sparsity(f, found["layers"])
    width, rows = f.integer("hidden_size_per_layer_input", 256), f.integer("vocab_size_per_layer_input", 262_144)
    # As the decoder says that every word has a vector.
    vectors = {"width": width, "vocab_size": None if rows == found["vocab_size"] else rows}
    return {
        **found,
        "attention": attention,
        "ffn": {**found["ffn"], "activation_sparsity_pattern": pattern},
        "residual": LaurelConfig(rank=f.integer("laurel_rank", 64)),
        "norm": NormConfig(eps=eps),
        "altup": AltUpConfig(streams=streams, coef_clip=f.optional_number("altup_coef_clip", 120.0)),
        "per_layer": PerLayerConfig(activation=found["ffn"]["activation"], **vectors),
        "kv_shared_layers": f.count("num_kv_shared_layers", 15),
    }


def _read_sparsity(f: Fields, layers: int) -> tuple[float, ...]:
    """Shares of zeros by layer; nothing where there are none."""
    given = f.values.get("activation_sparsity_pattern")
    if given is None:
        sparse = _SPARSE_LAYERS if layers > _SPARSE_LAYERS else 0
        given = [_SPARSITY] * sparse + [0.0] * (layers - sparse)
    good = isinstance(given, list) and len(given) == layers
    if not good or not all(type(share) in (int, float) and 0 <= share < 1 for share in given):
        wanted = "a number from 0 to below 1 for each of num_hidden_layers"
        f.problems.append(f"activation_sparsity_pattern: must have {wanted}")
        return ()
    return tuple(map(float, given)) if any(given) else ()


def _write(model: Any) -> dict[str, Any]:
    written = GEMMA3.write(model)
    del written["query_pre_attn_scalar"], written["attn_logit_softcapping"]
    pattern = model.ffn.activation_sparsity_pattern or (0.0,)
    return {
        **written,
        "hidden_activation": activation_name(model.ffn.activation),
        "activation_sparsity_pattern": list(pattern if len(pattern) == model.layers else pattern * model.layers),
        "laurel_rank": model.residual.rank,
        "altup_num_inputs": model.altup.streams,
        "altup_active_idx": 0,
        "altup_coef_clip": model.altup.coef_clip,
        "altup_correct_scale": True,
        "hidden_size_per_layer_input": model.per_layer.width,
        "vocab_size_per_layer_input": model.per_layer.vocab_size or model.vocab_size,
        "num_kv_shared_layers": model.kv_shared_layers,
    }


def _suits(model: DecoderConfig) -> bool:
    return isinstance(model.residual, LaurelConfig) and isinstance(model.attention, GQAConfig)


GEMMA3N = dataclasses.replace(
    GEMMA3,
    model_type="gemma3n_text",
    architecture="Gemma3nForCausalLM",
    entries=(*GEMMA3.entries, *_ENTRIES),
    # What layers that take keys and values from others have of their own in released checkpoints, which nothing reads.
    ignored=rf"{GEMMA3.ignored}|layers\.\d+\.self_attn\.[kv]_(proj|norm)\.weight",
    read=_read,
    write=_write,
    suits=_suits,
)
