import json

import pytest

from benchmarks import training_runs


@pytest.mark.parametrize(("arch", "is_rare"), [("dense", True), ("ling", False)])
def test_checkpoints_that_a_run_ends_as_the_average_of_stay_as_they_are(tmp_path, monkeypatch, arch, is_rare):
    commands = []

    def run(command, **_):
        commands.append(command)
        (tmp_path / "evaluation.json").write_text(json.dumps({"loss": 4.7}))

    monkeypatch.setattr(training_runs.subprocess, "run", run)
    for _ in range(2):  # the second time it is there
        assert training_runs.figures_of(tmp_path, arch, {"train.seed": 3, "eval.no-report": True}) == {"loss": 4.7}
    (command,) = commands
    assert command[-3:] == ["--train.seed", "3", "--eval.no-report"]
    assert ("--train.checkpoint-every" in command) is is_rare
