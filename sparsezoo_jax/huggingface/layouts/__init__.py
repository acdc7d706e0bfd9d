"""How Hugging Face stores families of checkpoints: their `config.json`, and their tensors' names as tables.

A row of a table names a tensor and the parameters it holds. Transposing, splitting and reshaping is all that happens
between the two, so a checkpoint survives the way there and back bit by bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sparsezoo_jax.config import flatten
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.fields import Fields
from sparsezoo_jax.huggingface.layouts.blockffn import BLOCKFFN
from sparsezoo_jax.huggingface.layouts.deco import DECO
from sparsezoo_jax.huggingface.layouts.gemma3 import GEMMA3
from sparsezoo_jax.huggingface.layouts.gemma3n import GEMMA3N
from sparsezoo_jax.huggingface.layouts.gpt2 import GPT2
from sparsezoo_jax.huggingface.layouts.ling import LING
from sparsezoo_jax.huggingface.layouts.llama import GEMMA2, LLAMA
from sparsezoo_jax.huggingface.layouts.minicpm import MINICPM
from sparsezoo_jax.huggingface.layouts.plm import PLM
from sparsezoo_jax.huggingface.layouts.relatives import MISTRAL, OLMO2, QWEN2, QWEN3
from sparsezoo_jax.huggingface.layouts.relu import BAMBOO, PROSPARSE
from sparsezoo_jax.huggingface.layouts.rows import LAYOUTS, Entry, Layout, register_layout
from sparsezoo_jax.huggingface.layouts.sparselm import SPARSELM
from sparsezoo_jax.huggingface.layouts.sparsezoo import SPARSEZOO
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.contract import ATTENTION_KINDS, FFN_KINDS

__all__ = [
    "LAYOUTS",
    "SPARSEZOO",
    "Entry",
    "Layout",
    "layout_of",
    "read_model",
    "register_layout",
    "write_model",
    "written_for_transformers",
]

_RELATIVES = (MISTRAL, QWEN2, QWEN3, OLMO2, PROSPARSE, BAMBOO, MINICPM)
for _layout in (LLAMA, GEMMA2, GEMMA3, GEMMA3N, GPT2, BLOCKFFN, DECO, SPARSELM, LING, PLM, *_RELATIVES, SPARSEZOO):
    register_layout(_layout)


def read_model(values: Mapping[str, Any], source: object) -> tuple[Layout, DecoderConfig]:
    """The layout of a `config.json` and the decoder it describes.

    Raises:
      UserError: another model type, or fields that are missing or not supported, all in one message.
    """
    layout = layout_of(values, source)
    fields = Fields(values)
    found = layout.read(fields)
    if fields.problems:
        raise UserError(f"{source}: {'; '.join(dict.fromkeys(fields.problems))}")
    tables = {name: found.pop(name, getattr(layout, name)) for name in ("entries", "variants", "arch")}
    layout = dataclasses.replace(layout, **tables)
    defaults = {"attention": layout.attention_kinds[0], "ffn": layout.ffn_kind}
    try:
        registries = {"attention": ATTENTION_KINDS, "ffn": FFN_KINDS}
        parts = {
            part: registries[part][found[part].get("kind", kind)](**found[part]) for part, kind in defaults.items()
        }
        model = DecoderConfig(**{**found, **parts})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return layout, model


def layout_of(values: Mapping[str, Any], source: object) -> Layout:
    """The layout of a `config.json`, by what it has or else by its model type.

    Raises:
      UserError: another model type.
    """
    found, layouts = values.get("model_type"), LAYOUTS.values()
    named = next((one for one in layouts if one.model_type == found), None)
    layout = next((one for one in layouts if one.recognises(values)), named)
    if layout is None:
        names = dict.fromkeys(one.model_type for one in layouts)
        raise UserError(f"{source}: model_type={found}: must be one of {', '.join(names)}")
    return layout


#: What says how a model starts or runs, not what it computes: a Hugging Face checkpoint has no place for it.
NOT_STORED = ("vocab_multiple", "init", "dtype", "param_dtype", "scan_layers", "remat", "layer_pattern", "ffn.l1")


def write_model(model: DecoderConfig, source: object) -> tuple[Layout, dict[str, Any]]:
    """The layout that can hold a decoder, and its `config.json`.

    Raises:
      UserError: the decoder has parts that no layout can hold, all in one message.
    """
    return _written(model, source, _layout_for(model))


def written_for_transformers(model: DecoderConfig, source: object) -> tuple[Layout, dict[str, Any]]:
    """As `write_model`, in a layout that transformers has a class for or, without one, in that of `huggingface.remote`.

    Raises:
      UserError: a kind that has no PyTorch form.
    """
    layout = _layout_for(model)
    if not layout.needs_code:
        with contextlib.suppress(UserError):
            return _written(model, source, layout)
    return _written(model, source, SPARSEZOO)


def _written(model: DecoderConfig, source: object, layout: Layout) -> tuple[Layout, dict[str, Any]]:
    kinds = {
        "model.attention.kind": (model.attention.kind, layout.attention_kinds),
        "model.ffn.kind": (model.ffn.kind, (layout.ffn_kind,)),
    }
    wrong = [
        f"{name}={kind}: only {' or '.join(known)}"
        for name, (kind, known) in kinds.items()
        if kind not in known and layout is not SPARSEZOO
    ]
    if not wrong:
        values = {"architectures": [layout.architecture], "model_type": layout.model_type, **layout.write(model)}
        written, again = read_model(values, source)
        ours, theirs = _compared(model, layout), _compared(again, layout)
        names = sorted(name for name in ours.keys() | theirs.keys() if not _same(ours.get(name), theirs.get(name)))
        wrong = [f"model.{name}={ours.get(name)}: only {theirs.get(name)}" for name in names]
        if not wrong:
            return written, values
    raise UserError(f"{source}: a {layout.architecture} checkpoint can't hold {'; '.join(wrong)}")


def _layout_for(model: DecoderConfig) -> Layout:
    """The layout that could hold a decoder, by its kinds and what goes with them."""
    suiting = [layout for layout in reversed(LAYOUTS.values()) if layout.suits(model)]
    return next((layout for layout in suiting if layout.ffn_kind == model.ffn.kind), suiting[0])


def _same(a: Any, b: Any) -> bool:
    """Equal, or numbers that differ by the rounding of a product and its quotient."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-11)
    return a == b


def _compared(model: DecoderConfig, layout: Layout) -> dict[str, Any]:
    skipped = (*NOT_STORED, *layout.not_stored)
    flat = {
        name: value
        for name, value in flatten(model).items()
        if not any(name == one or name.startswith(f"{one}.") for one in skipped)
    }
    if model.embedding_scale == "sqrt_d_model":
        flat["embedding_scale"] = model.d_model**0.5
    flat["layer_types"] = tuple(spec.layer_type for spec in model.layer_specs())
    if "local" not in flat["layer_types"]:
        flat.pop("attention.window", None)
    attention = model.attention
    if isinstance(attention, GQAConfig) and attention.query_scale == attention.head_dim**-0.5:
        flat["attention.query_scale"] = None
    return flat
