"""FLOPs per token against the Spark paper's accounting."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import (
    Sparsity,
    activated_parameters,
    bytes_per_token,
    count_parameters,
    dense_twin,
    flops_per_token,
)
from sparsezoo_jax.models.accounting import abstract_decoder
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.training.optimizers import is_embedding, is_matrix
from tests.models.conftest import CONFIGS

DENSE, SPARK = preset("dense", "gemma2_2b").model, preset("spark", "2b").model
FFN_ONLY = dataclasses.replace(SPARK, attention=DENSE.attention)


def test_ffn():
    assert SPARK.ffn.flops(2304) == 36_239_360
    assert DENSE.ffn.flops(2304) == 127_401_984
    assert DENSE.ffn.flops(2304) / SPARK.ffn.flops(2304) == pytest.approx(3.516, abs=1e-3)


def test_gemma3n_gate_is_computed_whole():
    dense = GatedFFNConfig(d_ff=1000)
    sparse = GatedFFNConfig(d_ff=1000, activation_sparsity_pattern=(0.95,))
    assert dense.flops(100) == 600_000
    assert sparse.flops(100) == pytest.approx(200_000 + 400_000 * 0.05)


@pytest.mark.parametrize("name", ["altup", "gemma2"])
def test_weights_are_those_of_all_matrices(name):
    config = CONFIGS[name]
    matrices = {
        "/".join(map(str, path)): math.prod(variable.shape)
        for path, variable in nnx.to_flat_state(nnx.state(abstract_decoder(config), nnx.Param))
        if is_matrix(variable) and not is_embedding(variable)
    }
    assert activated_parameters(config).layers == sum(matrices.values()), matrices


def test_attention():
    assert DENSE.attention.mixing_flops(8192) == 67_108_864
    assert SPARK.attention.mixing_flops(8192) == 18_350_080
    assert SPARK.attention.mixing_flops(100) == DENSE.attention.mixing_flops(100), "few keys: nothing to save"
    assert DENSE.attention.projection_flops(2304) == pytest.approx(28.31e6, rel=1e-3)


@pytest.mark.parametrize("output_bias", [None, True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_biases_of_projections(bias, output_bias):
    config = GQAConfig(heads=4, kv_heads=2, head_dim=8, bias=bias, output_bias=output_bias)
    layer = jax.eval_shape(lambda: config.build(DENSE.build_context(), nnx.Rngs(0)))
    parameters = jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert config.projection_weights(DENSE.d_model) == sum(math.prod(x.shape) for x in parameters)


@pytest.mark.parametrize(
    ("context", "position", "logits", "dense", "ffn_only", "spark"),
    [
        (8192, "mean", False, 4.812, 2.442, 1.909),
        (8192, "last", False, 5.357, 2.987, 2.046),
        (4096, "last", False, 4.921, 2.551, 1.937),
        (8192, "mean", True, 5.992, 3.621, 3.089),
        (512, "last", False, 4.158, 1.787, 1.746),
    ],
)
def test_whole_model(context, position, logits, dense, ffn_only, spark):
    counted = [flops_per_token(c, context, position=position, logits=logits) / 1e9 for c in (DENSE, FFN_ONLY, SPARK)]
    assert counted == pytest.approx([dense, ffn_only, spark], abs=1.5e-3)
    if (context, position, logits) == (8192, "mean", False):
        assert counted[0] / counted[2] == pytest.approx(2.52, abs=0.01)


def test_weight_bytes():
    # bfloat16, one layer: K1 whole, K2's columns and V's rows of the active neurons.
    spark, dense = 2 * SPARK.ffn.weights(2304), 2 * DENSE.ffn.weights(2304)
    assert 2 * SPARK.ffn.weights(2304, active=0) == pytest.approx(28.3e6, rel=2e-3)
    assert spark - 2 * SPARK.ffn.weights(2304, active=0) == pytest.approx(7.9e6, rel=5e-3)
    assert (spark, dense) == pytest.approx((36.2e6, 127.4e6), rel=2e-3)
    assert 2 * SPARK.ffn.weights(2304, active=13_824) == dense, "all neurons active: the dense twin's bytes"


def test_cache_reads():
    # Per key/value head: 128 predictor dimensions of all keys, 384 of key and value for each of 2 x 256 attended rows.
    assert SPARK.attention.cache_reads(8192) == 4 * (128 * 8192 + 384 * 512)
    assert DENSE.attention.cache_reads(8192) == 4 * 512 * 8192
    assert SPARK.attention.cache_reads(300) == DENSE.attention.cache_reads(300), "both heads' keys may be all there are"
    unweighted = dataclasses.replace(SPARK.attention, weighting="none")
    assert unweighted.cache_reads(8192) == 4 * (128 * 8192 + 256 * 512)


def test_bytes_of_the_whole_model():
    layer = 2 * 2304 * 256 * 12 + SPARK.ffn.weights(2304)
    cache = 13 * (SPARK.attention.cache_reads(8192) + SPARK.attention.cache_reads(4096))
    assert bytes_per_token(SPARK, 8192) == 2 * (26 * layer + cache)
    assert bytes_per_token(SPARK, 8192, logits=True) - bytes_per_token(SPARK, 8192) == 2 * 2304 * 256_128
    assert bytes_per_token(dataclasses.replace(SPARK, dtype="float32"), 64) == 2 * bytes_per_token(SPARK, 64)


def test_measured_sparsity_takes_the_place_of_the_aim():
    aim = Sparsity((1106,) * 26, (256,) * 26)
    for count in (flops_per_token, bytes_per_token):
        assert count(SPARK, 8192, sparsity=aim) == count(SPARK, 8192)
        unknown = Sparsity((None,) * 26, (None,) * 26)
        assert count(SPARK, 8192, sparsity=unknown) == count(SPARK, 8192)
    one_more = Sparsity((1107, *(1106,) * 25), (256,) * 26)
    assert flops_per_token(SPARK, 8192, sparsity=one_more) - flops_per_token(SPARK, 8192) == 2 * (2 * 2304 - 1024)
    fewer_keys = Sparsity((1106,) * 26, (200, *(256,) * 25))
    saved = flops_per_token(SPARK, 8192, position="last") - flops_per_token(
        SPARK, 8192, position="last", sparsity=fewer_keys
    )
    assert saved == 2 * 8 * (2 * 256 - 128) * 56


def test_dense_twin():
    twin = dense_twin(SPARK)
    assert (twin.ffn, twin.attention) == (DENSE.ffn, DENSE.attention)
    assert count_parameters(twin).non_embedding == count_parameters(SPARK).non_embedding
    assert dense_twin(DENSE) == DENSE
    assert dense_twin(dataclasses.replace(SPARK, ffn=dataclasses.replace(SPARK.ffn, d_ff=13_825))) is None
    assert flops_per_token(twin, 8192) == flops_per_token(DENSE, 8192)


def test_selection_by_sign_has_no_aim():
    positive = dataclasses.replace(SPARK.ffn, selection="relu")
    assert positive.target_active is None
    assert positive.flops(2304) == DENSE.ffn.flops(2304), "how many are positive is not configured: all are counted"
