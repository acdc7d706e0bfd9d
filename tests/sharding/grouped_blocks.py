"""Maps from and to active blocks, and a layer by unions, on a mesh; prints distances from one device as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks, from_blocks, to_blocks
from sparsezoo_jax.pallas_kernels.relu_ffn import relu_ffn
from sparsezoo_jax.pallas_kernels.tuning import Launch, trying
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, use_mesh

BLOCKS = Blocks(count=8, shared=3)


def main():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 32)), jnp.float32)
    routed = jnp.asarray(np.argsort(rng.normal(size=(4, 6, 5)), axis=-1)[..., :2] + 3)
    w = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    v = jnp.asarray(rng.normal(size=(16, 32)), jnp.float32)
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = named_sharding(mesh)
    report = {}
    for implementation in ("loop", "ragged", "native"):

        def loss(x, w, v, implementation=implementation):
            hidden = jnp.sin(from_blocks(x, routed, w, BLOCKS, implementation=implementation))
            return jnp.sum(jnp.sin(to_blocks(hidden, routed, v, BLOCKS, implementation=implementation)))

        expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, w, v)
        placed = (
            jax.device_put(x, place(("batch", "length", None), x.shape)),
            jax.device_put(w, place(("embed", "ffn"), w.shape)),
            jax.device_put(v, place(("ffn", "embed"), v.shape)),
        )
        with use_mesh(mesh):
            found = jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*placed))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        # Of the loss's size is what it sums: as many sines as x has entries. Compilers differ in how exact these are.
        sizes = [x.size, *(float(jnp.abs(gradient).max()) for gradient in expected[1])]
        report[implementation] = [float(np.abs(a - b).max()) / size for (a, b), size in zip(pairs, sizes, strict=True)]
    report["unions"] = unions(mesh, x, rng)
    print(json.dumps(report))


def unions(mesh, x, rng):
    """Loss and gradients of a sparse feed-forward layer whose kernels see one device's tokens and neurons."""
    gate, up, down = (jnp.asarray(rng.normal(size=size) / 8, jnp.float32) for size in ((32, 48), (32, 48), (48, 32)))
    x, gate = x.at[..., 0].set(1), gate.at[0].set(-1.2)
    tiles = ("relu_ffn_hidden", "relu_ffn_sum", "relu_ffn_gradients", "relu_ffn_weights")

    def loss(x, gate, up, down, implementation=None):
        out = relu_ffn(x, gate, up, down, jnp.ones(x.shape[:2], bool), implementation=implementation)
        return jnp.sum(jnp.sin(out.y)) + 0.1 * jnp.sum(out.l1), (out.active, out.fired, out.union)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True), static_argnums=4)
    (value, (active, fired, _)), gradients = step(x, gate, up, down)
    place = named_sharding(mesh)
    axes = (("batch", "length", None), ("embed", "ffn"), ("embed", "ffn"), ("ffn", "embed"))
    placed = [jax.device_put(a, place(names, a.shape)) for a, names in zip((x, gate, up, down), axes, strict=True)]
    with use_mesh(mesh), trying(**dict.fromkeys(tiles, Launch((16, 16, 16)))):
        found = jax.device_get(step(*placed, "pallas_gpu_interpret"))
    (found_value, (found_active, found_fired, share)), found_gradients = found
    assert 0 < share < 0.8
    np.testing.assert_array_equal(found_active, active)
    np.testing.assert_array_equal(found_fired, fired)
    distances = [float(np.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found_gradients, gradients, strict=True)]
    return [float(abs(found_value - value)) / x.size, *distances]


if __name__ == "__main__":
    main()
