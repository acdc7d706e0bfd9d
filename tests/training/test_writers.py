import io
import json
import sys

import numpy as np
import pytest

from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.training.writers import JsonlWriter, ProgressWriter, TensorBoardWriter


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


def test_tensorboard_gets_mean_and_layers(tmp_path, monkeypatch):
    written = {}
    writer = TensorBoardWriter(tmp_path)
    monkeypatch.setattr(writer._writer, "add_scalar", lambda name, value, step: written.update({name: (value, step)}))
    writer.write(7, {"loss": 2.0, "ffn_density": np.array([0.5, np.nan, 1.0])})
    writer.write(7, {"loss": 3.0}, split="validation")
    writer.close()
    assert written == {
        "train/loss": (2.0, 7),
        "train/ffn_density": (0.75, 7),
        "train_layers/ffn_density/000": (0.5, 7),
        "train_layers/ffn_density/002": (1.0, 7),
        "validation/loss": (3.0, 7),
    }
    assert list(tmp_path.glob("events*"))


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
