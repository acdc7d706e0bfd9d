"""Experts on a mesh that sends tokens to them; prints the distance from one device, of its size, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn
from sparsezoo_jax.pallas_kernels.grouped_ffn.exchange import ROOM
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, use_mesh

EXPERTS, K, WIDTH, NEURONS = 8, 2, 16, 12
AXES = {"x": ("batch", "length", None), "up": ("experts", "embed", "ffn"), "down": ("experts", "ffn", "embed")}


def fullest(experts, devices, groups):
    """Rows that a device would receive, at most, of those for which it has room."""
    groups = experts.reshape(groups, -1) // (EXPERTS // devices)
    return max(np.bincount(group).max() * devices / (ROOM * group.size) for group in groups)


def main():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 64, WIDTH)), jnp.float32)
    up, gate = (jnp.asarray(rng.normal(size=(EXPERTS, WIDTH, NEURONS)), jnp.float32) for _ in range(2))
    down = jnp.asarray(rng.normal(size=(EXPERTS, NEURONS, WIDTH)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=(8, 64, K)), jnp.float32)
    even = np.argsort(rng.normal(size=(8, 64, EXPERTS)), axis=-1)[..., :K]
    choices = {"even": even, "crowded": even % 3}  # all tokens to the devices of the first three experts
    meshes = {"expert 4, tensor 2": {"expert": 4, "tensor": 2}, "data 2, expert 4": {"data": 2, "expert": 4}}
    report = {}
    for (choice, experts), (name, axes) in zip(choices.items(), meshes.items(), strict=True):
        for form in ("ragged", "native"):

            def loss(x, weights, up, down, gate, experts=experts, form=form):
                y, active = grouped_ffn(
                    x, jnp.asarray(experts), weights, up, down, gate, activation=jax.nn.relu, return_active=True,
                    implementation=form, moved="tokens",
                )  # fmt: skip
                return jnp.sum(jnp.sin(y)), (y, active)

            step = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
            expected = jax.jit(step)(x, weights, up, down, gate)
            mesh = build_mesh(MeshConfig(**axes))
            place = named_sharding(mesh)
            names = (AXES["x"], AXES["x"], AXES["up"], AXES["down"], AXES["up"])
            arrays = [
                jax.device_put(a, place(names, a.shape))
                for a, names in zip((x, weights, up, down, gate), names, strict=True)
            ]
            with use_mesh(mesh):
                found = jax.device_get(jax.jit(step)(*arrays))
                text = str(jax.make_jaxpr(step)(*arrays))
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            report[f"{choice}, {form}, {name}"] = {
                "distances": [float(np.abs(a - b).max() / max(np.abs(b).max(), 1)) for a, b in pairs],
                "sends": "ragged_all_to_all" in text,
                "fullest": fullest(experts, axes["expert"], axes.get("data", 1)),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
