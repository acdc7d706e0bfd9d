"""The contract of statistical top-k: values, gradients, dtypes, masks and edge cases, for every implementation."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import norm

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.statistical_topk import normal_quantile, reference, row_statistics, statistical_topk
from tests.kernels.lowering import text_for

IMPLEMENTATIONS = ["xla", "pallas_tpu_interpret", "pallas_gpu_interpret"]
#: For a thousand long rows: interpreted GPU kernels take them one by one.
MANY_ROWS = pytest.mark.parametrize("topk", ["xla", "pallas_tpu_interpret"], indirect=True)
SPARK_2B = {"d": 13_824, "k": 1106}


@pytest.fixture(params=IMPLEMENTATIONS)
def topk(request):
    def apply(x, k, where=None, **kwargs):
        op = partial(statistical_topk, k=k, implementation=request.param, **kwargs)
        return jax.jit(lambda x, where: op(x, where=where))(x, where)

    return apply


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def threshold(x, k, ddof=1):
    return float(np.asarray(row_statistics(jnp.asarray(x), k, ddof=ddof).threshold)[..., 0])


@pytest.mark.parametrize(
    ("p", "quantile"),
    [
        (0.92, 1.4050715603),
        (1 - 1106 / 13824, 1.4050326350),
        (0.95, 1.6448536270),
        (0.9, 1.2815515655),
        (0.97, 1.8807936082),
        (1 - 256 / 8192, 1.8627318674),
        (0.75, 0.6744897502),
        (0.5, 0.0),
    ],
)
def test_quantile(p, quantile):
    assert normal_quantile(p) == pytest.approx(quantile, abs=1e-9)
    # The masked form evaluates it in float32 from the target count: the same quantile within single precision.
    n = 10_000
    masked = row_statistics(jnp.zeros(n), (1 - p) * n, where=jnp.ones(n, bool)).quantile
    assert float(masked[0]) == pytest.approx(quantile, abs=2e-6)


def test_golden_ramp(topk, x64):
    x = np.arange(10.0)
    assert threshold(x, 2) == pytest.approx(7.048134825843002, abs=1e-12)
    expected = np.zeros(10)
    expected[8:] = 0.9518651742, 1.9518651742
    np.testing.assert_allclose(topk(jnp.asarray(x), 2), expected, atol=1e-9)
    assert threshold(x, 2, ddof=0) == pytest.approx(6.917372950458111, abs=1e-12)
    y = np.asarray(topk(jnp.asarray(x), 2, ddof=0))
    assert y[7] == pytest.approx(0.0826270495, abs=1e-9)
    assert np.count_nonzero(y) == 3


def test_golden_signs(topk, x64):
    x = np.array([0.5, -1.25, 2, 0, 3.5, -0.75, 1, -2])
    for k, theta in ((2, 1.584254169205748), (4, 0.375), (1, 2.437395735233246)):
        assert threshold(x, k) == pytest.approx(theta, abs=1e-12)
    expected = [0, 0, 0.4157458308, 0, 1.9157458308, 0, 0, 0]
    np.testing.assert_allclose(topk(jnp.asarray(x), 2), expected, atol=1e-9)


@pytest.mark.slow
@MANY_ROWS
def test_density_of_gaussian_rows(topk):
    d, k = SPARK_2B["d"], SPARK_2B["k"]
    counts = np.concatenate(
        [np.sum(np.asarray(topk(jax.random.normal(jax.random.key(i), (250, d)), k)) > 0, axis=-1) for i in range(4)]
    )
    assert counts.min() >= 1004, "five standard deviations"
    assert counts.max() <= 1208
    assert counts.mean() == pytest.approx(1106, abs=2)
    assert counts.std() == pytest.approx(20.3, abs=1.5)


@pytest.mark.slow
@MANY_ROWS
@pytest.mark.parametrize(("d", "k", "deviation"), [(16_384, 819, 19.19), (1024, 82, 5.51), (256, 20, 2.74)])
def test_spread_of_the_count(topk, d, k, deviation):
    counts = np.sum(np.asarray(topk(jax.random.normal(jax.random.key(d), (1000, d)), k)) > 0, axis=-1)
    assert counts.std() == pytest.approx(deviation, rel=0.08)  # 1000 rows: 2.2 % standard error
    assert counts.mean() == pytest.approx(k, abs=0.02 * k)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "percent", "tolerance"),
    [
        (lambda g, s: g.uniform(size=s), 9.4, 0.5),
        (lambda g, s: g.laplace(size=s), 6.9, 0.5),
        (lambda g, s: g.exponential(size=s), 9.1, 0.5),
        (lambda g, s: g.lognormal(size=s), 6.1, 0.8),
    ],
    ids=["uniform", "laplace", "exponential", "lognormal"],
)
def test_density_of_other_rows(topk, draw, percent, tolerance):
    d = SPARK_2B["d"]
    x = draw(np.random.default_rng(0), (64, d)).astype(np.float32)
    density = 100 * np.mean(np.asarray(topk(jnp.asarray(x), 0.08 * d)) > 0)
    assert density == pytest.approx(percent, abs=tolerance)


@pytest.mark.slow
@MANY_ROWS
def test_moments_of_survivors(topk):
    d = SPARK_2B["d"]
    y = np.asarray(topk(jax.random.normal(jax.random.key(0), (400, d)), 0.08 * d), np.float64)
    assert y.mean() == pytest.approx(0.0363, rel=0.01)
    assert np.square(y).mean() == pytest.approx(0.0291, rel=0.02)
    assert y[y > 0].mean() == pytest.approx(0.4533, rel=0.01)
    assert np.square(np.asarray(jax.nn.gelu(y, approximate=True))).mean() == pytest.approx(0.0205, rel=0.03)


PROPERTY_TOPK = jax.jit(statistical_topk, static_argnums=1)
ROWS = hnp.arrays(np.float64, st.sampled_from([3, 17, 40]), elements=st.floats(-100, 100, width=32))


@settings(max_examples=60, deadline=None)
@given(ROWS, st.data())
def test_properties(x, data):
    with jax.enable_x64(True):
        d = len(x)
        k = data.draw(st.sampled_from([1, 2, d // 2, d - 1]))
        y = np.asarray(PROPERTY_TOPK(jnp.asarray(x), k))
        assert np.isfinite(y).all()
        assert (y >= 0).all()
        # Selected entries are a prefix of the descending order.
        kept = y > 0
        if kept.any() and not kept.all():
            assert x[kept].min() >= x[~kept].max()
        # Cantelli: no data at all select more than 1 / (1 + z^2) of a row, z > 0 (ddof 1 only lowers it).
        z = norm.ppf(1 - k / d)
        if z > 0:
            assert kept.mean() <= 1 / (1 + z * z) + 1e-9


def test_equivariances(topk, x64):
    x = jax.random.normal(jax.random.key(1), (5, 200), jnp.float64)
    y = topk(x, 16)
    np.testing.assert_allclose(topk(x + 3.7, 16), y, atol=1e-12)
    np.testing.assert_allclose(topk(2.5 * x, 16), 2.5 * y, atol=1e-12)
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_allclose(topk(x[:, order], 16), y[:, order], atol=1e-12)
    assert threshold(x[0], 100) == pytest.approx(float(x[0].mean()), abs=1e-12), "half of a row: the mean"
    thresholds = [threshold(x[0], k) for k in range(1, 200, 11)]
    assert (np.diff(thresholds) < 0).all(), "falls with the target count"


def test_gradient_by_finite_differences(topk, x64):
    x = jax.random.normal(jax.random.key(2), (3, 64), jnp.float64)
    g = jax.random.normal(jax.random.key(3), (3, 64), jnp.float64)

    def loss(x):
        return jnp.sum(g * topk(x, 10))

    step = 1e-6
    steps = step * jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
    numeric = jax.vmap(lambda d: (loss(x + d) - loss(x - d)) / (2 * step))(steps).reshape(x.shape)
    np.testing.assert_allclose(jax.grad(loss)(x), numeric, atol=1e-7)


def test_gradient_identities_fail_without_the_threshold(topk, x64):
    x = jax.random.normal(jax.random.key(4), (64,), jnp.float64)
    g = jax.random.normal(jax.random.key(5), (64,), jnp.float64)
    grad = jax.vjp(lambda x: topk(x, 10), x)[1](g)[0]
    y = topk(x, 10)
    assert float(grad.sum()) == pytest.approx(0, abs=1e-12)
    assert float(grad @ x) == pytest.approx(float(g @ y), abs=1e-12)

    detached = g * (y > 0)  # what a stopped threshold would give
    assert abs(float(detached.sum())) > 1e-3
    assert abs(float(detached @ x) - float(g @ y)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("huber_delta", [0.0, 0.3])
def test_closed_form_gradient_is_autodiff(topk, x64, masked, ddof, huber_delta):
    x = jax.random.normal(jax.random.key(6), (4, 7, 33), jnp.float64)
    where = jax.random.bernoulli(jax.random.key(7), 0.7, x.shape) if masked else None
    options = {"ddof": ddof, "huber_delta": huber_delta, "where": where}
    g = jax.random.normal(jax.random.key(8), x.shape, jnp.float64)

    def value_and_pullback(op):
        y, pull = jax.vjp(lambda x: op(x, 5, **options), x)
        return y, pull(g)[0]

    y, closed = jax.jit(value_and_pullback, static_argnums=0)(topk)
    expected, autodiff = jax.jit(value_and_pullback, static_argnums=0)(reference.statistical_topk)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(closed, autodiff, atol=1e-12)


@pytest.mark.parametrize(
    "row", [np.tile([1.0, -1.0], 50), np.full(100, 3.25), np.zeros(100)], ids=["two-point", "constant", "zero"]
)
def test_rows_without_survivors(topk, row):
    x = jnp.asarray(row, jnp.float32)
    y, pull = jax.vjp(lambda x: topk(x, 8), x)
    np.testing.assert_array_equal(y, 0)
    assert np.isfinite(pull(jnp.ones_like(y))[0]).all()


@pytest.mark.slow
def test_masked_rows(topk):
    x = jax.random.normal(jax.random.key(9), (6, 50))
    where = jnp.arange(50) < jnp.array([0, 1, 8, 9, 30, 50])[:, None]
    y = topk(x, 8, where=where)
    np.testing.assert_array_equal(y[:3], jnp.where(where[:3], x[:3], 0), "rows of at most k pass through")
    for row, n in ((3, 9), (4, 30), (5, 50)):
        np.testing.assert_allclose(y[row, :n], topk(x[row, :n], 8), atol=1e-6)
        np.testing.assert_array_equal(y[row, n:], 0)
    grad = jax.grad(lambda x: jnp.sum(topk(x, 8, where=where) ** 2))(x)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(jnp.where(where, 0, grad), 0)


@pytest.mark.slow
def test_bfloat16_keeps_the_selection(topk):
    x = jax.random.normal(jax.random.key(10), (200, SPARK_2B["d"]), jnp.bfloat16)
    y = topk(x, SPARK_2B["k"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    theta = exact.mean(-1, keepdims=True) + exact.std(-1, ddof=1, keepdims=True) * norm.ppf(1 - 1106 / 13824)
    assert np.mean((np.asarray(y, np.float64) > 0) == (exact > theta)) >= 0.9999


def test_moments_in_one_pass():
    """By the mean of a hundredth of the entries float32 suffices for any data; by a far shift it does not."""
    d, n = 12_800, 128
    rng = np.random.default_rng(16)
    rows = rng.normal(size=(4, d))
    rows[1] += 1e4  # far from 0
    rows[2, :n] += 1e3  # the sample is far from the others
    rows[3] = 7.25
    x = jnp.asarray(rows, jnp.float32)
    exact = np.asarray(x, np.float64)
    found = row_statistics(x, 800, shift=x[:, :n].mean(-1, keepdims=True))
    assert (np.abs(found.mean[:, 0] - exact.mean(-1)) <= 1e-5 * exact.std(-1) + 1e-3 * (exact.mean(-1) > 1e3)).all()
    np.testing.assert_allclose(found.std[:, 0], exact.std(-1, ddof=1), rtol=1e-4, atol=1e-7)
    far = row_statistics(x, 800, shift=jnp.zeros((4, 1)))
    assert abs(float(far.std[1, 0]) - 1) > 0.01
    y, pull = jax.vjp(lambda x, shift: statistical_topk(x, 800, shift=shift), x, x[:, :1])
    np.testing.assert_allclose(y[0], statistical_topk(x[0], 800), atol=1e-5)
    dx, dshift = pull(jnp.ones_like(y))
    assert not dshift.any()
    np.testing.assert_allclose(dx[0], jax.grad(lambda x: statistical_topk(x, 800).sum())(x[0]), atol=1e-5)
    with pytest.raises(ConfigError, match="must be none with a mask"):
        statistical_topk(x, 2, where=x > 0, shift=x[:, :1])


def test_huber_is_continuously_differentiable(x64):
    delta = 0.25
    smooth = lambda s: reference.shrink(jnp.asarray(s, jnp.float64), 0.0, delta)  # noqa: E731
    slope = jax.vmap(jax.grad(smooth))
    for knot in (0.0, delta):
        around = jnp.array([knot - 1e-9, knot + 1e-9])
        assert abs(float(jnp.diff(smooth(around))[0])) < 1e-8
        assert abs(float(jnp.diff(slope(around))[0])) < 1e-7
    s = jnp.linspace(0, 2, 1001)
    assert float(jnp.max(jnp.abs(smooth(s) - s))) == pytest.approx(delta / 2, abs=1e-12)


def test_gemma3n_form(topk):
    d = 4096
    x = jax.random.normal(jax.random.key(11), (8, d))
    expected = jax.nn.relu(x - (x.mean(-1, keepdims=True) + x.std(-1, keepdims=True) * 1.6448536))
    np.testing.assert_allclose(topk(x, 0.05 * d, ddof=0), expected, atol=1e-6)
    row = np.asarray(x[0], np.float64)
    with jax.enable_x64(True):
        offsets = [threshold(row, 0.05 * d, ddof=ddof) - row.mean() for ddof in (1, 0)]
    assert offsets[0] / offsets[1] == pytest.approx((d / (d - 1)) ** 0.5, rel=1e-9)


@pytest.mark.slow
def test_axis_and_transformations(topk):
    x = jax.random.normal(jax.random.key(12), (6, 5, 40))
    np.testing.assert_array_equal(topk(x, 4, axis=0), jnp.moveaxis(topk(jnp.moveaxis(x, 0, -1), 4), -1, 0))
    np.testing.assert_allclose(jax.vmap(lambda x: topk(x, 4))(x), topk(x, 4), atol=1e-7)
    np.testing.assert_allclose(jax.checkpoint(lambda x: topk(x, 4))(x), topk(x, 4), atol=1e-7)
    chex.assert_trees_all_equal(topk(x, 40), x)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (3, 129), (37, 700), (2, 5, 1300)])
def test_any_number_of_rows_and_columns(topk, shape, masked):
    """Sizes that fill no block, no chunk and no tile; float32 against float64."""
    rng = np.random.default_rng(13)
    x, g = rng.normal(size=(2, *shape)).astype(np.float32)
    where = jnp.asarray(rng.random(shape) < 0.6) if masked else None
    y, pull = jax.vjp(lambda x: topk(x, 3, where=where), jnp.asarray(x))
    dx = pull(jnp.asarray(g))[0]
    with jax.enable_x64(True):
        wide = lambda a: jnp.asarray(a, jnp.float64)  # noqa: E731
        exact, pull = jax.vjp(lambda x: reference.statistical_topk(x, 3, where=where), wide(x))
        np.testing.assert_allclose(y, exact, atol=5e-6)
        np.testing.assert_allclose(dx, pull(wide(g))[0], atol=2e-5)


def test_what_is_not_finite_stays_in_its_row(topk):
    x = jax.random.normal(jax.random.key(14), (20, 50)).at[1, 3].set(jnp.nan).at[2, 4].set(jnp.inf)
    y = topk(x, 5)
    assert np.isnan(y[1]).all()
    assert np.isnan(y[2]).all()
    others = jnp.array([0, *range(3, 20)])
    np.testing.assert_allclose(y[others], topk(x[others], 5), atol=1e-6)
    hidden = topk(x, 5, where=jnp.isfinite(x))
    assert np.isfinite(hidden).all(), "an entry that is not seen does not count, whatever it is"


def test_inside_scan_remat_and_grad(topk):
    x = jax.random.normal(jax.random.key(15), (3, 4, 40))

    def scanned(x):
        step = jax.checkpoint(lambda total, x: (total + jnp.sum(topk(x, 4) ** 2), None))
        return jax.lax.scan(step, 0.0, x)[0]

    plain = jax.grad(lambda x: jnp.sum(topk(x, 4) ** 2))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), plain, atol=1e-6)


def test_default_is_the_kernel_only_where_lowered_for_an_accelerator():
    x = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)
    call = jax.jit(partial(statistical_topk, k=40))
    assert "tpu_custom_call" in text_for("tpu", call, x)
    assert "gpu.triton" in text_for("cuda", call, x)
    assert "custom_call" not in text_for("cpu", call, x)


@pytest.mark.parametrize("x", [jnp.zeros((4, 8), jnp.float16), jnp.zeros((0, 8)), jnp.zeros((1, 10**6))])
def test_rows_that_the_kernels_can_not_take(x):
    assert statistical_topk(x, 2).shape == x.shape
    for name in ("pallas_tpu", "pallas_gpu"):
        with pytest.raises(ConfigError, match=rf'statistical_topk.implementation={name}: .*; use "xla"'):
            statistical_topk(x, 2, implementation=name)


def test_bad_input():
    with pytest.raises(ConfigError, match=r"statistical_topk.k=0: must be above 0"):
        statistical_topk(jnp.zeros(4), 0)
    with pytest.raises(ConfigError, match=r"=nope: must be one of pallas_gpu, pallas_gpu_interpret, pallas_tpu, .*xla"):
        statistical_topk(jnp.zeros(4), 2, implementation="nope")
