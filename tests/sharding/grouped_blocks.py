"""Maps from and to active blocks on a mesh; prints their distance from one device, of their size, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.pallas_kernels.grouped_linear import Blocks, from_blocks, to_blocks
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
    for implementation in ("loop", "ragged"):

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
    print(json.dumps(report))


if __name__ == "__main__":
    main()
