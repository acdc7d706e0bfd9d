"""Gemma 3's language models (`gemma3_text`): Gemma 2 with norms of queries and keys in place of soft caps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsezoo_jax.huggingface.fields import Fields, rope_scaling
from sparsezoo_jax.huggingface.layouts.llama import GEMMA2, read_layer_types, shortest_pattern
from sparsezoo_jax.huggingface.layouts.relatives import QK_NORMS
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.rope import RopeConfig

_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0


def _read_rope(f: Fields) -> RopeConfig:
    """The rotations of global layers, which may be scaled, and of local ones; by the older fields or the newer ones."""
    blocks = f.values.get("rope_parameters")
    if isinstance(blocks, Mapping) and not {"full_attention", "sliding_attention"}.isdisjoint(blocks):
        length = {"max_position_embeddings": f.values.get("max_position_embeddings")}
        of_global = Fields({**length, "rope_parameters": blocks.get("full_attention")})
        of_local = Fields({"rope_parameters": blocks.get("sliding_attention")})
        rope, local_base = of_global.rope(_BASE, scaled=True), of_local.rope(_LOCAL_BASE).base
        for name, fields in (("full_attention", of_global), ("sliding_attention", of_local)):
            f.problems += [problem.replace("parameters", f"parameters.{name}", 1) for problem in fields.problems]
    else:
        rope, local_base = f.rope(_BASE, scaled=True), f.number("rope_local_base_freq", _LOCAL_BASE)
    if rope.scaling is not None and rope.scaling.kind == "dynamic":
        f.problems.append("rope_type=dynamic: must be one of default, linear, yarn, llama3")
    return dataclasses.replace(rope, local_base=local_base)


def _read(f: Fields) -> dict[str, Any]:
    rope = _read_rope(f)
    plain = {name: value for name, value in f.values.items() if name not in ("rope_parameters", "rope_scaling")}
    # What transformers takes where a field is absent.
    absent = {"max_position_embeddings": 131_072, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    as_gemma2 = Fields({**absent, **plain})
    found = GEMMA2.read(as_gemma2)
    f.problems += as_gemma2.problems
    every = f.integer("sliding_window_pattern", 6)
    by_number = shortest_pattern(tuple("local" if (i + 1) % every else "global" for i in range(found["layers"])))
    attention = {**found["attention"], "rope": rope, "qk_norm": True, "qk_norm_zero_centered": True}
    attention["qk_norm_eps"] = found["norm"].eps
    return {**found, "attention": attention, "layer_pattern": read_layer_types(f, by_number)}


def _write(model: Any) -> dict[str, Any]:
    rope = model.attention.rope or RopeConfig()
    written = GEMMA2.write(model)
    local = rope.base if rope.local_base is None else rope.local_base
    blocks = {
        "full_attention": {"rope_type": "default", "rope_theta": rope.base, **(rope_scaling(rope) or {})},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    # Older readers know the former fields alone, newer ones prefer the latter.
    return {**written, "rope_local_base_freq": local, "rope_parameters": blocks}


def _suits(model: DecoderConfig) -> bool:
    attention = model.attention
    return GEMMA2.suits(model) and isinstance(attention, GQAConfig) and attention.qk_norm_zero_centered


GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    entries=(*GEMMA2.entries, *QK_NORMS),
    read=_read,
    write=_write,
    suits=_suits,
)
