"""The contract of Spark attention."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.spark_attention import (
    Visibility,
    select_keys,
    spark_attention,
    tpu,
    tpu_backward,
    tpu_grid,
)
from sparsezoo_jax.pallas_kernels.statistical_topk import row_statistics
from sparsezoo_jax.pallas_kernels.tuning import TABLE, Key, Launch
from tests.kernels.lowering import text_for

KERNELS = ["blocked", "native", "pallas_tpu_interpret", "pallas_gpu_interpret"]
R, WIDTH = 4, 12


@cache
def compiled(implementation, **kwargs):
    return jax.jit(partial(spark_attention, implementation=implementation, **kwargs))


@pytest.fixture(params=["xla", *KERNELS])
def attention(request):
    def apply(*arrays, **kwargs):
        return compiled(request.param, **kwargs)(*arrays)

    apply.implementation = request.param
    return apply


def inputs(batch=2, queries=40, heads=4, kv_heads=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, queries, heads, WIDTH), dtype)
    k, v = (jax.random.normal(key, (batch, queries, kv_heads, WIDTH), dtype) for key in keys[1:])
    return q, k, v, Visibility.of_tokens(jnp.ones((batch, queries), jnp.int32))


def all_of(batch, queries, keys):
    """All keys visible to all queries."""
    q, k = jnp.zeros((batch, queries), jnp.int32), jnp.zeros((batch, keys), jnp.int32)
    return Visibility(query_positions_BT=q, key_positions_BS=k, query_segments_BT=q, key_segments_BS=k)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of the kernel for TPUs that short sequences fill several of; those of the one for GPUs are small."""
    for kernel in ("spark_attention_tpu", "flash_attention_tpu"):
        monkeypatch.setitem(TABLE, Key(kernel), Launch((128, 128, 128)))


def loops(q, k, v, visible, r, top_k, ddof=1, softcap=None):
    """The definition one head and one query at a time, in float64: output and number of attended keys."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    mask = np.asarray(visible.mask)
    out = np.zeros(q.shape)
    counts = np.zeros(q.shape[:3], int)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        visible = np.flatnonzero(mask[b, t])
        keys, values = k[b, visible, h // group], v[b, visible, h // group]
        scores = keys[:, :r] @ q[b, t, h, :r] / np.sqrt(r)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        n = len(visible)
        keep = np.ones(n, bool)
        if n > top_k:
            keep = scores >= scores.mean() + scores.std(ddof=ddof) * norm.ppf(1 - top_k / n)
            keep[scores.argmax()] = True
        weights = np.where(keep, np.exp(scores - scores[keep].max()), 0)
        weights /= weights.sum()
        weights *= np.log1p(np.exp(keys[:, r:] @ q[b, t, h, r:] / np.sqrt(WIDTH - r)))
        out[b, t, h], counts[b, t, h] = weights @ values, keep.sum()
    return out, counts


@pytest.mark.slow
def test_golden_row(attention):
    scores = jnp.array([0.2, 1.1, -0.4, 2.3, 0.6])
    visible = jnp.ones(5, bool)
    theta = float(row_statistics(scores, 2, where=visible).threshold[0])
    assert theta == pytest.approx(1.0187367370861655, abs=1e-6)
    np.testing.assert_array_equal(select_keys(scores, visible, 2), [False, True, False, True, False])
    # One head of width 2: predictor scores and value scores are q * k with q = 1 and r = 1; values are unit vectors.
    q = jnp.ones((1, 1, 1, 2))
    k = jnp.stack([scores, jnp.array([0, 1, -1, 0.5, 2.0])], axis=-1)[None, :, None]
    weights = []
    attend = lambda v: attention(q, k, v, all_of(1, 1, 5), r=1, top_k=2)[0][0, 0, 0, 0]  # noqa: E731
    for j in range(5):
        weights.append(float(attend(jnp.zeros((1, 5, 1, 2)).at[0, j].set(1.0))))
    np.testing.assert_allclose(weights, [0, 0.3039875334, 0, 0.7486023034, 0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "options"), [(1, {"softcap": 2.0}), (2, {}), (4, {})])
def test_equals_the_definition_in_loops(attention, kv_heads, options):
    q, k, v, mask = inputs(kv_heads=kv_heads)
    y, attended = attention(q, k, v, mask, r=R, top_k=8, **options)
    expected, counts = loops(q, k, v, mask, R, 8, **options)
    np.testing.assert_array_equal(attended, counts)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.slow
def test_every_query_head_selects_its_own_keys(attention):
    q, k, v, mask = inputs()
    selected = np.stack([loops(q[:, :, h : h + 1], k[:, :, :1], v[:, :, :1], mask, R, 8)[1] for h in (0, 1)])
    assert (selected[0] != selected[1]).any()
    repeated = attention(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), mask, r=R, top_k=8)
    for ours, theirs in zip(attention(q, k, v, mask, r=R, top_k=8), repeated, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_threshold_has_no_gradient():
    q, k, _, visible = inputs()
    mask = visible.mask
    scores = jnp.where(mask[:, None], jnp.einsum("btnh,bsnh->bnts", q[..., :R], jnp.repeat(k, 2, 2)[..., :R]), 0)
    grad = jax.grad(lambda s: jnp.sum(select_keys(s, mask[:, None], 8) * 1.0))(scores)
    np.testing.assert_array_equal(grad, 0)
    # Subtracting the threshold from the survivors changes nothing: softmax is invariant to it.
    keep = select_keys(scores, mask[:, None], 8)
    theta = row_statistics(scores, 8, where=mask[:, None]).threshold
    plain = jax.nn.softmax(jnp.where(keep, scores, -1e30), axis=-1)
    shifted = jax.nn.softmax(jnp.where(keep, scores - theta, -1e30), axis=-1)
    np.testing.assert_allclose(plain, shifted, atol=1e-6)


@pytest.mark.slow
def test_few_keys_are_all_attended(attention):
    q, k, v, mask = inputs(queries=12)
    y, attended = attention(q, k, v, mask, r=R, top_k=12)
    np.testing.assert_array_equal(attended, np.broadcast_to(np.arange(1, 13)[None, :, None], (2, 12, 4)))
    everything = compiled("xla", r=R, top_k=12, selection="none")(q, k, v, mask)[0]
    np.testing.assert_allclose(y, everything, atol=1e-6)
    n = np.array([1, 8, 9])  # one key, k keys, k + 1 keys
    q, k, v, _ = inputs(batch=3, queries=9)
    visible = dataclasses.replace(all_of(3, 1, 9), key_segments_BS=(np.arange(9) >= n[:, None]).astype(np.int32))
    out, count = attention(q[:, :1], k, v, visible, r=R, top_k=8)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(count[:2, 0], np.broadcast_to(n[:2, None], (2, 4)))
    assert (np.asarray(count[2]) >= 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("position", [5, 25])
def test_causality_and_padding(attention, position):
    q, k, v, mask = inputs()
    y = attention(q, k, v, mask, r=R, top_k=8)[0]
    later = jnp.arange(40)[None, :, None, None] > position
    changed = attention(q, jnp.where(later, 9.0, k), jnp.where(later, -9.0, v), mask, r=R, top_k=8)[0]
    np.testing.assert_array_equal(changed[:, : position + 1], y[:, : position + 1])
    # More masked-out keys behind: the same numbers.
    pad = ((0, 0), (0, 7), (0, 0), (0, 0))
    hidden = {"key_positions_BS": 0, "key_segments_BS": 9}
    longer = {name: jnp.pad(getattr(mask, name), ((0, 0), (0, 7)), constant_values=x) for name, x in hidden.items()}
    padded_mask = dataclasses.replace(mask, ordered=False, **longer)
    padded = attention(q, jnp.pad(k, pad, constant_values=5.0), jnp.pad(v, pad), padded_mask, r=R, top_k=8)[0]
    np.testing.assert_allclose(padded, y, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "deviation"), [(257, 0.9), (300, 3.7), (512, 6.8), (1024, 7.6), (2048, 9.3), (8192, 11.7)]
)
def test_attended_keys_of_gaussian_scores(n, deviation):
    scores = jax.random.normal(jax.random.key(n), (600, n))
    counts = np.asarray(jax.jit(lambda s: select_keys(s, jnp.ones_like(s, bool), 256).sum(-1))(scores))
    assert counts.mean() == pytest.approx(256, abs=1.5)  # 600 rows: standard error up to 0.5
    assert counts.std() == pytest.approx(deviation, rel=0.15)


@cache
def value_and_gradients(implementation):
    def total(q, k, v, mask):
        y, attended = compiled(implementation, r=R, top_k=3)(q, k, v, mask)
        return jnp.sum(y), attended

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two-point", "constant", "no visible key"])
def test_odd_rows_make_no_nan(attention, kind):
    q, k, v, mask = inputs(batch=1, queries=64, heads=1, kv_heads=1)
    q = jnp.ones_like(q)
    k = jnp.where(jnp.arange(64)[None, :, None, None] % 2 == 0, 1.0, -1.0 if kind == "two-point" else 1.0)
    k = jnp.broadcast_to(k, q.shape)
    unseen = int(kind == "no visible key")
    mask = dataclasses.replace(mask, ordered=False, key_segments_BS=mask.key_segments_BS + unseen)
    (value, attended), grads = value_and_gradients(attention.implementation)(q, k, v, mask)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
    if kind == "no visible key":
        assert float(value) == 0
        np.testing.assert_array_equal(attended, 0)
    elif kind == "constant":
        np.testing.assert_array_equal(attended[0, :, 0], np.arange(1, 65))
    else:
        assert (np.asarray(attended) >= 1).all()


def test_sanity_configuration_is_plain_attention(attention):
    q, k, v, mask = inputs()
    y = attention(q, k, v, mask, r=WIDTH, top_k=40, weighting="none")[0]
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, 2)) / jnp.sqrt(WIDTH)
    weights = jax.nn.softmax(jnp.where(mask.mask[:, None], scores, -jnp.inf), axis=-1)
    np.testing.assert_allclose(y, jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, 2)), atol=1e-5)


@pytest.mark.slow
def test_gradients_by_finite_differences(attention):
    if attention.implementation == "native":
        pytest.skip("computes in float32; test_every_gradient_is_the_definition has its gradients")
    with jax.enable_x64(True):
        q, k, v, mask = inputs(batch=1, queries=9, heads=2, kv_heads=1, dtype=jnp.float64)
        g = jax.random.normal(jax.random.key(5), q.shape, jnp.float64)
        directions = [jax.random.normal(jax.random.key(i), x.shape, jnp.float64) for i, x in enumerate((q, k, v))]

        def total(step):
            arrays = [x + step * d for x, d in zip((q, k, v), directions, strict=True)]
            return jnp.sum(g * attention(*arrays, mask, r=R, top_k=3)[0])

        numeric = (total(1e-6) - total(-1e-6)) / 2e-6
        assert float(jax.grad(total)(0.0)) == pytest.approx(float(numeric), rel=1e-7)


@pytest.mark.slow
def test_bfloat16(attention):
    q, k, v, mask = inputs(dtype=jnp.bfloat16)
    y, _ = attention(q, k, v, mask, r=R, top_k=8)
    expected, _ = loops(q, k, v, mask, R, 8)
    assert y.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 2e-2


def both_passes(q, k, v, visible, g, implementation, **options):
    """Values, attended keys and gradients."""

    def weighed(q, k, v):
        y, attended = spark_attention(q, k, v, visible, r=R, top_k=16, implementation=implementation, **options)
        return jnp.sum(y * g), (y, attended)

    gradients, found = jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return (*found, *gradients)


#: The definition of `both_passes` does not depend on what tests set for kernels.
definition = jax.jit(partial(both_passes, implementation="xla"))


def assert_alike(found, expected, atol=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(theirs, np.float64), atol=atol)


LONG = 300  # fills two tiles of 128 and part of a third
DOCUMENTS = jnp.stack([jnp.repeat(jnp.array([1, 2, 0]), jnp.array(n)) for n in ([150, 130, 20], [290, 5, 5])])


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("kv_heads", "window", "options"),
    [
        (2, None, {"softcap": 2.0}),
        (4, 140, {"softcap_values": 1.5, "ddof": 0}),
        (1, 20, {"weighting": "none"}),
        (2, 140, {"selection": "none", "value_scale": 0.7, "predictor_scale": 0.4}),
    ],
)
def test_kernel_over_several_tiles(kv_heads, window, options):
    q, k, v, _ = inputs(queries=LONG, kv_heads=kv_heads)
    g = jax.random.normal(jax.random.key(5), q.shape)
    visible = Visibility.of_tokens(DOCUMENTS, window)
    expected = both_passes(q, k, v, visible, g, "xla", **options)
    for kernel in KERNELS:
        assert_alike(both_passes(q, k, v, visible, g, kernel, **options), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_over_several_tiles(kernel):
    q, k, v, _ = inputs(queries=LONG, dtype=jnp.bfloat16)
    g = jax.random.normal(jax.random.key(5), q.shape, jnp.bfloat16)
    visible = Visibility.of_tokens(DOCUMENTS)
    found, expected = both_passes(q, k, v, visible, g, kernel), definition(q, k, v, visible, g)
    np.testing.assert_array_equal(found[1], expected[1])
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_keys_a_chunk_at_a_time(monkeypatch):
    """Two tiles of keys in each chunk, of which the last one has no keys; and a part of a sequence, as in zigzag."""
    monkeypatch.setattr(tpu_backward, "CHUNK", 2 * (2 * 3 * 128 * 4 * 128))
    q, k, v, _ = inputs(queries=LONG)
    g = jax.random.normal(jax.random.key(5), q.shape)
    visible = Visibility.of_tokens(DOCUMENTS, 140)
    assert_alike(both_passes(q, k, v, visible, g, "pallas_tpu_interpret"), definition(q, k, v, visible, g))

    q, k, v, _ = inputs(queries=512)
    segments = (jnp.arange(512) > 200).astype(jnp.int32)[None].repeat(2, 0)
    whole, middle = Visibility.of_tokens(segments), slice(128, 384)
    arrays = whole.query_positions_BT[:, middle], whole.key_positions_BS, segments[:, middle], segments
    part = whole.replaced(*arrays, ordered=False).part_of(((0, 384), (128, 256)), jnp.int32(1))
    q, g = q[:, middle], jax.random.normal(jax.random.key(6), (2, 256, *q.shape[2:]))
    assert_alike(both_passes(q, k, v, part, g, "pallas_tpu_interpret"), definition(q, k, v, part, g))


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("limit", "at_a_time"), [(15, 2), (4, 1)])  # a sequence has 2 x 2 tiles
def test_sequences_a_few_at_a_time(monkeypatch, limit, at_a_time):
    """A list of steps of limited length: a loop over parts of the batch, whose sequences stay with their documents."""
    q, k, v, _ = inputs(batch=4, queries=150)
    g = jax.random.normal(jax.random.key(5), q.shape)
    starts = jnp.array([[50], [100], [149], [20]])
    visible = Visibility.of_tokens(jnp.where(jnp.arange(150) < starts, 1, 2).astype(jnp.int32), 90)
    expected = definition(q, k, v, visible, g)
    monkeypatch.setattr(tpu_grid, "STEPS", limit)
    sizes = []

    def counting(run, q, *rest, **options):
        sizes.append(len(q))
        return run(q, *rest, **options)

    monkeypatch.setattr(tpu, "forward", partial(counting, tpu.forward))
    monkeypatch.setattr(tpu_backward, "backward", partial(counting, tpu_backward.backward))
    assert_alike(both_passes(q, k, v, visible, g, "pallas_tpu_interpret"), expected)
    assert sizes == [at_a_time] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_queries_over_a_cache():
    """Positions that are no places: a few queries after many keys, of which some slots are empty."""
    q, k, v, _ = inputs(queries=LONG)
    q = q[:, :9]
    positions = jnp.where(jnp.arange(LONG) % 7 == 3, -1, jnp.arange(LONG))
    positions = jnp.stack([positions, jnp.where(jnp.arange(LONG) < 100, positions, -1)])
    visible = Visibility(
        query_positions_BT=jnp.array([[280], [91]]) + jnp.arange(9),
        key_positions_BS=positions,
        query_segments_BT=jnp.ones((2, 9), jnp.int32).at[1, 4:].set(0),
        key_segments_BS=jnp.where(positions < 0, -1, 1),
        window=150,
    )
    g = jax.random.normal(jax.random.key(5), q.shape)
    expected = both_passes(q, k, v, visible, g, "xla")
    for kernel in KERNELS:
        found = both_passes(q, k, v, visible, g, kernel)
        assert_alike(found, expected)
        np.testing.assert_array_equal(found[0][1, 4:], 0)


def test_what_is_not_finite(attention):
    """It shows in its own row, and a row whose scores have no mean attends to what the definition says."""
    q, k, v, visible = inputs(batch=1)
    q = q.at[0, 20, 0].set(jnp.nan).at[0, 30, 1, 0].set(jnp.inf).at[0, 35, 2, 5].set(jnp.nan)
    y, attended = attention(q, k, v, visible, r=R, top_k=8)
    expected, counts = attention_by_definition(q, k, v, visible, r=R, top_k=8)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
    np.testing.assert_array_equal(attended, counts)
    assert not np.isfinite(y[0, 20, 0]).any()
    finite = np.isfinite(expected)
    assert finite.mean() > 0.9
    np.testing.assert_allclose(np.asarray(y)[finite], np.asarray(expected)[finite], atol=1e-5)


attention_by_definition = jax.jit(partial(spark_attention, implementation="xla"), static_argnames=("r", "top_k"))


@cache
def exact_gradients(dtype):
    """Arrays, the results' gradient, and those of the definition in float64."""
    q, k, v, visible = inputs(dtype=dtype)
    g = jax.random.normal(jax.random.key(5), q.shape, dtype)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v, g)]
        pull = lambda *x: jax.vjp(lambda *x: attention_by_definition(*x, visible, r=R, top_k=8)[0], *x[:3])[1](x[3])  # noqa: E731
        return (q, k, v, visible), g, jax.device_get(jax.jit(pull)(*wide))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_definition(attention, dtype):
    (q, k, v, visible), g, exact = exact_gradients(dtype)
    found = jax.jit(lambda *x: jax.vjp(lambda *x: attention(*x, visible, r=R, top_k=8)[0], *x)[1](g))(q, k, v)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < (1e-6 if dtype == jnp.float32 else 2e-2)


@cache
def gradient_of_squares():
    """In the values, by the definition; `test_gradients_are_those_of_the_definition` holds kernels to it."""
    q, k, v, visible = inputs()
    return jax.jit(jax.grad(lambda v: jnp.sum(attention_by_definition(q, k, v, visible, r=R, top_k=8)[0] ** 2)))(v)


@pytest.mark.slow
def test_inside_scan_remat_and_vmap(attention):
    q, k, v, _ = inputs()

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, visible, r=R, top_k=8)[0] ** 2)

    def scanned(v):
        mapped = jax.checkpoint(jax.vmap(lambda q, k, v: total(q[None], k[None], v[None]), in_axes=(0, 0, 0)))
        return jax.lax.scan(lambda carry, v: (carry + mapped(q, k, v).sum(), None), 0.0, jnp.stack([v, 2 * v]))[0]

    visible = Visibility.of_tokens(jnp.ones((1, 40), jnp.int32))
    found = jax.jit(jax.grad(scanned))(v)
    np.testing.assert_allclose(found, 5 * gradient_of_squares(), atol=1e-4)


@pytest.mark.slow
def test_default_is_the_kernel_of_the_platform_it_is_lowered_for():
    shape = lambda heads: jax.ShapeDtypeStruct((1, 256, heads, 256), jnp.bfloat16)  # noqa: E731
    visible = lambda n: Visibility.of_tokens(jnp.ones((1, n), jnp.int32))  # noqa: E731

    def lowered(platform, queries=256):
        def both(q, k, v):
            q = q[:, :queries]
            mask = visible(256) if queries == 256 else all_of(1, queries, 256)
            total = lambda q, k, v: spark_attention(q, k, v, mask, r=128, top_k=32)[0].astype(float).sum()  # noqa: E731
            return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

        return text_for(platform, jax.jit(both), shape(8), shape(4), shape(4))

    for platform, call, count in (("tpu", "tpu_custom_call", 3), ("cuda", "gpu.triton", 4)):
        text = lowered(platform)
        assert text.count(call) == count
        assert "256x256xi1" not in text, "no mask of all pairs"
    for call in ("sparsezoo_attention_forward", "sparsezoo_attention_backward"):
        assert lowered("cpu").count(call) == 1
        assert call not in lowered("cpu", queries=1)
    assert "custom_call" not in lowered("tpu", queries=1)
    assert "custom_call" not in lowered("cuda", queries=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": jnp.float16}, "takes bfloat16 or float32 throughout"),
        ({"mask": jnp.ones((2, 40, 40), bool)}, "takes a Visibility"),
        ({"selection": "exact"}, "can't sort scores"),
    ],
)
def test_what_the_kernel_can_not_take(change, why):
    q, k, v, visible = inputs(dtype=change.get("dtype", jnp.float32))
    call = partial(
        spark_attention,
        q,
        k,
        v,
        change.get("mask", visible),
        r=R,
        top_k=8,
        selection=change.get("selection", "statistical"),
    )
    assert jax.eval_shape(call)[0].shape == q.shape
    for kernel in ("blocked", "native", "pallas_tpu", "pallas_gpu"):
        with pytest.raises(ConfigError, match=rf'spark_attention.implementation={kernel}: .*{why}.*; use "xla"'):
            call(implementation=kernel)


def test_heads_too_wide_for_a_gpus_registers():
    arrays = [jnp.zeros((1, 128, heads, 264)) for heads in (2, 1, 1)]
    call = partial(spark_attention, mask=Visibility.of_tokens(jnp.ones((1, 128), jnp.int32)), r=128, top_k=8)
    with pytest.raises(ConfigError, match=r"implementation=pallas_gpu: .*registers, and 264 columns are too many"):
        call(*arrays, implementation="pallas_gpu")
    assert "gpu.triton" not in text_for("cuda", jax.jit(call), *arrays)


def test_bad_input():
    q, k, v, mask = inputs()
    with pytest.raises(ConfigError, match=r"spark_attention.r=12: must be between 1 and 11"):
        spark_attention(q, k, v, mask, r=12, top_k=8)
    with pytest.raises(ConfigError, match=r"head count must divide"):
        spark_attention(q, jnp.tile(k, (1, 1, 3, 1))[:, :, :3], v, mask, r=4, top_k=8)
