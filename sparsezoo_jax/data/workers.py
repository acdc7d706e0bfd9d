"""Preparing on the cores of this machine: processes that take shards until none is left.

They are started as `python -m sparsezoo_jax.data.workers` rather than by multiprocessing, which would import the
command's own module, and JAX with it, into each. A worker ends when its standard input does, so none outlives the
command, however that was ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from sparsezoo_jax import errors
from sparsezoo_jax.data.claims import make_free_shards
from sparsezoo_jax.data.shards import Advance, Job
from sparsezoo_jax.data.tokenizer import TOKENIZER_FILES, find_tokenizer
from sparsezoo_jax.errors import StorageError, UserError


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_be_sent(job: Job) -> bool:
    """Whether another process can be given a job: not where a corpus or tokenizer is defined in a script."""
    modules = {type(job.documents).__module__, *(load.__module__ for load in TOKENIZER_FILES.values())}
    return "__main__" not in modules


def run_workers(job: Job, shards: Sequence[int], workers: int, advance: Advance) -> None:
    """Makes those of `shards` that nobody else makes, in `workers` processes.

    Raises:
      UserError: what a worker raised. StorageError: a worker was killed.
    """
    count = min(workers, len(shards))
    threads = max(1, workers // count)
    messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    processes = []
    try:
        for number in range(count):
            process = _start(threads)
            processes.append(process)
            first = number * len(shards) // count
            order = [*shards[first:], *shards[:first]]  # each begins elsewhere, so that they seldom want the same
            modules = sorted({load.__module__ for load in TOKENIZER_FILES.values()})
            threading.Thread(target=_listen, args=(number, process, messages), daemon=True).start()
            _send(process, (modules, job, order))
        running = count
        while running:
            number, message = messages.get()
            if message is None:
                running -= 1
                _check(processes[number], job)
            elif "error" in message:
                raise _error(message)
            else:
                advance(*message["advance"])
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # a dead worker's task may still wait to be written
                    pipe.close()


def _start(threads: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([entry or os.getcwd() for entry in sys.path])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
    }
    command = [sys.executable, "-m", __name__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _send(process: subprocess.Popen[bytes], task: Any) -> None:
    assert process.stdin is not None
    content = pickle.dumps(task)
    try:
        process.stdin.write(len(content).to_bytes(8, "little") + content)
        process.stdin.flush()  # stays open: its end is the worker's
    except BrokenPipeError:  # it died; `_check` says so
        return


def _listen(number: int, process: subprocess.Popen[bytes], messages: queue.Queue) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        messages.put((number, json.loads(line)))
    process.wait()
    messages.put((number, None))


def _check(process: subprocess.Popen[bytes], job: Job) -> None:
    status = process.returncode
    if status < 0:
        raise StorageError(
            f"{job.directory}: a worker process was killed (signal {-status}; too little memory?); finished shards are "
            "kept, the same command goes on"
        )
    if status > 0:
        raise RuntimeError(f"a worker process ended with status {status}")


def _error(message: dict[str, Any]) -> Exception:
    kind = getattr(errors, message["error"], None)
    if kind in (errors.DataError, errors.StorageError, errors.UserError):
        return kind(message["text"])
    return UserError(message["text"]) if message["is_user_error"] else RuntimeError(f"in a worker: {message['text']}")


def main() -> None:
    """A worker: reads its task from standard input, and writes what it does to standard output, an object a line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no message
    source = sys.stdin.buffer

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        modules, job, shards = _receive(source)
        for module in modules:
            importlib.import_module(module)  # registers its kind of tokenizer
        threading.Thread(target=_end_with_input, daemon=True).start()
        tokenizer = find_tokenizer(job.directory)
        if tokenizer is None:
            raise StorageError(f"{job.directory}: the tokenizer is missing")
        make_free_shards(job, shards, tokenizer, lambda *done: say(advance=done))
    except Exception as error:
        known = isinstance(error, UserError)
        text = str(error) if known else traceback.format_exc()
        kind = next((c.__name__ for c in type(error).__mro__ if getattr(errors, c.__name__, None) is c), "")
        say(error=kind, text=text, is_user_error=known)


def _receive(source: Any) -> Any:
    size = int.from_bytes(source.read(8), "little")
    return pickle.loads(source.read(size))


def _end_with_input() -> None:
    os.read(0, 1)  # not through `sys.stdin`, whose lock the interpreter wants when it ends
    os._exit(1)


if __name__ == "__main__":
    main()
