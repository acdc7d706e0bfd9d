"""Noticing that another process of the run is gone, and saying which.

Each process writes a counter into the key-value store of jax's coordination service. They are compared only when
something already looks wrong: a collective failed, or the main thread has made no progress for a while.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the public module gives no access to the client

from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.training.phases import Phases, end_process

_PREFIX = "sparsezoo_jax/alive"
_ENDED = "ended"
_LONGEST_INTERVAL = 5.0
_JOIN_SECONDS = 300.0


class Peers:
    """While entered, ends this process with one line and status 1 soon after another process of the run is gone.

    Does nothing in a run of one process.

    Args:
      phases: the main thread's progress.
      timeout: seconds within which a lost process is noticed; None or 0 leaves it to jax.
    """

    def __init__(self, phases: Phases, timeout: float | None):
        self._phases, self._timeout = phases, timeout
        self._client: Any = distributed.global_state.client if jax.process_count() > 1 else None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._interval = min((timeout or 0) / 8, _LONGEST_INTERVAL)

    def __enter__(self) -> Peers:
        if self._client is not None and self._timeout:
            if jax.process_index() > 0:
                explain_aborts(lambda: None if self._coordinator_answers() else _lost([0]))
            self._threads = [
                threading.Thread(target=target, name=name, daemon=True)
                for name, target in (("alive", self._tell), ("peers", self._watch))
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is not None and self._threads and _looks_like_a_lost_peer(error):
            # Whoever died took the collective with it; say who before jax's shutdown waits for them.
            missing = self._missing(wait=min(self._timeout or 0, 30.0))
            if missing:
                end_process(_lost(missing))
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1.0)
        if self._threads and kind is None:
            self._set(_ENDED)

    def explain(self) -> str:
        """Which processes are missing, for a message; empty if none is, or in a run of one process."""
        if not self._threads:
            return ""
        missing = self._missing(wait=3 * self._interval)
        return _lost(missing) if missing else "no process is missing"

    def _tell(self) -> None:
        count = 0
        while not self._ended.wait(self._interval):
            count += 1
            self._set(str(count))

    def _set(self, value: str) -> None:
        with contextlib.suppress(Exception):  # the coordinator may be gone; the watching thread finds that out
            self._client.key_value_set(f"{_PREFIX}/{jax.process_index()}", value, allow_overwrite=True)

    def _watch(self) -> None:
        """Compare counters while the main thread makes no progress."""
        seen, since = self._phases.beats, time.monotonic()
        while not self._ended.wait(self._interval):
            if self._phases.beats != seen:
                seen, since = self._phases.beats, time.monotonic()
            elif time.monotonic() - since > 2 * self._interval:
                missing = self._missing(wait=4 * self._interval)
                if missing and self._phases.beats == seen:
                    end_process(_lost(missing))

    def _missing(self, wait: float) -> list[int]:
        """Processes whose counter does not move within `wait` seconds; process 0 if the coordinator is gone."""
        silent: list[int] = []
        before = self._counters()
        deadline = time.monotonic() + max(wait, 3 * self._interval)
        while time.monotonic() < deadline and not self._ended.wait(self._interval):
            now = self._counters()
            if before is None or now is None:
                return [0]
            others = (i for i in range(jax.process_count()) if i != jax.process_index())
            silent = [i for i in others if now.get(i) == before.get(i) != _ENDED]
            if not silent:
                break
        return silent

    def _counters(self) -> dict[int, str] | None:
        """Counters by process; None if the coordinator does not give them."""
        found: list[dict[int, str]] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                entries = self._client.key_value_dir_get(_PREFIX)
                found.append({int(key.rpartition("/")[2]): value for key, value in entries})

        # The call knows no timeout; a coordinator that is stopped or cut off never answers.
        thread = threading.Thread(target=ask, name="ask the coordinator", daemon=True)
        thread.start()
        thread.join(timeout=3 * self._interval)
        return found[0] if found else None

    def _coordinator_answers(self) -> bool:
        host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
                return True
        except (OSError, ValueError):
            return False


_abort_handlers: list[Any] = []
"""Kept, for C calls them until the process ends."""


def explain_aborts(explain: Callable[[], str | None]) -> None:
    """Turn the abort() with which jax's client ends a process into one line and status 1.

    The client calls it in a thread of its own, for a coordinator that is gone and for processes that never come, with
    no way to be asked first. Where `explain` gives None the abort has another reason and goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def on_abort(number: int) -> None:
        reason = explain()
        if reason is not None:
            end_process(reason)
        libc.signal(number, None)

    libc = ctypes.CDLL(None)
    _abort_handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort))
    libc.signal(signal.SIGABRT, _abort_handlers[-1])


def join(coordinator: str | None, processes: int | None, number: int | None, hang_timeout: float | None) -> None:
    """`jax.distributed.initialize`, with the timeouts that fit `train.hang_timeout`.

    Ends the process with one line and status 1 if the others do not come.

    Raises:
      ValueError, RuntimeError: as jax does, for arguments that make no cluster.
    """
    patience = int(min(hang_timeout or _JOIN_SECONDS, _JOIN_SECONDS))
    where = coordinator or "the coordinator"
    wanted = "all processes" if processes is None else f"all {processes} processes"
    explain_aborts(lambda: f"--distributed: not {wanted} came to {where} within {patience} s")
    jax.distributed.initialize(
        coordinator,
        processes,
        number,
        initialization_timeout=patience,
        # Later than `Peers`, which says who is missing.
        heartbeat_timeout_seconds=max(100, int(2 * (hang_timeout or 0))),
    )
    explain_aborts(lambda: None)


def _lost(missing: list[int]) -> str:
    named = ", ".join(map(str, missing))
    what = "process" if len(missing) == 1 else "processes"
    coordinator = " (the coordinator)" if missing == [0] else ""
    return f"{what} {named}{coordinator} of {jax.process_count()} stopped answering; start the run again to go on"


_OF_COLLECTIVES = re.compile(r"Gloo|NCCL|\bcollective|\bpeer\b|coordination service", re.IGNORECASE)


def _looks_like_a_lost_peer(error: BaseException | None) -> bool:
    """Whether an error may come from a collective without its partners, rather than from this process's own doing.

    Saving has collectives too: what went wrong there is a `StorageError` whatever the cause, and what jax raises for a
    collective may be a plain `ValueError`.
    """
    if not isinstance(error, StorageError):
        return not isinstance(error, (UserError, KeyboardInterrupt, SystemExit))
    causes: list[BaseException] = []
    cause = error.__cause__
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(isinstance(cause, jax.errors.JaxRuntimeError) or _OF_COLLECTIVES.search(str(cause)) for cause in causes)
