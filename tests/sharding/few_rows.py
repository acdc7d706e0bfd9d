"""Prints whether operations on a few rows give the same on eight devices, however their arguments lie on them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsezoo_jax.pallas_kernels import linear, spark_ffn_rows
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, shard_map, use_mesh


def main() -> None:
    """Compare each placement with one device."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (8, 24))
    k1, rows = jax.random.normal(keys[1], (64, 8)), jax.random.normal(keys[2], (64, 40))
    w = jax.random.normal(keys[3], (16, 24))

    def both(x, k1, rows, w, implementation):
        y, active = spark_ffn_rows(x, k1, rows, top_k=9, implementation=implementation)
        return linear(y, w, implementation=implementation), active

    expected = both(x, k1, rows, w, "xla")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    found = {"devices": len(jax.devices())}
    for name, placed in {
        "whole": (whole, whole, whole, whole),
        "tokens split": (split, whole, whole, whole),
        "neurons split": (whole, split, split, whole),
    }.items():
        arrays = [jax.device_put(a, sharding) for a, sharding in zip((x, k1, rows, w), placed, strict=True)]
        for implementation in ("native", None):
            ours = jax.jit(both, static_argnums=4)(*arrays, implementation)
            close = [np.allclose(a, b, atol=1e-4) for a, b in zip(ours, expected, strict=True)]
            found[f"{name}, {implementation}"] = bool(all(close))
    on_last = [jax.device_put(a, jax.devices()[-1]) for a in (x, k1, rows, w)]
    ours = jax.jit(both, static_argnums=4)(*on_last, "native")
    found["last device"] = bool(jnp.allclose(jax.device_get(ours[0]), jax.device_get(expected[0]), atol=1e-4))

    def kernel(x, k1, rows, split):
        return spark_ffn_rows(x, k1, rows, top_k=9, implementation="pallas_tpu_interpret")

    mesh = build_mesh(MeshConfig(data=8))
    with use_mesh(mesh):
        axes, out = (("batch", None), (None, None), (None, None)), (("batch", None), ("batch",))
        placed = jax.device_put(x, named_sharding(mesh)(axes[0], x.shape))
        y, active = jax.jit(lambda *arrays: shard_map(kernel, arrays, axes, out))(placed, k1, rows)
    expected = spark_ffn_rows(x, k1, rows, top_k=9, implementation="xla")
    same = np.allclose(y, expected[0], atol=1e-4) and np.array_equal(active, expected[1])
    found["a kernel on each device's tokens"] = bool(same) and len({str(s.index) for s in y.addressable_shards}) == 8
    print(json.dumps(found))


if __name__ == "__main__":
    main()
