"""What the train steps of large presets take on pods: python -m benchmarks.preset_table --out DIR

Runs `aot` for every preset and topology, each in a process of its own, and prints one table. Batches have few sequences
a chip (`PRESETS`). A cell takes minutes. What `aot` says is kept in DIR, and the table's figures in
`benchmarks/results/preset_table.json` (`--record`): what is there is not compiled again. No figure is measured on a
device.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks import records
from sparsezoo_jax.models.remat import Remat

RECORD = Path("benchmarks/results/preset_table.json")

#: Architecture and size; sequences a chip.
PRESETS = {
    "dense gemma2_2b": 1,
    "spark 2b": 1,
    "spark 9b": 1,
    "blockffn 2_8b": 2,
    "moe xlarge": 2,
    "moex medium": 8,
    "mohd 1_13b_x2": 2,
}


class Pod(NamedTuple):
    """A topology, and how many of its chips share the parameters; copies of these share the batch."""

    topology: str
    slices: int
    fsdp: int


PODS = {
    "v5p:4x4x4": Pod("v5p:4x4x4", 1, 16),
    "v6e:16x16": Pod("v6e:16x16", 1, 16),
    "2 slices of v5p:4x4x4": Pod("v5p:4x4x4", 2, 16),
    "h100:1x8x8": Pod("h100:1x8x8", 1, 8),
}


#: Stands for what the preset itself says of `model.remat`.
OWN = "own"


def command(preset: str, pod: Pod, remat: str) -> list[str]:
    """The aot command of a cell."""
    arch, size = preset.split()
    chips = pod.slices * math.prod(int(side) for side in pod.topology.split(":")[1].split("x"))
    flags = {
        "arch": arch,
        "size": size,
        "topology": pod.topology,
        "mesh.slices": pod.slices,
        "mesh.fsdp": pod.fsdp,
        "data.batch-size": chips * PRESETS[preset],
        "train.accumulation": 1,
    }
    if remat != OWN:
        flags["model.remat"] = remat
    return [
        sys.executable,
        "-m",
        "sparsezoo_jax.aot",
        "--json",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def cell(preset: str, name: str, remat: str, folder: Path) -> dict[str, Any]:
    """What aot says, kept in `folder`; `error` where it ends without figures."""
    path = folder / f"{label(preset, remat)} {name}.json".replace(":", "_").replace(" ", "_")
    if not path.exists():
        done = subprocess.run(command(preset, PODS[name], remat), capture_output=True, text=True)
        if done.returncode in (0, 1) and "{" in done.stdout:
            found = json.loads(done.stdout[done.stdout.index("{") :])
        else:
            found = {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1))
        partial.rename(path)
    return json.loads(path.read_text())


def label(preset: str, remat: str) -> str:
    """What a row is called."""
    return preset if remat == OWN else f"{preset} {remat}"


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """What the table has of a cell; seconds by part and by overlap, bytes."""
    needed = found["needed"] or max(found["memory"].values(), default=0)
    return {
        "fits": found["fits"],
        "bytes": found["memory"]["total"] if found["fits"] else needed,
        "of": found["hbm"],
        "sent": sum(item["moved"] for item in found["collectives"]),
        "parts": found["parts"],
        "seconds": found["seconds"],
        "mfu": found["mfu"],
    }


def row(preset: str, name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in found:
        return f"| {preset} | {name} | {found['error']} | | | | | |"
    memory = f"{found['bytes'] / 2**30:.1f} of {found['of'] / 2**30:.0f}"
    if not found["fits"]:
        return f"| {preset} | {name} | {memory}: does not fit | | | | | |"
    parts = ", ".join(f"{1e3 * found['parts'][part]:,.0f}" for part in ("compute", "hbm", "interconnect"))
    steps = ", ".join(f"{1e3 * found['seconds'][overlap]:,.0f}" for overlap in ("none", "half", "full"))
    dense, sparse = (
        ", ".join(f"{100 * found['mfu'][kind][overlap]:.0f}" for overlap in ("none", "half", "full"))
        for kind in ("dense", "sparse")
    )
    return f"| {preset} | {name} | {memory} | {found['sent'] / 1e9:,.1f} | {parts} | {steps} | {dense} | {sparse} |"


def made(preset: str, name: str, remat: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a cell, from the record if it has them; or `error`, which is not kept there."""
    kept = f"{label(preset, remat)} {name}"
    if kept in (known := records.read(options.record)):
        return known[kept]
    found = cell(preset, name, remat, options.out)
    return found if "error" in found else records.recorded(options.record, kept, lambda: figures(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of finished cells")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--pods", nargs="*", default=list(PODS), choices=list(PODS))
    parser.add_argument(
        "--remat",
        nargs="*",
        default=[OWN],
        choices=[OWN, *get_args(Remat)],
        help="values of model.remat, each a row; own: as the preset has it",
    )
    parser.add_argument("--record", type=Path, default=RECORD, help="figures of all cells")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        "| preset | pod | GiB | sent GB | compute, HBM, links ms | step ms: no, half, full overlap | MFU dense % | "
        "MFU sparse % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for preset in options.presets:
        for name in options.pods:
            for remat in options.remat:
                print(row(label(preset, remat), name, made(preset, name, remat, options)), flush=True)


if __name__ == "__main__":
    main()
