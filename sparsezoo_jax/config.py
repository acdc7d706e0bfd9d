"""The configuration of a run: the parts that each room owns, in one object that flags override and JSON stores."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sparsezoo_jax import plugins
from sparsezoo_jax.data.config import DataConfig, local_cache
from sparsezoo_jax.data.corpus import CORPORA
from sparsezoo_jax.errors import STRICT, ConfigError, SparsezooWarning, StorageError, UserError, require
from sparsezoo_jax.evaluation.config import EvalConfig
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.overrides import as_python, faults, has_plain_kind, local_fields, with_kind, with_values
from sparsezoo_jax.registry import kinds_of
from sparsezoo_jax.sharding import MeshConfig
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.untrusted import MAX_CONFIG_BYTES, parse_json, read_bytes


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
    mesh: MeshConfig = MeshConfig()
    """Arrangement of devices. A run may go on with another one."""
    plugins: tuple[str, ...] = ()
    """Modules that register kinds of yours (docs/kinds.md); they are imported before anything else is read."""

    def __post_init__(self):
        if self.model.images.patch is not None:
            self._check_images()
        require(
            self.data.seq_len <= self.model.max_seq_len,
            "data.seq_len",
            self.data.seq_len,
            f"must be at most model.max_seq_len={self.model.max_seq_len}",
        )
        modules = self.model.mtp_layers
        require(
            modules < self.data.seq_len, "model.mtp_layers", modules, f"must be below data.seq_len={self.data.seq_len}"
        )
        reads_text = self.model.images.patch is None
        trains_tokenizer = reads_text and bool(self.data.names) and self.data.tokenizer_name is None
        require(
            not trains_tokenizer or self.data.bpe_vocab_size <= self.model.vocab_size,
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
        require(
            self.train.loss_chunk is None or self.data.seq_len % self.train.loss_chunk == 0,
            "train.loss_chunk",
            self.train.loss_chunk,
            f"must divide data.seq_len={self.data.seq_len}",
        )
        self.train.lemo.check(
            self.model,
            self.data.seq_len,
            context=self.mesh.context,
            prepared=self.data.mode == "prepared",
            adapts=self.train.lora.active,
        )

    def _check_images(self) -> None:
        patches, data = self.model.images.patches, self.data
        allowed = f"must be {patches}: the patches of an image are its tokens"
        require(data.seq_len == patches, "data.seq_len", data.seq_len, allowed)
        for name, value in (
            ("data.mixture", data.mixture),
            ("data.tokenizer", data.tokenizer),
            ("data.validation_dataset", data.validation_dataset),
            ("train.loss_chunk", self.train.loss_chunk),
        ):
            require(value is None, name, value, "must be none for a model of images")
        require(data.mode == "prepared", "data.mode", data.mode, "must be prepared for a model of images")
        context = self.mesh.context
        require(context == 1, "mesh.context", context, "must be 1 for a model of images: all patches see each other")


def require_text(config: RunConfig, directory: Path) -> None:
    """Raise `UserError` for a run whose model reads images."""
    if config.model.images.patch is not None:
        raise UserError(f"{directory}: a model of images, which reads and writes no text")


#: Fields that may change when a run goes on: they alter neither the parameters' path nor the data's order.
FREE_ON_RESUME = (
    "plugins",
    "train.stop_at",
    "train.log_every",
    "train.writers",
    "train.eval_every",
    "train.checkpoint_every",
    "train.checkpoint_every_minutes",
    "train.local_checkpoints",
    "train.local_checkpoint_every",
    "train.keep_last",
    "train.merge_last",
    "train.merge_decay",
    "train.keep_best",
    "train.max_skipped_steps",
    "train.hang_timeout",
    "train.spike",
    "train.profile_start",
    "train.profile_steps",
    "train.loss_chunk",
    "data.dataset",  # its fingerprint counts, not its place
    "data.verify",
    "data.wait_minutes",
    "data.prefetch",
    "data.workers",
    "data.cache_dir",
    "data.tfds_data_dir",
    "data.chess.stockfish",
    "data.chess.processes",
    "eval",
    "mesh",
)

_ADAPTER = TypeAdapter(RunConfig)


def to_json(config: RunConfig) -> str:
    """The configuration as indented JSON text."""
    return _ADAPTER.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str | bytes, source: Path | str = "config") -> RunConfig:
    """Read what `to_json` wrote; plugins that it names are imported if they are installed as such (see `plugins`).

    Raises:
      UserError: not JSON, a plugin that is neither loaded nor installed, or fields that are unknown, missing or of the
        wrong type, all in one message.
    """
    try:
        values = parse_json(text, max_bytes=MAX_CONFIG_BYTES, finite=True)
        if isinstance(values, dict):
            plugins.load_stored(values.get("plugins", ()), source)
        return _ADAPTER.validate_python(as_python(values))
    except ValidationError as error:  # a ValueError, too
        raise UserError(f"{source}: {faults(error)}") from None
    except ValueError as error:
        raise UserError(f"{source}: not a configuration ({error})") from None


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with other values of dotted fields, all at once; those that end in `.kind` exchange a part first.

    Raises:
      ConfigError: no such field, or values that are not allowed, alone or together.
    """
    kinds = [name for name in changes if name.endswith(".kind") and not has_plain_kind(config, name[: -len(".kind")])]
    for name in kinds:
        config = with_kind(config, name.removesuffix(".kind"), changes[name])
    values = _ADAPTER.dump_python(config)
    for name in changes.keys() - kinds:
        *parts, last = name.split(".")
        holder = values
        for part in parts:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            close = difflib.get_close_matches(name, flatten(config), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(name, changes[name], f"no such field{hint}")
        holder[last] = as_python(changes[name])
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ConfigError("changes", dict(changes), faults(error)) from None


def restorable(config: RunConfig) -> RunConfig:
    """`config` with all plugins that it needs, if its JSON gives the same configuration again.

    Raises:
      UserError: parts of other classes than those that JSON would give, or kinds that no plugin defines.
    """
    corpora = [(f"data.dataset={name}", CORPORA[name]) for name in _corpora(config.data) if name in CORPORA]
    kinds = [(f"kind {kind.kind!r}", type(kind)) for kind in kinds_of(config)]
    config = dataclasses.replace(config, plugins=plugins.needed([*kinds, *corpora], config.plugins))
    again = from_json(to_json(config))
    if again != config:
        changed = ", ".join(differences(again, config, ignored=())) or "a part of it is of a class of its own"
        raise UserError(f"the configuration can't be restored from its JSON: {changed}")
    return config


def _corpora(data: DataConfig) -> tuple[str, ...]:
    configs = [data] if data.mixture is None else [data.of(part) for part in data.mixture]
    names = (name for one in configs for name in (one.dataset, one.validation_dataset))
    return tuple(name for name in names if name is not None)


def read_config(path: Path) -> RunConfig:
    """The configuration stored in a run's `config.json`, fit for use on this machine.

    Unless this user wrote it here (see `remember`), fields marked `untrusted.Local` come without their values, with a
    warning that names them: a corpus must then be named, and the tokenizer is that of the run's directory.

    Raises:
      UserError: there is no such file, or it holds no valid configuration.
      StorageError: it can't be read.
    """
    content, config = _stored(path)
    found = {} if _note(content).exists() else local_fields(config)
    if not found:
        return config
    listed = ", ".join(f"{name}={value}" for name, value in found.items())
    why = f"{path}: ignored, for it was not written by you on this machine: {listed}"
    warnings.warn(why, SparsezooWarning, stacklevel=2)
    instead = {"data.tokenizer": str(path.parent)}
    return with_values(config, {name: instead.get(name) for name in reversed(found)})


def stored_config(path: Path) -> RunConfig:
    """The configuration in a run's `config.json` with every value, to compare with; nothing in it may be opened.

    Raises:
      UserError, StorageError: as `read_config`.
    """
    return _stored(path)[1]


def _stored(path: Path) -> tuple[bytes, RunConfig]:
    try:
        content = read_bytes(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no run here ({path.name} is missing)") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a configuration ({error})") from None
    return content, from_json(content, path)


def remember(text: str) -> None:
    """Note in the cache that this user wrote a configuration with this text, so that its places are known as his own.

    Raises:
      StorageError: it can't be noted.
    """
    write_atomic(_note(text.encode()), b"")


def _note(content: bytes) -> Path:
    return local_cache(DataConfig()) / "own_configs" / hashlib.sha256(content).hexdigest()


def differences(
    old: RunConfig, new: RunConfig, ignored: tuple[str, ...] = FREE_ON_RESUME
) -> dict[str, tuple[Any, Any]]:
    """Dotted fields that differ and would change what a resumed run computes: name to (old, new)."""
    a, b = _compared(old), _compared(new)
    return {
        name: (a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not any(name == free or name.startswith(f"{free}.") for free in ignored)
    }


def _compared(config: RunConfig) -> dict[str, Any]:
    """`flatten`, with the fields of a mixture's corpora by their names. Where they lie is left out: as for
    `data.dataset`, their fingerprints count.
    """
    flat = flatten(config)
    parts = config.data.mixture or ()
    flat["data.mixture"] = ", ".join(part.label for part in parts) or None
    for part in parts:
        own = flatten(part, f"data.mixture[{part.label}].")
        flat |= {name: value for name, value in own.items() if not name.endswith(("].dataset", "].name"))}
    return flat


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
