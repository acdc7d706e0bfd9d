"""What a signal does to a run: it stops after the step, saves, aborts, or asks for a checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsezoo_jax.training.parameters import saved_steps

from .test_loop import run
from .toy import ToyData


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number, capsys):
    class Signalling(ToyData):
        def __next__(self):
            if self.n == 3:
                os.kill(os.getpid(), number)
            return super().__next__()

    before = signal.getsignal(number)
    result = run(tmp_path, data=Signalling(), steps=50)
    assert signal.getsignal(number) is before
    assert (result.step, result.finished) == (4, False)
    assert saved_steps(tmp_path / "checkpoints") == [4]
    message = capsys.readouterr().err
    assert f"stopped on {number.name} after step 4; run the same command on {tmp_path} to go on" in message
    assert run(tmp_path, steps=6).resumed_from == 4


def test_a_second_signal_aborts(tmp_path):
    class Impatient(ToyData):
        def __next__(self):
            if self.n == 3:
                # raise_signal runs the handler before it returns; two kills in a row could arrive as one signal.
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().__next__()

    # Processes that a shell starts in the background ignore this signal.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, data=Impatient(), steps=50)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.slow
def test_a_second_signal_ends_the_command_at_once_without_a_traceback(tmp_path):
    code = f"""
import signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from sparsezoo_jax import cli
from training.test_loop import run
from training.toy import ToyData
class Impatient(ToyData):
    def __next__(self):
        if self.n == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return super().__next__()
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run(lambda args: run({str(tmp_path)!r}, data=Impatient(), steps=50, checkpoint_every=1, writers=[]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr
    assert run(tmp_path, steps=6).step == 6


def test_a_signal_in_an_evaluation_saves_at_once(tmp_path, capsys):
    batches = []

    def evaluate(model, between):
        for batch in range(100):
            between()
            batches.append(batch)
            if batch == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    result = run(tmp_path, evaluate=evaluate, steps=3)
    assert (result.step, result.finished, batches) == (3, False, [0, 1, 2])
    assert saved_steps(tmp_path / "checkpoints") == [3]
    assert "stopped on SIGTERM after step 3; run the same command" in capsys.readouterr().err


def test_sigusr1_asks_for_a_checkpoint(tmp_path):
    class Asking(ToyData):
        def __next__(self):
            if self.n == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().__next__()

    assert run(tmp_path, data=Asking(), writers=[]).finished
    assert saved_steps(tmp_path / "checkpoints") == [3, 6]
