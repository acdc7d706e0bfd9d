"""`benchmarks.curves`: widths, learning rates, the law of dense models and the table."""

import json
import math
import re
import sys

import numpy as np
import pytest

from benchmarks import curves
from sparsezoo_jax import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.models import count_parameters, dense_twin


@pytest.mark.parametrize("arch", curves.ARCHS)
def test_presets_grow_with_the_square_of_the_width(arch):
    tiny = preset(arch, "tiny")
    before = count_parameters(tiny.model).non_embedding
    for times in curves.SIZES.values():
        wide = preset(arch, "tiny", curves.widened(tiny, times))
        assert count_parameters(wide.model).non_embedding / before == pytest.approx(times**2, rel=0.03)
        assert wide.model.layers == tiny.model.layers
        multipliers = [group.lr_multiplier for group in wide.train.groups if group.lr_multiplier != 1]
        usual = [group.lr_multiplier for group in tiny.train.groups if group.lr_multiplier != 1] or [1.0]
        assert multipliers == pytest.approx([own / times for own in usual])


def test_spark_and_its_twin_stay_of_one_size():
    for times in curves.SIZES.values():
        wide = preset("spark", "tiny", curves.widened(preset("spark", "tiny"), times)).model
        assert count_parameters(wide) == count_parameters(dense_twin(wide))
    with pytest.raises(UserError, match=r"dense: model\..*can't be 0.3 times as large"):
        curves.widened(preset("dense", "tiny"), 0.3)


def test_the_law_is_that_of_the_losses():
    law = curves.Law(2.0, 50.0, 0.3)
    x = [4e5, 1.5e6, 6e6]
    assert curves.fitted(x, [law(at) for at in x]) == pytest.approx(law, rel=1e-6)
    assert law.at(law(1e6)) == pytest.approx(1e6)
    assert law.at(2.0) == float("inf")
    with pytest.raises(UserError, match="three sizes"):
        curves.fitted(x[:2], [3.0, 2.5])


def test_a_run_is_compared_with_a_dense_one_of_equal_parameters_flops_and_bytes(tmp_path, monkeypatch, capsys):
    law, record = curves.Law(2.0, 50.0, 0.3), {}
    for size, x in zip("sml", (4e5, 1.5e6, 6e6), strict=True):
        figures = {"parameters": x, "flops": 2 * x, "bytes": 4 * x, "density": 1.0, "loss": law(x)}
        record[f"pysource-dense-{size}-steps300-lr0.008-seed0"] = figures
    half = {"parameters": 1.5e6, "flops": 1.5e6, "bytes": 3e6, "density": 0.08, "loss": law(1.5e6) + 0.01}
    record["pysource-spark-m-steps300-lr0.016-seed0"] = half
    record["pysource-spark-m-steps300-lr0.016-seed1"] = {**half, "loss": half["loss"] + 0.02}
    # The best of the first seed, which all rates have, counts with the mean of all its seeds, however others fare.
    record["pysource-spark-m-steps300-lr0.008-seed0"] = {**half, "loss": half["loss"] + 0.001}
    half = {**half, "loss": half["loss"] + 0.01}
    (tmp_path / "curves.json").write_text(json.dumps(record))
    monkeypatch.setattr(curves, "DRAWS", 50)
    command = ["curves", "--archs", "dense", "spark", "--record", str(tmp_path / "curves.json"), "--table"]
    command += ["--rates", '{"spark": [0.008, 0.016]}']
    monkeypatch.setattr(sys, "argv", command)
    curves.main()
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if line.startswith("| spark")]
    dense = law(1.5e6), law(7.5e5), law(7.5e5)
    assert row.split("|")[4].strip() == "0.016"
    for cell, expected in zip(row.split("|")[10:13], dense, strict=True):
        assert cell.strip() == f"{expected:.4f} ({half['loss'] - expected:+.4f})"
    # The dense law against bytes is that against parameters, of four times as many.
    gain, low, high = map(float, re.findall(r"[\d.]+\d", row.split("|")[13]))
    assert gain == pytest.approx(4 * law.at(half["loss"]) / 3e6, abs=0.005)
    assert 0.5 < low < gain < high
    assert f"spark at 0.016: 0.0200 (2 seeds, mean {half['loss']:.4f})" in shown


def test_intervals_come_of_the_noise_of_seeds():
    law, kept = curves.Law(2.0, 50.0, 0.3), {}
    for size, x in zip("sml", (4e5, 1.5e6, 6e6), strict=True):
        kept[curves.Run("dense", size, 300, 0.008, 0, "pysource")] = {"bytes": x, "loss": law(x)}
    assert curves.noise(kept) is None
    for seed, factor in ((1, 1.01), (2, 1.01**2)):
        kept[curves.Run("dense", "m", 300, 0.008, seed, "pysource")] = {"bytes": 1.5e6, "loss": law(1.5e6) * factor}
    assert curves.noise(kept) == pytest.approx(math.log(1.01))
    one = {run: {**figures, "seeds": 1} for run, figures in kept.items() if run.seed == 0}
    exact = curves.drawn_laws(one, 300, "bytes", 0.0)
    assert len(exact) == curves.DRAWS
    assert exact[0] == exact[-1] == pytest.approx(law, rel=1e-4)
    (low, high) = np.quantile([of(1.5e6) for of in curves.drawn_laws(one, 300, "bytes", 0.01)], [0.16, 0.84])
    # One standard deviation of 1 % to either side.
    assert (high - low) / law(1.5e6) == pytest.approx(0.02, rel=0.25)
    three = curves.best(kept)
    assert [figures["seeds"] for figures in three.values()] == [1, 3, 1]
    (low, high) = np.quantile([of(1.5e6) for of in curves.drawn_laws(three, 300, "bytes", 0.01)], [0.16, 0.84])
    assert (high - low) / law(1.5e6) == pytest.approx(0.02 / 3**0.5, rel=0.25)


def test_times_are_compared_at_equal_loss(tmp_path, monkeypatch, capsys):
    law, kept, ms = curves.Law(2.0, 50.0, 0.3), {}, {}
    for size, x in zip("sml", (4e5, 1.5e6, 6e6), strict=True):
        run = curves.Run("dense", size, 300, 0.008, 0, "pysource")
        kept[run] = {"bytes": 4 * x, "loss": law(x)}
        if size == "m":  # whose directory is gone, of the first seed
            run = run._replace(seed=1)
            kept[run] = {"bytes": 4 * x, "loss": law(x)}
        ms[run.name] = 0.1 + 4e-7 * x
    spark = curves.Run("spark", "l", 300, 0.008, 0, "pysource")
    kept[spark], ms[spark.name] = {"bytes": 1e7, "loss": law(4e6)}, 1.0
    gone = curves.Run("moe", "l", 300, 0.008, 0, "pysource")
    kept[gone] = kept[spark]
    for name in ms:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(curves.zoo, "decoding", lambda run: run.name)
    turns = curves.decode.TURN
    # The second round takes twice as long for all.
    monkeypatch.setattr(
        curves, "interleaved", lambda of, rounds: {name: [t * ms[name] * turns / 1e3 for t in (1, 2, 1)] for name in of}
    )
    curves.print_times(kept, tmp_path, 3)
    shown = capsys.readouterr().out
    assert f"| {spark.name} | 10.00 | 1.000 | 1.700 | 1.70 (1.70 .. 1.70) | 1.60 |" in shown
    assert gone.name not in shown
    (tmp_path / "pysource-dense-s-steps300-lr0.008-seed0").rmdir()
    with pytest.raises(UserError, match="need three dense runs of 300 steps, found 2"):
        curves.print_times(kept, tmp_path, 3)
