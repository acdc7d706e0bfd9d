"""Whether a run survives what machines do to it: `python -m benchmarks.survive --faults 1000`.

A small model is trained by the train command in four stages, each on another mesh or number of processes. Once without
faults; then again and again with a fault in every start: killed at a random moment or within a save, stopped by a
signal, checkpoints and log damaged, disks full or slow, the clock set, a second process in the same directory, a
process of two lost. Every round must end with the loss and the gradient norm of each step that the undisturbed run had,
to the last bit, each step logged once. A stage has one mesh, because sums over another number of devices round
differently; a round goes through all of them.

Cut off, the command goes on where it was. Ends with status 1 if a fault was not survived.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

WORDS = ("the", "state", "of", "union", "is", "strong", "peace", "will", "follow", "where", "law", "congress", "people")
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
    """Where runs, their reference and the state of this command are kept."""
    seed: int = 0
    """Seed of the faults."""
    only: tuple[str, ...] = ()
    """Names of the faults to try; none tries all."""


class NotSurvivedError(Exception):
    """A run that did not do what it should after a fault."""


@dataclass
class Start:
    """Processes of one start of the train command."""

    processes: list[subprocess.Popen[str]]
    logs: list[Path]

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def send(self, number: int, which: int | None = None) -> None:
        for i, process in enumerate(self.processes):
            if which in (None, i) and process.poll() is None:
                process.send_signal(number)

    def wait(self) -> list[int]:
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self.send(signal.SIGABRT)
                self.send(signal.SIGKILL)
                raise NotSurvivedError(f"hangs: {self.errors()[-2000:]}") from None
        return [process.returncode for process in self.processes]

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
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={stage.devices}",
            "SPARSEZOO_CACHE": str(command.directory / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(command.directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "SURVIVE": json.dumps(misbehaviour),
        }
        self.starts += 1
        module = [sys.executable, "-m", "benchmarks.survive_worker"]
        processes, logs = [], []
        for i in range(stage.processes):
            logs.append(self.workdir.with_name(f"{self.workdir.name}.log{i}"))
            number = [str(i)] if stage.processes > 1 else []
            with logs[-1].open("w") as log:
                started = subprocess.Popen(
                    [*module, *arguments, *number], env=environment, stdout=log, stderr=log, text=True
                )
            if limit is not None:
                resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (limit, limit))
            processes.append(started)
        return Start(processes, logs)

    def step(self) -> int:
        """The newest step in the log."""
        return max((row["step"] for row in rows(self.workdir)), default=0)

    def checkpoints(self) -> list[Path]:
        found = (self.workdir / "checkpoints").glob("*")
        return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Rows of training steps that can be read."""
    found = []
    with_errors = (workdir / "metrics.jsonl").read_bytes() if (workdir / "metrics.jsonl").exists() else b""
    for line in with_errors.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "split" not in row:
            found.append(row)
    return found


# ----------------------------------------------------------------------------------------------------------- The faults
def until_some_steps(run: Session, start: Start, draw: random.Random) -> None:
    """Wait for a random number of further steps, or the end, and a random part of a step."""
    goal = run.step() + draw.randint(1, max(run.command.steps // 2, 2))
    while start.running() and run.step() < min(goal, run.last):
        time.sleep(0.02)
    time.sleep(draw.random() * 0.1)


def kill(run: Session, draw: random.Random) -> None:
    start = run.start()
    until_some_steps(run, start, draw)
    start.send(signal.SIGKILL)
    start.wait()


def kill_early(run: Session, draw: random.Random) -> None:
    start = run.start()
    time.sleep(draw.random() * 20)
    start.send(signal.SIGKILL)
    start.wait()


def kill_in_save(run: Session, draw: random.Random) -> None:
    start = run.start()
    goal = run.step() + draw.randint(1, max(run.command.steps // 2, 2))
    while start.running():
        saving = any((run.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        if saving and run.step() >= min(goal, run.last):
            break
        time.sleep(0.001)
    time.sleep(draw.random() * 0.05)
    start.send(signal.SIGKILL)
    start.wait()


def terminate(run: Session, draw: random.Random) -> None:
    start = run.start()
    until_some_steps(run, start, draw)
    # One of two that is about to end anyway would leave the other waiting for it.
    if len(start.processes) == 1 or run.step() < run.last - 2:
        start.send(signal.SIGTERM, draw.randrange(len(start.processes)))
    expect(start, (0, -signal.SIGTERM))


def interrupt_twice(run: Session, draw: random.Random) -> None:
    start = run.start()
    until_some_steps(run, start, draw)
    for _ in range(2):
        start.send(signal.SIGINT)
        time.sleep(draw.random() * 0.3)
    start.wait()
    if "Traceback" in start.errors() and len(start.processes) == 1:
        raise NotSurvivedError(f"a traceback after two interrupts: {start.errors()[-2000:]}")


def ask_for_checkpoints(run: Session, draw: random.Random) -> None:
    start = run.start()
    until_some_steps(run, start, draw)
    if run.step() > 0:  # before the loop nothing handles the signal
        start.send(signal.SIGUSR1, 0)
    until_some_steps(run, start, draw)
    start.send(signal.SIGKILL)
    start.wait()


def damage_checkpoint(run: Session, draw: random.Random) -> None:
    kill(run, draw)
    # What is left must be of this stage: steps made again on another mesh would differ in the last bit.
    first = run.command.steps * run.stage
    candidates = [path for path in run.checkpoints()[1:] if int(path.name) > first]
    if candidates:
        files = sorted(path for path in draw.choice(candidates).rglob("*") if path.is_file())
        damage_file(draw.choice(files), draw)


def damage_file(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    match draw.randrange(4):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(content[: draw.randrange(len(content) + 1)])
        case 2:
            path.write_bytes(bytes(len(content)))
        case _ if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)


def damage_log(run: Session, draw: random.Random) -> None:
    kill(run, draw)
    path = run.workdir / "metrics.jsonl"
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        bad = draw.choice([b"\xff\xfe\n", b"\0\0\0\n", b'{"step": "x"}\n', b"[]\n"])
        lines.insert(draw.randrange(len(lines) + 1), bad)
        path.write_bytes(b"".join(lines) + draw.choice([b"", b'{"step": 3, "lo']))


def lose_checkpoints(run: Session, draw: random.Random) -> None:
    kill(run, draw)
    hidden = run.workdir.with_name("hidden")
    if not rows(run.workdir) or not (run.workdir / "checkpoints").exists():
        return
    shutil.move(run.workdir / "checkpoints", hidden)
    before = (run.workdir / "metrics.jsonl").read_bytes()
    start = run.start()
    expect(start, (1,), "checkpoints is missing")
    if (run.workdir / "metrics.jsonl").read_bytes() != before:
        raise NotSurvivedError("the log was changed though the checkpoints were missing")
    shutil.rmtree(run.workdir / "checkpoints", ignore_errors=True)
    shutil.move(hidden, run.workdir / "checkpoints")


def file_size_limit(run: Session, draw: random.Random) -> None:
    start = run.start(limit=draw.choice([16_384, 65_536]))
    expect(start, (0, 1, -signal.SIGXFSZ))
    if 1 in [process.returncode for process in start.processes] and "Traceback" in start.errors():
        raise NotSurvivedError(f"a traceback: {start.errors()[-3000:]}")


def full_disk_for_a_while(run: Session, draw: random.Random) -> None:
    full = run.workdir.with_name("full")
    start = run.start(full=str(full))
    until_some_steps(run, start, draw)
    full.touch()
    time.sleep(draw.random() * 2)
    full.unlink()
    if draw.random() < 0.5:
        start.send(signal.SIGTERM)
    expect(start, (0, 1, -signal.SIGTERM))


def slow_disk(run: Session, draw: random.Random) -> None:
    start = run.start(slow=0.05)
    until_some_steps(run, start, draw)
    start.send(signal.SIGKILL)
    start.wait()


def clock_jump(run: Session, draw: random.Random) -> None:
    start = run.start(jump=draw.choice([-1, 1]) * draw.choice([5.0, 86_400.0, 1e8]))
    until_some_steps(run, start, draw)
    start.send(signal.SIGKILL)
    start.wait()


def pause(run: Session, draw: random.Random) -> None:
    start = run.start()
    until_some_steps(run, start, draw)
    start.send(signal.SIGSTOP)
    time.sleep(draw.random() * 3)
    start.send(signal.SIGCONT)
    until_some_steps(run, start, draw)
    start.send(signal.SIGKILL)
    start.wait()


def two_starters(run: Session, draw: random.Random) -> None:
    first = run.start()
    until_some_steps(run, first, draw)
    if not first.running() or run.step() == 0:
        first.wait()
        return
    logs = [log.rename(log.with_suffix(".first")) for log in first.logs]
    second = run.start()
    first.logs = logs
    codes = second.wait()
    ended = not first.running()
    first.send(signal.SIGKILL)
    first.wait()
    if not ended and (set(codes) != {1} or "trains there" not in second.errors()):
        raise NotSurvivedError(f"a second starter ended with {codes}: {second.errors()[-2000:]}")


def lose_one_of_two(run: Session, draw: random.Random) -> None:
    start = run.start()
    until_some_steps(run, start, draw)
    if len(start.processes) == 1 or not start.running() or run.step() == 0:
        start.send(signal.SIGKILL)
        start.wait()
        return
    victim = draw.randrange(2)
    start.send(signal.SIGKILL, victim)
    codes = start.wait()
    if codes[1 - victim] != 1 or f"process {victim}" not in start.errors():
        raise NotSurvivedError(f"the other of two ended with {codes}: {start.errors()[-3000:]}")


FAULTS: dict[str, Callable[[Session, random.Random], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        kill, kill_early, kill_in_save, terminate, interrupt_twice, ask_for_checkpoints, damage_checkpoint, damage_log,
        lose_checkpoints, file_size_limit, full_disk_for_a_while, slow_disk, clock_jump, pause, two_starters,
        lose_one_of_two,
    )
}  # fmt: skip


def expect(start: Start, codes: tuple[int, ...], message: str = "") -> None:
    """Raise unless the start ends with one of `codes` and says `message`."""
    found = start.wait()
    if not set(found) <= set(codes) or message not in start.errors():
        raise NotSurvivedError(f"ended with {found}: {start.errors()[-3000:]}")


# ----------------------------------------------------------------------------------------------------------- The rounds
def undisturbed(run: Session) -> None:
    """Train the present stage to its end."""
    expect(run.start(), (0,))
    if run.step() < run.last:
        raise NotSurvivedError(f"ended at step {run.step()} of {run.last}")


def reference(command: Survive) -> tuple[list[tuple[int, float, float]], float]:
    """The curve of the run that nothing disturbs, made once, and the seconds that it took."""
    run = Session(command, command.directory / "reference")
    timing = command.directory / "reference.json"
    if not timing.exists():
        shutil.rmtree(run.workdir, ignore_errors=True)
        started = time.monotonic()
        for run.stage in range(command.stages):
            undisturbed(run)
        timing.write_text(json.dumps({"seconds": time.monotonic() - started}))
    return curve(run.workdir), json.loads(timing.read_text())["seconds"]


def curve(workdir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every row of a training step."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(workdir)]


def compare(found: list[tuple[int, float, float]], wanted: list[tuple[int, float, float]]) -> None:
    """Raise unless both curves are the same to the last bit."""
    times = Counter(step for step, _, _ in found)
    for step, loss, norm in wanted:
        if times[step] != 1:
            raise NotSurvivedError(f"step {step} is logged {times[step]} times")
        if (step, loss, norm) not in found:
            raise NotSurvivedError(f"step {step} differs from the undisturbed run's {loss} and {norm}")
    if found != wanted:
        raise NotSurvivedError("the log has other steps, or has them in another order")


def one_round(command: Survive, number: int, state: dict[str, Any], wanted: list[tuple[int, float, float]]) -> None:
    """Train all stages with a fault in every start, until a stage is done; the last start of a stage is undisturbed."""
    names = command.only or tuple(FAULTS)
    run = Session(command, command.directory / "run")
    shutil.rmtree(run.workdir, ignore_errors=True)
    for run.stage in range(command.stages):
        # Faults that leave no time for progress must not keep a stage for ever.
        for _ in range(8):
            if state["tried"] >= command.faults or run.step() >= run.last:
                break
            draw = random.Random(f"{command.seed}/{number}/{run.stage}/{run.starts}/{state['tried']}")
            name = draw.choice(names)
            where = f"stage {run.stage}, from step {run.step()}"
            print(f"fault {state['tried'] + 1}: {name}, {where}", file=sys.stderr, flush=True)
            state["tried"] += 1
            state["by_name"][name] = state["by_name"].get(name, 0) + 1
            FAULTS[name](run, draw)
        undisturbed(run)
    compare(curve(run.workdir), wanted)
    state["steps"] += len(wanted)
    state["again"] += made_again(run)
    state["survived"] = state["tried"]


def made_again(run: Session) -> int:
    """Steps that were made more than once, as the newest checkpoint counts them."""
    return json.loads((run.checkpoints()[-1] / "meta" / "metadata").read_text())["record"]["lost_steps"]


def write_corpus(directory: Path) -> None:
    """Sixty short texts."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for i in range(60):
        sentences = (" ".join(draw.choices(WORDS, k=9)).capitalize() for _ in range(12))
        (directory / f"{i:02}.txt").write_text(". ".join(sentences) + ".\n", encoding="utf-8")


def main(args: list[str]) -> int:
    """Try faults until there were enough; returns the exit status."""
    command = tyro.cli(Survive, args=args, description=__doc__)
    for name in command.only:
        if name not in FAULTS:
            print(f"error: --only={name}: must be one of {', '.join(FAULTS)}", file=sys.stderr)
            return 2
    command.directory.mkdir(parents=True, exist_ok=True)
    write_corpus(command.directory / "corpus")
    kept = command.directory / "state.json"
    state: dict[str, Any] = dict.fromkeys(("rounds", "tried", "survived", "steps", "again", "seconds"), 0)
    state |= {"by_name": {}, "failed": []}
    if kept.exists():
        state = json.loads(kept.read_text())
    wanted, seconds = reference(command)
    compare(wanted, [(step, loss, norm) for step, (_, loss, norm) in enumerate(wanted, 1)])
    while state["survived"] < command.faults and not state["failed"]:
        # What a round that is cut off had tried is tried again.
        attempt = {**state, "by_name": dict(state["by_name"])}
        started = time.monotonic()
        try:
            one_round(command, state["rounds"], attempt, wanted)
        except NotSurvivedError as error:
            attempt["failed"] = [*state["failed"], f"fault {attempt['tried']}: {error}"]
        attempt["rounds"] += 1
        attempt["seconds"] += time.monotonic() - started
        state = attempt
        kept.write_text(json.dumps(state))
    lost = state["seconds"] - seconds * state["steps"] / max(len(wanted), 1)
    tried, runs = f"{state['survived']:,} of {state['tried']:,} faults", f"{state['rounds']:,} runs"
    print(f"{tried} survived in {runs} of {len(wanted)} steps")
    again = f"{state['again']:,} of {state['steps']:,} steps"
    print(f"{again} made again; {lost:,.0f} s lost, of {state['seconds']:,.0f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(state["by_name"].items())))
    for failure in state["failed"]:
        print(f"not survived: {failure}")
    return 1 if state["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
