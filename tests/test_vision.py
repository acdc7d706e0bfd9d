"""Runs on images through the commands: one tiny classifier, stopped and resumed."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sparsezoo_jax import evaluate, run_dir
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.evaluation import read_rows
from sparsezoo_jax.huggingface.conversion import to_hf
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.spark import SparkFFNConfig
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.report import Report, report
from sparsezoo_jax.text_model import TextModel
from sparsezoo_jax.train import train
from sparsezoo_jax.training.parameters import read_params

STEPS = 40
SMALL = {
    "model.layers": 1,
    "model.d_model": 16,
    "model.ffn": PlainFFNConfig(d_ff=24, activation="relu"),
    "data.batch_size": 16,
    "data.images.train_count": 200,
    "data.images.validation_count": 40,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.schedule.learning_rate": 1e-2,
    "train.eval_every": 0,
    "eval.report": False,
}


def small(arch, **changes):
    config = preset(arch, "digits")
    return with_values(config, {**SMALL, **changes})


SPARK = small("vit_mae", **{"model.ffn": SparkFFNConfig(d_ff=24, r=8, top_k=4), "train.steps": 3})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vit") / "run"
    figures = train(small("vit", **{"eval.report": True}), workdir)
    return workdir, figures


def parameters(workdir):
    return {path: np.asarray(array) for path, array in read_params(workdir / run_dir.CHECKPOINTS)}


def test_a_run_has_the_files_and_figures_of_every_run(run):
    workdir, figures = run
    assert {"loss", "accuracy", "ece", "ffn_density", "attended_keys"} <= figures.keys()
    assert 0 <= figures["accuracy"] <= 1
    assert (workdir / "report.html").is_file()
    rows = [row for row in read_rows(workdir) if "split" not in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["tokens"] == 16 for row in rows)  # images
    assert np.mean([row["loss"] for row in rows[-5:]]) < np.mean([row["loss"] for row in rows[:5]]) - 0.3


def test_a_stopped_run_goes_on_to_the_same_bits(run, tmp_path):
    train(small("vit", **{"train.stop_at": 5}), tmp_path / "run")
    train(small("vit"), tmp_path / "run")
    ours, theirs = parameters(tmp_path / "run"), parameters(run[0])
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array, err_msg=path)


def test_evaluate_and_report_read_a_run_of_images(run, capsys):
    workdir, figures = run
    evaluate.main([str(workdir), "--calibration", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert (found["count"], found["unit"]) == (40, "image")
    assert found["calibration"]["accuracy"] == pytest.approx(figures["accuracy"])
    assert found["meters"]["layers"][0]["ffn"]["density"] == pytest.approx(figures["ffn_density"][0], abs=0.05)
    assert found["meters"]["layers"][0]["attention"]["attended"]["mean"] == 16
    evaluate.main([str(workdir), "--no-meters"])
    assert "nats/image" in capsys.readouterr().out
    assert report(Report(directories=(workdir,), output=workdir / "again.html")).is_file()


def test_evaluation_alone_with_a_top_k_of_maps(run, capsys):
    workdir, figures = run

    def loss(*flags):
        evaluate.main([str(workdir), "--no-meters", "--json", *flags])
        return json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]

    assert loss("--map-top-k", "1") == pytest.approx(figures["loss"], rel=1e-5)
    sparse = loss("--map-top-k", "0.25")
    of_stream = loss("--map-top-k", "0.25", "--map-top-k-of", "residual")
    assert len({round(x, 4) for x in (figures["loss"], sparse, of_stream)}) == 3
    for flags, message in (
        (("--map-top-k", "1.5"), "--map-top-k=1.5: must be above 0 and at most 1"),
        (("--map-top-k-of", "residual"), "--map-top-k-of=residual: must be given with --map-top-k"),
    ):
        with pytest.raises(UserError, match=message):
            loss(*flags)
    words = run_dir.Loaded(None, None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--map-top-k=0.5: needs a model of images, and .* reads words"):
        evaluate.Evaluate(directory=workdir)._with_top_k(words, 0.5)


def test_adapters_of_an_autoencoders_encoder_train_a_head_of_classes(tmp_path):
    mae, adapted = tmp_path / "mae", tmp_path / "adapted"
    train(small("vit_mae", **{"train.steps": 2}), mae)
    changes = {"train.init_from": str(mae), "train.lora.rank": 2, "train.schedule.warmup_steps": 1}
    config = small("vit", **changes, **{"train.steps": 3, "train.checkpoint_every": 1, "train.keep_last": 3})
    train(with_values(config, {"train.stop_at": 2}), adapted)
    train(config, adapted)
    assert all("/lora_" in path or path.startswith("classes/") for path in parameters(adapted))
    heads = [run_dir.load(adapted, step=step).model.classes.output_DV[...] for step in (1, 3)]
    assert np.abs(heads[1] - heads[0]).max() > 1e-3
    encoder = run_dir.load(adapted).model
    np.testing.assert_array_equal(encoder.patches_PD[...], parameters(mae)["patches_PD"])


def test_what_is_for_words_is_refused_in_one_line(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match="a model of images, which reads and writes no text"):
        TextModel.load(workdir)
    with pytest.raises(UserError, match="a model of images, for which there is no layout"):
        to_hf(workdir, tmp_path / "hf")
    with pytest.raises(UserError, match=r"--cett=1%: can't be given for .* a model of images"):
        evaluate.main([str(workdir), "--cett", "1%"])
    with pytest.raises(UserError, match=r"data.seq_len=32: must be 16"):
        dataclasses.replace(small("vit"), data=dataclasses.replace(small("vit").data, seq_len=32))


def test_a_masked_autoencoder_trains_with_any_ffn_and_on_a_mesh(tmp_path):
    """Four devices, which split batch and parameters, come to what one does; the FFN is Spark's."""
    code = (
        "import sys; from pathlib import Path; from sparsezoo_jax.train import train;"
        "from sparsezoo_jax.overrides import with_values; from tests.test_vision import SPARK;"
        "train(with_values(SPARK, {'mesh.data': 2, 'mesh.fsdp': 2}), Path(sys.argv[1]))"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", code, str(tmp_path / "four")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = train(SPARK, tmp_path / "one")
    assert figures["ffn_density"][0] < 0.5
    one, four = ([row["loss"] for row in read_rows(tmp_path / name) if "split" not in row] for name in ("one", "four"))
    assert len(one) == 3
    np.testing.assert_allclose(four, one, rtol=1e-4)
