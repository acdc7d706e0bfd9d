"""A run directory: configuration, tokenizer, checkpoints and metrics, all that is needed to load the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparsezoo_jax import plugins as kinds
from sparsezoo_jax.config import RunConfig, differences, read_config, remember, restorable, stored_config, to_json
from sparsezoo_jax.data import Tokenizer, find_tokenizer
from sparsezoo_jax.data.tokenizer import write_atomic
from sparsezoo_jax.errors import StorageError, UserError, require
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.training.lease import LEASE
from sparsezoo_jax.training.merging import merge_params
from sparsezoo_jax.training.parameters import restore_params
from sparsezoo_jax.training.state import ModelTemplate

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


class Loaded(NamedTuple):
    """What `load` returns: unpacks as `model, config, tokenizer`."""

    model: Decoder
    config: RunConfig
    tokenizer: Tokenizer | None


def load(directory: str | Path, *, step: int | None = None, merge_last: int = 1, plugins: Sequence[str] = ()) -> Loaded:
    """Load a run for evaluation or decoding: the model with its parameters, the configuration and the tokenizer.

    Args:
      directory: a run directory.
      step: the checkpoint's step; None is the newest.
      merge_last: average this many newest checkpoints with the weights of a 1-sqrt decay (see `training.merging`)
        instead of taking one; not together with `step`.
      plugins: modules to import first, which register kinds that the run is made of. Those of installed packages are
        found without.

    Returns:
      `(model, config, tokenizer)`; the tokenizer is None for a converted checkpoint that ships none.

    Raises:
      UserError: no run there, or no such step. StorageError: its checkpoints are damaged.
    """
    directory = Path(directory)
    kinds.load_named(plugins)
    config = read_config(directory / CONFIG)
    tokenizer = find_tokenizer(directory)
    if tokenizer is not None:
        allowed = f"must be at least the tokenizer's {tokenizer.vocab_size}"
        require(tokenizer.vocab_size <= config.model.vocab_size, "model.vocab_size", config.model.vocab_size, allowed)
    template = ModelTemplate(lambda rngs: Decoder(config.model, rngs=rngs))
    if merge_last > 1 and step is not None:
        raise UserError(f"step={step} and merge_last={merge_last}: give one of both")
    if merge_last > 1:
        parameters, state = merge_params(directory / CHECKPOINTS, last=merge_last)
    else:
        parameters, state = restore_params(directory / CHECKPOINTS, step)
    model = template.merge(parameters, state)
    return Loaded(model, config, tokenizer)


def open_for_training(directory: Path, config: RunConfig, *, fresh: bool) -> bool:
    """Check that `config` may train in `directory`; true when there is a run to go on with. Writes nothing.

    Raises:
      UserError: `fresh` and the directory is not empty; files that are no run; a run of another configuration.
      StorageError: the directory can't be read.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--workdir={directory}: is a file; name a directory")
        found = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
        # What a run killed in its first moments may leave; there is no run yet.
        entries = [name for name in found if not name.startswith((f".{CONFIG}", LEASE))]
    except OSError as error:
        raise StorageError(f"--workdir={directory}: {error.strerror}") from None
    if not entries:
        return False
    if fresh:
        raise UserError(f"--fresh: {directory} is not empty ({', '.join(entries[:4])}); name another --workdir")
    if CONFIG not in entries:
        raise UserError(f"--workdir={directory}: holds files but no run ({', '.join(entries[:4])}); name another")
    changed = differences(stored_config(directory / CONFIG), config)
    if changed:
        listed = "; ".join(f"{name} is {old} there, {new} here" for name, (old, new) in list(changed.items())[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise UserError(f"--workdir={directory}: holds a run of another configuration: {listed}{more}")
    return True


def write_config(directory: Path, config: RunConfig) -> None:
    """Store the configuration, whole or not at all.

    Raises:
      UserError: it could not be read again as it is.
      StorageError: it can't be written.
    """
    text = to_json(restorable(config))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remember(text)
    except OSError as error:
        raise StorageError(f"{error.filename or directory}: {error.strerror}") from None
    write_atomic(directory / CONFIG, text.encode())
