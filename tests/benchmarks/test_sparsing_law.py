"""The runs of the Sparsing Law benchmark are what its tables say they are."""

from typing import Any

import pytest

from benchmarks.sparsing_law import PARAMETERS, SHAPES, flags
from sparsezoo_jax import cli
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.models import count_parameters


@pytest.mark.parametrize("layers", SHAPES)
def test_shapes_have_equal_parameters_and_no_loss_but_cross_entropy(layers):
    given = {**flags("relu", layers, SHAPES[layers], 100, 10), "arch": "prosparse"}
    args = [
        text
        for name, value in given.items()
        for text in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    config = cli.parse_with_preset(RunConfig, args, prog="train", description="")
    ffn: Any = config.model.ffn
    assert config.model.layers == layers
    assert count_parameters(config.model).non_embedding == pytest.approx(PARAMETERS, rel=1e-3)
    assert not config.train.objectives
    assert (ffn.l1, ffn.threshold, ffn.activation) == (False, 0, "relu")
    assert (config.train.steps, config.train.checkpoint_every, config.train.keep_last) == (100, 10, 10)
