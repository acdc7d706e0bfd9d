"""Attention of sequences, queries and heads split over devices; prints its distance from one device as JSON."""

import json

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels import flash_attention
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility, spark_attention
from sparsezoo_jax.pallas_kernels.tuning import Launch, trying
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, use_mesh

#: Axes, heads of queries and of keys, tokens, window. Without a window devices exchange halves of their queries, and
#: where these are whole tiles each device has a list of its own tiles.
MESHES = {
    "tensor 8, fewer key heads": ({"tensor": 8}, 8, 4, 24, 9),
    "fsdp 2, context 2, tensor 2": ({"fsdp": 2, "context": 2, "tensor": 2}, 4, 2, 24, 9),
    "data 2, tensor 4, groups cut across": ({"data": 2, "tensor": 4}, 12, 3, 24, 9),
    "data 2, context 4, pieces of tiles": ({"data": 2, "context": 4}, 1, 1, 1024, None),
}


def main():
    report = {}
    for name, (axes, heads, kv_heads, length, window) in MESHES.items():
        keys = jax.random.split(jax.random.key(0), 4)
        q, g = (jax.random.normal(key, (4, length, heads, 12)) for key in keys[:2])
        k, v = (jax.random.normal(key, (4, length, kv_heads, 12)) for key in keys[2:])
        segments = jnp.broadcast_to(jnp.arange(length) // (length * 2 // 3 + 1), (4, length))

        def both(q, k, v, segments, implementation, g=g, window=window):
            def weighed(q, k, v):
                visible = Visibility.of_tokens(segments, window)
                y, attended = spark_attention(q, k, v, visible, r=4, top_k=4, implementation=implementation)
                dense = flash_attention(q, k, v[..., :7], visible, implementation=implementation)
                return jnp.sum(y * g) + jnp.sum(dense * g[..., :7]), (y, attended, dense)

            gradients, found = jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return *found, *gradients

        run = jax.jit(both, static_argnums=4)
        expected = run(q, k, v, segments, "xla")
        mesh = build_mesh(MeshConfig(**axes))
        place = named_sharding(mesh)
        with use_mesh(mesh):
            names = ("batch", "length", "heads", "head_dim")
            placed = [jax.device_put(x, place((*names[:2], kind, names[3]), x.shape)) for x, kind in
                      ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))]  # fmt: skip
            for form in ("pallas_tpu_interpret", "pallas_gpu_interpret"):
                small = Launch((128, 128, 128))
                with trying(spark_attention_tpu=small, flash_attention_tpu=small):
                    found = run(*placed, segments, form)
                distances = [
                    float(jnp.max(jnp.abs(jax.device_get(a) - b))) for a, b in zip(found, expected, strict=True)
                ]
                pieces = len({str(s.index) for s in found[0].addressable_shards})
                report[f"{name}, {form}"] = {"distances": distances, "pieces": pieces}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
