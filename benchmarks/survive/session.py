"""One run of the train command in its stages, and its starts."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from benchmarks.survive.worker import work

#: Starts the processes: each is forked from one that has imported what the command imports and started nothing, which
#: halves the time that a fault takes.
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["benchmarks.survive.imports"])
FLAGS = {
    "data.seq-len": 32, "data.batch-size": 8, "data.bpe-vocab-size": 300, "model.vocab-size": 320, "model.layers": 2,
    "model.d-model": 32, "model.ffn.d-ff": 64, "model.ffn.r": 16, "model.ffn.top-k": 8, "train.log-every": 1,
    "train.checkpoint-every": 4, "train.keep-last": 3, "train.schedule.learning-rate": 1e-3, "train.hang-timeout": 60,
    "eval.batches": 2, "eval.final-batches": 2,
}  # fmt: skip
PATIENCE = 900.0
"""Seconds after which a start that does not end is a hang."""


@dataclass(frozen=True)
class Stage:
    """What a part of the run is trained on."""

    processes: int
    devices: int
    """Devices of each process."""
    mesh: tuple[tuple[str, int], ...] = ()


STAGES = (
    Stage(1, 1),
    Stage(1, 4, (("fsdp", 2), ("tensor", 2))),
    Stage(2, 1, (("data", 2),)),
    Stage(1, 2, (("fsdp", 2),)),
)


@dataclass(frozen=True)
class Survive:
    """Flags of the command."""

    faults: int = 1000
    """Faults to try."""
    steps: int = 40
    """Steps of a stage."""
    stages: int = len(STAGES)
    """Stages of a run."""
    directory: Path = Path("runs/survive")
    """Where runs and their reference are kept."""
    record: Path = Path("benchmarks/results/survive.json")
    """Where the rounds of each seed are counted; the command goes on after them."""
    seed: int = 0
    """Seed of the faults."""
    only: tuple[str, ...] = ()
    """Names of the faults to try; none tries all."""


class NotSurvivedError(Exception):
    """A run that did not do what it should after a fault."""


@dataclass
class Start:
    """Processes of one start of the train command."""

    processes: list[ForkServerProcess]
    logs: list[Path]

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def send(self, number: int, which: int | None = None) -> None:
        for i, process in enumerate(self.processes):
            if which in (None, i) and process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, number)

    def wait(self) -> list[int]:
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.is_alive():
                self.send(signal.SIGABRT)
                self.send(signal.SIGKILL)
                raise NotSurvivedError(f"hangs: {self.errors()[-2000:]}")
        return self.codes()

    def codes(self) -> list[int]:
        """Exit statuses of processes that have ended; minus the signal of those that one ended."""
        codes = [process.exitcode for process in self.processes]
        return [code for code in codes if code is not None]

    def errors(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


@dataclass
class Session:
    """One run with its stages."""

    command: Survive
    workdir: Path
    stage: int = 0
    starts: int = 0

    @property
    def last(self) -> int:
        """Step at which the stage ends."""
        return self.command.steps * (self.stage + 1)

    def start(self, *, limit: int | None = None, **misbehaviour: Any) -> Start:
        """Start the command for the present stage; `limit` is the size beyond which no file may grow."""
        stage, command = STAGES[self.stage], self.command
        flags = {**FLAGS, "train.steps": command.steps * command.stages, "train.stop-at": self.last}
        flags |= {f"mesh.{name}": size for name, size in stage.mesh}
        arguments = ["--arch", "spark", "--workdir", str(self.workdir), "--train.no-keep-best", "--eval.no-report"]
        arguments += ["--data.dataset", str(command.directory / "corpus")]
        arguments += [str(text) for name, value in flags.items() for text in (f"--{name}", value)]
        if stage.processes > 1:
            arguments += ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}"]
            arguments += ["--processes", str(stage.processes), "--process-id"]
        environment = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={stage.devices}",
            "SPARSEZOO_CACHE": str(command.directory / "cache"),
            "SURVIVE": json.dumps(misbehaviour),
        }
        self.starts += 1
        processes, logs = [], []
        for i in range(stage.processes):
            logs.append(self.workdir.with_name(f"{self.workdir.name}.log{i}"))
            number = [str(i)] if stage.processes > 1 else []
            given = ([*arguments, *number], environment, str(command.directory / "compiled"), str(logs[-1]), limit)
            logs[-1].write_text("")
            processes.append(WORKERS.Process(target=work, args=given))
            processes[-1].start()
        return Start(processes, logs)

    def step(self) -> int:
        """The newest step in the log.

        It is asked for all the time, so only the end of the log is read where that has a step.
        """
        for end in (4096, None):
            if found := [row["step"] for row in rows(self.workdir, end)]:
                return max(found)
        return 0

    def checkpoints(self) -> list[Path]:
        found = (self.workdir / "checkpoints").glob("*")
        return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rows(workdir: Path, end: int | None = None) -> list[dict[str, Any]]:
    """Rows of training steps that can be read, or those within the last `end` bytes of the log."""
    found, with_errors = [], b""
    if (workdir / "metrics.jsonl").exists():
        with (workdir / "metrics.jsonl").open("rb") as log:
            if end is not None:
                log.seek(max(log.seek(0, os.SEEK_END) - end, 0))
            with_errors = log.read()
    for line in with_errors.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "split" not in row:
            found.append(row)
    return found


def expect(start: Start, codes: tuple[int, ...], message: str = "") -> None:
    """Raise unless the start ends with one of `codes` and says `message`."""
    found = start.wait()
    if not set(found) <= set(codes) or message not in start.errors():
        raise NotSurvivedError(f"ended with {found}: {start.errors()[-3000:]}")
