"""Attention of whole sequences in C++: every level of the instruction set, any number of threads, and odd sizes.

test_flash_attention.py and test_spark_attention.py have the contract that it shares with the other implementations.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import native
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility, spark_attention
from tests.kernels.few_rows import implementation

LEVELS = ("default", "v3", "v4", "v4_bf16")
#: Sequences, tokens, heads of queries and of keys, width, window, and arguments. Tiles have 96 keys, and 128 rows.
CASES = {
    "one tile": (2, 70, 2, 2, 8, None, {"r": 8, "selection": "none", "weighting": "none"}),
    "window, groups of three": (
        1, 411, 6, 2, 19, 150, {"r": 19, "selection": "none", "weighting": "none", "softcap": 20.0}
    ),
    "part of the width": (1, 200, 2, 1, 12, None, {"r": 5, "selection": "none", "weighting": "none", "softcap": 90.0}),
    "Spark": (2, 300, 4, 2, 32, None, {"r": 16}),
    "Spark, caps, a group wider than a tile": (1, 130, 140, 1, 11, 64, {"r": 3, "softcap": 4.0, "softcap_values": 2.0}),
}  # fmt: skip


@jax.jit
def documents(batch_T: jax.Array) -> jax.Array:
    """Segments of documents of 57 tokens, the first one shorter."""
    return (batch_T + 20) // 57


def both_passes(attend, q, k, v, g):
    """Values, attended keys and gradients."""
    y, pull, attended = jax.vjp(attend, q, k, v, has_aux=True)
    return y, attended, *pull(g)


def results(form: str) -> dict[str, list[np.ndarray]]:
    """Values, attended keys and gradients of all cases."""
    found = {}
    for name, (batch, length, heads, kv_heads, width, window, options) in CASES.items():
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
        q, k, v, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
        segments = jnp.broadcast_to(documents(jnp.arange(length)), (batch, length))
        visible = Visibility.of_tokens(jnp.ones_like(segments) if window else segments, window)
        attend = partial(spark_attention, mask=visible, top_k=12, implementation=form, **options)
        found[name] = [np.asarray(x) for x in jax.jit(partial(both_passes, attend))(q, k, v, g)]
    return found


PROCESS = """
import json, os, sys
if sys.argv[1] == "one thread":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from sparsezoo_jax import native
from tests.kernels.test_native_attention import results
print(json.dumps([native.level(), {name: [x.tolist() for x in found] for name, found in results("native").items()}]))
"""


def elsewhere(level: str | None, threads: str) -> tuple[str, dict[str, list[np.ndarray]]]:
    """The level that another process used, and its results."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, threads],
        env={**os.environ, **({} if level is None else {"SPARSEZOO_NATIVE_LEVEL": level})},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used, found = json.loads(done.stdout)
    return used, {name: [np.asarray(x, np.float32) for x in arrays] for name, arrays in found.items()}


@pytest.fixture(scope="module")
def definition():
    implementation("native")
    return results("xla")


def check(found, definition):
    for name, expected in definition.items():
        attended = expected[1]
        np.testing.assert_array_equal(found[name][1], attended, err_msg=name)
        for ours, theirs in zip(found[name], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), err_msg=name)


def test_sizes_that_fill_no_tile(definition):
    check(results("native"), definition)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_the_definition(level, definition):
    best = native.level()
    if best is None or LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(f"this processor has no {level} beside its own")
    used, found = elsewhere(level, "all threads")
    assert used == level
    check(found, definition)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads(definition):
    if not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2:
        pytest.skip("needs a way to leave this process fewer processors")
    found, own = elsewhere(None, "one thread")[1], results("native")
    for name in definition:
        for one, several in zip(found[name], own[name], strict=True):
            np.testing.assert_array_equal(one, several, err_msg=name)
