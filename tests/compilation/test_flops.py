"""Counting the matrix products of traced functions: products of known sizes, and every architecture's train step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sparsezoo_jax.compilation.flops import KernelCall, kernel_calls, live, matmul_flops
from sparsezoo_jax.compilation.steps import lower_step
from sparsezoo_jax.compilation.topologies import open_topology
from sparsezoo_jax.configs import PRESETS, preset
from sparsezoo_jax.models import Decoder, flops_per_token
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.ragged import ragged_matmul
from sparsezoo_jax.sharding import MeshConfig, build_mesh
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.loop import first_device

ROWS, INNER, OUT, GROUPS = 16, 8, 12, 4
ONE = 2 * ROWS * INNER * OUT


def count(function, *arrays, platform="cpu"):
    return matmul_flops(jax.make_jaxpr(function)(*arrays).jaxpr, platform)


x, w = jnp.ones((ROWS, INNER)), jnp.ones((INNER, OUT))


def test_products_and_their_gradients():
    assert count(matmul, x, w) == ONE
    assert count(jax.grad(lambda *a: matmul(*a).sum(), (0, 1)), x, w) == 3 * ONE
    batched = partial(jnp.einsum, "gri,gio->gro")
    assert count(batched, jnp.ones((3, ROWS, INNER)), jnp.ones((3, INNER, OUT))) == 3 * ONE
    assert count(lambda x, w: jax.lax.fori_loop(0, 5, lambda i, y: y + x @ w, jnp.zeros((ROWS, OUT))), x, w) == 5 * ONE


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_each_row_of_a_grouped_product_counts_once(platform):
    """On TPUs the weights' gradient is a kernel, on GPUs all three products are: they count what they declare.

    Native products, a CPU's default, declare nothing.
    """
    sizes, weights = jnp.full(GROUPS, ROWS // GROUPS), jnp.ones((GROUPS, INNER, OUT))
    product = partial(ragged_matmul, sizes=sizes, implementation="xla" if platform == "cpu" else None)
    assert count(product, x, weights, platform=platform) == ONE
    found = count(jax.grad(lambda *a: product(*a).sum(), (0, 1)), x, weights, platform=platform)
    # Megablox' rows are padded to whole tiles of 128.
    assert found == (2 * ONE + ONE * 128 // ROWS if platform == "tpu" else 3 * ONE)


def test_products_that_nothing_reads_do_not_count():
    def loop(x, w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y), y @ w), x, length=3)[0]

    traced = jax.make_jaxpr(loop)(x, w).jaxpr
    assert matmul_flops(traced, "cpu") == 3 * ONE
    assert matmul_flops(live(traced), "cpu") == 0


def test_the_branch_of_the_platform_counts():
    def chosen(x, w):
        return jax.lax.platform_dependent(x, w, tpu=lambda x, w: x @ w @ w.T @ w, default=jnp.matmul)

    assert count(chosen, x, w, platform="tpu") == 3 * ONE
    assert count(chosen, x, w, platform="cuda") == ONE
    costliest = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w.T @ w)  # noqa: E731
    assert count(costliest, x, w) == 3 * ONE


def test_every_device_of_a_shard_map_counts():
    mesh, rows = AbstractMesh((4,), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec("x")
    mapped = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert count(mapped, x, w) == ONE
    repeated = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    assert count(repeated, x, w) == 4 * ONE, "all devices do the same"


@pytest.mark.parametrize("declared", [None, pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=9)])
def test_kernels(declared):
    """A kernel over two halves of the rows; for each call it is one device's, as often as its loop runs."""

    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((ROWS // 2, INNER), lambda i: (i, 0)), pl.BlockSpec((INNER, OUT), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((ROWS // 2, OUT), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((ROWS, OUT), jnp.float32),
        cost_estimate=declared,
        interpret=True,
        name="halves",
    )
    assert count(call, x, w) == (ONE if declared is None else 7)

    def chosen(x, w):
        looped = jax.lax.fori_loop(0, 5, lambda i, y: y + call(x, w), call(x, w))
        return looped + jax.lax.platform_dependent(x, w, tpu=lambda x, w: call(x, w), default=jnp.matmul)

    moved = 4 * (ROWS * INNER + INNER * OUT + ROWS * OUT)
    expected = {"halves": KernelCall(ONE, moved) if declared is None else KernelCall(7, 9)}
    traced = jax.make_jaxpr(chosen)(x, w).jaxpr
    read = jax.make_jaxpr(jax.checkpoint(lambda x, w: (call(x, w), call(x, w))[0]))(x, w).jaxpr
    assert matmul_flops(live(read), "cpu") == matmul_flops(read, "cpu") / 2
    assert kernel_calls(traced, "tpu") == kernel_calls(traced, "cuda") == expected
    only_on_tpus = jax.make_jaxpr(lambda x, w: jax.lax.platform_dependent(x, w, tpu=call, default=jnp.matmul))(x, w)
    assert kernel_calls(only_on_tpus.jaxpr, "tpu") == expected
    assert kernel_calls(only_on_tpus.jaxpr, "cuda") == {}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in PRESETS if preset(arch, "tiny").model.images.patch is None])
def test_a_traced_train_step_holds_what_sparsity_needs(arch):
    """Three passes of the sparse count at least; it knows no dense forms, recomputation or rows that fill up tiles.

    As lowered for TPUs: for CPUs experts loop over as many tiles as the routing asks for, which count once.
    """
    config = preset(arch, "tiny")
    layers = len(config.model.layer_pattern) + config.model.first_layers
    model = dataclasses.replace(config.model, remat="none", layers=layers)
    step = prepare_step(config.train, lambda rngs: Decoder(model, rngs=rngs), (2, 64), first_device)
    traced = step.train_step.trace(step.abstract, step.batch).jaxpr.jaxpr
    sparse = 3 * 2 * 64 * flops_per_token(model, 64, logits=True)
    assert sparse <= matmul_flops(live(traced), "tpu") <= 6 * sparse


def test_what_experts_send_is_of_a_micro_batch():
    """Layers see few tokens at a time, which are then less to send than weights."""
    own = preset("moe", "tiny")
    model = dataclasses.replace(
        own.model, layers=1, ffn=dataclasses.replace(own.model.ffn, experts=8, expert_width=256)
    )
    data = dataclasses.replace(own.data, batch_size=64, seq_len=256)
    mesh = build_mesh(MeshConfig(expert=4), open_topology("v5e:2x2").devices)

    def note(accumulation):
        train = dataclasses.replace(own.train, accumulation=accumulation)
        config = dataclasses.replace(own, model=model, data=data, train=train)
        (found,) = lower_step(config, mesh, "train", 0).notes
        return found

    assert "sends weights" in note(1)
    assert "sends tokens" in note(16)
