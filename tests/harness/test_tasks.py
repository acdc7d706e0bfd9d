"""lm-evaluation-harness itself on a run, with tasks of local files; skipped where it is not installed."""

import json
import subprocess
import sys

import pytest

from sparsezoo_jax import cli, evaluate
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.harness.tasks import run_tasks

QUESTIONS = [
    {"text": "the state of the union is", "choices": ["strong", "law"], "answer": 0},
    {"text": "peace will follow where the", "choices": ["union", "law"], "answer": 1},
    {"text": "the", "choices": ["congress", "and"], "answer": 0},
]
TASKS = {
    "choose": """\
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "whole": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "answer": """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}test_split: test\n{text}")
    return folder


def test_tasks_of_a_run(folder, text_run, capsys):
    found = run_tasks(text_run, ["choose", "whole", "answer"], task_path=folder, batch_size=2)
    assert found["choose"]["acc"] * 3 == pytest.approx(round(found["choose"]["acc"] * 3))
    assert found["whole"]["bits_per_byte"] > 0
    assert 0 <= found["answer"]["exact_match"] <= 1
    args = [text_run, "--tasks", "choose", "--task-path", folder, "--limit", 2, "--batch-size", 2]
    evaluate.main([*map(str, args), "--json"])
    limited = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert limited["choose"]["acc"] in (0.0, 0.5, 1.0)
    with pytest.raises(UserError, match="--tasks=choos: no such task"):
        evaluate.main([*map(str, args[:2]), "choos"])


def test_the_harness_knows_runs(folder, text_run):
    args = ["--model", "sparsezoo", "--model_args", f"pretrained={text_run}", "--tasks", "choose"]
    command = [sys.executable, "-m", "sparsezoo_jax.harness", *args, "--include_path", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|choose|" in done.stdout.replace(" ", "")


def test_flags_that_need_tasks(text_run, monkeypatch, capsys):
    for flags, message in (
        (["--limit", "3"], "--tasks=False: must be given with --limit, --shots and --task-path"),
        (["--tasks", ","], "--tasks=,: must name tasks"),
        (["--tasks", "a", "--limit", "0"], "--limit=0: must be above 0"),
        (["--tasks", "a", "--base", "b"], "--base=b: can't be given with --tasks"),
    ):
        with pytest.raises(SystemExit):
            cli.run(evaluate.main, [str(text_run), *flags])
        assert message in capsys.readouterr().err


def test_the_harness_is_asked_for_where_it_is_missing(text_run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sparsezoo-jax\[eval\]'"):
        run_tasks(text_run, ["choose"])
