"""A gather over eight devices along several rings against the array itself; prints distances as JSON."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sparsezoo_jax.sharding import MeshConfig, build_mesh
from sparsezoo_jax.torus import all_gather, use_rings

RINGS = [(2, 2, 2), (2, 4), (8,)]


def main():
    mesh = build_mesh(MeshConfig(fsdp=8))
    x = jnp.arange(48.0).reshape(16, 3)
    weights = jnp.arange(8 * 48.0).reshape(8, 16, 3) % 7
    report = {"rings": RINGS, "values": [], "gradients": [], "gathers": []}
    for sizes in RINGS:

        def gathered(x):
            return jax.shard_map(
                lambda x: all_gather(x, "fsdp", 0)[None],
                mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False,
            )(x)  # fmt: skip

        def loss(x):
            return jnp.sum(gathered(x) * weights)

        with use_rings((("fsdp", sizes),)):
            report["values"].append(float(jnp.abs(jax.jit(gathered)(x) - x).max()))
            report["gradients"].append(float(jnp.abs(jax.jit(jax.grad(loss))(x) - weights.sum(0)).max()))
            report["gathers"].append(str(jax.make_jaxpr(gathered)(x)).count("all_gather["))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
