"""FLOPs per token against the Spark paper's accounting."""

import dataclasses

import pytest

from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import flops_per_token
from sparsezoo_jax.models.ffn import GatedFFNConfig

DENSE, SPARK = preset("dense", "gemma2_2b").model, preset("spark", "2b").model
FFN_ONLY = dataclasses.replace(SPARK, attention=DENSE.attention)


def test_ffn():
    assert SPARK.ffn.flops(2304) == 36_239_360
    assert DENSE.ffn.flops(2304) == 127_401_984
    assert DENSE.ffn.flops(2304) / SPARK.ffn.flops(2304) == pytest.approx(3.516, abs=1e-3)
    # A multiply-add reads one weight: at batch 1 in bfloat16, bytes of weights read equal FLOPs.
    assert SPARK.ffn.flops(2304) / 2 * 2 == pytest.approx(36.2e6, rel=2e-3)


def test_gemma3n_gate_is_computed_whole():
    dense = GatedFFNConfig(d_ff=1000)
    sparse = GatedFFNConfig(d_ff=1000, activation_sparsity_pattern=(0.95,))
    assert dense.flops(100) == 600_000
    assert sparse.flops(100) == pytest.approx(200_000 + 400_000 * 0.05)


def test_attention():
    assert DENSE.attention.mixing_flops(8192) == 67_108_864
    assert SPARK.attention.mixing_flops(8192) == 18_350_080
    assert SPARK.attention.mixing_flops(100) == DENSE.attention.mixing_flops(100), "few keys: nothing to save"
    assert DENSE.attention.projection_flops(2304) == pytest.approx(28.31e6, rel=1e-3)


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
