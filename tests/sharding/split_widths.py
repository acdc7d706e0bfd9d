"""FLOPs of a device for FFN layers on four devices and, with `tensor` 2, on eight; prints both as JSON.

Each device has as many tokens on the one as on the other, so that half the width is half the work. The compiler counts
the body of a loop once, which is the same number of rounds on both.
"""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.common import BuildContext, CallContext, InitConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.mohd import MoHDConfig, RoutedWidth
from sparsezoo_jax.pallas_kernels import without_kernels
from sparsezoo_jax.sharding import MeshConfig, build_mesh, named_sharding, use_mesh

SHAPE, WIDTH = (8, 32), 32
FFNS = {
    "moe": MoEFFNConfig(experts=8, expert_width=64, k=3, shared_experts=1),
    "moe, remoe": MoEFFNConfig(experts=8, expert_width=64, k=3, router="remoe"),
    "moex": MoEXFFNConfig(experts=4, expert_width=256, k=2),
    "blockffn": BlockFFNConfig(experts=16, expert_width=64),
    "mohd": GatedFFNConfig(d_ff=256),
}


def flops(name, mesh):
    """The compiler's count for one device, of a layer's output, statistics and gradients."""
    place, f32 = named_sharding(mesh), jnp.dtype(jnp.float32)
    context = BuildContext(d_model=WIDTH, layers=1, init=InitConfig(), param_dtype=f32, dtype=f32)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: FFNS[name].build(context, nnx.Rngs(0))))

    def placed(variable):
        value, axes = variable.get_value(), variable.get_metadata()["axes"]
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place(axes, value.shape)))

    state = nnx.from_flat_state([(path, placed(variable)) for path, variable in nnx.to_flat_state(state)])
    x = jax.ShapeDtypeStruct((*SHAPE, WIDTH), f32, sharding=place(("batch", "length", None), (*SHAPE, WIDTH)))
    ctx = CallContext(jnp.zeros(SHAPE, jnp.int32), jnp.ones(SHAPE, jnp.int32))
    if name == "mohd":
        routed = jnp.asarray(np.tile([3, 5], (*SHAPE, 1)))
        residual = MoHDConfig(blocks=8, active=4, shared=2)
        ctx = replace(ctx, width=RoutedWidth(residual, routed, routed))

    def layer(state, x):
        y, aux = nnx.merge(graphdef, state)(x, ctx)
        return jnp.sum(jnp.square(y)), aux.stats

    # The compiler counts nothing for native operations.
    with use_mesh(mesh), without_kernels():
        compiled = jax.jit(jax.value_and_grad(layer, argnums=(0, 1), has_aux=True)).lower(state, x).compile()
    return compiled.cost_analysis()["flops"]


def main():
    whole = build_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    split = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    names = sys.argv[1:] or FFNS
    print(json.dumps({name: [flops(name, whole), flops(name, split)] for name in names}))


if __name__ == "__main__":
    main()
