"""Reading a Hugging Face `config.json` field by field, all faults collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
_NEEDED = object()


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

    def activation(self, names: tuple[str, ...], default: str) -> str:
        """The non-linearity that the first of `names` with a value gives, by our name."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        value = self.values.get(name, default) or default
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.problems.append(f"{name}={value}: must be one of {', '.join(ACTIVATIONS)}")
            value = default
        return ACTIVATIONS[value]

    def rope_base(self, default: float = 10_000.0, fraction: float = 1) -> float:
        """The base of plain rotary embeddings, from `rope_theta` or the newer `rope_parameters`.

        `fraction` is the share of each head that rotates, which fields must not contradict.
        """
        base = self.number("rope_theta", default)
        for name in ("rope_scaling", "rope_parameters"):
            block = self.values.get(name)
            if block is None:
                continue
            if not isinstance(block, Mapping):
                self.problems.append(f"{name}={block}: must be an object")
                continue
            kind = block.get("rope_type", block.get("type", "default"))
            if kind != "default":
                self.problems.append(f"{name}.rope_type={kind}: scaled rotary embeddings are not supported")
            nested = Fields(block)
            base = nested.number("rope_theta", base)
            nested.require("partial_rotary_factor", fraction)
            self.problems += [f"{name}.{problem}" for problem in nested.problems]
        self.require("partial_rotary_factor", fraction)
        return base

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
