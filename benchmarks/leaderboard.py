"""All architectures in one table and one page: `python -m benchmarks.leaderboard [--out runs/leaderboard]`.

It measures nothing: it reads what other benchmarks keep in `benchmarks/results` and writes `leaderboard.md` and
`leaderboard.html`, which needs no other file. What has not been measured is shown as missing, with the command that
measures it.

- `zoo.json` (`benchmarks.zoo`): loss after as many tokens, active neurons, FLOPs of a token;
- `interpretability.json` (`benchmarks.interpretability`): detection and fuzzing, and those of autoencoders at equal L0.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import interpretability, zoo
from sparsezoo_jax import cli
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.evaluation.report.page import document, plot_grid, table
from sparsezoo_jax.evaluation.report.svg import bar_plot, escape
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.untrusted import read_json

NONE, MISSING = "–", "missing"
"""Not there for such a row; there to be measured."""
TASKS = ("detection", "fuzzing")
COLUMNS = (
    *("architecture", "parameters", "validation loss, mean (spread)", "seeds", "against dense", "FFN active"),
    *("MFLOP a token", "dense twin / it", "features of a token (L0)", *TASKS),
)
_QUALITY = slice(1, 8)
"""Columns of the comparison of losses."""


@dataclasses.dataclass
class Board:
    """What is known, and what is not."""

    rows: list[list[str]]
    """Cells of `COLUMNS`."""
    missing: dict[str, str]
    """What has not been measured, and the command that measures it."""
    figures: dict[str, Any]
    """The numbers of the rows, by architecture."""
    judge: str | None


def gather(results: Path, *, steps: int, seeds: int, judge: str) -> Board:
    """The board of what the files in `results` hold.

    Args:
      results: directory; files that are not there have no results.
      steps: of the runs that are compared.
      seeds: runs that each architecture should have at its best learning rate.
      judge: whose scores of explanations are shown.

    Raises:
      UserError: a file that holds something else. StorageError: one can't be read.
    """
    records = _read(results / zoo.RECORD.name, ("loss", "parameters", "density", "flops", "dense_flops"))
    scores = _read(results / interpretability.RECORD.name, ("accuracy", "l0", "judge_kind"))
    best = zoo.best_runs(records, steps)
    board, base = Board([], {}, {}, None), best.get(zoo.BASELINE)
    for arch in [zoo.BASELINE, *(name for name in zoo.ARCHS if name != zoo.BASELINE)]:
        found, row = best.get(arch), [arch, *[NONE] * (len(COLUMNS) - 1)]
        own: dict[str, Any] = {}
        if found is None:
            row[_QUALITY] = [MISSING] * 7
            board.missing[f"{arch}: loss"] = zoo.command(arch, steps)
        else:
            mean, count = statistics.fmean(found.losses), found.figures
            own = {"loss": mean, "losses": found.losses, "flops": count["flops"], "density": count["density"]}
            row[_QUALITY] = [
                f"{count['parameters']:,.0f}",
                _loss(found),
                f"{len(found.losses)} of {seeds}",
                MISSING if base is None else f"{mean / statistics.fmean(base.losses) - 1:+.2%}",
                f"{count['density']:.1%}",
                f"{count['flops'] / 1e6:.2f}",
                f"{count['dense_flops'] / count['flops']:.2f}",
            ]
            if not found.searched:
                board.missing[f"{arch}: learning rates beyond the best so far"] = zoo.command(arch, steps)
            if len(found.losses) < seeds:
                board.missing[f"{arch}: seeds, {seeds - len(found.losses)} of {seeds}"] = zoo.command(arch, steps)
        further = _explained(board, row, own, scores, arch, steps, judge)
        board.rows += [row, *further]
        board.figures[arch] = own
    return board


def _loss(found: zoo.BestRuns) -> str:
    """Mean and spread of the seeds; marked where a better learning rate may not have been tried yet."""
    spread = f" ({max(found.losses) - min(found.losses):.4f})" if len(found.losses) > 1 else ""
    return f"{statistics.fmean(found.losses):.4f}{spread}{'' if found.searched else ' †'}"


def _explained(
    board: Board, row: list[str], own: dict[str, Any], scores: Mapping[str, Any], arch: str, steps: int, judge: str
) -> list[list[str]]:
    """Fill in an architecture's scores; the row of the dense model's autoencoder at its L0, if it is to have one."""
    if arch not in interpretability.ARCHS:
        return []
    beside = [f"dense, topk at {arch}'s L0", *[NONE] * (len(COLUMNS) - 1)]
    command = f"python -m benchmarks.interpretability --archs {arch} --steps {steps} --judge {judge}"
    for name, cells, key in zip(
        interpretability.names(arch, steps, judge), (row, beside), ("explained", "autoencoder"), strict=True
    ):
        found = scores.get(name)
        if found is None:
            cells[-3:] = [MISSING] * 3
            board.missing[f"{cells[0]}: detection and fuzzing"] = command
        else:
            cells[-3:] = [f"{found['l0']:.1f}", *(interpretability.scored(found["accuracy"].get(t)) for t in TASKS)]
            own[key] = {"l0": found["l0"], **{task: found["accuracy"].get(task) for task in TASKS}}
            board.judge = f"{judge} ({found['judge_kind']})"
    return [beside]


def _read(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """The runs of a record by name; none where there is no file."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold an object of runs by name")
    for name, figures in found.items():
        lacking = [key for key in needed if not isinstance(figures, dict) or key not in figures]
        if lacking:
            raise UserError(f"{path}: {name}: lacks {', '.join(lacking)}")
    return found


def _notes(board: Board, steps: int) -> list[str]:
    notes = [
        f"Tiny presets after {steps} steps on the same tokens, each at its best learning rate; spread: largest less "
        "smallest loss of the seeds; †: a better rate may lie beyond those tried so far. FLOPs include the output "
        "projection."
    ]
    if board.judge is not None:
        notes.append(
            f"Detection and fuzzing: balanced accuracy with 95 % intervals over features; judge {board.judge}."
        )
    return notes


def markdown(board: Board, steps: int) -> str:
    """The board as a Markdown document with one table."""
    lines = ["# Leaderboard", "", *_notes(board, steps), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in board.rows]
    if board.missing:
        lines += ["", "## Missing", "", *(f"- {what}: `{command}`" for what, command in board.missing.items())]
    return "\n".join(lines) + "\n"


def page(board: Board, steps: int) -> str:
    """The board as an HTML document, with bars of what is known."""
    known = {arch: own for arch, own in board.figures.items() if "loss" in own}
    best = min((own["loss"] for own in known.values()), default=0.0)
    plots = [
        _bars(
            "Validation loss above the best, nats a token",
            steps,
            {arch: own["loss"] - best for arch, own in known.items()},
        ),
        _bars("MFLOP a token", steps, {arch: own["flops"] / 1e6 for arch, own in known.items()}),
    ]
    scored = {arch: own for arch, own in board.figures.items() if "explained" in own}
    if scored:
        bars = [(label, [_mean(own.get(key)) for own in scored.values()]) for label, key in _EXPLAINED]
        plots.append(bar_plot("Detection at equal L0", "balanced accuracy", list(scored), bars))
    parts = ["<h1>Leaderboard</h1>", *(f'<p class="note">{escape(note)}</p>' for note in _notes(board, steps))]
    parts += [table(COLUMNS, board.rows), plot_grid(plots)]
    if board.missing:
        rows = [[what, command] for what, command in board.missing.items()]
        parts += ["<h2>Missing</h2>", table(("not measured", "command that measures it"), rows, values=True)]
    return document("Leaderboard", parts, board.figures)


def _bars(title: str, steps: int, values: Mapping[str, float]) -> str:
    """A bar for each architecture, told apart by colours: names would not find room below them."""
    series = [(name, [value]) for name, value in values.items()]
    return bar_plot(title, title.rsplit(", ", 1)[-1], [f"{steps} steps"], series)


_EXPLAINED = (("own features", "explained"), ("dense, topk", "autoencoder"))


def _mean(scores: dict[str, Any] | None) -> float | None:
    return None if scores is None or scores["detection"] is None else scores["detection"]["mean"]


def main(args: list[str] | None = None) -> None:
    """Read the results, write the table and the page, and say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=zoo.RECORD.parent, help="files of the other benchmarks")
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"), help="directory of both files")
    parser.add_argument("--steps", type=int, default=zoo.STEPS, help="of the runs that are compared")
    parser.add_argument("--seeds", type=int, default=len(zoo.SEEDS), help="that each architecture should have")
    parser.add_argument("--judge", default="tokens", help="whose scores of explanations are shown")
    options = parser.parse_args(args)
    if not options.results.is_dir():
        raise UserError(f"--results={options.results}: no such directory")
    board = gather(options.results, steps=options.steps, seeds=options.seeds, judge=options.judge)
    for name, text in (("leaderboard.md", markdown), ("leaderboard.html", page)):
        write_atomic(options.out / name, text(board, options.steps).encode())
        print(options.out / name)
    for what, command in board.missing.items():
        print(f"missing: {what}: {command}")


if __name__ == "__main__":
    cli.run(lambda args: main(list(args)))
