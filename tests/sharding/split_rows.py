"""Statistical top-k of rows split over devices, by `shard_map`; prints its distance from whole rows as JSON.

Its arguments are the implementations.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.pallas_kernels.statistical_topk import statistical_topk
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, shard_map, use_mesh

AXES = ("batch", "length", "ffn")


def main():
    print(json.dumps({implementation: report_of(implementation) for implementation in sys.argv[1:]}))


def report_of(implementation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 256)) * np.linspace(0.5, 3, 256), jnp.float32)
    g = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    where = jnp.asarray(rng.random(x.shape) < 0.7)
    mesh = build_mesh(MeshConfig(data=2, tensor=4))

    def split(x, where=None, *, whole_rows):
        def kernel(x, *rest):
            *masks, axes = rest
            over = axes["ffn"] if whole_rows else ()
            mask = masks[0] if masks else None
            return statistical_topk(x, 20, where=mask, split_over=over, implementation=implementation)

        arrays = (x,) if where is None else (x, where)
        return shard_map(kernel, arrays, (AXES,) * len(arrays), AXES)

    report = {}
    for name, mask in (("plain", None), ("masked", where)):
        expected, pull = jax.vjp(lambda x, mask=mask: statistical_topk(x, 20, where=mask), x)
        placed = jax.device_put(x, named_sharding(mesh)(AXES, x.shape))
        for whole_rows in (True, False):
            with use_mesh(mesh):
                function = jax.jit(partial(split, whole_rows=whole_rows))
                found = function(placed, mask)
                gradient = jax.jit(jax.grad(lambda x, mask=mask, f=function: jnp.sum(f(x, mask) * g)))(placed)
            report[f"{name}, {'whole' if whole_rows else 'local'} statistics"] = {
                "values": float(jnp.max(jnp.abs(jax.device_get(found) - expected))),
                "gradients": float(jnp.max(jnp.abs(jax.device_get(gradient) - pull(g)[0]))),
                "pieces": len({str(shard.index) for shard in found.addressable_shards}),
            }
    return report


if __name__ == "__main__":
    main()
