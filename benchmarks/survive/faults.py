"""What happens to a start, by name: `FAULTS`."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.survive.session import NotSurvivedError, Session, Start, expect, rows


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
    deadline = time.monotonic() + draw.random() * 10
    while start.running() and time.monotonic() < deadline:
        time.sleep(0.02)
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
    if 1 in start.codes():
        one_line(start)


def one_line(start: Start) -> None:
    """Raise unless a start that failed said so in one line, without what libraries print of their threads."""
    errors = start.errors()
    if "Traceback" in errors or "never retrieved" in errors:
        raise NotSurvivedError(f"more than one line: {errors[-3000:]}")


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
    if start.codes() == [1]:
        one_line(start)


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
