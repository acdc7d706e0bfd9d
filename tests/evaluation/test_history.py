"""Reading metrics.jsonl."""

import json

import pytest

from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.evaluation import read_history


def test_rows(tmp_path):
    rows = [
        {"step": 10, "loss": 7.5, "ffn_density": [0.1, None], "attended_keys": [3.0, 4.0]},
        {"step": 20, "split": "validation", "loss": 7.25, "ffn_density": [0.2, 0.3]},
        {"step": 20, "loss": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = read_history(tmp_path)
    assert (history.train.steps, history.train.loss) == ([10, 20], [7.5, None])
    assert history.train.layers == {"ffn_density": [[0.1, None], []], "attended_keys": [[3.0, 4.0], []]}
    assert (history.evaluation.steps, history.evaluation.loss) == ([20], [7.25])
    assert history.evaluation.layers["ffn_density"] == [[0.2, 0.3]]
    assert history.unreadable == 0


def test_broken_lines(tmp_path):
    lines = ['{"step": 1, "loss": 2.0}', "", '{"loss": 3}', "[1]", '{"step": "2"}', "\ufffd\u2603", '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n")
    history = read_history(tmp_path)
    assert history.train.steps == [1]
    assert history.unreadable == 5


def test_no_file(tmp_path):
    history = read_history(tmp_path)
    assert (history.train.steps, history.evaluation.steps, history.unreadable) == ([], [], 0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        read_history(tmp_path)
