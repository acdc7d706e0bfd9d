"""The benchmark of global relations: unlike runs have unlike directories, and tables are means over seeds."""

import argparse

import pytest

from benchmarks.gestalt import MODELS, Model, configured, displays_of, run_of, tables
from sparsezoo_jax.evaluation.gestalt import PIXELS


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        runs=tmp_path, set="digits", mae_steps=20, steps=10, rate=2e-3, tuned_rate=1e-3, map_top_k=0.2,
        map_top_k_of="residual", displays=4,
    )  # fmt: skip


def test_a_tuned_run_starts_from_the_autoencoder_of_its_seed_without_top_k(options):
    found = {
        (training, top_k): configured(options, training, 3, top_k=top_k)
        for training in ("mae", "tuned", "scratch")
        for top_k in (False, True)
    }
    mae = str(run_of(options, "mae", 3, top_k=False).absolute())
    for (training, top_k), config in found.items():
        assert config.model.images.reconstructs == (training == "mae")
        assert config.train.init_from == (mae if training == "tuned" else None)
        assert config.model.images.map_top_k == (0.2 if top_k else None)
        assert config.train.steps == (20 if training == "mae" else 10)
    directories = {run_of(options, training, 3, top_k=top_k) for training, top_k in found}
    assert len(directories) == 6
    options.steps = 11
    assert run_of(options, "tuned", 3, top_k=True) not in directories


def test_blocks_of_the_displays_are_the_models_patches(options):
    for name, patch in (("digits", 2), ("shapes", 4)):
        options.set = name
        assert configured(options, "scratch", 0, top_k=False).model.images.patch == patch
        displays = displays_of(options)
        assert (displays.closure is None) == (name == "digits")
        for images, _ in displays.triplets.values():
            assert images.shape[:2] == (4, 3)
            squares = [
                sorted(image[i : i + patch, j : j + patch].tobytes() for i in range(0, len(image), patch)
                       for j in range(0, len(image), patch))
                for image in images[0]
            ]  # fmt: skip
            assert squares[0] == squares[1] == squares[2]


def test_tables_are_means_over_seeds(capsys):
    def credits(share):
        row = [1.0] * round(10 * share) + [0.0] * round(10 - 10 * share)
        return {test: {PIXELS: [1 / 3] * 10, "layer 1": [0.0] * 10, "layer 2": row} for test in ("intact", "broken")}

    found = {model: [(None, credits(0.5)), (None, credits(0.7))] for model in MODELS}
    found[Model("tuned", "none")] = [(0.8, credits(0.2)), (0.9, credits(0.6))]
    tables("digits", found)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| MAE, then classes | 85.0 | 40.0 [") for line in lines)
    assert any(line.startswith("| pixels |  | 33.3 [33.3, 33.3] |") for line in lines)
    assert "| MAE | 0.0 | 60.0 | 0.0 | 60.0 |" in lines
    (claim,) = (line for line in lines if line.startswith("| MAE above MAE, then classes |"))
    assert claim.startswith("| MAE above MAE, then classes | 20.0 [")
    assert "| 2 of 2 |" in claim
    (against,) = (line for line in lines if line.startswith("| MAE above classes |"))
    assert "| 0 of 2 |" in against
