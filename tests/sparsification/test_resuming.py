"""Calibrations that are cut off go on where they were, and make what an undisturbed one makes, bit for bit."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import run_dir, sparsify
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.sparsification import making
from sparsezoo_jax.sparsification import progress as kept
from sparsezoo_jax.sparsification.config import (
    AllocationConfig,
    CalibrationConfig,
    NeuronConfig,
    RSparseConfig,
)
from sparsezoo_jax.sparsification.progress import Progress, Stage
from sparsezoo_jax.training.state import flatten

#: By name, flags of the command, and passes through the two layers.
PLANS = {
    "teal": ({"allocation": AllocationConfig(kind="greedy", step=0.5, sequences=4)}, 2),
    "rsparse": ({"rsparse": RSparseConfig(population=4, generations=1, sequences=4)}, 1),
    "gblm": ({}, 1),
    "cfsp": ({"neurons": NeuronConfig(widths="by-layer")}, 2),
}


class KilledError(Exception):
    """What stands in for the end of the process."""


class Sequences(list):
    """Batches as `making.Text` gives them."""

    def first(self, sequences):
        return self[:1]

    def tokens(self):
        return sum(int((batch["segment_ids"] > 0).sum()) for batch in self)


def arrays_of(model):
    return {path: np.asarray(x) for path, x in flatten(nnx.state(model)).items()}


def assert_same(model, other):
    """All arrays of two models are equal bit for bit."""
    own, others = arrays_of(model), arrays_of(other)
    assert own.keys() == others.keys()
    for path, value in own.items():
        assert value.tobytes() == others[path].tobytes(), path


def dying(monkeypatch, owner, name, after):
    """Let a function raise in place of its call number `after`; returns the list of its calls."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == after:
            raise KilledError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("method", PLANS)
def test_finished_layers_are_not_computed_again(monkeypatch, tmp_path, dense, batches, method):
    fields, passes = PLANS[method]
    command = sparsify.Sparsify(directory=Path("run"), out=Path("out"), method=method, **fields)
    plan, text = sparsify.planned(command), Sequences(batches)
    expected = plan.make(dense, text)
    with monkeypatch.context() as patch:
        dying(patch, Stage, "keep", 2)
        with pytest.raises(KilledError):
            plan.make(dense, text, Progress(tmp_path))
    with monkeypatch.context() as patch:
        calls = dying(patch, Stage, "keep", None)
        made = plan.make(dense, text, Progress(tmp_path))
    assert len(calls) == 2 * passes - 1
    assert made.record == expected.record
    assert_same(made.model, expected.model)
    # All of it is there now, so that nothing is read of the model or the text.
    with monkeypatch.context() as patch:
        calls = dying(patch, Stage, "keep", None)
        assert_same(plan.make(dense, text, Progress(tmp_path)).model, expected.model)
    assert not calls


def test_wherever_it_is_cut_off_what_is_kept_is_whole(monkeypatch, tmp_path, dense, batches):
    """The end comes before each of the writes in turn, and each time in an empty directory."""
    plan = sparsify.planned(sparsify.Sparsify(directory=Path("run"), out=Path("out"), method="wanda"))
    expected, text = plan.make(dense, Sequences(batches)).model, Sequences(batches)
    writes = 2 + len(batches) + 2
    for n in range(1, writes + 1):
        with monkeypatch.context() as patch:
            dying(patch, kept, "write_atomic", n)
            with pytest.raises(KilledError):
                plan.make(dense, text, Progress(tmp_path / str(n)))
        assert_same(plan.make(dense, text, Progress(tmp_path / str(n))).model, expected)
    with monkeypatch.context() as patch:
        calls = dying(patch, kept, "write_atomic", None)
        plan.make(dense, text, Progress(tmp_path / "whole"))
    assert len(calls) == writes
    assert {path.name for path in (tmp_path / "whole" / "pruned").iterdir()} == {
        "layer-00000.npz",
        "layer-00001.npz",
        "next.json",
    }


def test_types_that_numpy_lacks_are_kept(tmp_path):
    value = np.arange(4, dtype=np.float32).astype("bfloat16")
    Progress(tmp_path).set_value("values", {"a/b": value, "c": np.array(0.1)})
    found = Progress(tmp_path).value("values")
    assert found is not None
    assert found["a/b"].dtype == value.dtype
    np.testing.assert_array_equal(found["a/b"], value)
    assert found["c"] == 0.1
    (tmp_path / "values.npz").write_bytes(b"PK")
    with pytest.raises(StorageError, match=r"values.npz: can't be read .* remove what is kept"):
        Progress(tmp_path).value("values")


@pytest.fixture
def teal(made):
    """The command of the run that is made once, with another place, and what it made."""
    folder, command, _ = made
    command = dataclasses.replace(
        command, sparsity=0.4, batches=100, calibration=CalibrationConfig(sequences=6), out=folder / "again"
    )
    yield command, folder / "teal"
    for path in (command.out, sparsify.partial_of(command.out)):
        kept.remove_tree(path)


def assert_equal_runs(directory, other):
    assert_same(run_dir.load(directory).model, run_dir.load(other).model)
    for name in ("sparsify.json", "calibration.npz", "config.json"):
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name


def test_the_same_command_goes_on_and_another_one_is_refused(monkeypatch, teal):
    command, expected = teal
    unfinished = sparsify.partial_of(command.out)
    with monkeypatch.context() as patch:
        dying(patch, Stage, "keep", 2)
        with pytest.raises(KilledError):
            sparsify.sparsify(command)
    assert not command.out.exists()
    stored = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    others = {"sparsity": 0.3, "method": "wina", "calibration": CalibrationConfig(sequences=5)}
    for name, value in others.items():
        with pytest.raises(UserError, match=rf"again.partial: holds an unfinished .* with another .*--{name}") as error:
            sparsify.sparsify(dataclasses.replace(command, **{name: value}))
        assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()} == stored
    # What is only measured may be another, and so may the place where corpora are kept.
    with monkeypatch.context() as patch:
        calls = dying(patch, Stage, "keep", None)
        sparsify.sparsify(command)
    assert len(calls) == 1
    assert_equal_runs(command.out, expected)
    assert not unfinished.exists()


def test_a_run_that_was_being_written_is_written_anew(monkeypatch, teal):
    command, expected = teal
    with monkeypatch.context() as patch:
        dying(patch, run_dir, "write_config", 1)
        with pytest.raises(KilledError):
            sparsify.sparsify(command)
    assert (command.out / "sparsify.json").is_file()
    sparsify.sparsify(command)
    assert_equal_runs(command.out, expected)
    # Cut off after that: the run is whole, and what was kept is removed.
    with monkeypatch.context() as patch:
        kept.remove_tree(command.out)
        dying(patch, Progress, "remove", 1)
        with pytest.raises(KilledError):
            sparsify.sparsify(command)
    assert sparsify.partial_of(command.out).is_dir()
    assert sparsify.sparsify(command)["method"] == "teal"
    assert not sparsify.partial_of(command.out).exists()
    with pytest.raises(UserError, match="again: is not empty"):
        sparsify.sparsify(command)


def test_nothing_is_left_of_what_fails_before_a_layer_is_finished(monkeypatch, teal):
    command, _ = teal
    with monkeypatch.context() as patch:
        dying(patch, making, "calibrate", 1)
        with pytest.raises(KilledError):
            sparsify.sparsify(command)
    assert not command.out.exists()
    assert not sparsify.partial_of(command.out).exists()


def test_files_of_others_are_not_overwritten(monkeypatch, teal):
    """OUT was filled while the calibration lay there unfinished."""
    command, _ = teal
    with monkeypatch.context() as patch:
        dying(patch, Stage, "keep", 1)
        with pytest.raises(KilledError):
            sparsify.sparsify(command)
    command.out.mkdir()
    (command.out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="again: is not empty"):
        sparsify.sparsify(command)
    assert [path.name for path in command.out.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(monkeypatch, teal):
    command, expected = teal
    code = """
import os, signal, sys
from sparsezoo_jax import sparsify
from sparsezoo_jax.sparsification.progress import Stage
keep = Stage.keep
def killed(stage, layer, found, streams):
    keep(stage, layer, found, streams)
    os.kill(os.getpid(), signal.SIGKILL)
Stage.keep = killed
sparsify.main(sys.argv[1:])
"""
    flags = ["--method", "teal", "--sparsity", "0.4", "--calibration.sequences", "6", "--batches", "100"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(command.directory), str(command.out), *flags],
        env=dict(os.environ),
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with monkeypatch.context() as patch:
        calls = dying(patch, Stage, "keep", None)
        sparsify.sparsify(command)
    assert len(calls) == 1
    assert_equal_runs(command.out, expected)
