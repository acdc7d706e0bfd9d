"""What the documentation tells people to type exists."""

import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from sparsezoo_jax import completion
from sparsezoo_jax.__main__ import COMMANDS
from sparsezoo_jax.configs import PRESETS

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(code, page.name, "exec")
