import errno
import io
import json
import os
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.training.tensorboard import TensorBoardWriter
from sparsezoo_jax.training.writers import Histogram, JsonlWriter, MetricWriter, ProgressWriter, Writers


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_rows_are_on_disk_at_once_and_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 2.5, "ffn_density": np.array([0.25, np.nan], np.float32)})
    writer.write(1, {"loss": float("nan")}, split="validation")
    assert rows(path) == [
        {"step": 1, "loss": 2.5, "ffn_density": [0.25, None]},
        {"step": 1, "split": "validation", "loss": None},
    ]
    assert "NaN" not in path.read_text()
    writer.close()


def test_jsonl_resume_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.write(4, {"loss": 0.0}, split="validation")
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    writer = JsonlWriter(path, resume_step=3)
    writer.write(4, {"loss": 40.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_fresh_run_does_not_keep_old_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "loss": 1.0}\n')
    JsonlWriter(path).close()
    assert path.read_text() == ""


def test_an_unwritable_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="metrics"):
        JsonlWriter(tmp_path / "absent" / "metrics.jsonl")


def events(directory):
    """Events of all files of a directory, in order."""
    found = []
    for path in sorted(directory.glob("events*"), key=lambda path: path.name.rpartition(".")[2]):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def test_tensorboard_gets_mean_and_layers(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(7, {"loss": 2.0, "ffn_density": np.array([0.5, np.nan, 1.0])})
    writer.write(7, {"loss": 3.0}, split="validation")
    writer.close()
    found = events(tmp_path)
    written = {value.tag: (value.simple_value, event.step) for event in found for value in event.summary.value}

    assert written == {
        "train/loss": (2.0, 7),
        "train/ffn_density": (0.75, 7),
        "train_layers/ffn_density/000": (0.5, 7),
        "train_layers/ffn_density/002": (1.0, 7),
        "validation/loss": (3.0, 7),
    }


def test_tensorboard_gets_hyperparameters_histograms_and_text(tmp_path):
    table = {"train.steps": 9, "data.dataset": "sotu", "mesh": (1, 2), "none": None}
    writer = TensorBoardWriter(tmp_path, hyperparameters=table)
    writer.write_histograms(7, {"parameters/w": Histogram.of([0.0, 1.0, 1.0, np.nan], bins=2)})
    writer.add_text(8, "sample", "one *line*\nanother")
    writer.close()
    TensorBoardWriter(tmp_path / "resumed", resume_step=7, hyperparameters=table).write(8, {})
    assert not any(value.metadata.plugin_data.plugin_name for event in events(tmp_path / "resumed")
                   for value in event.summary.value)  # fmt: skip
    values = {value.tag: (event.step, value) for event in events(tmp_path) for value in event.summary.value}
    content = values["_hparams_/session_start_info"][1].metadata.plugin_data.content
    assert b"train.steps" in content
    assert b"(1, 2)" in content
    assert b"validation/loss" in values["_hparams_/experiment"][1].metadata.plugin_data.content
    step, value = values["parameters/w"]
    shown = value.histo
    assert (step, shown.num, shown.sum, shown.sum_squares, shown.min, shown.max) == (7, 3, 2, 2, 0, 1)
    assert (list(shown.bucket), list(shown.bucket_limit)) == ([1, 2], [0.5, 1.0])
    step, value = values["sample/text_summary"]
    assert (step, value.tensor.string_val) == (8, [b"    one *line*\n    another"])


def test_progress_prints_lines_without_a_terminal():
    stream = io.StringIO()
    writer = ProgressWriter(100, stream=stream)
    row = {"loss": 1.25, "tokens": 2469, "tokens_per_second": 12345.0, "ffn_density": np.array([0.1, 0.3])}
    writer.write(50, row)
    writer.write(50, {"loss": 1.5}, split="validation")
    writer.write(60, {})
    writer.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 50/100  loss 1.2500  12,345 tokens/s  FFN density 20.0%")
    assert lines[0].endswith("  10 s left"), "50 steps of a fifth of a second"
    assert lines[1] == "step 50/100  validation loss 1.5000"
    assert "\x1b" not in stream.getvalue()


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    writer = ProgressWriter(100, start=20, stream=stream)
    writer.write(50, {"loss": 1.25, "ffn_density": np.array([0.1])})
    writer.close()
    assert "50/100" in stream.getvalue()
    assert "loss 1.2500" in stream.getvalue()
    assert "FFN density 10.0%" in stream.getvalue()
    assert sys.stderr is not stream


def test_rows_that_came_with_a_checkpoint_are_added_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = '{"step": %d, "loss": 1.0}\n'
    path.write_text(line % 1 + line % 2 + (line % 3)[:9])  # the third was under way
    JsonlWriter(path, resume_step=4, unlogged=[line % step for step in (2, 3, 4)]).close()
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4]


class FullDisk:
    """os.write that fails once `room` bytes are written, until there is room again."""

    def __init__(self, monkeypatch, room):
        self.room, self._write = room, os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor, data):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written


def test_rows_that_do_not_fit_are_written_in_order_once_they_do(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    disk = FullDisk(monkeypatch, room=70)  # two rows and a part of the third
    writer = Writers([JsonlWriter(path)])
    for step in range(1, 8):
        writer.write(step, {"loss": float(step)})
    writer.flush()
    assert path.stat().st_size == 70
    disk.room = 10_000
    writer.flush()
    assert [row["step"] for row in rows(path)] == list(range(1, 8))
    writer.write(8, {"loss": 8.0})
    writer.close()
    assert [row["step"] for row in rows(path)] == list(range(1, 9))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1, "once for one full disk"
    assert "JsonlWriter: writing failed (No space left on device); the run goes on" in warnings[0]


def test_rows_beyond_what_memory_may_hold_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(JsonlWriter, "HELD_BYTES", 80)
    path = tmp_path / "metrics.jsonl"
    disk = FullDisk(monkeypatch, room=0)
    writer = Writers([JsonlWriter(path)])
    for step in range(1, 11):
        writer.write(step, {"loss": 1.0})
    writer.flush()
    disk.room = 10_000
    writer.close()
    kept = [row["step"] for row in rows(path)]
    assert kept == [1, 8, 9, 10], "the row under way, and the newest that fit"
    assert "JsonlWriter: 6 rows were not written" in capsys.readouterr().err


def test_a_writer_that_hangs_holds_up_nobody(capsys):
    hangs, entered = threading.Event(), threading.Event()

    class Stuck(MetricWriter):
        def write(self, step, metrics, split=None):
            entered.set()
            hangs.wait()

        def close(self):
            pass

    class Good(Stuck):
        rows: ClassVar[list] = []

        def write(self, step, metrics, split=None):
            self.rows.append(step)

    writer = Writers([Stuck(), Good()])
    writer.write(0, {})
    entered.wait()
    for step in range(1, Writers.QUEUE + 4):
        writer.write(step, {})
        while len(Good.rows) < step:
            time.sleep(0.0001)
    started = time.monotonic()
    writer.flush(timeout=0.05)
    writer.close(timeout=0.05)
    assert time.monotonic() - started < 5
    assert Good.rows == list(range(Writers.QUEUE + 4))
    error = capsys.readouterr().err
    assert error.count("Stuck: hangs; rows are dropped until it goes on") == 1
    assert "rows or more were not written" in error
    hangs.set()


def test_tensorboard_goes_on_in_a_new_file_after_a_failure(tmp_path, monkeypatch, capsys):
    tensorboard = TensorBoardWriter(tmp_path)
    writer = Writers([tensorboard])
    writer.write(1, {"loss": 1.0})
    writer.flush()

    def full(event):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard._events, "write_event", full)
    writer.write(2, {"loss": 2.0})
    for step in range(3, 30):  # more than the queue of tensorboardX's own thread holds
        writer.write(step, {"loss": float(step)})
    writer.close()
    assert len(list(tmp_path.glob("events*"))) == 2
    assert [event.step for event in events(tmp_path) if event.summary.value] == [1, *range(3, 30)]
    assert capsys.readouterr().err.count("warning: TensorBoardWriter: writing failed (No space left on device)") == 1


BAD_LINES = [
    b"\xff\xfe{", b"\0\0\0", b"[]", b"7", b'{"loss": 1}', b'{"step": "3"}', b'{"step": 1.5}', b'{"step": -1}',
    b'{"step": true}', b'{"step": 2, "split": 3}', b"[" * 100_000, b'{"step": 9' + b"0" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_damaged_lines_never_block_resuming(tmp_path, bad, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + bad + b'\n{"step": 2, "loss": 2.0}\n')
    JsonlWriter(path, resume_step=5).close()
    assert [row["step"] for row in rows(path)] == [1, 2]
    assert "1 lines are no metrics" in capsys.readouterr().err


def test_rows_are_taken_back_for_steps_that_will_be_made_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = Writers([JsonlWriter(path), TensorBoardWriter(tmp_path)])
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    writer.rewind(1)
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(1, 1.0), (2, 2.0)]
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [2]
