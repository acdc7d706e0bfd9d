"""What the tables of all families are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sparsezoo_jax.huggingface.fields import ACTIVATIONS, FATRELU, Fields
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.training.config import TrainConfig


class Entry(NamedTuple):
    """One row: a tensor's name and our parameters' (or other variables') paths within the model, layer or module."""

    name: str
    """With '{layer}' in those of a layer, '{expert}' in those of one of its experts, which our arrays stack; '{module}'
    is the number of the layer in a module of multi-token prediction, in what such a module has beside it."""
    paths: tuple[str, ...]
    """Several are joined along the outputs (GPT-2's queries, keys and values)."""
    inputs: int = 0
    """How many leading dimensions of our parameter are inputs; 0: a vector."""
    transposed: bool = False
    """Stored as [out, in] (torch's Linear) instead of [in, out] (GPT-2's Conv1D, embeddings)."""
    expert_axis: int | None = None
    """Stored as a stack of one matrix an expert; in one matrix of all experts they would share this axis."""
    whole: bool = False
    """Stored in the shape of our parameter."""
    rotated: int = 0
    """How many entries at the end of our last dimension rotate, entry i with i + rotated/2, where neighbours do in the
    checkpoint."""


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints is stored."""

    model_type: str
    architecture: str
    """Name of the model class."""
    prefix: str
    """What the names of a bare base model lack."""
    entries: tuple[Entry, ...]
    ignored: str
    """Regular expression of tensors that are no parameters, prefix left out."""
    read: Callable[[Fields], dict[str, Any]]
    """From config.json to the fields of `DecoderConfig`; `attention` and `ffn` as dictionaries with their `kind`. May
    also give `entries` and `arch`, where these depend on the configuration."""
    write: Callable[[Any], dict[str, Any]]
    """And back."""
    attention_kinds: tuple[str, ...]
    ffn_kind: str
    suits: Callable[[DecoderConfig], bool]
    """Whether this is the layout that a decoder of these kinds belongs in, going by its other parts."""
    variants: tuple[tuple[Entry, ...], ...] = ()
    """Other tables by which the tensors of a checkpoint may be named; only read. `read` may give these, too."""
    not_stored: tuple[str, ...] = ()
    """Fields of the decoder, beside `NOT_STORED`, for which a checkpoint has no place."""
    arch: str = "dense"
    """Architecture of the run. `read` may give this, too."""
    needs_code: bool = False
    """Whether transformers has no class of its own for it."""
    name: str = ""
    """By which it is registered, where other families have the same model type."""
    left_out: tuple[str, str] | None = None
    """Regular expression of parameters that a decoder has no place for, prefix left out, and a note that says so."""
    train: Callable[[Any], TrainConfig] = lambda model: TrainConfig()
    """How a run of this decoder would train."""
    recognises: Callable[[Mapping[str, Any]], bool] = lambda values: False
    """Whether a config.json is of this family whatever model type it names."""
    completed: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    """From config.json and the tensors' shapes by name to config.json with what it lacked, if it may lack sizes."""

    def named_as(self, names: Collection[str]) -> Layout:
        """The layout with that table, of its own and `variants`, of which a checkpoint with these tensors has most."""
        stems = {re.sub(r"(?<=layers\.)\d+(?=\.)", "{layer}", self.key(name)) for name in names}
        tables = (self.entries, *self.variants)
        best = max(tables, key=lambda entries: len({self.key(entry.name) for entry in entries} & stems))
        return replace(self, entries=best)

    def key(self, name: str) -> str:
        """A tensor's name without the prefix."""
        return name.removeprefix(self.prefix)

    def is_ignored(self, key: str, *, tied: bool) -> bool:
        """Whether a tensor holds nothing to convert; with tied embeddings a stored head is a copy."""
        ignored = self.ignored if self.left_out is None else f"{self.ignored}|{self.left_out[0]}"
        return re.fullmatch(ignored, key) is not None or (tied and key == "lm_head.weight")

    def notes(self, names: Collection[str]) -> tuple[str, ...]:
        """What a user should know of a checkpoint with these tensors."""
        if self.left_out is None or not any(re.fullmatch(self.left_out[0], self.key(name)) for name in names):
            return ()
        return self.left_out[1:]


LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Make a layout known to `convert` by its model type. Of several that suit a decoder the last one is taken."""
    LAYOUTS[layout.name or layout.model_type] = layout
    return layout


def vector(name: str, path: str) -> Entry:
    return Entry(name, (path,))


def linear(name: str, path: str, inputs: int = 1) -> tuple[Entry, Entry]:
    bias = re.sub(r"_[A-Z]+$", "_bias", path)
    return Entry(f"{name}.weight", (path,), inputs, True), Entry(f"{name}.bias", (bias,))


# Rows whose parameters a model does not have (biases, an output matrix of its own) don't apply to it.
HEAD = Entry("lm_head.weight", ("output_DV",), 1, True)
FFN_NORM = ("ffn_residual/pre/scale",)
EMBEDDING_AND_NORMS = (
    Entry("model.embed_tokens.weight", ("embedding_VD",), 1),
    vector("model.norm.weight", "final_norm/scale"),
    HEAD,
    vector("model.layers.{layer}.input_layernorm.weight", "attention_residual/pre/scale"),
)
GROUPED_QUERY = (
    *linear("model.layers.{layer}.self_attn.q_proj", "attention/projections/q_DNH"),
    *linear("model.layers.{layer}.self_attn.k_proj", "attention/projections/k_DKH"),
    *linear("model.layers.{layer}.self_attn.v_proj", "attention/projections/v_DKH"),
    *linear("model.layers.{layer}.self_attn.o_proj", "attention/projections/o_NHD", 2),
)
LATENT = (
    vector("model.layers.{layer}.self_attn.kv_a_layernorm.weight", "attention/kv_a_norm/scale"),
    Entry("model.layers.{layer}.self_attn.kv_b_proj.weight", ("attention/kv_b_CNH",), 1, True),
    Entry("model.layers.{layer}.self_attn.o_proj.weight", ("attention/o_NHD",), 2, True),
)
INV_FREQ = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"


def activation_name(ours: str, preferred: str | None = None) -> str:
    if preferred is not None and ACTIVATIONS[preferred] == ours:
        return preferred
    return next(name for name, value in ACTIVATIONS.items() if value == ours)


def written_gate(ffn: Any, *, fatrelu: bool = False) -> dict[str, Any]:
    """The fields that `Fields.gate` reads."""
    if fatrelu and ffn.threshold > 0:
        return {"hidden_act": FATRELU, "hidden_act_param": ffn.threshold}
    return {"hidden_act": activation_name(ffn.activation)}


def auto_map(family: str, model: str) -> dict[str, dict[str, str]]:
    """Where transformers finds the classes that it lacks: in modules that come with the released checkpoints."""
    return {
        "auto_map": {
            "AutoConfig": f"configuration_{family}.{model}Config",
            "AutoModelForCausalLM": f"modeling_{family}.{model}ForCausalLM",
        }
    }
