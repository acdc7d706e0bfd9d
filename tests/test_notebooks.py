"""The notebooks run from top to bottom."""

import ast
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def results_of(name, **changes):
    """Runs a notebook's code with some texts exchanged; the values of the cells that end in an expression."""
    names, found = {}, []
    for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"])
        for old, new in changes.items():
            code = code.replace(old, new)
        tree, last = ast.parse(code), None
        if isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            found.append(eval(compile(last, name, "eval"), names))
    return found


def test_all_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {"first_run", "statistical_topk"}


def test_statistical_topk(capsys):
    survivors, distance, (of_survivors, of_others) = results_of("statistical_topk")
    assert all(1000 < count < 1212 for count in survivors.tolist())
    assert distance < 1e-5
    assert 0 < of_survivors < 1
    assert of_others < 0
    assert "2.41 times fewer" in capsys.readouterr().out


@pytest.mark.slow
def test_first_run():
    changes = {
        '"train.steps": 30, "train.log_every": 5': '"train.steps": 2, "train.log_every": 1, "data.batch_size": 2',
        '"train.eval_every": 0': '"eval.batches": 1, "eval.final_batches": 1, "eval.report": False, "model.layers": 2',
    }
    ffn, (loss, _), steps, (shape, stats), text = results_of("first_run", **changes)
    assert (ffn.top_k, ffn.d_ff) == (61, 768)
    assert 5 < loss < 9
    assert [step for step, *_ in steps] == [1, 2]
    assert shape[-1] == 4096
    assert all(0.04 < share < 0.16 for share in stats["ffn_density"])
    assert text
