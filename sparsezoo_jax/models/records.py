"""Names of the internal arrays that a forward pass can record: `Decoder(...)(tokens, record={"ffn_gate", ...})`.

A layer kind fills in the names that it has and leaves out the others, so a reader asks with `in` rather than by kind.
A new kind uses these names for what they describe and adds a line here for what they don't.
"""

from __future__ import annotations

from collections.abc import Collection

from sparsezoo_jax.errors import require

FFN_SCORES = "ffn_scores"
FFN_GATE = "ffn_gate"
FFN_HIDDEN = "ffn_hidden"
EXPERT_SCORES = "expert_scores"
GATE_SCORES = "gate_scores"
FFN_OUTPUT = "ffn_output"
RESIDUAL = "residual"
ATTENTION_SCORES = "attention_scores"
ATTENTION_SELECTED = "attention_selected"
ATTENTION_VISIBLE = "attention_visible"
SUBLAYER_INPUT = "sublayer_input"

#: Names of the maps that `Width.channels` may be called with.
MAPS = (
    *("q", "q_up", "k", "v", "o"),
    *("gate", "up", "neurons", "down"),
    *("shared_gate", "shared_up", "shared_neurons", "shared_down"),
)


def input_of(name: str) -> str:
    """Name of the record of what the map called `name` reads."""
    return f"input_{name}"


def scores_of(name: str) -> str:
    """Name of the record of the scores of the channels of the map called `name`."""
    return f"scores_{name}"


RECORDS: dict[str, str] = {
    FFN_SCORES: "[B, T, F] pre-activations of the neurons: what a selection rule sees, before it",
    FFN_GATE: "[B, T, F] after selection and non-linearity; a neuron is active where this is not 0",
    FFN_HIDDEN: "[B, T, F] hidden units: the output is these times `FFN.dictionary`, a bias and shared experts aside",
    EXPERT_SCORES: "[B, T, E] weights of the experts, shared ones first; an expert is active where this is not 0",
    GATE_SCORES: "float32 [B, T, E] scores by which MoE-X chooses experts, before the choice",
    FFN_OUTPUT: "[B, T, D] what the FFN returns, before a norm and before it joins the residual stream",
    RESIDUAL: "[B, T, D] the residual stream after the layer",
    ATTENTION_SCORES: "float32 [B, N, T, S] scores that select keys (where keys are selected)",
    ATTENTION_SELECTED: "bool [B, N, T, S] keys that the query attends to (where keys are selected)",
    ATTENTION_VISIBLE: "bool [B, T, S] keys that the query may see: causal, window, document",
    SUBLAYER_INPUT: "[2, B, T, D] normalised inputs of attention and feed-forward network, as these read them",
    **{input_of(name): f"[B, T, I] input of the map {name} of a sparsified layer, before its mask" for name in MAPS},
    **{scores_of(name): f"float32 [B, T, I] scores of these channels of the map {name}" for name in MAPS},
}


def checked(names: Collection[str]) -> frozenset[str]:
    """`names` as a set.

    Raises:
      ConfigError: a name that no layer kind could fill in.
    """
    for name in names:
        require(name in RECORDS, "record", name, f"must be one of {', '.join(RECORDS)}")
    return frozenset(names)
