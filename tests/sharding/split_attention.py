"""Attention of sequences, queries and heads split over devices; prints its distance from one device as JSON."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.pallas_kernels import flash_attention
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility, spark_attention
from sparsezoo_jax.pallas_kernels.tuning import Launch, trying
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, use_mesh

TPU, GPU, BLOCKED, NATIVE = "pallas_tpu_interpret", "pallas_gpu_interpret", "blocked", "native"
#: Axes, heads of queries and of keys, tokens, window, kernels. Without a window devices exchange halves of their
#: queries, and where these are whole tiles each device has a list of its own tiles. What tells a kernel its part of a
#: sequence meets all of them; which heads a device has is settled before there is a kernel.
MESHES = {
    "tensor 8, fewer key heads": ({"tensor": 8}, 8, 4, 24, 9, (TPU,)),
    "fsdp 2, context 2, tensor 2": ({"fsdp": 2, "context": 2, "tensor": 2}, 8, 4, 24, 9, (TPU, GPU, BLOCKED, NATIVE)),
    "data 2, tensor 4, groups cut across": ({"data": 2, "tensor": 4}, 12, 3, 24, 9, (GPU, NATIVE)),
    "data 2, context 4, pieces of tiles": ({"data": 2, "context": 4}, 1, 1, 1024, None, (TPU, GPU, BLOCKED, NATIVE)),
}


@partial(jax.jit, static_argnames=("implementation", "window"))
def both(q, k, v, g, segments, *, implementation, window):
    """Results of sparse and of plain attention, and gradients of their weighed sum."""

    def weighed(q, k, v):
        visible = Visibility.of_tokens(segments, window)
        y, attended = spark_attention(q, k, v, visible, r=4, top_k=4, implementation=implementation)
        dense = flash_attention(q, k, v[..., :7], visible, implementation=implementation)
        return jnp.sum(y * g) + jnp.sum(dense * g[..., :7]), (y, attended, dense)

    gradients, found = jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return *found, *gradients


def main():
    report = {}
    rng = np.random.default_rng(0)
    for name, (axes, heads, kv_heads, length, window, forms) in MESHES.items():
        q, g = rng.normal(size=(2, 4, length, heads, 12)).astype(np.float32)
        k, v = rng.normal(size=(2, 4, length, kv_heads, 12)).astype(np.float32)
        segments = np.broadcast_to(np.arange(length) // (length * 2 // 3 + 1), (4, length)).astype(np.int32)
        expected = jax.device_get(both(q, k, v, g, segments, implementation="xla", window=window))
        mesh = build_mesh(MeshConfig(**axes))
        place = named_sharding(mesh)
        with use_mesh(mesh):
            names = ("batch", "length", "heads", "head_dim")
            placed = [jax.device_put(x, place((*names[:2], kind, names[3]), x.shape)) for x, kind in
                      ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))]  # fmt: skip
            for form in forms:
                small = Launch((128, 128, 128))
                with trying(spark_attention_tpu=small, flash_attention_tpu=small):
                    found = both(*placed, g, segments, implementation=form, window=window)
                pairs = zip(jax.device_get(found), expected, strict=True)
                pieces = len({str(s.index) for s in found[0].addressable_shards})
                distances = [float(np.max(np.abs(a - b))) for a, b in pairs]
                report[f"{name}, {form}"] = {"distances": distances, "pieces": pieces}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
