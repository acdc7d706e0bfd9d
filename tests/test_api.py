"""The package from Python."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import sparsezoo_jax
from sparsezoo_jax import train
from sparsezoo_jax.errors import ConfigError, UserError
from tests.test_docs import values_of

SMALL = {
    "model.vocab_size": 320,
    "model.d_model": 32,
    "model.layers": 2,
    "model.max_seq_len": 64,
    "model.attention.heads": 2,
    "model.attention.kv_heads": 1,
    "model.attention.head_dim": 16,
    "model.attention.window": 16,
    "model.ffn.d_ff": 64,
    "data.bpe_vocab_size": 320,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "data.validation_fraction": 0.2,
    "train.steps": 3,
    "train.log_every": 1,
    "train.optimizer.kind": "muon",
    "eval.batches": 1,
    "eval.histograms": True,
    "eval.report": False,
}


class Rows(sparsezoo_jax.MetricWriter):
    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, step, metrics, split=None):
        self.rows.append((step, split))
        raise RuntimeError("a fault of the writer's own")

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def writer():
    return Rows()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_corpus, writer):
    config = sparsezoo_jax.preset("dense", "tiny", {**SMALL, "data.dataset": str(small_corpus)})
    run = sparsezoo_jax.Run(tmp_path_factory.mktemp("runs") / "own")
    return run, run.train(config, writers=[writer])


@pytest.mark.slow
def test_training_returns_its_figures(trained, writer):
    run, result = trained
    assert result.finished
    assert result.workdir == run.workdir
    assert result.figures["step"] == 3
    assert 0 < result.figures["loss"] < 10
    assert result.figures["seconds"] < 300, "since the call, not since the import"
    assert writer.rows == [(1, None), (2, None), (3, None), (3, "validation")]
    assert writer.closed


@pytest.mark.slow
def test_the_python_of_the_documentation(trained, small_corpus, tmp_path, monkeypatch, capsys):
    """docs/python.md from top to bottom, then README.md, with small models; the first run is there and goes on."""
    run, result = trained
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.workdir, "runs/mine")
    small = repr({**SMALL, "data.dataset": str(small_corpus)})
    changes = {
        '"spark", "tiny", {"train.steps": 100, "data.batch_size": 4}': f'"dense", "tiny", {small}',
        # A run as the first one was, whose programs are compiled.
        "(0.004, 0.008, 0.016)": "(0.008,)",
        "(0, 1, 2)": "(0,)",
        '"spark", "tiny", changes': f'"dense", "tiny", {{**{small}, **changes}}',
    }
    found = values_of("docs/python.md", changes)
    assert found["result"].figures["loss"] == pytest.approx(result.figures["loss"], rel=1e-5)
    assert found["best"] == (0.008, 0)
    assert "Slow" in found
    assert (tmp_path / "runs/sweep/lr0.008-seed0/evaluation.json").exists()

    changes = {'"spark", "tiny", {"train.steps": 100}': f'"dense", "tiny", {small}', "runs/spark-tiny": "runs/mine"}
    x = np.random.default_rng(0).standard_normal((2, 13_824), np.float32)
    found = values_of("README.md", changes, tokens_BT=jnp.ones((1, 4), jnp.int32), x=x)
    assert found["out"].logits.shape == (1, 4, 320)
    assert 1000 < np.count_nonzero(found["y"]) / 2 < 1212


@pytest.mark.slow
def test_tensorboard_has_what_a_run_is_and_says(trained):
    run, _ = trained
    tags = set()
    for path in (run.workdir / "tensorboard").glob("events*"):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            tags |= {value.tag for value in Event.FromString(content[12 : 12 + size]).summary.value}
            content = content[16 + size :]
    assert {"train/loss", "validation/loss", "_hparams_/session_start_info", "sample/text_summary"} <= tags
    assert any(tag.startswith("parameters/") for tag in tags)


@pytest.mark.slow
def test_a_run_evaluates_and_generates(trained):
    run, result = trained
    found = run.evaluate()
    assert found["loss"] == pytest.approx(result.figures["loss"], rel=1e-5)
    assert "meters" not in found
    text = run.generate("the state", max_new_tokens=4, temperature=0)
    assert isinstance(text, str)
    assert run.generate(["the state"], max_new_tokens=4, temperature=0) == [text]
    assert run.load().config.train.optimizer.kind == "muon"
    with pytest.raises(ConfigError, match=r"splits=train: no such option; there are .*split"):
        run.evaluate(splits="train")
    with pytest.raises(ConfigError, match="must be given with --limit"):
        run.evaluate(limit=3)
    with pytest.raises(ConfigError, match="chat=True"):
        run.generate("the state", system="Be brief.")


@pytest.mark.slow
def test_metrics_are_rows_or_a_frame(trained, monkeypatch):
    run, _ = trained
    rows = sparsezoo_jax.metrics(run.workdir, frame=False)
    assert [(row["step"], row.get("split")) for row in rows] == [(1, None), (2, None), (3, None), (3, "validation")]
    assert run.metrics(frame=False) == rows
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    assert run.metrics() == rows
    with pytest.raises(ConfigError, match="needs pandas"):
        run.metrics(frame=True)
    with pytest.raises(UserError, match="no run here"):
        sparsezoo_jax.metrics(run.workdir / "absent")


@pytest.mark.slow
def test_a_frame_has_a_row_for_each(trained):
    pytest.importorskip("pandas")
    frame = trained[0].metrics()
    assert list(frame["step"]) == [1, 2, 3, 3]
    assert frame[frame["split"] == "validation"]["loss"].notna().all()


def test_changes_apply_together():
    config = sparsezoo_jax.preset("spark", "tiny", {"model.max_seq_len": 64, "data.seq_len": 32})
    assert (config.model.max_seq_len, config.data.seq_len) == (64, 32)
    groups = [{"pattern": "embedding", "lr_multiplier": 0.5}]
    config = sparsezoo_jax.preset("spark", changes={"train.groups": groups, "train.optimizer.kind": "muon"})
    assert config.train.groups[0].lr_multiplier == 0.5
    assert config.train.optimizer.kind == "muon"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.stepz": 3}, r"train\.stepz=3: no such field \(did you mean train\.steps\?\)"),
        ({"train.steps.x": 3}, r"train\.steps\.x=3: no such field"),
        ({"train.steps": "many"}, "train.steps: .* integer"),
        ({"data.seq_len": 10**6}, "data.seq_len=1000000: must be at most model.max_seq_len"),
        ({"train.optimizer.kind": "sgd"}, "train.optimizer.kind=sgd: must be one of adamw"),
        ({"train.writers": ["tensorboardd"]}, "train.writers"),
    ],
)
def test_impossible_changes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        sparsezoo_jax.preset("spark", "tiny", changes)


def test_writers_are_looked_at_before_anything_is_written(tmp_path):
    class Close:
        def close(self): ...

    run = sparsezoo_jax.Run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"subclass of sparsezoo_jax\.MetricWriter"):
        run.train(sparsezoo_jax.preset("dense"), writers=[Close()])  # pyright: ignore[reportArgumentType]
    assert not run.workdir.exists()


def test_commands_keep_their_modules():
    assert callable(train.main)
    assert set(sparsezoo_jax.__all__) <= set(dir(sparsezoo_jax))
    for name in sparsezoo_jax.__all__:
        assert getattr(sparsezoo_jax, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        sparsezoo_jax.trian  # noqa: B018


def test_the_import_loads_no_library():
    code = "import sys, sparsezoo_jax; print([m for m in ('jax', 'numpy', 'pydantic', 'orbax') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_command_starts_without_what_only_kernels_need_and_leaves_the_collector_as_it_was():
    code = """
import gc, sys
usual = gc.get_threshold()
from sparsezoo_jax import cli, train
assert gc.get_threshold() == usual and not gc.get_freeze_count()
print([m for m in ("jax.experimental.pallas.tpu", "orbax", "tensorflow_datasets") if m in sys.modules])
try:
    cli.run(train.main, ["--help"])
finally:
    assert gc.get_threshold() == usual and gc.get_freeze_count() > 100_000
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[]\nusage: "), done.stdout[:200]
