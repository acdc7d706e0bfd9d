import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError, StorageError
from sparsezoo_jax.training.config import ParameterGroup, SpikeConfig
from sparsezoo_jax.training.guards import TrainingDiverged
from sparsezoo_jax.training.lease import Lease, RunInUseError
from sparsezoo_jax.training.loop import fit
from sparsezoo_jax.training.objectives import AdaptiveFactor, FixedObjective
from sparsezoo_jax.training.parameters import restore_params, saved_steps
from sparsezoo_jax.training.phases import Phases
from tests.devices import with_devices

from .test_step import assert_equal
from .toy import BATCH, LENGTH, ToyData, ToyModel, config


class Recorder:
    """A metric writer that remembers."""

    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, step, metrics, split=None):
        self.rows.append((step, split, dict(metrics)))

    def close(self):
        self.closed = True

    def losses(self):
        return {step: metrics["loss"] for step, split, metrics in self.rows if split is None}


def run(
    workdir,
    *,
    build=ToyModel,
    data=None,
    evaluate=None,
    writers=None,
    before_writing=None,
    place=None,
    phases=None,
    **changes,
):
    return fit(
        config(**changes),
        build=build,
        data=data or ToyData(),
        batch_shape=(BATCH, LENGTH),
        workdir=workdir,
        evaluate=evaluate,
        place=place,
        before_writing=before_writing,
        writers=writers,
        phases=phases,
    )


def rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def is_time(name):
    return name in ("tokens_per_second", "goodput") or name.startswith("seconds/")


class NoisyModel(ToyModel):
    """Draws from a random stream of its own in every call."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, tokens_BT, **arguments):
        out = super().__call__(tokens_BT, **arguments)
        return out._replace(logits=self.dropout(out.logits))


@pytest.mark.slow
@pytest.mark.parametrize("build", [ToyModel, NoisyModel])
def test_resuming_is_bitwise_exact(tmp_path, build, capsys):
    changes = {
        "build": build,
        "accumulation": 2,
        "objectives": (AdaptiveFactor(loss="activation", weight=0.1, start=2, interval=1),),
    }
    whole = run(tmp_path / "whole", **changes)
    first = run(tmp_path / "parts", stop_at=3, **changes)
    assert (first.step, first.finished) == (3, False)
    assert "stopped at train.stop_at after step 3" in capsys.readouterr().err
    second = run(tmp_path / "parts", **changes)
    assert (second.step, second.resumed_from, second.finished) == (6, 3, True)
    assert "resuming from step 3" in capsys.readouterr().err
    assert_equal(second.state, whole.state)
    timeless = [
        [{k: v for k, v in row.items() if not is_time(k)} for row in rows(tmp_path / part)]
        for part in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_left_alone(tmp_path):
    first = run(tmp_path, steps=2)
    again = run(tmp_path, steps=2)
    assert (again.step, again.finished, again.metrics) == (2, True, {})
    assert_equal(again.state, first.state)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_rows_after_the_checkpoint_are_made_again_once(tmp_path):
    run(tmp_path, stop_at=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9.0}\n')  # a run killed after step 5
    run(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path)[4]["loss"] != 9.0


def test_the_model_is_trained_and_the_checkpoint_is_the_model(tmp_path):
    writer = Recorder()
    result = run(tmp_path, steps=40, writers=[writer], log_every=4)
    assert list(writer.losses()) == list(range(4, 41, 4))
    assert writer.closed
    assert np.mean([writer.losses()[s] for s in (36, 40)]) < writer.losses()[4]
    params, model_state = restore_params(tmp_path / "checkpoints")
    assert_equal(params, result.state.params)
    np.testing.assert_array_equal(result.model.up[...], params["up"])
    np.testing.assert_array_equal(result.model.tokens_seen[...], model_state["tokens_seen"])
    assert result.metrics["loss"] == writer.losses()[40]
    assert result.tokens_per_second > 0
    assert 0 < result.time_to_first_step < result.seconds


def test_seeds_differ(tmp_path):
    one, other = (run(tmp_path / str(seed), steps=1, seed=seed, writers=[]) for seed in (0, 1))
    assert not np.array_equal(one.state.params["up"], other.state.params["up"])


def test_evaluates_when_due_and_keeps_the_best(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    seen = []

    def evaluate(model, between):
        seen.append(int(model.tokens_seen[...]))
        return {"loss": next(losses), "bits_per_byte": 1.5}

    result = run(tmp_path, evaluate=evaluate, eval_every=2, checkpoint_every=1, keep_last=1)
    assert len(seen) == 6, "keep_best evaluates at every checkpoint"
    assert seen == sorted(set(seen)), "each evaluation sees the newest model"
    assert saved_steps(tmp_path / "checkpoints") == [2, 6]
    validation = [row for row in rows(tmp_path) if row.get("split") == "validation"]
    assert [row["step"] for row in validation] == [1, 2, 3, 4, 5, 6]
    assert validation[1] == {"step": 2, "split": "validation", "loss": 1.0, "bits_per_byte": 1.5}
    assert result.evaluation == {"loss": 2.7, "bits_per_byte": 1.5}


def test_evaluates_seldom_without_keep_best(tmp_path):
    writer = Recorder()
    run(
        tmp_path,
        evaluate=lambda model, between: {"loss": 1.0},
        eval_every=4,
        checkpoint_every=1,
        keep_best=False,
        writers=[writer],
    )
    assert [step for step, split, _ in writer.rows if split] == [4, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": (FixedObjective(loss="balance", weight=1),)}, "auxiliary losses are: activation"),
        ({"groups": (ParameterGroup(pattern="experts"),)}, "layers/0/norm"),
        ({"accumulation": 3}, r"train\.accumulation=3: must divide data\.batch_size=4"),
    ],
)
def test_a_config_that_does_not_fit_the_model_writes_nothing(tmp_path, changes, message):
    called = []
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", before_writing=lambda: called.append(1), **changes)
    assert not (tmp_path / "run").exists()
    assert not called


def test_before_writing_comes_before_the_first_file(tmp_path):
    found = []
    run(tmp_path / "run", steps=1, before_writing=lambda: found.extend((tmp_path / "run").iterdir()))
    assert [path.name for path in found] == [".lease"]


class PoisonModel(ToyModel):
    """Not finite on batches whose first token is 0; training batches start at 1."""

    def __call__(self, tokens_BT, **arguments):
        out = super().__call__(tokens_BT, **arguments)
        return out._replace(logits=out.logits / (tokens_BT[0, 0] != 0))


class PoisonData(ToyData):
    """Batch numbers in `bad` give a loss that is not finite."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def __next__(self):
        batch = super().__next__()
        if self.n in self.bad:
            batch["tokens"][0, 0] = 0
        return batch


def test_bad_steps_are_skipped_and_counted(tmp_path):
    result = run(tmp_path, build=PoisonModel, data=PoisonData({2, 3, 5}), max_skipped_steps=3)
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1, 2, 2, 3, 3]
    assert [row["loss"] is None for row in rows(tmp_path)] == [False, True, True, False, True, False]
    assert result.finished
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))


def test_divergence_names_steps_and_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"steps 4 to 6 .*last checkpoint is step 4 in") as caught:
        run(
            tmp_path,
            steps=20,
            build=PoisonModel,
            data=PoisonData(range(4, 20)),
            max_skipped_steps=3,
            checkpoint_every=2,
            keep_last=9,
        )
    assert caught.value.exit_status == 1
    # Step 4 was skipped, so what is saved there is good.
    params, _ = restore_params(tmp_path / "checkpoints", 4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_full_disk_keeps_earlier_checkpoints_and_shows_no_half_written_one(tmp_path):
    run(tmp_path, writers=[], stop_at=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(model, between):
        # From here on no file can grow beyond 256 bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
        return {"loss": 1.0}

    class SlowAfterSaving(ToyData):
        def __next__(self):
            time.sleep(0.01 if self.n >= 500 else 0)  # gives the background save 5 s before the next one
            return super().__next__()

    data = SlowAfterSaving()
    changes = {"steps": 10_000, "checkpoint_every": 500, "eval_every": 500, "log_every": 100}
    try:
        with pytest.raises(StorageError) as caught:
            run(tmp_path, data=data, writers=[], evaluate=fill_disk, **changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"saving a checkpoint in {tmp_path}/checkpoints failed: File too large"
    assert caught.value.exit_status == 1
    assert 500 <= data.n < 1000, "found out before the next save"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    resumed = run(tmp_path, writers=[])
    assert (resumed.resumed_from, resumed.step) == (2, 6)
    assert_equal(resumed.state, run(tmp_path / "whole", writers=[]).state)


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("sparsezoo_jax.training.loop.time.monotonic", lambda: now[0])

    class Slow(ToyData):
        def __next__(self):
            now[0] += 60.0
            return super().__next__()

    run(tmp_path, data=Slow(), writers=[], steps=7, checkpoint_every_minutes=3, keep_last=9)
    assert saved_steps(tmp_path / "checkpoints") == [3, 6, 7]


def test_a_log_without_checkpoints_is_no_fresh_start(tmp_path):
    run(tmp_path, stop_at=2)
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(StorageError, match=r"checkpoints is missing, but metrics\.jsonl has steps: is a file system"):
        run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "checkpoints").exists()
    shutil.move(tmp_path / "elsewhere", tmp_path / "checkpoints")
    assert run(tmp_path).resumed_from == 2


def test_an_empty_place_to_mount_checkpoints_is_no_fresh_start(tmp_path):
    run(tmp_path, stop_at=2)
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StorageError, match=r"checkpoints is empty, but has held checkpoints: .* delete .*s.saved$"):
        run(tmp_path)
    (tmp_path / "checkpoints.saved").unlink()
    assert run(tmp_path, stop_at=1).resumed_from == 0


def test_the_first_evaluation_counts_as_compilation_until_its_first_batch_is_done(tmp_path):
    phases, seen = Phases(), []

    def evaluate(model, between):
        seen.append(phases.current)
        between()
        seen.append(phases.current)
        return {"loss": 1.0}

    run(tmp_path, evaluate=evaluate, phases=phases, writers=[], eval_every=3)
    assert seen == ["compilation", "evaluation", "evaluation", "evaluation"]


def test_rows_that_the_disk_had_no_room_for_are_in_the_checkpoint(tmp_path, monkeypatch, capsys):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        run(tmp_path, stop_at=4, checkpoint_every=2)
    assert rows(tmp_path) == []
    assert "JsonlWriter: 4 rows were not written" in capsys.readouterr().err
    run(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    whole = run(tmp_path / "whole")
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(tmp_path / "whole")]
    assert whole.finished


def test_two_runs_do_not_share_a_directory(tmp_path):
    lease = Lease(tmp_path)
    lease.acquire()
    called = []
    with pytest.raises(RunInUseError, match="trains there"):
        run(tmp_path, before_writing=lambda: called.append(1))
    assert not called
    assert not (tmp_path / "checkpoints").exists()
    lease.release()
    assert run(tmp_path, steps=1).finished
    assert not (tmp_path / ".lease").exists()


def test_a_lost_lease_stops_before_the_next_save(tmp_path):
    class Robbed(ToyData):
        def __next__(self):
            if self.n == 3:
                (tmp_path / ".lease").unlink()
            return super().__next__()

    with pytest.raises(RunInUseError, match="lost the directory to somebody who removed the lease"):
        run(tmp_path, data=Robbed(), writers=[], checkpoint_every=2)
    assert saved_steps(tmp_path / "checkpoints") == [2]


class SpikyData(ToyData):
    """Batches in `bad` have targets that nothing predicts."""

    bad: frozenset[int] = frozenset({40})

    def __next__(self):
        batch = super().__next__()
        if self.n in self.bad:
            batch["mask"] = np.zeros_like(batch["mask"])
            batch["mask"][0, 0] = True
            batch["targets"] = np.zeros_like(batch["targets"])  # a token that no other batch has
        return batch


def spiky(workdir, mode, **changes):
    spike = SpikeConfig(mode=mode, window=30, threshold=4.0)
    base = {"steps": 50, "checkpoint_every": 16, "log_every": 1, "spike": spike, "data": SpikyData()}
    return run(workdir, **{**base, **changes})


@pytest.mark.slow
def test_a_spike_is_skipped_and_counted(tmp_path):
    whole = spiky(tmp_path / "whole", "skip")
    logged = rows(tmp_path / "whole")
    assert [row["step"] for row in logged if row["skipped"] == 0] == list(range(1, 40))
    assert logged[39]["loss"] > 1.2 * logged[38]["loss"]
    assert whole.metrics["skipped"] == 1
    spiky(tmp_path / "parts", "skip", stop_at=39)
    parts = spiky(tmp_path / "parts", "skip")
    assert_equal(parts.state, whole.state)
    assert "skipped" in spiky(tmp_path / "off", "off").metrics
    assert rows(tmp_path / "off")[-1]["skipped"] == 0


@pytest.mark.slow
def test_a_rewind_passes_over_the_batches_before_a_spike(tmp_path, capsys):
    class Data(SpikyData):
        read: ClassVar[list] = []

        def __next__(self):
            self.read.append(self.n)
            return super().__next__()

    whole = spiky(tmp_path / "whole", "rewind", data=Data())
    message = "the loss spiked at step 40: back to step 32, passing over 8 batches"
    error = capsys.readouterr().err
    assert message in error
    assert "8 steps made again" in error or "9 steps made again" in error
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, 51))
    assert Data.read[-18:] == list(range(40, 58)), "batches 32 to 39 belong to the steps 33 to 40"
    assert max(row["loss"] for row in rows(tmp_path / "whole")[30:]) < 3.2
    spiky(tmp_path / "parts", "rewind", stop_at=44)
    assert message in capsys.readouterr().err
    parts = spiky(tmp_path / "parts", "rewind")
    assert_equal(parts.state, whole.state)


def test_spikes_that_rewinds_do_not_help_end_the_run(tmp_path):
    class Bad(SpikyData):
        bad = frozenset(range(40, 100))

    spike = SpikeConfig(mode="rewind", window=30, threshold=4.0, max_rewinds=2)
    with pytest.raises(TrainingDiverged, match=r"again at step \d+ after 2 rewinds .*last checkpoint is step 32"):
        spiky(tmp_path, "rewind", spike=spike, data=Bad(), writers=[])


def test_where_the_time_goes_is_in_the_log_and_at_the_end(tmp_path, capsys):
    run(tmp_path, stop_at=3, checkpoint_every=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9.0}\n')  # a run killed after step 5
    run(tmp_path)
    logged = rows(tmp_path)
    assert logged[0]["seconds/compilation"] > 0
    assert all(0 <= row["goodput"] < 1 and row["seconds/step"] > 0 for row in logged[1:])
    assert "seconds/save" in logged[2], "of the save at step 2"
    error = capsys.readouterr().err
    assert re.search(r"goodput \d+\.\d% in 2 starts: .*compilation .* s.*; 2 steps made again", error)


def test_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, steps=2, writers=[])))
    thread.start()
    thread.join()
    assert results[0].finished


def test_profile_writes_a_trace_of_the_window(tmp_path):
    run(tmp_path, profile_start=2, profile_steps=2, writers=[])
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_batch_of_another_shape_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 6\), not \(4, 6\)"):
        run(tmp_path, data=ToyData(batch=2))


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    """Parameters sharded over one mesh axis and the batch over another train to the same numbers."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from training.test_loop import run
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
table = {{"batch": "data", "ffn": "fsdp", "embed": None}}
place = lambda axes, shape: NamedSharding(mesh, P(*(table.get(axis) for axis in axes)))
result = run({str(tmp_path / "eight")!r}, accumulation=2, writers=[], place=place, stop_at=3)
result = run({str(tmp_path / "eight")!r}, accumulation=2, writers=[], place=place)
assert result.resumed_from == 3
assert result.state.params["up"].addressable_shards[0].data.shape == (2, 8, 4)
assert result.state.opt_state[0].mu["up"].addressable_shards[0].data.shape == (2, 8, 4)
"""
    environment = {**os.environ, "XLA_FLAGS": with_devices(8), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one = run(tmp_path / "one", accumulation=2, writers=[])
    eight, _ = restore_params(tmp_path / "eight" / "checkpoints")
    # Sums over devices are taken in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one.state.params)


def test_norms_of_parts_are_logged(tmp_path):
    result = run(tmp_path, steps=2, grad_clip=1e-2)
    row = rows(tmp_path)[0]
    parts = {"embedding", "norm", "up", "router", "down"}
    assert {name.partition("/")[2] for name in row if name.startswith("grad_norms/")} == parts
    assert {name.partition("/")[2] for name in row if name.startswith("update_ratios/")} == parts
    total = sum(row[f"grad_norms/{part}"] ** 2 for part in parts) ** 0.5
    assert row["grad_norm"] == pytest.approx(total, rel=1e-5)
    assert total > 1e-2, "before clipping"
    # Adam's first update of a parameter is as large as the learning rate.
    norm = np.linalg.norm(result.state.params["up"])
    assert row["update_ratios/up"] == pytest.approx(1e-2 * np.sqrt(result.state.params["up"].size) / norm, rel=0.1)
