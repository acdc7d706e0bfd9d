"""Trackers' writers, on modules that stand for the trackers' own."""

import sys
import types

import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.trackers import TrackerWriter
from sparsezoo_jax.training.usual_writers import check_writers
from sparsezoo_jax.training.writers import Histogram, Writers


class Tracker(types.ModuleType):
    """The functions of wandb and trackio that are called, with what they were given."""

    def __init__(self, name):
        super().__init__(name)
        self.opened, self.rows, self.axes, self.ended = [], [], [], 0
        self.fails = False
        self.Histogram = lambda np_histogram: ("histogram", np_histogram)

    def init(self, **options):
        if self.fails:
            raise OSError("no network")
        self.opened.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values, step=None):
        self.rows.append(values if step is None else {"step": step, **values})

    def finish(self):
        self.ended += 1


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    module = Tracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return module


def write(tracker, workdir):
    own = TrackerWriter(tracker.__name__, workdir, hyperparameters={"train.steps": 9, "mesh.shape": (1, 2)})
    writer = Writers([own])
    writer.write(5, {"loss": 2.0, "lr": float("nan"), "ffn_density": np.array([0.5, np.nan, 1.0])})
    writer.write(5, {"loss": 3.0}, split="validation")
    writer.write_histograms(5, {"parameters/w": Histogram.of([0.0, 1.0, np.inf], bins=2)})
    writer.close()


def test_rows_reach_the_tracker(tracker, tmp_path):
    write(tracker, tmp_path)
    (options,) = tracker.opened
    assert (options["project"], options["name"], options["resume"]) == ("sparsezoo", tmp_path.name, "allow")
    assert options["config"] == {"train.steps": 9, "mesh.shape": "(1, 2)"}
    assert tracker.rows[:2] == [
        {
            "step": 5,
            "train/loss": 2.0,
            "train/ffn_density": 0.75,
            "train_layers/ffn_density/000": 0.5,
            "train_layers/ffn_density/002": 1.0,
        },
        {"step": 5, "validation/loss": 3.0},
    ]
    assert tracker.ended == 1
    if tracker.__name__ == "trackio":
        assert len(tracker.rows) == 2
        return
    assert tracker.axes == [("*", "step")]
    (counts, edges) = tracker.rows[2]["parameters/w"][1]
    assert (counts.tolist(), edges.tolist()) == ([1, 1], [0.0, 0.5, 1.0])
    assert options["dir"] == str(tmp_path)
    write(tracker, tmp_path)
    assert tracker.opened[1]["id"] == options["id"], "a run that goes on is the same run there"


def test_a_tracker_out_of_reach_costs_its_rows_alone(tracker, tmp_path, capsys, monkeypatch):
    tracker.fails = True
    own = TrackerWriter(tracker.__name__, tmp_path, hyperparameters={})
    writer = Writers([own])
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
    writer.flush()
    tracker.fails, own.RETRY = False, 0.0
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in tracker.rows] == [3]
    error = capsys.readouterr().err
    assert f"warning: {tracker.__name__}: writing failed (no network); the run goes on" in error
    assert f"{tracker.__name__}: 2 rows were not written" in error


def test_a_library_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_writers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"train\.writers=wandb: needs the extra .*sparsezoo-jax\[wandb\]"):
        check_writers(["tensorboard", "wandb"])
