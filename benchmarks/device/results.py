"""The tables of docs/device.md, made from the files of benchmarks/results/device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.device.rows import FAILED, OK, WRONG, Row, read

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "benchmarks" / "results" / "device", ROOT / "docs" / "device.md"
START, END = "<!-- results -->", "<!-- end of results -->"
#: The figures of each stage that the tables show.
COLUMNS = {
    "times": ("ms", "of bound", "x xla", "TFLOP/s", "GB/s", "of datasheet"),
    "training": ("parameters M", "tokens/s", "MFU dense", "MFU sparse", "program GB", "first loss", "last loss"),
    "decoding": ("ms a token", "tokens/s", "MB a token", "of bandwidth", "x dense as trained"),
}


def tables(folder: Path) -> str:
    """A section for each file, in Markdown."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return "No results yet: nothing was run on an accelerator."
    return "\n\n".join("\n".join(_section(*read(path))) for path in files)


def _section(machine: dict[str, Any], rows: list[Row]) -> Iterator[str]:
    yield f"### {machine['device']}\n"
    named = ("compute_capability", "driver", "python", "jax", "jaxlib", "flax")
    yield "; ".join(f"{name} {machine[name]}" for name in named if machine.get(name)) + "\n"
    values = [row for row in rows if row.stage == "values" and row.status in (OK, WRONG, FAILED)]
    if values:
        good = sum(row.status == OK for row in values)
        yield f"{good} of {len(values)} kernels' values and gradients within their tolerances.\n"
        yield from (f"- {row.name}: {row.note}" for row in values if row.status != OK)
    for stage, columns in COLUMNS.items():
        own = [row for row in rows if row.stage == stage and row.status in (OK, WRONG, FAILED)]
        if not own:
            continue
        shown = [name for name in columns if any(name in row.figures for row in own)]
        yield f"\n| {stage} | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}"
        for row in own:
            figures = [_figure(row.figures.get(name)) for name in shown]
            yield f"| {row.name}{row.note and f' ({row.note})'} | {' | '.join(figures)} |"


def _figure(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def renewed(text: str, folder: Path = RESULTS) -> str:
    """A document with its tables made anew, between the comments that mark their place."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{tables(folder)}\n{END}{after}"


def write() -> None:
    """Renew docs/device.md."""
    DOCS.write_text(renewed(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
