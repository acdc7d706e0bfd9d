"""The walk through the code in docs/flow.md names functions that exist."""

import importlib
import importlib.util
import re
from functools import reduce
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "docs" / "flow.md").read_text()
NAMES = set(re.findall(r"`([a-z_]+(?:\.\w+)+)`", TEXT)) - {"a.b.c", "b.C.c", "spark_ffn.cc"}


def exists(name: str) -> bool:
    """Whether the module named by the longest leading part has what the rest names."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = "sparsezoo_jax." + ".".join(parts[:end])
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if found is not None:
            try:
                return callable(reduce(getattr, parts[end:], importlib.import_module(module)))
            except AttributeError:
                return False
    return False


def test_every_function_of_the_walk_exists():
    assert len(NAMES) > 30
    assert not [name for name in NAMES if not exists(name)]
    assert not exists("training.loop.fitted")
    assert not exists("training.loops.fit")
