"""Open sets of kinds: configuration dataclasses that stand for one another in a field and are told apart by `kind`.

The package registers its own kinds and a user's package registers others in the same way; flags, JSON and error
messages know them all from here. `plugins` says how a user's package is found.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import CoreSchema, core_schema

from sparsezoo_jax.errors import ConfigError, require


class Kind(abc.ABC):
    """What the base classes of all registries share: a configuration dataclass that its `kind` tells apart."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    kind: str


K = TypeVar("K", bound=Kind)
Registered = TypeVar("Registered", bound=type)


class Registry(Generic[K]):
    """The kinds that a field may hold. `Annotated[Base, registry]` is the field's type, for pydantic as for pyright.

    Args:
      field: dotted name of the field ("model.ffn"), for messages.
      base: class that every kind derives from; its abstract members are what a kind must define.
    """

    def __init__(self, field: str, base: type[K]):
        self.field, self.base = field, base
        self._kinds: dict[str, type[K]] = {}

    def register(self, kind: Registered) -> Registered:
        """Class decorator: makes a frozen pydantic dataclass with a default for its `kind` one of the kinds.

        Raises:
          ConfigError: no such dataclass, abstract members left, or a name that another class has.
        """
        name, where = getattr(kind, "kind", None), f"{self.field}.kind"
        require(isinstance(name, str), where, kind.__name__, 'needs a field such as kind: Literal["name"] = "name"')
        assert isinstance(name, str)
        require(issubclass(kind, self.base), where, kind.__name__, f"must derive from {self.base.__name__}")
        frozen = is_pydantic_dataclass(kind) and kind.__dataclass_params__.frozen  # pyright: ignore
        require(bool(frozen), where, kind.__name__, "must be a frozen dataclass of pydantic (config=STRICT)")
        missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        require(not inspect.isabstract(kind), where, kind.__name__, f"does not define {missing}")
        known = self._kinds.get(name)
        again = known is None or (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__)
        require(again, where, name, f"is taken by {_path(known)}; {_path(kind)} needs another name")
        self._kinds[name] = kind  # pyright: ignore[reportArgumentType]
        return kind

    def __getitem__(self, name: str) -> type[K]:
        """The class of a kind.

        Raises:
          ConfigError: nothing is registered under that name.
        """
        if name not in self._kinds:
            close = difflib.get_close_matches(str(name), self._kinds, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{self.field}.kind", name, f"must be one of {', '.join(self._kinds)}{hint}")
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def members(self) -> dict[str, type[K]]:
        """All kinds by name."""
        return dict(self._kinds)

    def checked(self, value: object) -> K:
        """`value` if it is of a class that is registered under its `kind`: another one could not be restored.

        Raises:
          ConfigError: it is not.
        """
        if not isinstance(value, self.base):
            raise ConfigError(self.field, type(value).__name__, f"must be a {self.base.__name__}")
        name = str(getattr(value, "kind", None))
        if self._kinds.get(name) is not type(value):
            there = f"kind {name} is {_path(self._kinds[name])}" if name in self else f"no kind {name} is known"
            register = "register the class under a name of its own (docs/kinds.md)"
            raise ConfigError(self.field, type(value).__name__, f"can't be restored: {there}; {register}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validated(value: Any) -> K:
            if not isinstance(value, dict):
                return self.checked(value)
            name = value.get("kind", "")
            if not isinstance(name, str) or not name:
                raise ConfigError(f"{self.field}.kind", name, f"must be one of {', '.join(self._kinds)}")
            # A ValidationError from here is taken up by pydantic with the field's place in front.
            return _adapter(self[name]).validate_python(value)

        def plain(value: K) -> Any:
            return _adapter(type(value)).dump_python(value, mode="json")

        serializer = core_schema.plain_serializer_function_ser_schema(plain)
        return core_schema.no_info_plain_validator_function(validated, serialization=serializer)


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def _path(kind: type | None) -> str:
    return "" if kind is None else f"{kind.__module__}.{kind.__qualname__}"


def kinds_of(config: Any) -> Iterator[Kind]:
    """All kinds in a configuration, however deep."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        if isinstance(config, Kind):
            yield config
        for field in dataclasses.fields(config):
            yield from kinds_of(getattr(config, field.name))
    elif isinstance(config, tuple):
        for item in config:
            yield from kinds_of(item)
