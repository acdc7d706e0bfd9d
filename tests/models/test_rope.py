"""Rotary position embeddings of local and global layers."""

import dataclasses

import numpy as np
import pytest

from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.models.spark import SparkAttentionConfig
from tests.models.conftest import build, forward

KINDS = {
    "gqa": GQAConfig(heads=2, kv_heads=1, head_dim=8, window=20),
    "mla": MLAConfig(
        heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=8, v_head_dim=8, window=20
    ),
    "spark": SparkAttentionConfig(heads=2, kv_heads=1, head_dim=16, window=20, r=8, top_k=30),
}


@pytest.mark.parametrize("kind", KINDS)
def test_local_layers_may_have_a_base_of_their_own(kind, tokens):
    def logits(layer_type, **rope):
        attention = dataclasses.replace(KINDS[kind], rope=RopeConfig(**rope))
        config = DecoderConfig(
            vocab_size=61, d_model=16, layers=1, max_seq_len=32, layer_pattern=(layer_type,), attention=attention,
            ffn=GatedFFNConfig(d_ff=8),
        )  # fmt: skip
        return forward(build(config))(tokens).logits

    local = logits("local", base=1e4, local_base=30.0)
    np.testing.assert_array_equal(local, logits("local", base=30.0))
    assert np.abs(local - logits("local", base=1e4)).max() > 1e-3
    both = logits("global", base=1e4, local_base=30.0)
    np.testing.assert_array_equal(both, logits("global", base=1e4))
