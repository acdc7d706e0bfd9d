"""What the tests of operations on a few rows share: their implementations, and weights in all storage types."""

import inspect
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import native
from sparsezoo_jax.native.build import BuildError, compiler


def implementation(name: str) -> str:
    """`name`; without a C++ compiler, and only then, the native tests are skipped."""
    if name == "native" and not native.available():
        try:
            compiler()
        except BuildError as error:
            pytest.skip(str(error))
        pytest.fail(f"no native library: {native.why_missing()}; {native.HOW_TO_GET}")
    return name


@cache
def compiled(operation: Callable, form: str) -> Callable:
    """The operation in one implementation, jitted once for all tests; its settings, but for scales, are static."""
    settings = inspect.signature(operation).parameters.values()
    static = [each.name for each in settings if each.kind is each.KEYWORD_ONLY and each.name != "scales"]
    return jax.jit(partial(operation, implementation=form), static_argnames=static)


STORAGE = ["float32", "bfloat16", "int8"]


class Draw:
    """Random tokens and weights of one storage type; int8 weights come with the factors of their rows."""

    def __init__(self, storage: str, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.storage = storage
        self.tokens_dtype = jnp.bfloat16 if storage == "bfloat16" else jnp.float32

    def tokens(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape), self.tokens_dtype)

    def weights(self, *shape: int) -> tuple[jax.Array, jax.Array | None]:
        values = self.rng.standard_normal(shape)
        if self.storage != "int8":
            return jnp.asarray(values, self.storage), None
        scale = np.abs(values).max(axis=-1) / 127
        return jnp.asarray(np.round(values / scale[..., None]), jnp.int8), jnp.asarray(scale, jnp.float32)


def rounds(request: pytest.FixtureRequest, storage: str) -> bool:
    """Whether a test, which has its implementation in its name, is of native int8: it rounds tokens to 16 bits."""
    return storage == "int8" and "native" in request.node.name


def close(ours: jax.Array, expected: jax.Array, rounded: bool = False) -> None:
    """Equal up to sums in another order; in bfloat16 also up to the rounding of results and what leads to them.

    `rounded`: up to tokens that are rounded to 16 bits as well.
    """
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    tolerance = 1e-2 if expected.dtype == jnp.bfloat16 else 3e-4 if rounded else 3e-6
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(ours), finite)
    size = np.abs(expected[finite]).max(initial=0)
    np.testing.assert_allclose(ours[finite], expected[finite], rtol=0, atol=max(tolerance * size, 1e-30))
