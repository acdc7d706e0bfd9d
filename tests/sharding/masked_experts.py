"""Experts that leave out channels on meshes of eight devices; prints how far they are from one device, as JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.sharding import MeshConfig, build_mesh, use_mesh
from tests.sparsification.test_expert_channels import FORM, sparse_layer
from tests.sparsification.test_formulas import D

MESHES = {"expert 4, tensor 2": {"expert": 4, "tensor": 2}, "data 4, tensor 2": {"data": 4, "tensor": 2}}


def main():
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, D)), jnp.float32)
    ids_BT = jnp.ones((8, 16), jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(16), ids_BT.shape)
    report = {}
    for method in ("teal", "wina", "cats"):
        for name, axes in MESHES.items():
            of = dataclasses.replace(FORM, moved="tokens" if method == "wina" else None)
            graphdef, params, rest = nnx.split(sparse_layer(of, method, dense_tokens=2), nnx.Param, ...)

            def loss(params, x, graphdef=graphdef, rest=rest):
                y, aux = nnx.merge(graphdef, params, rest)(x, CallContext(positions_BT, ids_BT))
                return jnp.sum(jnp.sin(y)), (y, {k: v for k, v in aux.stats.items() if k.startswith("density_")})

            step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
            expected = jax.jit(step)(params, x_BTD)
            with use_mesh(build_mesh(MeshConfig(**axes))):
                found = jax.device_get(jax.jit(step)(params, x_BTD))
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            report[f"{method}, {name}"] = [float(np.abs(a - b).max() / max(np.abs(b).max(), 1)) for a, b in pairs]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
