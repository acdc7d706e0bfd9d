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

from sparsezoo_jax.chips import GPUS
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
      `cycles` of all operations together, `clock_ghz` (assumed; None: unknown), `note`, and `ops`: `op`, `cycles` and
      `share` of the costliest. Every operation counts as often as it stands in the program: the body of a loop once.

    Raises:
      ConfigError: not a TPU.
      UserError: the compiler failed, or needed more than `MEMORY_LIMIT` bytes or `TIME_LIMIT` seconds.
    """
    if topology.generation in GPUS:
        raise ConfigError("--profile", topology.name, "works for TPUs only")
    kept = [arg for arg in args if arg not in ("--profile", "--no-profile")]
    command = [sys.executable, "-m", "sparsezoo_jax.aot", *kept]
    found = summarise(profiled(command, allowed=(0, 1), remedy=f"; {_REMEDY}"), top)
    return found | {"clock_ghz": CLOCK_GHZ.get(topology.generation)}


def profiled(command: Sequence[str], *, allowed: Sequence[int] = (0,), remedy: str = "") -> list[str]:
    """Run a command that compiles for a TPU with the static profile switched on; the profiles in text form.

    Raises:
      UserError: it ended with another status than those `allowed`, or needed more than `MEMORY_LIMIT` bytes or
        `TIME_LIMIT` seconds; `remedy` ends the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"{flags} --xla_jf_dump_static_llo_profile_to={folder}".strip(),
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache would leave no profile
        }
        limited = ["bash", "-c", f'ulimit -v {MEMORY_LIMIT // 1024}; exec "$@"', "profile", *command]
        try:
            done = subprocess.run(limited, env=environment, capture_output=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise UserError(f"--profile: took more than {TIME_LIMIT} s{remedy}") from None
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        if done.returncode not in allowed or not files:
            fatal = re.search(rb"(?:LLO_CHECK|Check fail|RESOURCE_EXHAUSTED|bad_alloc)[^\n]*", done.stderr)
            why = f": {fatal[0].decode(errors='replace')[:200]}" if fatal else ""
            raise UserError(f"--profile: the compiler ended with status {done.returncode}{why}{remedy}")
        return [path.read_text(errors="replace") for path in files]


_REMEDY = "profile a smaller step (--size, --model.layers 2, --data.seq-len), or on v6e, whose profile fails least"
#: Assumed, to turn cycles into time: 1 / GHz is nanoseconds.
CLOCK_GHZ = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}


def summarise(texts: Sequence[str], top: int = 20) -> dict[str, Any]:
    """Sum up profiles in text form, one an operation; see `profile_command`."""
    cycles: dict[str, int] = {}
    for text in texts:
        found = {name: value.strip('"') for name, value in re.findall(r'(\w+): ("[^"]*"|\d+)', text)}
        if "hlo_op_name" in found and "estimated_cycles" in found:
            # Operations that are alike are estimated once.
            cycles[found["hlo_op_name"]] = int(found["estimated_cycles"]) * int(found.get("num_equivalent_hlos", 1))
    total = sum(cycles.values())
    largest = sorted(cycles.items(), key=lambda item: -item[1])[:top]
    return {
        "cycles": total,
        "note": "compiler's model, not measured",
        "ops": [{"op": name, "cycles": count, "share": count / max(total, 1)} for name, count in largest],
    }
