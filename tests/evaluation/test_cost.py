"""Costs by context length."""

import dataclasses

import pytest

from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation import cost_table
from sparsezoo_jax.models import Sparsity, bytes_per_token, flops_per_token

SPARK, DENSE = preset("spark", "2b").model, preset("dense", "gemma2_2b").model


def test_the_papers_accounting():
    costs = {(c.context, c.variant): c for c in cost_table(SPARK, (512, 8192))}
    assert set(costs) == {(n, v) for n in (512, 8192) for v in ("dense", "configured")}
    assert costs[8192, "dense"].flops_mean == pytest.approx(4.812e9, rel=3e-4)
    assert costs[8192, "configured"].flops_mean == pytest.approx(1.909e9, rel=3e-4)
    assert costs[512, "dense"].flops_last == pytest.approx(4.158e9, rel=3e-4)
    assert costs[512, "configured"].flops_last == pytest.approx(1.746e9, rel=3e-4)
    ffn_only = dataclasses.replace(SPARK, attention=DENSE.attention)
    assert cost_table(ffn_only, (8192,))[1].flops_mean == pytest.approx(2.442e9, rel=3e-4)


def test_measured_rows():
    measured = Sparsity((1000,) * 26, (200,) * 26)
    dense, configured, found = cost_table(SPARK, (4096,), measured)
    assert [c.variant for c in (dense, configured, found)] == ["dense", "configured", "measured"]
    assert (
        found.flops_mean == flops_per_token(SPARK, 4096, sparsity=measured) < configured.flops_mean < dense.flops_mean
    )
    assert found.flops_last == flops_per_token(SPARK, 4096, position="last", sparsity=measured)
    assert found.bytes_last == bytes_per_token(SPARK, 4096, sparsity=measured) < configured.bytes_last


def test_a_dense_model_is_its_own_twin():
    (only,) = cost_table(DENSE, (8192,))
    assert (only.variant, only.flops_mean) == ("configured", pytest.approx(4.812e9, rel=3e-4))
    with pytest.raises(ConfigError, match="--contexts=0: must be above 0"):
        cost_table(DENSE, (0,))
