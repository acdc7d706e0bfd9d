"""One thread that answers requests one after another, and the bounded queue before it."""

from __future__ import annotations

import dataclasses
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.inference import Sampling
from sparsezoo_jax.serving.protocol import RequestError
from sparsezoo_jax.text_model import TextModel


@dataclasses.dataclass(frozen=True)
class Ended:
    """How an answer ended."""

    reason: str
    """'stop': by the model or a stop sequence; 'length': by the number of tokens, or by the time limit."""
    tokens: int
    """That were generated."""


Event = str | Ended | RequestError
"""A piece of text, or the last thing that is said of a job."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request under way."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: Sequence[str]
    deadline: float
    """`time.monotonic()` at which it ends, however far it is."""
    tell: Callable[[Event], None]
    """Called from the worker's thread."""
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)


class StopFilter:
    """Text up to the first of some stop sequences; what may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = tuple(stop), ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain now."""
        text = self._held + text
        ends = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        longest = max(map(len, self._stop), default=1) - 1
        starts = range(max(len(text) - longest, 0), len(text))
        at = next((i for i in starts if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held = text[at:]
        return text[:at]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


class Worker:
    """Answers jobs in the order they came; at most `waiting` of them wait."""

    def __init__(self, model: TextModel, *, waiting: int):
        self._model = model
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(waiting + 1)  # the one under way, too
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="serve", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Take a job, unless as many wait as may."""
        if self._ends.is_set() or not self._free.acquire(blocking=False):
            return False
        self._queue.put(job)
        return True

    def stop(self, timeout: float = 10.0) -> None:
        """Give up what is under way and waits; returns when the thread has ended, or after `timeout` seconds."""
        self._ends.set()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._ends.is_set():
            job = self._queue.get()
            if job is not None:
                self._answer(job)
                self._free.release()

    def _answer(self, job: Job) -> None:
        if job.cancelled.is_set():
            return
        try:
            job.tell(self._generate(job))
        except RequestError as error:
            job.tell(error)
        except UserError as error:  # logits that are not finite
            job.tell(RequestError(500, str(error).replace(str(self._model.directory), "the model")))
        except Exception:
            traceback.print_exc(file=sys.stderr)
            job.tell(RequestError(500, "internal error"))

    def _generate(self, job: Job) -> Ended:
        if time.monotonic() > job.deadline:
            raise RequestError(503, "the time limit passed while the request waited", code="timeout")
        generation = self._model.generate(
            [job.prompt], max_new_tokens=job.max_tokens, sampling=job.sampling, seed=job.seed
        )
        decoder, stops = self._model.tokenizer.stream_decoder(job.prompt), StopFilter(job.stop)
        for (new,) in generation:
            if piece := stops.push("".join(map(decoder.push, new))):
                job.tell(piece)
            tokens = len(generation.rows[0])
            if stops.found:
                return Ended("stop", tokens)
            if job.cancelled.is_set() or self._ends.is_set() or time.monotonic() > job.deadline:
                return Ended("length", tokens)
        tokens = len(generation.rows[0])
        piece = stops.push(decoder.flush())
        if piece := piece + stops.flush():
            job.tell(piece)
        return Ended("length" if tokens == job.max_tokens and not stops.found else "stop", tokens)
