"""Report on runs: `python -m sparsezoo_jax.report DIR...`.

Writes one HTML file with plots and tables: the course of training, and the meters and costs of the newest checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sparsezoo_jax import cli
from sparsezoo_jax.corpus_flags import CorpusFlags
from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.path_flags import IN_RUN_STORES, Stores
from sparsezoo_jax.storage import is_object

if TYPE_CHECKING:
    from sparsezoo_jax.evaluation.report import RunFigures
    from sparsezoo_jax.models import Decoder


@dataclass(frozen=True, kw_only=True)
class Report(CorpusFlags):
    """Flags of the command."""

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directories; several are compared."""
    output: Annotated[Path | None, Stores()] = None
    """File to write. Default: report.html in the run directory, for several runs in the current directory."""
    batches: int = 8
    """Batches of the validation split that the meters read."""
    contexts: tuple[int, ...] = (512, 2048, 8192)
    """Context lengths, in tokens, at which FLOPs and bytes per token are counted."""
    cett: str | None = None
    """Also show the activation ratio of every kept checkpoint: the hidden units that are left when dropping others
    raises the perplexity of the last five together by this percentage, such as 1% (docs/sparsing-law.md)."""


def main(args: Sequence[str]) -> None:
    """Write the report and say where it is."""
    command = cli.parse(Report, args, prog="report", description=(__doc__ or "").strip())
    print(report(command))


def report(command: Report) -> Path:
    """Write the report; returns its path.

    Raises:
      UserError: no run in a directory, a directory twice, or nowhere to write; nothing has been written then.
      StorageError: reading or writing failed.
    """
    from sparsezoo_jax.evaluation.cett import parse_share
    from sparsezoo_jax.evaluation.report import write_report

    directories = command.directories
    require(len(directories) > 0, "DIR", "", "name at least one run directory")
    require(command.batches > 0, "--batches", command.batches, "must be above 0")
    require(len(command.contexts) > 0, "--contexts", "", "needs at least one length")
    for context in command.contexts:
        require(context > 0, "--contexts", context, "must be above 0")
    if command.cett is not None:
        parse_share(command.cett)
    twice = {str(d) for i, d in enumerate(directories) if d.resolve() in [e.resolve() for e in directories[:i]]}
    if twice:
        raise UserError(f"{', '.join(sorted(twice))}: named twice")
    output = command.output
    if output is None:
        output = directories[0] / "report.html" if len(directories) == 1 else Path("report.html")
    elif output.is_dir():
        raise UserError(f"--output={output}: is a directory; name a file")
    elif not (is_object(output) or output.parent.is_dir()):
        raise UserError(f"--output={output}: there is no directory {output.parent}")
    names = _names(directories)
    runs = [figures(d, name, command) for d, name in zip(directories, names, strict=True)]
    write_report(output, runs)
    return output


def figures(directory: Path, name: str, command: Report) -> RunFigures:
    """What a report shows of the run in `directory`.

    Raises:
      UserError: no run there, or one without a tokenizer. StorageError: files that can't be read.
    """
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.config import flatten
    from sparsezoo_jax.data.images.batches import images_once
    from sparsezoo_jax.evaluation import contexts
    from sparsezoo_jax.evaluation.cett import course, parse_share
    from sparsezoo_jax.evaluation.report import run_figures
    from sparsezoo_jax.training.parameters import saved_steps
    from sparsezoo_jax.training_inputs import evaluation_images

    model, config, tokenizer = run_dir.load(directory)
    config = dataclasses.replace(config, data=command.corpus(config.data))
    lengths = command.contexts
    if config.model.images.patch is not None:
        require(command.cett is None, "--cett", command.cett, f"can't be given for {directory}, a model of images")
        images, lengths = evaluation_images(config, "validation"), contexts(config.model)
        shown = partial(images_once, images, config.data.batch_size, command.batches)
    else:
        if tokenizer is None:
            raise UserError(f"{directory}: has no tokenizer, so no text can be read")
        prepared = data.prepare(config.data, "validation", tokenizer)
        shown = partial(data.evaluation_batches, prepared, config.data.batch_size, command.batches)

    found = None
    if command.cett is not None:
        steps = saved_steps(directory / run_dir.CHECKPOINTS)
        checkpoints = {step: partial(_model, directory, step) for step in steps}
        found = course(checkpoints, shown, parse_share(command.cett))
    return run_figures(directory, name, flatten(config), config.model, model, shown(), lengths, found)


def _model(directory: Path, step: int) -> Decoder:
    from sparsezoo_jax import run_dir

    return run_dir.load(directory, step=step).model


def _names(directories: Sequence[Path]) -> list[str]:
    """Last parts of the paths, or whole paths where those are alike."""
    short = [directory.resolve().name for directory in directories]
    return [name if short.count(name) == 1 else str(d) for name, d in zip(short, directories, strict=True)]


if __name__ == "__main__":
    cli.run(main)
