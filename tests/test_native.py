"""The native library: what is said when it is missing, how it is built, and that all its levels agree."""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import native
from sparsezoo_jax.errors import ConfigError, SparsezooWarning
from sparsezoo_jax.native import __main__ as command
from sparsezoo_jax.native import build
from sparsezoo_jax.pallas_kernels import linear
from sparsezoo_jax.pallas_kernels.gated_ffn import gated_ffn_rows
from tests.kernels.few_rows import implementation

X, W = jnp.arange(6.0).reshape(2, 3), jnp.ones((4, 3))


@pytest.fixture
def missing(monkeypatch):
    """A process without the library."""
    library = native._Library()
    library.missing = "it was not built"
    monkeypatch.setattr(native, "_library", lambda: library)
    native.warn_missing.cache_clear()
    yield
    native.warn_missing.cache_clear()


def test_without_the_library_plain_jax_runs_and_says_so_once(missing):
    with pytest.warns(SparsezooWarning, match=r"not built.*python -m sparsezoo_jax.native") as found:
        y = linear(linear(X, W), jnp.ones((1, 4)))
    np.testing.assert_array_equal(y, X @ W.T @ jnp.ones((4, 1)))
    assert len(found) == 1


def test_without_the_library_asking_for_it_is_an_error(missing):
    with pytest.raises(ConfigError, match=r"linear.implementation=native: it was not built; build it with `python -m"):
        linear(X, W, implementation="native")


def test_many_rows_are_left_to_xla_without_a_word(missing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = linear(jnp.ones((17, 3)), W)
    np.testing.assert_array_equal(y, jnp.ones((17, 3)) @ W.T)


def test_by_default_a_few_rows_run_natively():
    implementation("native")
    few, many = (jax.jit(linear).lower(jnp.ones((m, 3)), W).as_text() for m in (16, 17))
    assert "sparsezoo_linear" in few
    assert "sparsezoo_linear" not in many
    np.testing.assert_array_equal(jax.jit(linear)(X, W), X @ W.T)


def test_on_another_platform_the_default_is_plain_jax():
    implementation("native")
    text = jax.export.export(jax.jit(linear), platforms=["tpu"])(X, W).mlir_module()
    assert "sparsezoo_linear" not in text
    assert "dot_general" in text


def test_a_library_of_a_newer_jaxlib_or_of_other_sources_is_not_used(monkeypatch):
    implementation("native")
    monkeypatch.setattr(native.jaxlib.version, "__version__", "0.4.0")
    assert "and this is 0.4.0" in native._Library().missing
    monkeypatch.undo()
    monkeypatch.setattr(native, "fingerprint", lambda: "another")
    assert native._Library().missing == "it was built from other sources than these"


def test_building_without_a_compiler_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(sys, "argv", ["native"])
    assert command.main() == 1
    assert capsys.readouterr().err == "not built: no C++ compiler: CXX=no-such-compiler is no command\n"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no g\+\+, clang\+\+ or c\+\+ on the PATH"):
        build.build(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_a_level_that_the_compiler_does_not_know_is_left_out(tmp_path):
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$*" in *bf16*) exit 1;; esac\n')
    old.chmod(0o755)
    assert not build._knows([str(old)], build.V4_BF16)
    assert build._knows(["true"], build.V4_BF16)
    assert build._knows(["false"], build.V4), "an error about another level is not hidden"


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match=r"`false .*` failed"):
        build.build(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


LEVELS = """
import json, sys
import jax.numpy as jnp, numpy as np
from sparsezoo_jax import native
from tests.test_native import results
print(json.dumps([native.level(), [y.tolist() for y in results()]]))
"""


def results():
    """Every loop of the library at sizes that leave a rest, in all storage types."""
    from sparsezoo_jax.pallas_kernels import attention_rows, spark_attention_rows, spark_ffn_rows
    from tests.kernels.few_rows import STORAGE, Draw
    from tests.kernels.test_attention_rows import inputs
    from tests.kernels.test_spark_attention_rows import split
    from tests.kernels.test_spark_ffn_rows import layer

    found = []
    for storage in STORAGE:
        draw = Draw(storage)
        x = draw.tokens(3, 45)
        weights, scales = layer(draw, 45, 21, 150)
        y, active = spark_ffn_rows(x, *weights, top_k=20, scales=scales, implementation="native")
        found += [y, active]
        for activation in native.ACTIVATIONS:
            w, scale = draw.weights(70, 45)
            options = {"activation": activation, "scales": (scale,) * 3, "implementation": "native"}
            found.append(gated_ffn_rows(x, w, w, w, **options))
    q, k, v, mask = inputs("float32", keys=700)
    found.append(attention_rows(q, k, v, mask, softcap=3.0, implementation="native"))
    found += spark_attention_rows(*split(q, k, v, mask, 5), top_k=30, implementation="native")
    return [np.asarray(y, np.float64) for y in found]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["default", "v3"])
def test_levels_of_the_instruction_set_agree(level):
    implementation("native")
    done = subprocess.run(
        [sys.executable, "-c", LEVELS],
        env={**os.environ, "SPARSEZOO_NATIVE_LEVEL": level},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used, theirs = json.loads(done.stdout)
    if used != level:
        pytest.skip(f"this processor has no level {level}")
    for ours, other in zip(results(), theirs, strict=True):
        # The results in bfloat16 may round to different neighbours.
        np.testing.assert_allclose(other, ours, rtol=0, atol=8e-3 * np.abs(ours).max())


def test_calls_at_the_same_time_do_not_wait_for_each_other():
    form = implementation("native")
    call = jax.jit(partial(linear, implementation=form))
    x, w = jnp.ones((1, 512)), jnp.ones((4096, 512))
    pending = [call(x * i, w) for i in range(50)]
    for i, y in enumerate(pending):
        np.testing.assert_array_equal(y, 512.0 * i)


def test_huge_pages_are_no_error_and_change_nothing():
    x = jnp.arange(3 << 20, dtype=jnp.float32)
    native.advise_huge_pages(x)
    np.testing.assert_array_equal(x, np.arange(3 << 20, dtype=np.float32))
    assert native.advise_huge_pages(jnp.ones(3)) is False


def test_a_wheel_is_for_what_its_library_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    library = tmp_path / "library.so"
    for needed, tag in ((b"\0GLIBC_2.14\0GLIBC_2.9\0", 27), (b"\0GLIBC_2.5\0GLIBC_2.32\0memcpy\0GLIBC_2.27\0", 32)):
        library.write_bytes(b"\x7fELF" + needed)
        assert build.platform_tag(library) == f"manylinux_2_{tag}_x86_64"
    library.write_bytes(b"\x7fELF\0libc.musl-x86_64.so.1\0")
    assert build.platform_tag(library).startswith("linux")
