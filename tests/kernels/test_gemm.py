"""Products of many tokens, and grouped ones, against float64 at every level of the instruction set that runs here."""

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
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import gemm
from tests.kernels.few_rows import STORAGE, Draw, implementation
from tests.kernels.test_ragged import native_results

# Fewer and more tokens than a vector, a panel and a block have; depths and rows that leave a rest of each, and none.
SHAPES = [(1, 1, 1), (5, 7, 3), (17, 37, 50), (23, 1031, 97), (64, 96, 24), (70, 1100, 130)]
LEVELS = ["default", "v3", "v4", "v4_bf16"]


@pytest.fixture(params=["xla", "native"])
def apply(request):
    form = implementation(request.param)
    return lambda *arrays, **kwargs: jax.jit(partial(gemm, implementation=form, **kwargs))(*arrays)


def product(x, w, scale, transposed=True):
    """In float64."""
    w = np.asarray(w, np.float64) * (1 if scale is None else np.asarray(scale, np.float64)[:, None])
    return np.asarray(x, np.float64) @ (w.T if transposed else w)


def error(ours, expected, x, w, scale, transposed=True):
    """The largest difference, in units of the sum of its products' magnitudes."""
    size = product(np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(w, np.float64)), scale, transposed)
    assert ours.shape == expected.shape
    return float(np.max(np.abs(np.asarray(ours, np.float64) - expected) / np.maximum(size, 1e-30)))


def cases():
    """Errors of all shapes, storage types and orientations, and one result, of the native form in this process.

    With those of grouped products, for processes take long to start.
    """
    errors = {}
    for storage in STORAGE:
        for m, k, n in SHAPES:
            for transposed in (True, False):
                draw = Draw(storage)
                tokens = jnp.bfloat16 if storage != "float32" else jnp.float32
                x, (w, scale) = draw.tokens(m, k).astype(tokens), draw.weights(*((n, k) if transposed else (k, n)))
                form = {"transposed": transposed, "dtype": jnp.float32, "implementation": "native"}
                y = jax.jit(partial(gemm, **form))(x, w, scale)
                errors[f"{storage} {m}x{k}x{n} {transposed}"] = error(
                    y, product(x, w, scale, transposed), x, w, scale, transposed
                )
    draw = Draw("bfloat16")
    y = jax.jit(partial(gemm, dtype=jnp.float32, implementation="native"))(
        draw.tokens(70, 300), draw.weights(200, 300)[0]
    )
    grouped, result = native_results()
    return errors | grouped, [np.asarray(y).tolist(), *result]


PROCESS = """
import json, os, sys
if sys.argv[1] == "one thread":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from sparsezoo_jax import native
from tests.kernels.test_gemm import cases
print(json.dumps([native.level(), *cases()]))
"""


def elsewhere(level: str | None, threads: str = "all threads"):
    """`cases` of another process: the level it used, errors and the result."""
    environment = {**os.environ, **({} if level is None else {"SPARSEZOO_NATIVE_LEVEL": level})}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, threads],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_the_product_in_float64(level):
    implementation("native")
    best = native.level()
    if best is None or LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor has no {level}")
    used, errors, _ = elsewhere(level)
    assert used == level
    # Pairs of bfloat16 need int8 weights [K, N] times their factors rounded.
    rounded = {name for name in errors if level == "v4_bf16" and name.startswith("int8") and name.endswith("False")}
    for name, found in errors.items():
        assert found < (2**-8 if name in rounded else 5e-7), name


def test_results_do_not_depend_on_the_number_of_threads():
    implementation("native")
    if not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2:
        pytest.skip("needs a way to leave this process fewer processors")
    assert elsewhere(None, "one thread")[2] == cases()[1]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_row_does_not_depend_on_the_others(storage, transposed):
    draw = Draw(storage)
    x, (w, scale) = draw.tokens(81, 600), draw.weights(*((40, 600) if transposed else (600, 40)))
    apply = jax.jit(partial(gemm, transposed=transposed, dtype=jnp.float32, implementation=implementation("native")))
    together = apply(x, w, scale)
    for first, count in ((0, 5), (7, 20), (64, 17)):
        np.testing.assert_array_equal(apply(x[first : first + count], w, scale), together[first : first + count])


def test_more_tokens_than_are_multiplied_together(apply):
    draw = Draw("bfloat16")
    x, (w, _) = draw.tokens(2050, 40), draw.weights(30, 40)
    assert error(apply(x, w, dtype=jnp.float32), product(x, w, None), x, w, None) < 5e-7


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("transposed", [True, False])
def test_one_of_two_matrices_side_by_side(apply, storage, transposed):
    draw = Draw(storage)
    left, right = draw.weights(45, 30), draw.weights(45, 33)
    rows = jnp.concatenate([left[0], right[0]], axis=1)
    scale = None if left[1] is None or right[1] is None else jnp.stack([left[1], right[1]], axis=1)
    for (w, own), columns in ((left, (0, 30)), (right, (30, 33))):
        x = draw.tokens(19, columns[1] if transposed else 45).astype(jnp.float32)
        y = apply(x, rows, scale, transposed=transposed, columns=columns)
        assert error(y, product(x, w, own, transposed), x, w, own, transposed) < (2**-8 if storage == "int8" else 1e-6)


@pytest.mark.parametrize("tokens", ["float32", "bfloat16"])
def test_types_of_tokens_and_results(apply, tokens):
    x, (w, scale) = Draw("float32").tokens(20, 50).astype(tokens), Draw("int8").weights(9, 50)
    y = apply(x, w, scale)
    assert y.dtype == x.dtype
    assert error(y, product(x, w, scale), x, w, scale) < 2**-8
    wide = Draw("float32").weights(9, 50)[0]
    assert error(apply(x, wide, dtype=jnp.float32), product(x, wide, None), x, wide, None) < 2**-8


def test_tokens_in_float32_are_not_rounded():
    x, (w, _) = Draw("float32").tokens(20, 50), Draw("bfloat16").weights(9, 50)
    y = jax.jit(partial(gemm, implementation=implementation("native")))(x, w)
    assert error(y, product(x, w, None), x, w, None) < 5e-7


def test_not_a_number_stays_in_its_row(apply):
    x, (w, _) = Draw("float32").tokens(33, 20), Draw("float32").weights(50, 20)
    x = x.at[1, 3].set(jnp.nan).at[2, 4].set(jnp.inf)
    finite = np.isfinite(np.asarray(apply(x, w))).all(axis=1)
    assert np.flatnonzero(~finite).tolist() == [1, 2]


def test_bad_input():
    x, w = jnp.ones((20, 3)), jnp.ones((4, 5))
    with pytest.raises(ConfigError, match=r"gemm.x=\(20, 3\): must be \(20, 5\)"):
        gemm(x, w)
    with pytest.raises(ConfigError, match=r"gemm.x=\(20, 3\): must be \(20, 4\)"):
        gemm(x, w, transposed=False)
    with pytest.raises(ConfigError, match=r"gemm.columns=\(3, 3\): must be within the 5 of w"):
        gemm(x, w, columns=(3, 3))
    with pytest.raises(ConfigError, match=r"gemm.w=float16: must be one of float32, bfloat16, int8"):
        gemm(x, jnp.ones((4, 3), jnp.float16))
    with pytest.raises(ConfigError, match=r"gemm.w's scale=None: must be \(4,\) for int8 weights"):
        gemm(x, jnp.ones((4, 3), jnp.int8))
    implementation("native")
    with pytest.raises(ConfigError, match='x is float16, not float32 or bfloat16; use "xla"'):
        gemm(x.astype(jnp.float16), jnp.ones((4, 3)), implementation="native")
