"""Other programs' work, in processes of their own that compute when they are asked and wait otherwise."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self


class Worker:
    """A script under any Python that has what it imports; it imports nothing of this project.

    The script lies in this folder unless its path is absolute. Its first line of input says what is measured. Each
    further line asks for one run, which it answers with its processor time in seconds; `cpu` is the sum of these.
    """

    def __init__(self, python: str, script: str, first: str):
        command = [python, str(Path(__file__).parent / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.cpu = 0.0
        self._send(first)

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")

    def answer(self) -> str:
        """The next line that it prints.

        Raises:
          RuntimeError: it has ended.
        """
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return line.strip()

    def __call__(self, ask: str = "run") -> None:
        """One run."""
        self._send(ask)
        self.cpu += float(self.answer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
