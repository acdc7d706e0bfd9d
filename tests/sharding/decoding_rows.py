"""Operations of decoding on meshes of eight devices: prints how far each is from one device, and in how many pieces."""

import json
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sparsezoo_jax.inference import packed
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.pallas_kernels import (
    active_rows,
    block_ffn_rows,
    block_ffn_union,
    spark_attention_rows,
    spark_ffn_rows,
)
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, use_mesh
from tests.kernels.few_rows import Draw
from tests.models.conftest import CONFIGS

TPU, GPU = "pallas_tpu_interpret", "pallas_gpu_interpret"
#: Each with implementations: rows, heads and neurons are split before one is chosen, so that each need not meet all.
MESHES = {
    "data 2, tensor 4": (MeshConfig(data=2, tensor=4), (None, TPU)),
    "expert 4, tensor 2": (MeshConfig(expert=4, tensor=2), (None, TPU, GPU)),
    "tensor 8": (MeshConfig(tensor=8), (TPU, GPU)),
}
#: The union's kernel for TPUs takes experts of whole tiles.
ABSENT = (("block_ffn_union", TPU), ("active_rows", GPU))


def cases() -> dict[str, tuple]:
    """Each operation and its arrays; int8 weights, so that factors are split as well."""
    draw, weights = Draw("float32"), Draw("int8", 1)
    x, (k1, s1), (rows, _) = draw.tokens(8, 24), weights.weights(64, 8), weights.weights(64, 40)
    s2 = jnp.abs(draw.tokens(64, 2)) / 127
    spark = partial(spark_ffn_rows, top_k=9)
    scores = jax.nn.relu(draw.tokens(8, 8) - 0.8)
    (up, u), (down, d), (gate, g) = (weights.weights(8, 16, 24) for _ in range(3))
    q, cache = draw.tokens(8, 8, 16), draw.tokens(8, 4, 24, 32)
    mask = jnp.asarray(np.random.default_rng(2).random((8, 24)) < 0.8)
    w = weights.weights(64, 24)
    columns, neurons, in_union = draw.tokens(24, 128), draw.tokens(128, 24), scores.at[:, ::3].set(0)
    return {
        "spark_ffn_rows": (lambda x, k1, rows, *s, **how: spark(x, k1, rows, scales=s, **how), x, k1, rows, s1, s2),
        "active_rows": (lambda *a, **how: (active_rows(*a, **how),), jax.nn.relu(draw.tokens(8, 64) - 0.8), *w),
        "spark_attention_rows": (partial(spark_attention_rows, top_k=6), q, cache[..., :4], cache[..., 4:], mask),
        "block_ffn_rows": (
            lambda x, scores, up, down, gate, *s, **how: block_ffn_rows(
                x, scores, up, down, gate, scales=s, return_active=True, **how
            ),
            *(x, scores, up, down, gate, u, d, g),
        ),
        "block_ffn_union": (
            lambda *a, **how: (block_ffn_union(*a, expert_width=16, capacity=7, **how),),
            *(x, in_union, columns, neurons),
        ),
    }


def steps(config: DecoderConfig, meshes: Sequence[Mesh | None]) -> list[tuple[jax.Array, jax.Array]]:
    """Logits of one more token after a prompt, by a packed model, and the share of active neurons in each layer."""
    make = lambda: packed(Decoder(config, rngs=nnx.Rngs(0)))  # noqa: E731
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    whole = jax.device_get(jax.jit(lambda: nnx.split(make())[1])())
    axes = {path: variable.get_metadata()["axes"] for path, variable in nnx.to_flat_state(abstract)}
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (8, 7))

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        cache = model(tokens[:, :-1], cache=model.init_cache(8, 8), logits=False).cache
        out = model(tokens[:, -1:], cache=cache)
        return out.logits, out.stats["ffn_density"]

    found = []
    for mesh in meshes:
        flat = nnx.to_flat_state(whole)
        if mesh is not None:
            place = named_sharding(mesh)
            flat = [(path, v.replace(jax.device_put(v[...], place(axes[path], v.shape)))) for path, v in flat]
        with use_mesh(mesh):
            found.append(jax.device_get(run(nnx.from_flat_state(flat))))
    return found


def gradients_apart(operation: Callable, *arrays: jax.Array) -> float:
    """How far gradients in all arrays are from those on one device."""
    loss = lambda *arrays: jnp.sum(operation(*arrays)[0] ** 2)  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=range(len(arrays))))
    expected = gradients(*arrays)
    with use_mesh(build_mesh(MeshConfig(data=2, tensor=4))):
        found = gradients(*arrays)
    pairs = zip(jax.device_get(found), jax.device_get(expected), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def main() -> None:
    """Compare each implementation on each mesh with plain JAX on one device."""
    report = {}
    for name in ("spark", "blockffn", "moe", "lazy", "delta"):
        found, expected = steps(CONFIGS[name], (build_mesh(MeshConfig(expert=4, tensor=2)), None))
        report[f"a step of {name}"] = {
            "distance": float(np.max(np.abs(found[0] - expected[0]))),
            "counts": bool(np.allclose(found[1], expected[1], atol=1e-6)),
        }
    for name, (operation, *arrays) in cases().items():
        expected = jax.jit(partial(operation, implementation="xla"))(*arrays)
        for mesh_name, (config, forms) in MESHES.items():
            for form in forms:
                if (name, form) in ABSENT:
                    continue
                with use_mesh(build_mesh(config)):
                    found = jax.jit(partial(operation, implementation=form))(*arrays)
                ours, wanted = jax.device_get((found, expected))
                report[f"{name}, {form}, {mesh_name}"] = {
                    "distance": float(np.max(np.abs(ours[0] - wanted[0])) / np.max(np.abs(wanted[0]))),
                    "counts": bool(all(np.array_equal(a, b) for a, b in zip(ours[1:], wanted[1:], strict=True))),
                    "pieces": len({str(shard.index) for shard in found[0].addressable_shards}),
                }
    report["gradient of block_ffn_union"] = {"distance": gradients_apart(*cases()["block_ffn_union"])}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
