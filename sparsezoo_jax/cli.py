"""What the commands share: parsing into configurations, errors as one line, tables."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsezoo_jax import (
    collector,  # before anything large is imported
    platforms,  # noqa: F401  # before anything imports jax
    plugins,
    program_cache,
    storage,
)
from sparsezoo_jax.config import RunConfig, read_config
from sparsezoo_jax.configs import PRESETS, archs, preset, sizes
from sparsezoo_jax.data.config import MIN_BPE_VOCAB_SIZE
from sparsezoo_jax.errors import ConfigError, SparsezooWarning, UserError
from sparsezoo_jax.flag_text import expanded, one_line_errors, short_help
from sparsezoo_jax.overrides import has_plain_kind, list_fields, union_kinds, with_kind, with_list, with_values
from sparsezoo_jax.path_flags import PATHS, check_paths
from sparsezoo_jax.untrusted import printable

collector.as_usual()  # whoever imports this as a library keeps thresholds of his own

Command = TypeVar("Command")


#: What comes before a command's name where it is called: `sparsezoo` sets it to its own name.
PROGRAM = "python -m sparsezoo_jax."
#: The list of objects that is given in place of `data.dataset`.
MIXTURE = "data.mixture"


def run(main: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> None:
    """Run a command on `args`, by default the process's; a user's error becomes one line and its exit status."""
    collector.leave_imports_alone()
    # Library chatter that says nothing to a user of a command; set before those are loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    show = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, SparsezooWarning):
            line = f"warning: {printable(message)}"
            if _held is None:
                print(line, file=sys.stderr)
            else:
                _held.append(line)
        else:
            show(message, category, *where)

    warnings.showwarning = one_line
    args = sys.argv[1:] if args is None else args
    kept = program_cache.FLAG not in args
    if kept:
        program_cache.keep_compiled_programs()
    try:
        with contextlib.nullcontext() if kept else program_cache.no_programs_kept():
            main([arg for arg in args if arg != program_cache.FLAG])
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        # At once: threads that save or prepare would keep the process.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of stdout (head, say) left: not an error, and nobody is left to print one for.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


_held: list[str] | None = None


@contextlib.contextmanager
def held_warnings() -> Iterator[None]:
    """Print the warnings of what is done within when it is done: not amid text that is written meanwhile."""
    global _held
    _held = held = []
    try:
        yield
    finally:
        _held = None
        for line in held:
            print(line, file=sys.stderr)


def parse(
    command: type[Command], args: Sequence[str], *, prog: str, description: str, default: Command | None = None
) -> Command:
    """Parse flags into a command's dataclass.

    With `default`, its values are those of flags that are not given. Plugins that `--plugins` names are imported.

    Raises:
      UserError: an unknown flag, with a suggestion, or a bad value.
    """
    name = PROGRAM + prog
    args, named = _split_plugins(args)
    plugins.load_named(named)
    description += "\n\n--plugins MODULE ...: modules to import first, which register kinds of yours (docs/kinds.md)."
    description += f"\n{program_cache.FLAG}: keep no compiled programs, and take none that were kept."
    with one_line_errors(name, getattr(command, "__dataclass_fields__", ())):
        shared: Any = {"args": list(args), "prog": name, "description": description, "registry": PATHS}
        if default is None:
            parsed = tyro.cli(command, **shared)
        else:
            # Members of unions are as in `default`, not subcommands.
            kinds: Any = tyro.conf.AvoidSubcommands[command]  # pyright: ignore[reportInvalidTypeArguments]
            parsed = tyro.cli(kinds, default=default, **shared)
    check_paths(parsed)
    return parsed


def parse_with_preset(
    command: type[Command], args: Sequence[str], *, prog: str, description: str, default_arch: str = "spark"
) -> Command:
    """Parse flags into `command`, a subclass of `RunConfig`, over the preset that `--arch` and `--size` name.

    `ALIASES` are expanded; `--help` is short, `--help-all` lists all flags. `--a.b.kind NAME` exchanges a member of a
    union (`--train.optimizer.kind muon`) before the other flags apply; lists of objects are JSON (`--train.groups
    '[{"pattern": "embedding", "lr_multiplier": 0.5}]'`). Without `--size`, and with no other `--arch`, the model is
    that of the run that `--train.init-from` names.

    Raises:
      ConfigError: no such architecture, size or kind, or an impossible combination of values.
      UserError: an unknown flag, or a bad value.
    """
    name = PROGRAM + prog
    args = expanded(args, getattr(command, "__dataclass_fields__", ()))
    plugins.load_installed()
    plugins.load_named(_split_plugins(args)[1])
    arch, size = value_of(args, "--arch"), value_of(args, "--size")
    config = _of_source(args, arch) if size is None else None
    config = config or preset(arch or default_arch, size or "tiny")
    if any(arg in ("-h", "--help") for arg in args):
        given = command(**{field: getattr(config, field) for field in type(config).__dataclass_fields__})
        print(short_help(given, name, description, archs(), sizes(config.arch)))
        sys.exit(0)
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    for flag in dict.fromkeys(arg.partition("=")[0] for arg in args if arg.startswith("--")):
        path = flag.removeprefix("--").replace("-", "_")
        part = path.removesuffix(".kind")
        if part != path and not has_plain_kind(config, part):
            config = with_kind(config, part, _needed_value_of(args, flag))
    config, args = with_lists(config, args)
    kinds = "; ".join(f"--{path}.kind {'|'.join(members)}" for path, members in union_kinds(config).items())
    presets = "; ".join(f"{name}: {' '.join(sizes)}" for name, sizes in PRESETS.items())
    lists = "; ".join(f"--{path} '[{{...}}]'" for path in list_fields(config))
    text = (
        f"{description}\n\nPresets (--arch: --size): {presets}.\nExchangeable parts: {kinds}.\n"
        f"Lists of objects, as JSON: {lists}."
    )
    fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
    with one_line_errors(name):
        parsed = tyro.cli(
            tyro.conf.AvoidSubcommands[command],  # pyright: ignore[reportInvalidTypeArguments]
            default=command(**fields),
            args=list(args),
            prog=name,
            description=text,
            registry=PATHS,
        )
    check_paths(parsed)
    return parsed


def with_lists(config: Any, args: Sequence[str]) -> tuple[Any, list[str]]:
    """`config` with the lists of objects that `args` give as JSON, and the rest of `args`.

    Raises:
      ConfigError: not JSON, or objects that are not what the field holds.
    """
    args = list(args)
    for flag in dict.fromkeys(arg.partition("=")[0] for arg in args if arg.startswith("--")):
        path = flag.removeprefix("--").replace("-", "_")
        if path in list_fields(config):
            if path == MIXTURE:  # in place of the preset's corpus; one that is named beside it is refused
                config = with_values(config, {"data.dataset": None})
            config = with_list(config, path, _needed_value_of(args, flag))
            args = _without(args, flag)
    return config, args


def _of_source(args: Sequence[str], arch: str | None) -> RunConfig | None:
    """The preset of the run that `--train.init-from` names, with that run's model; None if it is of another `arch`.

    A run that began so and goes on has its model itself: the other one may be gone.
    """
    named = [value_of(args, flag) for flag in ("--workdir", "--train.init-from")]
    if named[1] is None:
        return None
    for field, folder in zip(("--workdir", "train.init_from"), named, strict=True):
        storage.require_place(field, folder, schemes=storage.RUN_STORES)
    files = (storage.path(folder) / "config.json" for folder in named if folder)
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return None
    found = read_config(path)
    if arch not in (None, found.arch):
        return None
    base = preset(found.arch)
    data = dataclasses.replace(
        base.data,
        seq_len=min(base.data.seq_len, found.model.max_seq_len),
        bpe_vocab_size=min(base.data.bpe_vocab_size, max(found.model.vocab_size, MIN_BPE_VOCAB_SIZE)),
    )
    return dataclasses.replace(base, size=found.size, model=found.model, data=data)


def value_of(args: Sequence[str], flag: str) -> str | None:
    """The value after `flag` (or in `flag=value`), None without it."""
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            return args[index + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _split_plugins(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """`args` without `--plugins` and its values, and these values."""
    rest: list[str] = []
    named: list[str] = []
    reads = False
    for arg in args:
        flag, given, value = arg.partition("=")
        if flag == "--plugins":
            reads = not given
            named += [value] if given else []
        elif reads and not arg.startswith("-"):
            named.append(arg)
        else:
            reads = False
            rest.append(arg)
    return rest, named


def _needed_value_of(args: Sequence[str], flag: str) -> str:
    value = value_of(args, flag)
    if value is None or value.startswith("--"):
        raise ConfigError(flag.removeprefix("--"), "", "needs a value")
    return value


def _without(args: Sequence[str], flag: str) -> list[str]:
    """`args` less a flag and its value, in both spellings."""
    kept, skip = [], False
    for arg in args:
        if skip:
            skip = False
        elif arg == flag:
            skip = True
        elif not arg.startswith(f"{flag}="):
            kept.append(arg)
    return kept


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], file: IO[str] | None = None) -> None:
    """Print a table to `file` (None: stdout), first column left, others right."""
    # As Text, for rich takes brackets in a string for its markup, and names come from files.
    table = Table(title=Text(printable(title)), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(file=file).print(table)


def corpus_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row on the loss of each corpus of a mixture, for a table of figures; none for a run on one corpus."""
    return [
        (f"loss of {name}, weight {found['weight']:.4f}", f"{found['loss']:.4f} nats/token")
        for name, found in figures.get("corpora", {}).items()
    ]


def without_nan(figures: Any) -> Any:
    """Figures as JSON can hold them: what is not a number, such as a statistic of a layer that lacks it, is null."""
    if isinstance(figures, Mapping):
        return {name: without_nan(value) for name, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and math.isnan(figures) else figures


def print_layers(figures: Mapping[str, Any]) -> None:
    """Print statistics by layer: FFN density, attended keys and, where there are, experts, width and what changes."""
    kinds = (("ffn_density", "active neurons", ".2%"), ("attended_keys", "attended keys", ".1f"))
    if not all(figures.get(name) for name, _, _ in kinds):
        return
    routed = (
        ("mixing_density", "active in mixing", ".2%"),
        ("routed_density", "active routed experts", ".2%"),
        ("width_density", "active width", ".2%"),
        ("temporal_density", "neurons that change", ".2%"),
        ("input_temporal_density", "inputs that change", ".2%"),
    )
    kinds += tuple(kind for kind in routed if figures.get(kind[0]))
    columns = []
    for name, _, form in kinds:
        values = [value for value in figures[name] if not math.isnan(value)]
        cells = ["-" if math.isnan(value) else format(value, form) for value in figures[name]]
        columns.append([*cells, format(sum(values) / len(values), form)])
    layers = [*map(str, range(len(columns[0]) - 1)), "mean"]
    rows = list(zip(layers, *columns, strict=True))
    print_table("Sparsity on the validation split", ("layer", *(title for _, title, _ in kinds)), rows)
