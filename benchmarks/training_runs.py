"""Training runs for tables: each is made once, resumed when it was cut off, and read from its directory afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsezoo_jax.configs import preset


def figures_of(workdir: Path, arch: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `evaluation.json` of a run holds; without it, trains now with `--flag value` for each of `flags`.

    A value of True stands for a flag without value.
    """
    figures = workdir / "evaluation.json"
    if not figures.exists():
        command = [sys.executable, "-m", "sparsezoo_jax.train", "--arch", arch, "--workdir", str(workdir)]
        command += ["--train.no-keep-best"]
        # Fewer checkpoints than presets keep, but for those that end as the average of their last ones.
        if preset(arch, str(flags.get("size", "tiny"))).train.merge_last == 1:
            command += ["--train.checkpoint-every", "100"]
        for name, value in flags.items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        print(f"training {workdir.name}", file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(figures.read_text())
