"""Whether a run survives what machines do to it: `python -m benchmarks.survive --faults 1000`.

A small model is trained by the train command in four stages, each on another mesh or number of processes. Once without
faults; then again and again with a fault in every start: killed at a random moment or within a save, stopped by a
signal, checkpoints and log damaged, disks full or slow, the clock set, a second process in the same directory, a
process of two lost. Every round must end with the loss and the gradient norm of each step that the undisturbed run had,
to the last bit, each step logged once. A stage has one mesh, because sums over another number of devices round
differently; a round goes through all of them.

Whole rounds are counted in `--record`, and the command goes on after those that its seed has there, on this machine or
another: several processes with seeds and directories of their own share the work. Prints the sums of all seeds, and
ends with status 1 if a fault was not survived.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import tyro

from benchmarks import records
from benchmarks.survive.faults import FAULTS
from benchmarks.survive.session import NotSurvivedError, Session, Survive, expect, rows

WORDS = ("the", "state", "of", "union", "is", "strong", "peace", "will", "follow", "where", "law", "congress", "people")


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
    name = f"{kind_of(command)}-seed{command.seed}"
    state = {**nothing_yet(), **records.read(command.record).get(name, {})}
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
        passed = time.monotonic() - started
        attempt["seconds"] += passed
        attempt["lost"] += max(passed - seconds * (attempt["steps"] - state["steps"]) / max(len(wanted), 1), 0.0)
        state = attempt
        records.write(command.record, name, state)
    return summary(command)


def nothing_yet() -> dict[str, Any]:
    """The sums before the first round."""
    sums: dict[str, Any] = dict.fromkeys(("rounds", "tried", "survived", "steps", "again", "seconds", "lost"), 0)
    return {**sums, "by_name": {}, "failed": []}


def kind_of(command: Survive) -> str:
    """What rounds must share to be added up, as the record calls it."""
    return "-".join((f"stages{command.stages}", f"steps{command.steps}", *sorted(command.only)))


def summary(command: Survive) -> int:
    """Print the sums of all seeds with rounds like the command's; returns the exit status."""
    kind = f"{kind_of(command)}-seed"
    kept = {name: found for name, found in records.read(command.record).items() if name.startswith(kind)}
    total, by_name = nothing_yet(), Counter[str]()
    for found in kept.values():
        total |= {field: total[field] + found[field] for field in total if isinstance(total[field], int | float)}
        by_name.update(found["by_name"])
    tried, runs = f"{total['survived']:,} of {total['tried']:,} faults", f"{total['rounds']:,} runs"
    print(f"{tried} survived in {runs} of {command.stages * command.steps} steps")
    again = f"{total['again']:,} of {total['steps']:,} steps"
    print(f"{again} made again; {total['lost']:,.0f} s lost, of {total['seconds']:,.0f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(by_name.items())))
    failed = [f"{name}: {failure}" for name, found in kept.items() for failure in found["failed"]]
    for failure in failed:
        print(f"not survived: {failure}")
    return 1 if failed else 0
