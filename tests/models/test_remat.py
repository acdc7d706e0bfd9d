"""What each rematerialisation policy keeps for the backward pass, and that none of them changes a number."""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals  # private: nothing public tells what a policy keeps
from jax.ad_checkpoint import checkpoint_name

from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.altup import AltUpConfig
from sparsezoo_jax.models.decoder import call_context
from sparsezoo_jax.models.layers import Passed
from sparsezoo_jax.models.per_layer import PerLayerConfig
from sparsezoo_jax.models.remat import rematerialised
from sparsezoo_jax.models.routers import top_1
from sparsezoo_jax.pallas_kernels.checkpoint_names import ATTENTION, product
from tests.models.conftest import CONFIGS, build

B, T = 2, 16


def kept(name, remat):
    """Numbers a token of each array that one layer of a sample keeps beside its inputs; nothing is computed."""
    # The last layer: of the samples whose layers differ, one like the others.
    spec = CONFIGS[name].layer_specs()[-1]
    alike = dataclasses.replace(CONFIGS[name], first_layers=0, first_ffn=None)
    alone = {"kv_shared_layers": 0, "altup": AltUpConfig(), "per_layer": PerLayerConfig()}
    config = dataclasses.replace(alike, layers=1, layer_pattern=(spec.layer_type,), ffn=spec.ffn, **alone)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).unstacked())
    graphdef, state = nnx.split(model.segments[0])
    x_BTD = jax.ShapeDtypeStruct((B, T, config.d_model), jnp.float32)
    gate = config.ffn.pre_gate(config)
    chosen = None if gate is None else top_1(jnp.zeros((B, T, gate.experts)))

    def layer(x_BTD, tokens, state):
        ctx = call_context(model.config, tokens)
        ctx.experts = chosen
        run = lambda x_BTD, state: nnx.merge(graphdef, state)(Passed(x_BTD), ctx, None, scan=False, remat="none")[0]  # noqa: E731
        return rematerialised(run, remat)(x_BTD, state)

    found = saved_residuals(layer, x_BTD, jax.ShapeDtypeStruct((B, T), jnp.int32), state)
    # A mask, positions and segments of the tokens are inputs, too, and so are constants, such as chosen experts.
    own = [x for x, source in found if "argument" not in source and "constant" not in source]
    arrays = [x for x in own if x.shape[:2] == (B, T) and x.dtype == jnp.float32]
    return sorted(math.prod(x.shape) // (B * T) for x in arrays)


# Of each sample of 24 columns: attention's projections, then what its feed-forward network and routers multiply.
# The last product of a layer is missing where only a sum reads it, whose gradient needs no value.
PRODUCTS = {
    "gemma2": ([32, 16, 16, 24], [32, 32, 24]),
    "spark": ([32, 16, 16, 24], [48, 48, 24], [1, 1]),  # and two statistics of the scores
    "llama": ([32, 16, 16, 24], [32, 32]),
    "gpt2": ([24, 24, 24, 24], [32]),
    "lazy": ([16, 16, 16, 24], [32]),
    "blockffn": ([16, 12 + 4, 3 * 12, 3 * 14, 24], [8, 48]),
    "delta": ([16, 16, 16, 24], [32, 32]),  # products of rounded numbers
    "deco": ([16, 16, 16, 24], [8, 48, 12, 12]),
    # The experts' hidden units are computed again whatever the policy.
    "moe": ([16, 8, 8, 24], [6, 8, 8]),
    "moex": ([24, 24, 24, 24], [8, 8]),
    "mohd": ([16, 8, 8, 24], [32, 32, 24], [6, 24, 24, 6, 24]),
    "readme": ([16, 8, 8, 24], [12, 12]),  # of the shared neurons
    "sparselm": ([16, 16, 16, 24], [20, 20]),  # scores of up to 20 neurons a token, in the place of 32
    "sparsified": ([16, 8, 8, 24], [32, 32]),
    "gemma3n": ([16, 8, 8, 24], [64, 64]),
    "altup": ([16, 8, 8, 24], [3, 24], [32, 32, 24]),  # and the low-rank map of LAuReL
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_dots_keeps_products_and_attention_full_the_inputs_only(name):
    attention = CONFIGS[name].attention
    attention = getattr(attention, "of", attention)
    mixed = attention.heads * getattr(attention, "v_head_dim", getattr(attention, "head_dim", 0))
    assert kept(name, "full") == []
    assert kept(name, "attention") == [mixed]
    assert kept(name, "dots") == sorted(itertools.chain([mixed], *PRODUCTS[name]))


def test_every_sample_is_listed():
    assert PRODUCTS.keys() == CONFIGS.keys()


def test_attention_and_offload():
    def layer(x):
        mixed = checkpoint_name(jnp.sin(x), ATTENTION)
        return jnp.sin(product(jnp.sin(mixed)))

    def found(remat):
        return [str(x) for x, _ in saved_residuals(rematerialised(layer, remat), jnp.ones(3))]

    assert found("full") == ["float32[3]"], "the argument"
    assert found("attention") == ["float32[3]"] * 2
    assert found("dots") == ["float32[3]"] * 3
    assert found("offload") == ["float32[3]", "float32<host>[3]", "float32<host>[3]"]


@pytest.mark.slow
def test_no_policy_changes_a_gradient():
    config, tokens = CONFIGS["spark"], jax.random.randint(jax.random.key(0), (B, T), 0, 61)

    def gradient(remat):
        graphdef, state = nnx.split(build(dataclasses.replace(config, remat=remat)))
        loss = lambda state: jnp.mean(jnp.square(nnx.merge(graphdef, state)(tokens).logits))  # noqa: E731
        return jax.jit(jax.grad(loss))(state)

    plain = gradient("none")
    for remat in ("full", "attention", "dots", "offload"):
        check = partial(np.testing.assert_allclose, atol=1e-5, err_msg=remat)
        jax.tree.map(check, gradient(remat), plain)
