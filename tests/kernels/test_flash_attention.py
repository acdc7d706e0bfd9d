"""The contract of flash attention: all implementations, values and gradients.

Its kernels are those of Spark attention with everything selected; test_spark_attention.py has their tiles, chunks of
keys and lists of steps.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.compilation.flops import matmul_flops
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import flash_attention
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility, blocked, spark_attention
from sparsezoo_jax.pallas_kernels.tuning import TABLE, Key, Launch
from tests.kernels.lowering import text_for

FORMS = ["xla", "blocked", "native", "pallas_tpu_interpret", "pallas_gpu_interpret"]
LENGTH = 300  # fills two tiles of 128 and part of a third
DOCUMENTS = np.stack([np.repeat([1, 2, 0], n) for n in ([150, 130, 20], [290, 5, 5])]).astype(np.int32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    # A tile has two slices of queries, which few heads take together.
    monkeypatch.setitem(TABLE, Key("flash_attention_tpu"), Launch((256, 128, 128)))
    monkeypatch.setattr(blocked, "_SCORES", 1 << 14)  # one or two heads at a time


def inputs(kv_heads=2, width=12, values=12, queries=LENGTH, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, queries, 4, width), (2, LENGTH, kv_heads, width), (2, LENGTH, kv_heads, values)]
    q, k, v = (2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    return q, k, v, jax.random.normal(keys[3], (2, queries, 4, values), dtype)


@cache
def compiled(form, **options):
    def weighed(q, k, v, visible, g):
        def total(q, k, v):
            y = flash_attention(q, k, v, visible, implementation=form, **options)
            return jnp.sum((y * g).astype(jnp.float32)), y

        gradients, y = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return y, *gradients

    return jax.jit(weighed)


def definition(q, k, v, visible, g, scale=None, softcap=None):
    """Values and gradients in float64 by NumPy, head by head."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    mask, group = np.asarray(visible.mask), q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, dq, dk, dv = np.zeros(g.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, n in np.ndindex(len(q), q.shape[2]):
        h = n // group
        scores = scale * q[b, :, n] @ k[b, :, h].T
        slope = np.ones_like(scores)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        best = np.max(scores, axis=-1, initial=-1e30, where=mask[b], keepdims=True)
        weights = np.where(mask[b], np.exp(np.minimum(scores - best, 0)), 0)
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        y[b, :, n] = weights @ v[b, :, h]
        dweights = g[b, :, n] @ v[b, :, h].T
        dscores = scale * slope * weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
        dq[b, :, n] = dscores @ k[b, :, h]
        dk[b, :, h] += dscores.T @ q[b, :, n]
        dv[b, :, h] += weights.T @ g[b, :, n]
    return y, dq, dk, dv


# A cap below and one above that to which exponentials are summed without a running maximum; scales that kernels for
# GPUs multiply queries by, and a power of two, which multiplies their scores.
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kv_heads", "values", "window", "options"),
    [
        (2, 12, None, {}),
        (4, 7, 140, {"softcap": 50.0, "scale": 3.0}),
        (1, 20, 20, {"softcap": 90.0, "scale": 4.0}),
    ],
)
def test_values_and_gradients(form, kv_heads, values, window, options):
    arrays = inputs(kv_heads, values=values)
    visible = Visibility.of_tokens(jnp.asarray(DOCUMENTS), window)
    found = compiled(form, **options)(*arrays[:3], visible, arrays[3])
    for ours, exact in zip(found, definition(*arrays[:3], visible, arrays[3], **options), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5 * max(1, np.abs(exact).max()))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "scale": 0.25}])
def test_bfloat16(form, options):
    arrays = inputs(dtype=jnp.bfloat16)
    visible = Visibility.of_tokens(jnp.asarray(DOCUMENTS))
    found = compiled(form, **options)(*arrays[:3], visible, arrays[3])
    for ours, exact in zip(found, definition(*arrays[:3], visible, arrays[3], **options), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) < 2e-2 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_queries_over_a_cache(form):
    """A few queries after many keys, of which some slots are empty, and two queries that see nothing."""
    q, k, v, g = inputs(queries=9)
    positions = np.where(np.arange(LENGTH) % 7 == 3, -1, np.arange(LENGTH))
    positions = np.stack([positions, np.where(np.arange(LENGTH) < 100, positions, -1)]).astype(np.int32)
    visible = Visibility(
        query_positions_BT=jnp.array([[280], [91]]) + jnp.arange(9),
        key_positions_BS=jnp.asarray(positions),
        query_segments_BT=jnp.ones((2, 9), jnp.int32).at[1, 7:].set(0),
        key_segments_BS=jnp.where(positions < 0, -1, 1),
        window=150,
    )
    found = compiled(form)(q, k, v, visible, g)
    for ours, exact in zip(found, definition(q, k, v, visible, g), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5)
    np.testing.assert_array_equal(found[0][1, 7:], 0)
    np.testing.assert_array_equal(found[1][1, 7:], 0)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"softcap": 50.0}], ids=str)
def test_what_is_not_finite_and_what_is_large(form, options):
    """It shows in its own row, and scores of thousands overflow nothing."""
    q, k, v, g = inputs()
    q = q.at[0, 20, 0].set(jnp.nan).at[0, 30, 1].multiply(1e4)
    visible = Visibility.of_tokens(jnp.asarray(DOCUMENTS))
    y = np.asarray(compiled(form, **options)(q, k, v, visible, g)[0])
    assert np.isnan(y[0, 20, 0]).all()
    expected = definition(q, k, v, visible, g, **options)[0]
    finite = np.isfinite(expected)
    assert finite.sum() == expected.size - v.shape[-1]
    np.testing.assert_allclose(y[finite], expected[finite], atol=1e-5)


def temporaries(kind, length, form):
    """Bytes of those of both passes, compiled for a CPU."""
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def both(q, k, v, segments):
        visible = Visibility.of_tokens(segments)
        attend = {
            "dense": lambda q, k, v: flash_attention(q, k, v, visible, implementation=form),
            "spark": lambda q, k, v: spark_attention(q, k, v, visible, r=8, top_k=64, implementation=form)[0],
        }[kind]

        # A layer of several, of which a scan keeps what the backward pass reads.
        def layer(x, _):
            return attend(x, k, v), None

        return jax.grad(lambda q: jax.lax.scan(layer, q, None, length=2)[0].sum())(q)

    analysis = jax.jit(both).lower(x, x, x, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("form", [None, "blocked"])
@pytest.mark.parametrize("kind", ["dense", "spark"])
def test_memory_is_linear_on_a_cpu(kind, form):
    short, long = temporaries(kind, 1024, form), temporaries(kind, 4096, form)
    assert long < 4.2 * short
    assert long < 4096**2, "a quarter of one head's scores"


def test_default_is_the_kernel_of_the_platform_it_is_lowered_for():
    shape = lambda heads: jax.ShapeDtypeStruct((1, 256, heads, 128), jnp.bfloat16)  # noqa: E731

    def lowered(platform, queries=256):
        def both(q, k, v):
            visible = Visibility.of_tokens(jnp.ones((1, 256), jnp.int32))
            mask = visible if queries == 256 else visible.mask[:, -queries:]
            total = lambda q, k, v: flash_attention(q, k, v, mask).astype(float).sum()  # noqa: E731
            return jax.value_and_grad(total, argnums=(0, 1, 2))(q[:, :queries], k, v)

        return text_for(platform, jax.jit(both), shape(8), shape(4), shape(4))

    for platform, call, count in (("tpu", "tpu_custom_call", 2), ("cuda", "gpu.triton", 3)):
        text = lowered(platform)
        assert text.count(call) == count
        assert "256x256xi1" not in text, "no mask of all pairs"
        assert "custom_call" not in lowered(platform, queries=1)
    for call in ("sparsezoo_attention_forward", "sparsezoo_attention_backward"):
        assert lowered("cpu").count(call) == 1
        assert call not in lowered("cpu", queries=1)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 8, 3, 4), (1, 8, 2, 4), (1, 8, 2, 4)), r"flash_attention.k=\(1, 8, 2, 4\).*must divide the queries' 3"),
        (((1, 8, 2, 4), (1, 8, 2, 6), (1, 8, 2, 4)), r"flash_attention.k=\(1, 8, 2, 6\).*must have the width 4 of q"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ConfigError, match=message):
        flash_attention(*(jnp.zeros(shape) for shape in shapes), Visibility.of_tokens(jnp.ones((1, 8), jnp.int32)))


@pytest.mark.parametrize("form", ["blocked", "native", "pallas_tpu", "pallas_gpu"])
def test_kernels_take_no_mask_of_all_pairs(form):
    q, k, v, _ = inputs()
    call = partial(flash_attention, q, k, v, jnp.ones((2, LENGTH, LENGTH), bool))
    with pytest.raises(ConfigError, match=rf'flash_attention.implementation={form}: .*takes a Visibility.*; use "xla"'):
        call(implementation=form)


@pytest.mark.parametrize("window", [None, 100])
def test_kernels_say_what_they_cost(window, monkeypatch):
    """Products of pairs that see each other, forward and backward: 2 and 5 on TPUs, 2 and 7 on GPUs."""
    monkeypatch.setitem(TABLE, Key("flash_attention_tpu"), Launch((128, 128, 128)))
    q, k, v, g = inputs(queries=1024)
    k, v = (jnp.concatenate([x] * 4, axis=1)[:, :1024] for x in (k, v))
    visible = Visibility.of_tokens(jnp.ones((2, 1024), jnp.int32), window)
    pairs = int(visible.mask[0].sum())
    assert visible.pairs == pairs
    for form, products in (("pallas_tpu_interpret", 7), ("pallas_gpu_interpret", 9)):
        jaxpr = jax.make_jaxpr(compiled(form))(q, k, v, visible, g)
        needed = 2 * products * 12 * pairs * q.shape[0] * q.shape[2]
        # Kernels for TPUs count whole tiles, of 128 x 128 here.
        assert needed <= matmul_flops(jaxpr.jaxpr, "cpu") <= 2.6 * needed
