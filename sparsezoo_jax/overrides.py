"""Changes to a configuration that plain flags can't express: another member of a union, and lists of objects."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from sparsezoo_jax.errors import ConfigError, require
from sparsezoo_jax.registry import Registry
from sparsezoo_jax.untrusted import Local, parse_json


def faults(error: ValidationError) -> str:
    """All faults of a failed validation in one line."""
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def as_python(value: Any) -> Any:
    """JSON's lists as the tuples that configurations hold."""
    if isinstance(value, list):
        return tuple(as_python(item) for item in value)
    return {key: as_python(item) for key, item in value.items()} if isinstance(value, dict) else value


def union_kinds(config: Any) -> dict[str, dict[str, Any]]:
    """For each dotted field that holds a union of kinds: the kinds' names and classes.

    A part that may be lacking (`model.first_ffn`) is one where it is there.
    """
    hints = _hints(config).items()
    members = {path: _members(hint if _at(config, path) is None else _without_none(hint)) for path, hint in hints}
    return {path: found for path, found in members.items() if found}


def has_plain_kind(config: Any, path: str) -> bool:
    """Whether the part at `path` is no member of a union and has a field "kind" as any other (`model.init`, say)."""
    return hasattr(_at(config, path), "kind") and path not in union_kinds(config)


def _at(config: Any, path: str) -> Any:
    """What `config` has at a dotted path; None where it has nothing."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _members(hint: Any) -> dict[str, Any]:
    """The kinds that a field of this type may hold, by name: of a registry, or of a union written out."""
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Registry):
            return note.members()
    hint = _plain(hint)
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return {}
    members = [member for member in get_args(hint) if dataclasses.is_dataclass(member)]
    return {
        field.default: member
        for member in members
        for field in dataclasses.fields(member)
        if field.name == "kind" and isinstance(field.default, str)
    }


def list_fields(config: Any) -> dict[str, Any]:
    """For each dotted field that holds a tuple of objects: its type. Such fields are given as JSON."""
    plain = {path: _without_none(_plain(hint)) for path, hint in _hints(config).items()}
    return {path: hint for path, hint in plain.items() if _is_list_of_objects(hint)}


def integers(config: Any, prefix: str = "") -> dict[str, int]:
    """Dotted fields that hold integers, nested dataclasses and lists of them opened up."""
    found: dict[str, int] = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item):
                found |= integers(item, f"{path}.")
            elif isinstance(item, int) and abs(item) > abs(found.get(path, 0)):
                found[path] = item
    return found


def local_fields(config: Any) -> dict[str, Any]:
    """Dotted fields marked `Local` and their values, those left out that are not given or name nothing here."""
    found = {}
    for path, hint in _hints(config).items():
        value = _at(config, path)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Local) and value is not None and value not in mark.harmless:
                found[path] = value
    return found


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """`config` with other values of some dotted fields, replaced in this order."""
    for path, value in values.items():
        config = _replace_at(config, path, lambda holder, name, v=value: dataclasses.replace(holder, **{name: v}))
    return config


def _hints(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        if name in type(config).__dataclass_fields__:
            found[prefix + name] = hint
            if dataclasses.is_dataclass(getattr(config, name)):
                found.update(_hints(getattr(config, name), f"{prefix}{name}."))
    return found


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`, any other type as it is."""
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    rest = [member for member in get_args(hint) if member is not type(None)]
    return rest[0] if len(rest) == 1 else hint


def _is_list_of_objects(hint: Any) -> bool:
    if get_origin(hint) is not tuple:
        return False
    item = get_args(hint)[0]
    return dataclasses.is_dataclass(item) or bool(_members(item))


def _replace_at(config: Any, path: str, change: Callable[[Any, str], Any]) -> Any:
    """`config` with the object that holds the last name of `path` replaced by `change(object, name)`."""
    head, _, rest = path.partition(".")
    if rest:
        return dataclasses.replace(config, **{head: _replace_at(getattr(config, head), rest, change)})
    return change(config, head)


def with_list(config: Any, path: str, text: str) -> Any:
    """`config` with the objects at `path` (one of `list_fields`) read from JSON `text`.

    Raises:
      ConfigError: not JSON, or objects that are not what the field holds.
    """
    try:
        value = TypeAdapter(list_fields(config)[path]).validate_python(as_python(parse_json(text)))
    except ValidationError as error:  # a ValueError, too
        raise ConfigError(path, text, faults(error)) from None
    except ValueError as error:
        raise ConfigError(path, text, f"must be a JSON list of objects ({error})") from None
    return _replace_at(config, path, lambda holder, name: dataclasses.replace(holder, **{name: value}))


def with_kind(config: Any, path: str, kind: str) -> Any:
    """`config` with another member of the union at `path`; fields that both members have keep their values.

    Raises:
      ConfigError: no union there, no such kind, or a kind that needs fields which the present one does not have.
    """
    unions = union_kinds(config)
    require(path in unions, f"{path}.kind", kind, f"is no exchangeable part; those are {', '.join(unions)}")
    members = unions[path]
    if kind not in members:
        close = difflib.get_close_matches(kind, members, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{path}.kind", kind, f"must be one of {', '.join(members)}{hint}")
    member = members[kind]

    def exchange(holder: Any, name: str) -> Any:
        present = getattr(holder, name)
        if isinstance(present, member):
            return holder
        fields = [field for field in dataclasses.fields(member) if field.name != "kind"]
        shared = {field.name: getattr(present, field.name) for field in fields if hasattr(present, field.name)}
        nothing = dataclasses.MISSING
        required = {field.name for field in fields if field.default is nothing and field.default_factory is nothing}
        missing = ", ".join(sorted(required - shared.keys()))
        require(not missing, f"{path}.kind", kind, f"the preset gives no {missing}; start from another --arch")
        try:
            return dataclasses.replace(holder, **{name: member(**shared)})
        except ValidationError as error:
            raise ConfigError(f"{path}.kind", kind, faults(error)) from None

    return _replace_at(config, path, exchange)
