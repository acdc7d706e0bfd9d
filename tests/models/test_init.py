"""How weights start, where a setting of `model.init` changes that."""

import dataclasses

import numpy as np
from flax import nnx

from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from tests.models.conftest import build


def test_projections_to_the_stream_may_shrink_with_depth():
    config = DecoderConfig(
        vocab_size=11, d_model=8, layers=3, max_seq_len=8, attention=GQAConfig(heads=2, kv_heads=1, head_dim=4),
        ffn=GatedFFNConfig(d_ff=8),
    )  # fmt: skip
    plain = nnx.to_flat_state(nnx.state(build(config), nnx.Param))
    scaled = dict(
        nnx.to_flat_state(
            nnx.state(build(dataclasses.replace(config, init=InitConfig(residual_depth_scaling=True))), nnx.Param)
        )
    )
    written = {"o_NHD", "down_FD"}
    assert written <= {path[-1] for path, _ in plain}
    for path, weights in plain:
        factor = 6**-0.5 if path[-1] in written else 1
        np.testing.assert_allclose(scaled[path][...], factor * weights[...], rtol=1e-6, err_msg=str(path))
