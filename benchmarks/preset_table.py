"""What the train steps of large presets take on pods: python -m benchmarks.preset_table --out DIR

Runs `aot` for every preset and topology, each in a process of its own, and prints one table. Batches have few sequences
a chip (`PRESETS`). A cell takes minutes; finished ones are kept in DIR and not compiled again. Nothing is measured on a
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

from sparsezoo_jax.models.remat import Remat

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


def row(preset: str, name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in found:
        return f"| {preset} | {name} | {found['error']} | | | | | |"
    gib = 2**30
    if not found["fits"]:
        needed = found["needed"] or max(found["memory"].values(), default=0)
        return f"| {preset} | {name} | {needed / gib:.1f} of {found['hbm'] / gib:.0f}: does not fit | | | | | |"
    parts = ", ".join(f"{1e3 * found['parts'][part]:,.0f}" for part in ("compute", "hbm", "interconnect"))
    seconds, sent = found["seconds"], sum(item["moved"] for item in found["collectives"])
    dense, sparse = (", ".join(f"{100 * x:.0f}" for x in found["mfu"][kind].values()) for kind in ("dense", "sparse"))
    return (
        f"| {preset} | {name} | {found['memory']['total'] / gib:.1f} of {found['hbm'] / gib:.0f} | {sent / 1e9:,.1f} | "
        f"{parts} | {', '.join(f'{1e3 * x:,.0f}' for x in seconds.values())} | {dense} | {sparse} |"
    )


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
                print(row(label(preset, remat), name, cell(preset, name, remat, options.out)), flush=True)


if __name__ == "__main__":
    main()
