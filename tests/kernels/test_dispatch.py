"""The choice among implementations, and switching all kernels off at once."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from sparsezoo_jax import native
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels import block_ffn_union, linear, spark_attention, statistical_topk
from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP, Implementation, dispatch, without_kernels
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn
from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks, to_blocks
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from tests.kernels.lowering import text_for

KERNELS = {"tpu": "tpu_custom_call", "cuda": "gpu.triton", "cpu": "sparsezoo"}


def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def attend(q, k, v):
    visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32))
    return spark_attention(q, k, v, visible, r=128, top_k=32)[0]


def experts(x, up, down):
    chosen = jnp.arange(2 * x.shape[0]).reshape(-1, 2) % up.shape[0]
    return grouped_ffn(x, chosen, jnp.ones(chosen.shape, x.dtype), up, down)


def blocks(x, w):
    return to_blocks(x, jnp.ones((x.shape[0], 1), jnp.int32), w, Blocks(4, 1))


OPERATIONS = {
    "statistical_topk": (partial(statistical_topk, k=40), [of(16, 512)], ("tpu", "cuda")),
    "spark_attention": (attend, [of(1, 128, 2, 256), *[of(1, 128, 1, 256)] * 2], ("tpu", "cuda")),
    "block_ffn_union": (
        partial(block_ffn_union, expert_width=128, capacity=2),
        [of(8, 256), of(8, 4), of(256, 512), of(512, 256)],
        ("tpu", "cuda"),
    ),
    "grouped_ffn": (experts, [of(64, 128), of(4, 128, 256), of(4, 256, 128)], ("tpu",)),
    "to_blocks": (blocks, [of(64, 128), of(128, 128)], ("tpu",)),
}


def gradient(function, *arrays):
    y, pull = jax.vjp(function, *arrays)
    return y, pull(jnp.ones_like(y))


def texts(jitted, arrays, platforms):
    return {platform: text_for(platform, jitted, *arrays) for platform in platforms}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_no_operation_takes_its_kernel(name):
    function, arrays, platforms = OPERATIONS[name]
    step = jax.jit(partial(gradient, function))  # one function throughout: what was traced before must not be used
    before = texts(step, arrays, platforms)
    with without_kernels():
        within = texts(step, arrays, platforms)
    after = texts(step, arrays, platforms)
    for platform in platforms:
        assert KERNELS[platform] in before[platform]
        assert KERNELS[platform] not in within[platform]
        assert KERNELS[platform] in after[platform]


def test_the_native_form_is_off_too():
    native_form = native.why_missing()
    if native_form is not None:
        pytest.skip(native_form)
    call = jax.jit(linear)
    arrays = of(1, 64, dtype=jnp.float32), of(32, 64, dtype=jnp.float32)
    assert KERNELS["cpu"] in text_for("cpu", call, *arrays)
    with without_kernels():
        assert "custom_call" not in text_for("cpu", call, *arrays)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_gradient_has_the_form_of_its_forward_pass(name):
    function, arrays, _ = OPERATIONS[name]

    def step(*arrays):
        with without_kernels():
            y, pull = jax.vjp(function, *arrays)
        return pull(jnp.ones_like(y))

    assert KERNELS["tpu"] not in text_for("tpu", jax.jit(step), *arrays)


def test_a_kernel_that_is_asked_for_by_name_stays():
    call = jax.jit(partial(statistical_topk, k=40, implementation="pallas_tpu"))
    with without_kernels():
        assert KERNELS["tpu"] in text_for("tpu", call, of(16, 512))


SINE = CustomVJP(lambda x: (jnp.sin(x), jnp.cos(x)), lambda arrays, cosine, g: (2 * g * cosine,))
"""With a gradient that shows which rule was used: twice the right one."""


def toy(implementation=None, *, refusal=None, **options):
    """An operation with a plain form, x + 1, and one for CPUs, 2 x."""
    implementations = [
        Implementation("xla", lambda x: x + 1),
        Implementation("cpu", lambda x: 2 * x, "cpu", lambda: refusal, **options),
    ]
    return dispatch("toy", implementation, implementations)


def test_each_platform_gets_its_default_when_the_program_is_lowered():
    assert toy()(3.0) == 6
    assert toy(refusal="takes nothing")(3.0) == 4
    assert toy(default=False)(3.0) == 4
    assert "multiply" in text_for("cpu", jax.jit(toy()), of(2))
    assert "multiply" not in text_for("tpu", jax.jit(toy()), of(2))


def test_only_kernels_are_left_out():
    with without_kernels():
        assert toy(kernel=True)(3.0) == 4
        assert toy()(3.0) == 6
        assert toy("cpu", kernel=True)(3.0) == 6


def test_a_name_is_used_or_refused_with_a_reason():
    assert toy("xla")(3.0) == 4
    assert toy("cpu", default=False)(3.0) == 6
    with pytest.raises(ConfigError, match=r"toy\.implementation=other: must be one of cpu, xla"):
        toy("other")
    with pytest.raises(ConfigError, match=r'toy\.implementation=cpu: takes nothing; use "xla"'):
        toy("cpu", refusal="takes nothing")


def test_the_gradient_is_that_of_the_implementation_chosen():
    implementations = [Implementation("xla", jnp.sin), Implementation("rule", SINE, "cpu")]
    for name, factor in ((None, 2), ("rule", 2), ("xla", 1)):
        found = jax.grad(dispatch("sine", name, implementations[::-1]))(0.3)
        assert jnp.allclose(found, factor * jnp.cos(0.3)), name


def test_arguments_stay_the_same_arrays_for_the_backward_pass():
    weights, pair = jnp.ones((3, 4, 4)), CustomVJP(lambda x, w: (x @ w, ()), lambda arrays, _, g: arrays)

    def scanned(x, weights):
        apply = dispatch("product", None, [Implementation("xla", pair), Implementation("cpu", pair, "cpu")])
        return jax.lax.scan(lambda x, w: (apply(x, w), None), x, weights)[0]

    step = jax.make_jaxpr(lambda x, w: jax.vjp(scanned, x, w)[1](x))(jnp.ones((2, 4)), weights)
    forward = next(equation for equation in step.eqns if equation.primitive.name == "scan")
    assert [out.aval.shape for out in forward.outvars] == [(2, 4), (3, 2, 4)], "no copy of the weights is stacked"
