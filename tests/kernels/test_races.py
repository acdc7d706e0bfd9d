"""Kernels in the simulator of a TPU's memories and transfers: no access races with another."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparsezoo_jax.pallas_kernels.block_ffn import reference
from sparsezoo_jax.pallas_kernels.block_ffn import tpu as block_ffn
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility, spark_attention
from sparsezoo_jax.pallas_kernels.spark_attention import tpu as attention
from sparsezoo_jax.pallas_kernels.spark_attention import tpu_backward as attention_backward
from sparsezoo_jax.pallas_kernels.statistical_topk import tpu as statistical_topk
from sparsezoo_jax.pallas_kernels.statistical_topk.reference import Problem
from sparsezoo_jax.pallas_kernels.tuning import Launch, trying
from tests.kernels.simulator import races


def test_the_simulator_sees_a_race():
    def kernel(x_ref, y_ref, copy_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, copy_ref, semaphore)
        copy.start()
        y_ref[...] = copy_ref[...]  # before it has arrived
        copy.wait()

    x = jnp.ones((8, 128))
    call = lambda interpret: pl.pallas_call(  # noqa: E731
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=interpret,
    )(x)
    assert races(call)


@pytest.mark.slow
def test_statistical_topk():
    x, g = jax.random.normal(jax.random.key(0), (2, 40, 130))
    where, p = jax.random.bernoulli(jax.random.key(1), 0.7, x.shape), Problem(k=9.0, ddof=1, huber_delta=0.0)
    for mask in (None, where):
        y, kept = statistical_topk.forward(x, mask, p, interpret=True)

        def both(interpret, mask=mask, kept=kept):
            return (
                statistical_topk.forward(x, mask, p, interpret=interpret)[0],
                statistical_topk.backward(x, mask, kept, g, p, interpret=interpret),
            )

        assert not races(both)
        assert jnp.allclose(both(pltpu.InterpretParams())[0], y, atol=1e-6)


@pytest.mark.slow
def test_block_ffn():
    keys = jax.random.split(jax.random.key(2), 4)
    x, scores = jax.random.normal(keys[0], (4, 16)), jnp.ones((4, 3)).at[:, 1].set(0)
    up, down = jax.random.normal(keys[1], (16, 384)), jax.random.normal(keys[2], (384, 16))
    experts = jnp.array([0, 2, 3, 3])
    call = lambda interpret: block_ffn.union(x, scores, up, down, None, experts, 128, interpret)  # noqa: E731
    assert not races(call)
    expected = reference.block_ffn_union(x, scores, up, down, None, experts=experts, expert_width=128)
    assert jnp.allclose(call(pltpu.InterpretParams()), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_spark_attention(monkeypatch):
    """Two tiles of queries and two chunks of one tile of keys each, so that gradients go from call to call."""
    monkeypatch.setattr(attention_backward, "CHUNK", 0)
    q, g = jax.random.normal(jax.random.key(3), (2, 1, 160, 2, 12))
    k, v = jax.random.normal(jax.random.key(4), (2, 1, 160, 1, 12))
    visible = Visibility.of_tokens(jnp.ones((1, 160), jnp.int32))
    problem = attention.Problem(
        r=4, top_k=16, ddof=1, predictor_scale=0.5, value_scale=0.3, softcap=2.0, softcap_values=None,
        selection="statistical", weighting="softplus",
    )  # fmt: skip
    found = []

    def both(interpret):
        with trying(spark_attention_tpu=Launch((128, 128, 128))):
            y, attended, statistics = attention.forward(q, k, v, visible, problem, interpret)
            gradients = attention_backward.backward(q, k, v, visible, y, statistics, g, problem, interpret)
        found.append((y, attended, gradients))
        return found[-1]

    assert not races(both)
    expected, pull, attended = jax.vjp(
        lambda *x: spark_attention(*x, visible, **problem._asdict(), implementation="xla"), q, k, v, has_aux=True
    )
    for ours, theirs in zip(jax.tree.leaves(found[-1]), jax.tree.leaves((expected, attended, pull(g))), strict=True):
        assert jnp.allclose(ours, theirs, atol=1e-5)
