"""What the documentation tells people to type exists."""

import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import sparsezoo_jax
from sparsezoo_jax import completion
from sparsezoo_jax.__main__ import COMMANDS
from sparsezoo_jax.configs import PRESETS
from sparsezoo_jax.evaluation.laws import PUBLISHED_RELU

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """Each command line of a page: its command and its arguments."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    text = re.sub(r"'\[\n.*?\]'", "'[]'", text, flags=re.DOTALL)  # values of several lines
    for line in text.splitlines():
        found = re.match(r"\s+(?:\$ )?(?:pip install [^&]*&& )?(?:python -m sparsezoo_jax\.|sparsezoo )(\w+)(.*)", line)
        if found:
            yield found[1], shlex.split(found[2].replace("...", ""), comments=True)


@pytest.fixture(scope="module")
def flags():
    """The flags of each command; of those with a preset, those of all presets."""
    of_presets = {path for sizes in PRESETS.values() for config in sizes.values() for path in completion._paths(config)}
    found = {name: set(completion.flags_of(name)) for name in COMMANDS}
    return {name: own | of_presets if "--arch" in own else own for name, own in found.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page, flags):
    for command, args in commands(page):
        if command not in COMMANDS:
            assert importlib.util.find_spec(f"sparsezoo_jax.{command}"), command
            continue
        given = {word.partition("=")[0].replace("--no-", "--") for word in args if word.startswith("--")}
        known = {flag.replace("--no-", "--") for flag in flags[command]}
        # Fields of what is absent by default, and of kinds that no preset has, are named by what they are within.
        known |= {"--help-all", "--plugins"} | {flag.rpartition(".")[0] for flag in known}
        unknown = {flag for flag in given - known if flag.rpartition(".")[0] not in known}
        assert not unknown, (command, unknown)
        named = dict(pairwise(args))
        if (arch := named.get("--arch", "spark")) in PRESETS and "--size" in named and command in ("train", "aot"):
            assert named["--size"] in PRESETS[arch], (command, args)


def python_of(name):
    """The Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def values_of(name, changes=(), block=None, **given):
    """The names of a page's Python after it ran with some texts exchanged; all blocks in one go, or a certain one."""
    codes = python_of(name)
    code = "\n".join(codes) if block is None else codes[block]
    for old, new in dict(changes).items():
        assert old in code, old
        code = code.replace(old, new)
    exec(compile(code, name, "exec"), given)
    return given


#: Pages with Python, and where it runs.
TESTED = {
    "README.md": "tests/test_api.py",
    "docs/chess.md": "tests/evaluation/test_chess.py",
    "docs/continual.md": "tests/continual/test_learner.py",
    "docs/decode.md": "tests/test_docs.py",
    "docs/evaluation.md": "tests/test_docs.py",
    "docs/kinds.md": "tests/test_plugins.py",
    "docs/python.md": "tests/test_api.py",
    "docs/quickstart.md": "tests/test_commands.py",
    "docs/serve.md": "tests/serving/test_server.py",
    "docs/sparsing-law.md": "tests/test_docs.py",
    "docs/vision.md": "tests/test_docs.py",
}


def test_all_python_runs():
    assert {page.relative_to(ROOT).as_posix() for page in PAGES if "```python" in page.read_text()} == set(TESTED)
    for page, file in TESTED.items():
        assert page in (ROOT / file).read_text() or Path(page).name in (ROOT / file).read_text(), page


def test_the_python_of_decoding(text_run):
    changes = {"runs/spark-tiny": str(text_run), "max_new_tokens=100": "max_new_tokens=5"}
    found = values_of("docs/decode.md", changes, sparsezoo_jax=sparsezoo_jax)
    assert len(found["generation"].rows[0]) == 5
    assert found["generation"].stats.decode_rate > 0


def test_the_python_of_evaluation(capsys):
    values_of("docs/evaluation.md")
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r" +8192 \w+ +1\.909 GF mean, 2\.046 GF last, .* GB", line) for line in lines), lines


def test_the_python_of_images(capsys):
    assert len(values_of("docs/vision.md")["found"].labels) == 8
    assert "'star'" in capsys.readouterr().out


def test_the_python_of_the_sparsing_law():
    law = PUBLISHED_RELU["0.1B"]
    tokens = np.linspace(5, 100, 12)
    found = values_of("docs/sparsing-law.md", tokens=tokens, ratios=law(tokens))["found"]
    assert found.law(500) == pytest.approx(law(500), rel=1e-3)
