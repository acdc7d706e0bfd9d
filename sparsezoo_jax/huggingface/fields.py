"""Reading a Hugging Face `config.json` field by field, all faults collected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.models.rope import RopeConfig, RopeScaling
from sparsezoo_jax.untrusted import MAX_SIZE

#: Hugging Face's names of the non-linearities; the first one of each value is the one written.
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}
#: Their name of a ReLU with a threshold, which `hidden_act_param` gives.
FATRELU = "fatrelu"
#: Kinds of scaled rotary embeddings, by transformers' names, which are ours.
ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")
_NEEDED = object()


def rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """The block `rope_scaling` of a `config.json`, None where nothing is scaled."""
    scaling = rope.scaling
    if scaling is None:
        return None
    block: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.original_length is not None and scaling.kind != "dynamic":
        block["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        block |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling.kind == "yarn":
        block |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
        block |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return block


class Fields:
    """The fields of a `config.json`; what is wrong with them gathers in `problems`.

    A getter that finds a fault returns a stand-in of the right type, so that reading goes on to the next fault.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.problems: list[str] = []

    def integer(self, name: str, default: Any = _NEEDED, most: int = MAX_SIZE) -> int:
        """A positive integer, at most `most`; null counts as absent."""
        wanted = f"an integer from 1 to {most}"
        return self._number(name, default, wanted, lambda v: isinstance(v, int) and 0 < v <= most, 1)

    def count(self, name: str, default: int, most: int = MAX_SIZE) -> int:
        """An integer from 0 to `most`; null counts as absent."""
        wanted = f"an integer from 0 to {most}"
        return self._number(name, default, wanted, lambda v: isinstance(v, int) and 0 <= v <= most, default)

    def number(self, name: str, default: Any = _NEEDED) -> float:
        """A positive number; null counts as absent."""
        return float(self._number(name, default, "a positive number", lambda v: v > 0, 1.0))

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A positive number or null."""
        return None if name in self.values and self.values[name] is None else self.number(name, default)

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """A positive integer or null."""
        return None if name in self.values and self.values[name] is None else self.integer(name, default)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.problems.append(f"{name}={value}: must be true or false")
        return default

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of these strings, which must be there."""
        value = self.values.get(name)
        if value in allowed:
            return value
        self.problems.append(f"{name}={value}: must be {' or '.join(allowed)}")
        return allowed[0]

    def activation(self, names: tuple[str, ...], default: str, others: tuple[str, ...] = ()) -> str:
        """The non-linearity that the first of `names` with a value gives, by our name; a fault lists `others`, too."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        value = self.values.get(name, default) or default
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.problems.append(f"{name}={value}: must be one of {', '.join((*ACTIVATIONS, *others))}")
            value = default
        return ACTIVATIONS[value]

    def gate(self, *, fatrelu: bool = False) -> dict[str, Any]:
        """The non-linearity of a gated FFN, and its threshold where the family knows FATReLU, as fields of the FFN."""
        if not fatrelu or self.values.get("hidden_act") != FATRELU:
            return {"activation": self.activation(("hidden_act",), "silu", (FATRELU,) if fatrelu else ())}
        threshold = self._number("hidden_act_param", _NEEDED, "a number from 0 on", lambda v: v >= 0, 0.0)
        return {"activation": "relu", "threshold": float(threshold)}

    def rope(self, default: float = 10_000.0, fraction: float = 1, *, scaled: bool = False) -> RopeConfig:
        """Rotary embeddings, from `rope_theta` with `rope_scaling` or the newer `rope_parameters`.

        `fraction` is the share of each head that rotates, which fields must not contradict; `scaled` families may have
        scaled ones.
        """
        scaling: RopeScaling | None = None
        base = self.number("rope_theta", default)
        for name in ("rope_scaling", "rope_parameters"):
            block = self.values.get(name)
            if block is None:
                continue
            if not isinstance(block, Mapping):
                self.problems.append(f"{name}={block}: must be an object")
                continue
            nested = Fields(block)
            base = nested.number("rope_theta", base)
            kind = block.get("rope_type", block.get("type", "default"))
            if scaled:
                scaling = nested._rope_scaling(kind, self.values.get("max_position_embeddings")) or scaling
            elif kind != "default":
                nested.problems.append(f"rope_type={kind}: scaled rotary embeddings are not supported here")
            nested.require("partial_rotary_factor", fraction)
            self.problems += [f"{name}.{problem}" for problem in nested.problems]
        self.require("partial_rotary_factor", fraction)
        return RopeConfig(base=base, fraction=fraction, scaling=scaling)

    def _rope_scaling(self, kind: Any, max_length: Any) -> RopeScaling | None:
        """What a block of rotary parameters says of scaling; a factor of 1 is none."""
        if kind == "default":
            return None
        if kind not in ROPE_SCALINGS:
            self.problems.append(f"rope_type={kind}: must be one of default, {', '.join(ROPE_SCALINGS)}")
            return None
        length = max_length if type(max_length) is int and max_length > 0 else _NEEDED
        wanted: dict[str, Any] = {"kind": kind, "factor": self.number("factor")}
        if kind == "dynamic":  # which reads no other field
            wanted["original_length"] = max_length
        elif kind != "linear":
            wanted["original_length"] = self.integer("original_max_position_embeddings", length)
        if kind == "llama3":
            wanted |= {name: self.number(name) for name in ("low_freq_factor", "high_freq_factor")}
        if kind == "yarn":
            wanted |= {"beta_fast": self.number("beta_fast", 32.0), "beta_slow": self.number("beta_slow", 1.0)}
            wanted |= {"truncate": self.flag("truncate", True), "attention_factor": self._attention_factor()}
        if self.problems:
            return None
        try:
            scaling = RopeScaling(**wanted)
        except UserError as error:
            self.problems.append(str(error))
            return None
        return None if scaling.factor == 1 and kind != "yarn" else scaling

    def _attention_factor(self) -> float | None:
        """yarn's: given, or by two numbers of DeepSeek's."""
        names = ("attention_factor", "mscale", "mscale_all_dim")
        given, mscale, of_all = (None if self.values.get(name) is None else self.number(name) for name in names)
        if given is not None or mscale is None or of_all is None:
            return given
        factor = self.number("factor")
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * of_all * math.log(factor) + 1) if factor > 1 else 1.0

    def require(self, name: str, allowed: Any) -> None:
        """A field that may be absent or null, or have this one value."""
        value = self.values.get(name)
        if value is not None and value != allowed:
            self.problems.append(f"{name}={value}: only {allowed} is supported")

    def _number(self, name: str, default: Any, wanted: str, valid: Any, stand_in: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is not _NEEDED:
            return default
        if value is None:
            self.problems.append(f"{name}: is missing")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
            self.problems.append(f"{name}={value}: must be {wanted}")
        else:
            return value
        return stand_in
