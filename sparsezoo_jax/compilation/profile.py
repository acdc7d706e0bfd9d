"""The TPU compiler's static estimate of cycles for every operation, taken in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsezoo_jax.compilation.topologies import Topology
from sparsezoo_jax.errors import ConfigError, UserError

#: Sorts are simulated unrolled: without a limit they take all memory of the machine.
MEMORY_LIMIT = 16 * 2**30
TIME_LIMIT = 900


def profile_command(args: Sequence[str], topology: Topology, top: int = 20) -> dict[str, Any]:
    """Compile the same step again with the static profile switched on.

    Args:
      args: of the aot command.
      top: operations to return.

    Returns:
      `cycles` of all operations together, `note`, and `ops`: `op`, `cycles` and `share` of the costliest. Every
      operation counts as often as it stands in the program: the body of a loop counts once.

    Raises:
      ConfigError: not a TPU.
      UserError: the compiler failed, or needed more than `MEMORY_LIMIT` bytes or `TIME_LIMIT` seconds.
    """
    if topology.generation == "h100":
        raise ConfigError("--profile", topology.name, "works for TPUs only")
    kept = [arg for arg in args if arg not in ("--profile", "--no-profile")]
    with tempfile.TemporaryDirectory() as folder:
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        environment = os.environ | {"LIBTPU_INIT_ARGS": f"{flags} --xla_jf_dump_static_llo_profile_to={folder}".strip()}
        command = ["bash", "-c", f'ulimit -v {MEMORY_LIMIT // 1024}; exec "$@"', "profile"]
        command += [sys.executable, "-m", "sparsezoo_jax.aot", *kept]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise UserError(f"--profile: took more than {TIME_LIMIT} s; {_REMEDY}") from None
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        if done.returncode not in (0, 1) or not files:
            raise UserError(f"--profile: the compiler failed with the profile on (status {done.returncode}); {_REMEDY}")
        return summarise([path.read_text(errors="replace") for path in files], top)


_REMEDY = "profile a smaller step (--size, --model.layers 2, --data.seq-len)"


def summarise(texts: Sequence[str], top: int = 20) -> dict[str, Any]:
    """Sum up profiles in text form, one an operation; see `profile_command`."""
    cycles: dict[str, int] = {}
    for text in texts:
        name = re.search(r'(?:hlo_name|name): "([^"]+)"', text)
        count = re.search(r"estimated_cycles: (\d+)", text)
        if count:
            label = name[1] if name else "unnamed"
            cycles[label] = cycles.get(label, 0) + int(count[1])
    total = sum(cycles.values())
    largest = sorted(cycles.items(), key=lambda item: -item[1])[:top]
    return {
        "cycles": total,
        "note": "compiler's model, not measured",
        "ops": [{"op": name, "cycles": count, "share": count / max(total, 1)} for name, count in largest],
    }
