"""Flags, help, errors and the one name of the commands."""

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import sparsezoo_jax
from sparsezoo_jax import __main__ as console
from sparsezoo_jax import cli, completion, evaluate, generate, report, train
from sparsezoo_jax.configs import PRESETS
from sparsezoo_jax.errors import SparsezooWarning
from tests.test_commands import call

BAD_FLAGS = [
    (["--arch", "sparc"], f"--arch=sparc: must be one of {', '.join(sorted(PRESETS))}"),
    (["--arch", "spark", "--size", "huge"], "--size=huge: for --arch spark"),
    (["--arch", "spark", "--model.ffn.rr", "3"], "--model.ffn.rr: no such flag (did you mean --model.ffn.r?); python"),
    (["--lr"], "Missing value for argument '--train.schedule.learning-rate'. Expected 1 values; python"),
    (["--steps", "many"], "--train.steps: invalid literal for int"),
    (["--arch", "spark", "--model.ffn.top-k", "768"], "model.ffn.top_k=768: must be between 1 and d_ff - 1 = 767"),
    (["--arch", "spark", "--model.ffn.r", "128"], "model.ffn.r=128: must be below model.d_model=128"),
    (["--arch", "spark", "--model.attention.kv-heads", "3"], "model.attention.kv_heads=3: must divide"),
    (["--arch", "spark", "--model.attention.r", "32"], "model.attention.r=32: must be between 1 and 31"),
    *(
        (["--arch", "spark", "--model.attention.window", none], "model.attention.window=None: must be set")
        for none in ("none", "None")
    ),
    (["--arch", "spark", "--model.attention.window", "nil"], "'nil' is not none"),
    (["--arch", "spark", "--data.seq-len", "4096"], "data.seq_len=4096: must be at most model.max_seq_len=1024"),
    (["--arch", "ling", "--model.mtp-layers", "256"], "model.mtp_layers=256: must be below data.seq_len=256"),
    (["--arch", "spark", "--train.accumulation", "3"], "train.accumulation=3: must divide data.batch_size=8"),
    (["--arch", "spark", "--data.dataset", "no/such"], "no/such"),
    (["--arch", "spark", "--data.dataset", "sotuu"], "sotuu"),
    (["--arch", "spark", "--train.groups", "[{"], "train.groups=[{: must be a JSON list"),
    (["--arch", "spark", "--train.groups"], "train.groups=: needs a value"),
    (["--data.mixture", "[{"], "data.mixture=[{: must be a JSON list"),
    (["--data.mixture", "[" * 99], "more than 64 objects and lists within each other"),
    (["--data.mixture", "[]"], "data.mixture=0 corpora: must be 1 to 256"),
    (["--data.mixture", '{"dataset": "a"}'], "data.mixture={"),
    (["--data.mixture", '[{"dataset": "a", "weight": NaN}]'], "data.mixture[a].weight=nan: must be above 0"),
    (["--data.mixture", '[{"dataset": "a", "wieght": 1}]'], "0.wieght: Unexpected keyword argument"),
    (["--data.mixture", '[{"dataset": "a", "weight": 1}]', "--dataset", "sotu"], "data.dataset=sotu: can't be given"),
    (["--arch", "spark", "--train.optimizer.kind", "moon"], "train.optimizer.kind=moon: must be one of"),
]


@pytest.mark.parametrize(("args", "message"), BAD_FLAGS, ids=[" ".join(args) for args, _ in BAD_FLAGS])
def test_bad_flags(args, message, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    assert call(train, [*args, "--workdir", workdir], monkeypatch) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not workdir.exists()


def test_help(monkeypatch, capsys):
    for command, words in (
        (
            train,
            [r"--train\.steps, --steps  \(default: 300\)", r"  sparselm +SparseLM \(", r"  9b +42 layers, width 3,584"],
        ),
        (evaluate, ["--merge-last", "--json"]),
        (generate, ["--max-new-tokens", "--top-p"]),
        (report, ["--output", "--contexts"]),
    ):
        assert call(command, ["--help"], monkeypatch) == 0
        text = capsys.readouterr().out
        assert all(re.search(word, text) for word in words)
    assert call(train, ["--help-all"], monkeypatch) == 0
    everything = capsys.readouterr().out
    assert "--model.ffn.top-k" in everything
    assert "spark: tiny small 2b 9b" in " ".join(everything.replace("│", "").split())


def test_one_name_for_all_commands(monkeypatch, capsys):
    def sparsezoo(*args):
        monkeypatch.setattr(sys, "argv", ["sparsezoo", *args])
        monkeypatch.setattr(cli, "PROGRAM", cli.PROGRAM)
        try:
            console.main()
        except SystemExit as end:
            return end.code
        return 0

    assert sparsezoo() == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in console.COMMANDS)
    # Every module of the package that can be run as a command is one.
    folder = Path(sparsezoo_jax.__file__).parent
    runs = {path.stem for path in folder.glob("*.py") if "cli.run(main)" in path.read_text()}
    assert runs == set(console.COMMANDS)
    assert sparsezoo("--version") == 0
    assert capsys.readouterr().out == f"sparsezoo-jax {sparsezoo_jax.__version__}\n"
    assert sparsezoo("trian") == 2
    assert capsys.readouterr().err.endswith("(did you mean train?)\n")
    assert sparsezoo("train", "--arch", "sparc") == 2
    assert sparsezoo("generate", "--help") == 0
    assert "usage: sparsezoo generate" in capsys.readouterr().out


def test_completion_in_a_shell(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    script = tmp_path / "completion"
    script.write_text(completion.script())

    def complete(*words):
        line = " ".join(map(shlex.quote, words))
        code = f'. {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _sparsezoo; echo "${{COMPREPLY[@]}}"'
        return subprocess.run([bash, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert complete("sparsezoo", "tr") == ["train"]
    assert complete("sparsezoo", "train", "--arch", "spa") == ["spark", "sparselm"]
    assert "--train.schedule.learning-rate" in complete("sparsezoo", "train", "--train.sch")
    assert complete("sparsezoo", "generate", "--max") == ["--max-new-tokens"]


def test_warnings_wait_for_the_end_of_a_text(monkeypatch, capsys):
    def main(args):
        with cli.held_warnings():
            print("one ", end="")
            warnings.warn("late", SparsezooWarning, stacklevel=1)
            print(capsys.readouterr().err == "", end="")

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    cli.run(main, [])
    assert capsys.readouterr() == ("True", "warning: late\n")
