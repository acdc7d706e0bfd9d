"""The configuration of a run: the parts that each room owns, in one object that flags override and JSON stores."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.errors import STRICT, ConfigError, StorageError, UserError, require
from sparsezoo_jax.evaluation.config import EvalConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything that determines a run."""

    arch: str
    """Architecture: selects the presets of one module of configs/."""
    size: str = "tiny"
    """Preset of that architecture."""
    model: DecoderConfig
    """The transformer."""
    data: DataConfig = DataConfig()
    """Corpus, tokenizer, batches."""
    train: TrainConfig = TrainConfig()
    """Optimization."""
    eval: EvalConfig = EvalConfig()
    """Evaluation during and after training."""

    def __post_init__(self):
        require(
            self.data.seq_len <= self.model.max_seq_len,
            "data.seq_len",
            self.data.seq_len,
            f"must be at most model.max_seq_len={self.model.max_seq_len}",
        )
        require(
            self.data.tokenizer is not None or self.data.bpe_vocab_size <= self.model.vocab_size,
            "data.bpe_vocab_size",
            self.data.bpe_vocab_size,
            f"must be at most model.vocab_size={self.model.vocab_size}",
        )
        require(
            self.data.batch_size % self.train.accumulation == 0,
            "train.accumulation",
            self.train.accumulation,
            f"must divide data.batch_size={self.data.batch_size}",
        )


#: Fields that may change when a run goes on: they alter neither the parameters' path nor the data's order.
FREE_ON_RESUME = (
    "train.stop_at",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_best",
    "train.max_skipped_steps",
    "train.profile_start",
    "train.profile_steps",
    "data.prefetch",
    "data.workers",
    "data.cache_dir",
    "data.tfds_data_dir",
    "eval",
)

_ADAPTER = TypeAdapter(RunConfig)


def to_json(config: RunConfig) -> str:
    """The configuration as indented JSON text."""
    return _ADAPTER.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str, source: Path | str = "config") -> RunConfig:
    """Read what `to_json` wrote.

    Raises:
      UserError: not JSON, or fields that are unknown, missing or of the wrong type, all in one message.
    """
    try:
        return _ADAPTER.validate_python(_as_python(json.loads(text)))
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not a configuration ({error})") from None
    except ValidationError as error:
        raise UserError(f"{source}: {_faults(error)}") from None


def _faults(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def _as_python(value: Any) -> Any:
    """JSON's lists as the tuples that the dataclasses hold."""
    if isinstance(value, list):
        return tuple(_as_python(item) for item in value)
    return {key: _as_python(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_config(path: Path) -> RunConfig:
    """The configuration stored in a run's `config.json`.

    Raises:
      UserError: there is no such file, or it holds no valid configuration.
      StorageError: it can't be read.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no run here ({path.name} is missing)") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted fields that differ and would change what a resumed run computes: name to (old, new)."""
    a, b = flatten(old), flatten(new)
    return {
        name: (a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)
    }


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field names and their values, nested dataclasses opened up."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{field.name}."))
        else:
            flat[prefix + field.name] = value
    return flat


def union_kinds(config: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """For each dotted field that holds a union of kinds: the kinds' names and classes."""
    found: dict[str, dict[str, Any]] = {}
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, members = getattr(config, field.name), _members(hints[field.name])
        if members:
            found[prefix + field.name] = members
        if dataclasses.is_dataclass(value):
            found.update(union_kinds(value, f"{prefix}{field.name}."))
    return found


def _members(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return {}
    members = [member for member in get_args(hint) if dataclasses.is_dataclass(member)]
    return {
        field.default: member
        for member in members
        for field in dataclasses.fields(member)
        if field.name == "kind" and isinstance(field.default, str)
    }


def with_kind(config: Any, path: str, kind: str, full_path: str | None = None) -> Any:
    """`config` with another member of the union at `path`; fields that both members have keep their values.

    Raises:
      ConfigError: no such kind there, or it needs fields that the present kind does not have.
    """
    full_path = full_path or path
    head, _, rest = path.partition(".")
    if rest:
        return dataclasses.replace(config, **{head: with_kind(getattr(config, head), rest, kind, full_path)})
    members = union_kinds(config).get(head, {})
    if kind not in members:
        close = difflib.get_close_matches(kind, members, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{full_path}.kind", kind, f"must be one of {', '.join(members)}{hint}")
    present, member = getattr(config, head), members[kind]
    if isinstance(present, member):
        return config
    shared = {
        field.name: getattr(present, field.name)
        for field in dataclasses.fields(member)
        if field.name != "kind" and hasattr(present, field.name)
    }
    required = {
        field.name
        for field in dataclasses.fields(member)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - shared.keys())
    require(
        not missing, f"{full_path}.kind", kind, f"the preset gives no {', '.join(missing)}; start from another --arch"
    )
    try:
        return dataclasses.replace(config, **{head: member(**shared)})
    except ValidationError as error:
        raise ConfigError(f"{full_path}.kind", kind, _faults(error)) from None
