"""A run directory: configuration, tokenizer, checkpoints and metrics, all that is needed to load the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from sparsezoo_jax import plugins as kinds
from sparsezoo_jax import storage
from sparsezoo_jax.config import (
    FREE_ON_RESUME,
    RunConfig,
    differences,
    read_config,
    remember,
    restorable,
    stored_config,
    to_json,
)
from sparsezoo_jax.config import flatten as flatten_config
from sparsezoo_jax.data import Tokenizer, find_tokenizer
from sparsezoo_jax.errors import ConfigError, SparsezooWarning, StorageError, UserError, require
from sparsezoo_jax.evaluation.sparsified import RECORD
from sparsezoo_jax.models import Decoder, DecoderConfig, build_model
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.sharding import named_sharding
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.training.lease import LEASE
from sparsezoo_jax.training.lora import Adapters, LoRAConfig, proportional_ranks
from sparsezoo_jax.training.merging import merge_params
from sparsezoo_jax.training.parameters import read_params, restore_params, save_params, saved_metadata, saved_steps
from sparsezoo_jax.training.state import ModelTemplate, PureDict, flatten, map_with_path
from sparsezoo_jax.training.warm_start import NEW_HEAD, WarmStart, gets_head, open_warm_start
from sparsezoo_jax.untrusted import read_json

ShardingOf = Callable[[str, tuple[int, ...]], Sharding]
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
_HOW_TO_NAME_IT = "evaluate, generate and convert merge take --base DIR, train takes --train.init-from DIR"


class Loaded(NamedTuple):
    """What `load` returns: unpacks as `model, config, tokenizer`."""

    model: Decoder
    """Of a run on images an `Encoder`, which is called alike."""
    config: RunConfig
    tokenizer: Tokenizer | None


def load(
    directory: str | Path,
    *,
    step: int | None = None,
    merge_last: int | None = None,
    base: str | Path | None = None,
    plugins: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Loaded:
    """Load a run for evaluation or decoding: the model with its parameters, the configuration and the tokenizer.

    Adapters come merged into the parameters that they were trained for.

    Args:
      directory: a run directory.
      step: the checkpoint's step; None is the newest.
      merge_last: average this many newest checkpoints with the weights of a 1-sqrt decay (see `training.merging`)
        instead of taking one; not together with `step`. None takes the newest, or of a finished run with
        `train.merge_last` what it ends as.
      base: for adapters, the run that they were trained for. Default: the place that the configuration names.
      plugins: modules to import first, which register kinds that the run is made of. Those of installed packages are
        found without.
      mesh: devices that share the arrays, each read where it will lie. None: all are on the first device.

    Returns:
      `(model, config, tokenizer)`; the tokenizer is None for a converted checkpoint that ships none.

    Raises:
      UserError: no run there, or no such step; adapters without the parameters that they were trained for.
      StorageError: its checkpoints are damaged.
    """
    directory = storage.path(directory)
    storage.require_place("directory", directory, schemes=storage.RUN_STORES)
    kinds.load_named(plugins)
    config = read_config(directory / CONFIG)
    if base is not None:
        require(config.train.lora.active, "base", base, f"{directory} holds no adapters")
        config = with_values(config, {"train.init_from": str(base)})
    tokenizer = find_tokenizer(directory)
    if tokenizer is not None:
        allowed = f"must be at least the tokenizer's {tokenizer.vocab_size}"
        require(tokenizer.vocab_size <= config.model.vocab_size, "model.vocab_size", config.model.vocab_size, allowed)
    template = ModelTemplate(lambda rngs: build_model(config.model, rngs))
    if merge_last is not None and merge_last > 1 and step is not None:
        raise UserError(f"step={step} and merge_last={merge_last}: give one of both")
    sharding_of = None if mesh is None or mesh.size == 1 else _sharding_of(template, mesh)
    restored = partial(restore_params, sharding_of=sharding_of)
    read = _with_adapters(directory, config, template, sharding_of) if config.train.lora.active else restored
    own = _merged_steps(directory, config) if step is None and merge_last is None else ()
    if own:
        decay = config.train.merge_decay
        parameters, state = merge_params(directory / CHECKPOINTS, steps=own, decay=decay, read=read)
    elif merge_last is not None and merge_last > 1:
        parameters, state = merge_params(directory / CHECKPOINTS, last=merge_last, read=read)
    else:
        parameters, state = read(directory / CHECKPOINTS, step)
    model = template.merge(parameters, state)
    return Loaded(model, config, tokenizer)


def _sharding_of(template: ModelTemplate, mesh: Mesh) -> ShardingOf:
    """The sharding of each array of a checkpoint, from its path and shape."""
    place = named_sharding(mesh)
    axes = {f"params/{path}": variable.full_axes for path, variable in template.parameters.items()}
    axes |= {f"model_state/{path}": variable.full_axes for path, variable in template.variables.items()}
    # A random key is stored as its numbers, one dimension more.
    return lambda path, shape: place((*axes.get(path, ()), *(None,) * len(shape))[: len(shape)], shape)


def _merged_steps(directory: Path, config: RunConfig) -> tuple[int, ...]:
    """Steps whose average a finished run ends as; empty for other runs."""
    found = saved_steps(directory / CHECKPOINTS)
    return config.train.merged_steps() if found and found[-1] == config.train.steps else ()


def _with_adapters(
    directory: Path, config: RunConfig, template: ModelTemplate, sharding_of: ShardingOf | None = None
) -> Callable[[Path, int | None], tuple[PureDict, PureDict]]:
    """`restore_params` of a run whose checkpoints hold adapters, which merges them into their base.

    They are merged on the first device, whatever `sharding_of` makes of the result.
    """
    source = open_source(config, directory)
    assert source is not None
    adapters = Adapters(config.train.lora, template.parameters)
    base, _ = source.read()
    merge = jax.jit(adapters.merged)

    def read(checkpoints: Path, step: int | None) -> tuple[PureDict, PureDict]:
        trained, model_state = restore_params(checkpoints, step)
        found = merge(trained, adapters.divided(base, trained)[1]), model_state
        if (place := sharding_of) is None:
            return found
        both = {"params": found[0], "model_state": found[1]}
        placed = map_with_path(lambda path, x: jax.device_put(x, place(path, x.shape)), both)
        return placed["params"], placed["model_state"]

    return read


def open_source(config: RunConfig, adapters: Path | None = None) -> WarmStart | None:
    """The run that `train.init_from` names, None without one.

    Warns of fields of the model that differ though no parameter shows it.

    Args:
      adapters: a run of `config` with checkpoints of adapters. Then the parameters have to be those of their base, of
        the step they were trained for unless the configuration names one.

    Raises:
      UserError: no run or step there, or one whose parameters don't fit, or are not those that adapters were trained
        for; adapters without such a run.
    """
    lora = config.train.lora
    if config.train.init_from is None:
        if adapters is not None:
            raise UserError(f"{adapters}: holds adapters for another run, unknown here; {_HOW_TO_NAME_IT}")
        require(not lora.active, *lora.asked, "needs train.init_from, the run whose parameters get adapters")
        return None
    directory = storage.path(config.train.init_from)
    found = (directory / CONFIG).is_file()
    where = "" if adapters is None else f"; {adapters} has adapters for it: {_HOW_TO_NAME_IT}"
    require(found, "train.init_from", directory, f"is no run directory ({CONFIG} is missing){where}")
    source = read_config(directory / CONFIG)
    allowed = f"holds adapters alone; make a whole run of it with: convert merge {directory} RUN"
    require(not source.train.lora.active, "train.init_from", directory, allowed)
    same = not lora.active or source.model.ffn.kind == config.model.ffn.kind
    require(same, *lora.asked, f"needs FFNs of the kind that {directory} has, {source.model.ffn.kind}")
    _check_new_adapters(source.model, config, directory)
    step, identity = config.train.init_step, {} if adapters is None else _identity_of_base(adapters)
    start = open_warm_start(
        directory / CHECKPOINTS,
        source.model,
        config.model,
        step=identity.get("step") if step is None else step,
        noise=config.train.upcycle_noise,
        seed=config.train.seed,
    )
    if adapters is not None and start.identity()["fingerprint"] != identity.get("fingerprint"):
        allowed = f"step {start.step} there does not hold the parameters that {adapters} has adapters for"
        raise ConfigError("train.init_from", directory, allowed)
    there, here = flatten_config(source.model, "model."), flatten_config(config.model, "model.")
    ignored = (
        "model.ffn",
        "model.init",
        "model.dtype",
        "model.param_dtype",
        "model.scan_layers",
        "model.remat",
        "model.adapter",
    )
    if gets_head(source.model, config.model):  # the patches' places are the same, and the other run had no classes
        ignored += ("model.images.mae", "model.images.positions", "model.vocab_size")
    changed = [
        f"{name} was {there.get(name)}, is {here.get(name)}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not name.startswith(ignored)
    ]
    if changed:
        warnings.warn(f"train.init_from={directory}: {'; '.join(changed)}", SparsezooWarning, stacklevel=2)
    return start


def _check_new_adapters(source: DecoderConfig, config: RunConfig, directory: Path) -> None:
    """Raise `ConfigError` where nothing would train bottleneck adapters that the source of all else lacks."""
    lora, width = config.train.lora, config.model.adapter.width
    if not lora.active or width is None or source.adapter.width is not None:
        return
    template = ModelTemplate(lambda rngs: build_model(config.model, rngs))
    left = template.parameters.keys() - Adapters(lora, template.parameters).parameters.keys()
    trains = not any("_adapter/" in path for path in left)
    require(
        trains, "train.lora.whole", lora.whole, f"must find _adapter/: {directory} has no adapters to leave as they are"
    )


def _identity_of_base(directory: Path) -> dict[str, Any]:
    """`WarmStart.identity` of what the adapters in a run were trained for; all of its checkpoints say the same."""
    damaged: StorageError | None = None
    for step in reversed(saved_steps(directory / CHECKPOINTS)):
        try:
            record = saved_metadata(directory / CHECKPOINTS, step).get("record")
            base = record.get("base") if isinstance(record, dict) else None
            return base if isinstance(base, dict) else {}
        except StorageError as error:
            damaged = damaged or error
    raise damaged or UserError(f"{directory}: has no checkpoint")


def stored_parameters(
    directory: Path, config: RunConfig, *, state: Collection[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """All parameters of a run as `load` takes it: path and array in host memory, one at a time.

    Of the model's other variables those whose paths are in `state` come along. Of adapters and their base, and of
    averages of checkpoints, all are in memory at the same time.

    Raises:
      UserError, StorageError: as `load`.
    """
    if not config.train.lora.active and not _merged_steps(directory, config):
        yield from read_params(directory / CHECKPOINTS, state=state)
        return
    params, others = ModelTemplate(lambda rngs: build_model(config.model, rngs)).split(load(directory).model)
    for path, array in flatten(params).items():
        yield path, np.asarray(array)
    for path, array in flatten(others).items():
        if path in state:
            yield path, np.asarray(array)


def with_absolute_base(config: RunConfig) -> RunConfig:
    """`config` that names the base of adapters in a way that holds in any directory: each reader of them needs it."""
    base = config.train.init_from
    if not config.train.lora.active or base is None:
        return config
    return with_values(config, {"train.init_from": str(storage.path(base).absolute())})


def with_choices_of_base(config: RunConfig, workdir: Path) -> RunConfig:
    """`config` with what the run that adapters are for decides: ranks of layers, and what has to train whole.

    Raises:
      ConfigError, StorageError: as `with_layer_ranks` and `with_new_head`.
    """
    return with_new_head(with_layer_ranks(config, workdir), workdir)


def with_layer_ranks(config: RunConfig, workdir: Path) -> RunConfig:
    """`config` with the ranks of layers that `train.lora.ranks=importance` asks for: those of the run in `workdir`, or
    for a new one those that the importance of layers in the base's record gives.

    Raises:
      ConfigError: no base, or one whose layers have no known importance.
      StorageError: a file can't be read.
    """
    lora = config.train.lora
    if lora.ranks == "uniform" or lora.layer_ranks:
        return config
    if (workdir / CONFIG).is_file():
        stored = stored_config(workdir / CONFIG).train.lora
        if (stored.ranks, stored.rank) == (lora.ranks, lora.rank):
            return with_values(config, {"train.lora.layer_ranks": stored.layer_ranks})
    allowed = "needs train.init_from, the run whose parameters get adapters"
    require(config.train.init_from is not None, *lora.asked, allowed)
    directory = storage.path(config.train.init_from or "")
    importance = importance_of_layers(directory)
    layers = config.model.layers
    allowed = (
        f"needs the importance of {layers} layers; {directory} has {len(importance) or 'none'} in {RECORD}, which "
        "sparsify --method cfsp writes"
    )
    require(len(importance) == layers, "train.lora.ranks", lora.ranks, allowed)
    assert lora.rank is not None
    return with_values(config, {"train.lora.layer_ranks": proportional_ranks(importance, lora.rank)})


def with_new_head(config: RunConfig, workdir: Path) -> RunConfig:
    """`config` that trains the head of classes whole, where adapters are for the encoder of a masked autoencoder.

    That has no head to leave as it is. A run in `workdir` that began so goes on so, wherever the other one is now.

    Raises:
      StorageError: a configuration can't be read.
    """
    lora, images = config.train.lora, config.model.images
    if not lora.active or images.patch is None or images.reconstructs or NEW_HEAD in lora.whole:
        return config
    with_it = with_values(config, {"train.lora.whole": (*lora.whole, NEW_HEAD)})
    if (workdir / CONFIG).is_file():
        return with_it if NEW_HEAD in stored_config(workdir / CONFIG).train.lora.whole else config
    source = storage.path(config.train.init_from or "") / CONFIG
    new = source.is_file() and gets_head(read_config(source).model, config.model)
    return with_it if new else config


def importance_of_layers(directory: Path) -> list[float]:
    """What `sparsify` noted of the layers of a run that it made, positive numbers; none if it noted nothing.

    Raises:
      StorageError: the record can't be read.
    """
    path = directory / RECORD
    if not path.is_file():
        return []
    try:
        found = read_json(path, finite=True)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: can't be read ({error})") from None
    values = found.get("importance") if isinstance(found, dict) else None
    numbers = values if isinstance(values, list) else []
    return [float(x) for x in numbers if isinstance(x, int | float) and x > 0]


def merge_adapters(directory: Path, destination: Path, base: Path | None = None) -> int:
    """Make a run of adapters and the parameters they were trained for, which needs no other run; returns its step.

    Args:
      directory: a run with checkpoints of adapters; the newest is taken.
      destination: empty or absent.
      base: the run that they were trained for. Default: the place that the configuration names.

    Raises:
      UserError: no adapters there, or not the parameters that they were trained for; `destination` is not empty.
      StorageError: reading or writing failed.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: is not empty; name another directory")
    model, config, tokenizer = load(directory, base=base)
    require(config.train.lora.active, "DIR", directory, "holds no adapters to merge")
    params, model_state = ModelTemplate(lambda rngs: build_model(config.model, rngs)).split(model)
    step = saved_steps(directory / CHECKPOINTS)[-1]
    save_params(destination / CHECKPOINTS, flatten(params), step=step, model_state=flatten(model_state))
    if tokenizer is not None:
        tokenizer.save(destination)
    changes = {"train.lora": LoRAConfig(), "train.init_step": None, "train.init_from": None}
    write_config(destination, with_values(config, changes))  # last: an interrupted merge leaves no run behind
    return step


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
    ignored = FREE_ON_RESUME
    if config.train.lora.active:
        ignored += ("train.init_from", "train.init_step")  # `open_source` looks at what is there
    changed = differences(stored_config(directory / CONFIG), config, ignored)
    if changed:
        listed = "; ".join(f"{name} is {old} there, {new} here" for name, (old, new) in list(changed.items())[:6])
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        way = f"to start from its parameters, give --train.init-from {directory} and another --workdir"
        raise UserError(f"--workdir={directory}: holds a run of another configuration: {listed}{more}; {way}")
    return True


def write_config(directory: Path, config: RunConfig) -> None:
    """Store the configuration, whole or not at all.

    Raises:
      UserError: it could not be read again as it is.
      StorageError: it can't be written.
    """
    text = to_json(restorable(config))
    remember(text)
    write_atomic(directory / CONFIG, text.encode())
