"""All games of a configuration in one PGN file, played by several processes, in the order of their numbers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsezoo_jax import storage
from sparsezoo_jax.data.chess.config import ChessConfig
from sparsezoo_jax.data.chess.games import Players
from sparsezoo_jax.errors import DataError, StorageError, UserError

#: Games that a process plays before it hands them over.
_CHUNK = 4
_SEPARATOR = b"\n\n"  # after the tags and after the moves of each game
_REPORT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate_games` did."""

    path: Path
    games: int
    """Games in the file."""
    played: int
    """Games played now; the others were there."""
    seconds: float


def generate_games(config: ChessConfig, path: Path) -> Generated:
    """Play the games of `config` into the PGN file `path`.

    Until the last game the file is called `PATH.partial`; an interrupted call goes on with it. In an object store that
    is a copy of now and then. The content does not depend on the number of processes or on interruptions.

    Raises:
      DataError: no Stockfish, no package `chess`, or an engine that stopped.
      UserError: a file that holds other games. StorageError: it can't be written.
    """
    started = time.monotonic()
    try:
        if path.exists():
            _, there = _whole_games(path, config, None)
            if there != config.games:
                raise UserError(f"{path}: holds {there:,} games already, not {config.games:,}; name another file")
            return Generated(path, there, 0, 0.0)
        players = Players(config)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(storage.Mirror(path.parent)) as mirror:
                partial = mirror.local / f"{path.name}.partial"
                mirror.fetch(partial.name)
                size, done = _whole_games(partial, config, players.name) if partial.exists() else (0, 0)
                with open(partial, "r+b" if partial.exists() else "wb") as file:
                    file.truncate(size)  # a game that was cut off
                    file.seek(size)
                    with _progress(config.games, done) as show, _all_games(config, done, players) as texts:
                        for number, text in enumerate(texts, done + 1):
                            file.write(text.encode())
                            file.flush()
                            show(number)
                            mirror.send()
                    os.fsync(file.fileno())
                partial.replace(mirror.local / path.name)
            if mirror.is_remote:  # what is there now has the file's name
                path.with_name(partial.name).unlink(missing_ok=True)
        finally:
            players.close()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
    return Generated(path, config.games, config.games - done, time.monotonic() - started)


def _whole_games(path: Path, config: ChessConfig, engine: str | None) -> tuple[int, int]:
    """Bytes and number of the whole games in a file that this configuration (and engine) began."""
    with storage.open_read(path) as file:
        content = file.read()
    games = content.count(_SEPARATOR) // 2
    size = 0
    for _ in range(2 * games):
        size = content.index(_SEPARATOR, size) + len(_SEPARATOR)
    expected = {"Event": f"sparsezoo_jax: {config.recipe}", "Site": engine}
    for line in content[:size].decode("utf-8", "replace").split("\n\n", 1)[0].splitlines():
        name, _, value = line.strip("[]").partition(" ")
        wanted = expected.pop(name, None)
        if wanted is not None and value.strip('"') != wanted:
            raise UserError(f'{path}: holds other games ({name} {value}, not "{wanted}"); name another file')
    if games and "Event" in expected:
        raise UserError(f"{path}: holds games that this command did not make; name another file")
    return size, games


@contextlib.contextmanager
def _all_games(config: ChessConfig, start: int, players: Players) -> Iterator[Iterator[str]]:
    """The games from `start` on, in order."""
    count = config.processes or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    numbers = range(start, config.games)
    if min(count, len(numbers)) <= 1:
        yield (players.play(number) for number in numbers)
        return
    chunks = [numbers[i : i + _CHUNK] for i in range(0, len(numbers), _CHUNK)]
    # Forking a process that has started threads can hang it.
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(count, context, _start_players, (config,))
    try:
        yield itertools.chain.from_iterable(executor.map(_play_chunk, chunks))
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError("a process that played games was killed; the same command goes on where they were") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_players: Players | None = None


def _start_players(config: ChessConfig) -> None:
    global _players
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    _players = Players(config)
    # The engines' threads would keep the process from ending.
    multiprocessing.util.Finalize(None, _players.close, exitpriority=1)


def _end_with_parent() -> None:
    """End this process, and with it its engines, when its parent is killed: its queue would never tell."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _play_chunk(numbers: range) -> list[str]:
    assert _players is not None
    return [_players.play(number) for number in numbers]


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line every few seconds; to stderr."""
    if done:
        print(f"going on after {done:,} of {total:,} games", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("Playing", total=total, completed=done)
            yield lambda number: bar.update(task, completed=number)
        return
    started = last = time.monotonic()

    def show(number: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS:
            last, rate = now, (number - done) / (now - started)
            left = (total - number) / rate
            print(f"game {number:,}/{total:,}  {rate:.1f} games/s  {left:.0f} s left", file=sys.stderr, flush=True)

    yield show
