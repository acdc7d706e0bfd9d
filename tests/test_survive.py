"""A bounded part of `python -m benchmarks.survive`: the rest runs for hours."""

import json

import pytest

from benchmarks.survive import FAULTS, compare, main

pytestmark = pytest.mark.slow


def test_a_run_survives_kills_and_damage(tmp_path, capsys):
    flags = ["--stages", "1", "--steps", "12", "--directory", str(tmp_path), "--record", str(tmp_path / "record.json")]
    flags += ["--only", "kill-in-save", "damage-checkpoint", "damage-log"]
    assert main(["--faults", "3", *flags]) == 0
    assert "3 of 3 faults survived" in capsys.readouterr().out
    # It goes on where the record is: nothing is left to do, and sums are of all seeds.
    record = json.loads((tmp_path / "record.json").read_text())
    ((name, found),) = record.items()
    other = {name.replace("seed0", "seed1"): {**found, "failed": ["fault 3: lost"]}}
    (tmp_path / "record.json").write_text(json.dumps({**record, **other}))
    assert main(["--faults", "3", *flags]) == 1
    out = capsys.readouterr().out
    assert "6 of 6 faults survived in 2 runs of 12 steps" in out
    assert "-seed1: fault 3: lost" in out
    assert main(["--only", "flood"]) == 2
    assert f"must be one of {', '.join(FAULTS)}" in capsys.readouterr().err


def test_what_counts_as_another_curve():
    wanted = [(1, 2.5, 1.0), (2, 2.25, 1.0)]
    compare(list(wanted), wanted)
    for found, message in (
        (wanted[:1], "step 2 is logged 0 times"),
        ([*wanted, wanted[1]], "step 2 is logged 2 times"),
        ([wanted[0], (2, 2.2500000000000004, 1.0)], "step 2 differs"),
        ([*wanted, (3, 1.0, 1.0)], "has other steps"),
        (wanted[::-1], "in another order"),
    ):
        with pytest.raises(Exception, match=message):
            compare(found, wanted)
