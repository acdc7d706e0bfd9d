"""How flags become values where tyro's own rules are not enough: paths, none, and parts that may be lacking."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructTypeInfo

from sparsezoo_jax import storage


@dataclasses.dataclass(frozen=True)
class Stores:
    """Marks a flag, in its annotation, whose path may also begin with one of some schemes."""

    schemes: tuple[str, ...] = storage.OBJECT_STORES


#: Marks a flag whose path is what has checkpoints: the directory of a run or of an autoencoder.
IN_RUN_STORES = Stores(storage.RUN_STORES)
#: How `tyro.cli` makes paths.
PATHS = ConstructorRegistry()


@PATHS.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda args: storage.path(args[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


@PATHS.primitive_rule
def _none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[None] | None:
    """None is written as `--help` shows it, or as Python does."""
    if info.type is not type(None):
        return None

    def of_text(args: list[str]) -> None:
        if args[0] not in ("none", "None"):
            raise ValueError(f"{args[0]!r} is not none")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="none",
        instance_from_str=of_text,
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: ["none"],
    )


@PATHS.struct_rule
def _part(info: StructTypeInfo) -> Any:
    """The fields of a part that may be None, and is not here: flags as those of any other part."""
    if type(None) in typing.get_args(info.type) and dataclasses.is_dataclass(info.default):
        return PATHS.get_struct_spec(dataclasses.replace(info, type=type(info.default)))
    return None


def check_paths(command: Any) -> None:
    """Raise `ConfigError` for a flag of a parsed command whose path has a scheme that the flag does not take."""
    for field, value, schemes in _paths(command):
        storage.require_place(field, value, schemes=schemes)


def _paths(command: Any) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """The flags of a command that are paths, as they are called, their values, and the schemes that they take."""
    hints = typing.get_type_hints(type(command), include_extras=True)
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        marks = getattr(hints[field.name], "__metadata__", ())
        name = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)
        schemes = next((mark.schemes for mark in marks if isinstance(mark, Stores)), ())
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Path):
                yield name or f"--{field.name.replace('_', '-')}", one, schemes
