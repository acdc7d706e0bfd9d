"""Two processes, two devices each, train together; the run then goes on in one process on another mesh.

They stream a mixture of files, of a data set of Hugging Face's library, and of games, so that each of them knows the
position of its own rows alone, in every corpus.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.devices import with_devices

pytestmark = pytest.mark.slow

FLAGS = {
    "data.mode": "streaming", "data.packing": "stream",
    "data.seq-len": 32, "data.batch-size": 8, "data.bpe-vocab-size": 300, "model.vocab-size": 320, "model.layers": 2,
    "model.d-model": 32, "model.ffn.d-ff": 64, "model.ffn.r": 16, "model.ffn.top-k": 8, "train.steps": 6,
    "train.log-every": 1, "train.eval-every": 3, "train.checkpoint-every": 3, "eval.batches": 2,
    "train.schedule.learning-rate": 1e-3,
}  # fmt: skip


def start(mixture, workdir, devices, *more, **flags):
    command = [sys.executable, "-m", "sparsezoo_jax.train", "--arch", "spark", "--workdir", str(workdir)]
    command += ["--data.mixture", json.dumps(mixture), *more]
    command += [str(text) for name, value in {**FLAGS, **flags}.items() for text in (f"--{name}", value)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(devices)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "".join(err for _, err in results)
    return results


def rows_of(workdir, split=None, name="loss"):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if row.get("split") == split}


@pytest.fixture(scope="module")
def mixture(small_corpus, tmp_path_factory):
    """Corpora by weight: files, Parquet as the hub has it, games."""
    hub = tmp_path_factory.mktemp("hub") / "laws"
    (hub / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 8)):
        rows = pyarrow.table({"text": [f"{split} {n}: a law of {n % 7} articles, and peace" for n in range(count)]})
        pyarrow.parquet.write_table(rows, hub / "data" / f"{split}-00000-of-00001.parquet")
    games = Path(__file__).parents[1] / "data" / "games.pgn"
    named = {"texts": (small_corpus, 2), "laws": (f"hf://{hub}", 1), "games": (games, 1)}
    return [{"dataset": str(dataset), "weight": weight, "name": name} for name, (dataset, weight) in named.items()]


@pytest.fixture(scope="module")
def runs(mixture, tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id"]
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(root / "hub"))
        pair = [start(mixture, root / "two", 2, *together, str(i), **mesh, **{"train.stop-at": 3}) for i in (0, 1)]
        first, second = finish(*pair)
        finish(start(mixture, root / "two", 4, **{"mesh.data": 2, "mesh.tensor": 2}))
        finish(start(mixture, root / "one", 1))
    return root, first, second


def test_losses_are_those_of_one_process(runs):
    root, _, _ = runs
    one, two = rows_of(root / "one"), rows_of(root / "two")
    assert sorted(two) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=2e-4)
    for name in ("loss", "texts/loss", "laws/loss", "games/loss"):
        one, two = (rows_of(root / run, "validation", name) for run in ("one", "two"))
        np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=2e-4)


def test_shares_are_counted_over_all_processes(runs):
    root, _, _ = runs
    for name, share in (("texts", 0.5), ("laws", 0.25), ("games", 0.25)):
        one, two = (rows_of(root / run, name=f"shares/{name}") for run in ("one", "two"))
        assert list(two.values()) == pytest.approx(list(one.values()))
        # A sequence or two of 48 more or fewer, and targets that ends of documents leave out.
        assert np.mean(list(two.values())) == pytest.approx(share, abs=0.05)


def test_only_the_first_process_reports(runs):
    _, (_, first), (_, second) = runs
    assert "training from step 0" in first
    assert "training from step" not in second


def test_flags_of_processes_go_together(mixture, tmp_path):
    process = start(mixture, tmp_path / "run", 1, "--distributed", "--coordinator", "127.0.0.1:1")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "--processes and --process-id must be given too" in error
    assert not (tmp_path / "run").exists()
