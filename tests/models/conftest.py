"""Small decoders of every kind, built once a session. A kind without one fails `test_decoder`."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.altup import AltUpConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.common import InitConfig
from sparsezoo_jax.models.deco import DECOConfig
from sparsezoo_jax.models.delta_ffn import DeltaFFNConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.laurel import LaurelConfig
from sparsezoo_jax.models.masks import ActivationSparsity
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.mohd import MoHDConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.per_layer import PerLayerConfig
from sparsezoo_jax.models.readme import ReadMEFFNConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig
from sparsezoo_jax.models.sparselm import SparseLMFFNConfig
from sparsezoo_jax.models.sparsified import SparsifiedAttentionConfig, SparsifiedFFNConfig

BASE = {"vocab_size": 61, "d_model": 24, "layers": 5, "max_seq_len": 48}
TWO = {**BASE, "layers": 2}  # where all layers are alike
GEMMA = {
    "residual": PreNormConfig(post_norm=True),
    "norm": NormConfig(zero_centered=True),
    "embedding_scale": "sqrt_d_model",
    "final_softcap": 30.0,
    "layer_pattern": ("local", "global"),
}

SPARSITY = ActivationSparsity(
    maps=("q", "k", "o", "gate", "down"), target=0.5, gate="top_k", weighted=("k", "down"), dense_tokens=2
)

CONFIGS = {
    "gemma2": DecoderConfig(
        **BASE,
        **GEMMA,
        attention=GQAConfig(heads=4, kv_heads=2, head_dim=8, window=7, softcap=50.0),
        ffn=GatedFFNConfig(d_ff=32),
    ),
    "spark": DecoderConfig(
        **TWO,
        **GEMMA,
        attention=SparkAttentionConfig(heads=4, kv_heads=2, head_dim=8, window=12, softcap=50.0, r=4, top_k=6),
        ffn=SparkFFNConfig(d_ff=48, top_k=5, r=12),
    ),
    "blockffn": DecoderConfig(
        **TWO,
        attention=MLAConfig(
            heads=3, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
        ),
        ffn=BlockFFNConfig(experts=8, expert_width=6, chunk_length=16),
        residual=PreNormConfig(scale=0.6),
        norm=NormConfig(eps=1e-5),
        embedding_scale=12.0,
        logit_divisor=2.0,
        tie_embeddings=False,
        init=InitConfig(kind="fixed", scale=0.1, width_base=256, embedding_std=0.1, output_std=0.1),
    ),
    "deco": DecoderConfig(
        **{**BASE, "layers": 3},
        attention=GQAConfig(heads=2, kv_heads=2, head_dim=8),
        first_layers=1,
        first_ffn=GatedFFNConfig(d_ff=32, activation="silu"),
        ffn=DECOConfig(experts=8, expert_width=6, shared_width=12),
        norm=NormConfig(eps=1e-5),
    ),
    "llama": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=4, kv_heads=2, head_dim=8, qk_norm=True, rope=RopeConfig(fraction=0.5, base=5e5)),
        ffn=GatedFFNConfig(d_ff=32, activation="silu"),
        norm=NormConfig(eps=1e-5),
        tie_embeddings=False,
    ),
    "gpt2": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=6, rope=None, bias=True),
        ffn=PlainFFNConfig(d_ff=32, bias=True),
        norm=NormConfig(kind="layer", bias=True),
        learned_positions=True,
    ),
    "lazy": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=2, kv_heads=2, head_dim=8),
        ffn=PlainFFNConfig(d_ff=32, activation="relu", top_k=9),
    ),
    "delta": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=2, kv_heads=2, head_dim=8),
        ffn=DeltaFFNConfig(d_ff=32, gated=True, rounded="both", step_init=0.3),
    ),
    "moe": DecoderConfig(
        **{**BASE, "layers": 3},
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
        first_layers=1,
        first_ffn=GatedFFNConfig(d_ff=16, activation="silu"),
        ffn=MoEFFNConfig(
            experts=7,
            expert_width=8,
            k=3,
            router="ling",
            shared_experts=1,
            groups=3,
            kept_groups=2,
            gated=True,
            routed_scale=2.5,
            router_std=0.3,
        ),
    ),
    "moex": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=4, kv_heads=4, head_dim=6, rope=None),
        ffn=MoEXFFNConfig(expert_width=12),
        norm=NormConfig(kind="layer"),
        learned_positions=True,
    ),
    "mohd": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
        ffn=GatedFFNConfig(d_ff=32, activation="silu"),
        residual=MoHDConfig(blocks=6, active=4, shared=2, router_std=0.5, masked_head=True),
        norm=NormConfig(eps=1e-5),
        init=InitConfig(kind="fixed", scale=0.1, embedding_std=1.0),
    ),
    "readme": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
        ffn=ReadMEFFNConfig(
            experts=3, expert_width=8, shared_width=12, router_width=16, router_heads=2, router_d_ff=12
        ),
        norm=NormConfig(eps=1e-5),
    ),
    "sparselm": DecoderConfig(
        **TWO,
        attention=GQAConfig(heads=2, kv_heads=2, head_dim=8, rope=RopeConfig(base=1e5)),
        ffn=SparseLMFFNConfig(d_ff=32, stored_neurons=20),
        norm=NormConfig(eps=1e-5),
    ),
    "sparsified": DecoderConfig(
        **TWO,
        attention=SparsifiedAttentionConfig(of=GQAConfig(heads=2, kv_heads=1, head_dim=8), sparsity=SPARSITY),
        ffn=SparsifiedFFNConfig(of=GatedFFNConfig(d_ff=32, activation="silu"), sparsity=SPARSITY),
    ),
    "gemma3n": DecoderConfig(
        **BASE,
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=8),
        ffn=GatedFFNConfig(d_ff=64, activation_sparsity_pattern=(0.9, 0.9, 0.0, 0.0, 0.0)),
    ),
    "altup": DecoderConfig(  # the other parts of Gemma 3n
        **{**BASE, "layers": 4},
        **{**GEMMA, "residual": LaurelConfig(rank=3), "norm": NormConfig()},
        attention=GQAConfig(
            heads=2,
            kv_heads=1,
            head_dim=8,
            window=7,
            rope=RopeConfig(base=1e6, local_base=1e4),
            qk_norm=True,
            value_norm=True,
            query_scale=1.0,
        ),
        ffn=GatedFFNConfig(d_ff=32),
        altup=AltUpConfig(streams=3),
        per_layer=PerLayerConfig(width=5, vocab_size=59),
        kv_shared_layers=2,
    ),
}


@cache
def initialised(config: DecoderConfig):
    graphdef, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    # Masks that leave nothing out, as they start, would test nothing.
    cuts = {path: variable for path, variable in nnx.to_flat_state(state) if path[-1] == "cut_P"}
    for variable in cuts.values():
        variable.set_value(jnp.full(variable.get_value().shape, 0.5))
    return graphdef, state


def build(config: DecoderConfig) -> Decoder:
    """A new decoder; its initial weights, which take longer to make than most calls of it, are made once."""
    return nnx.merge(*initialised(config), copy=True)


def with_weights_of(config: DecoderConfig, model: Decoder) -> Decoder:
    """The decoder of another configuration with all variables of `model`."""
    other = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(model))
    return other


def forward(model: Decoder):
    """The model's call, jitted over everything but its structure."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, tokens, **kwargs: nnx.merge(graphdef, state)(tokens, **kwargs))

    def run(tokens, *, segment_ids=None, **kwargs):
        # Given always, so that calls with and without them are one program.
        segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
        return call(state, tokens, segment_ids=segment_ids, **kwargs)

    return run


@pytest.fixture(scope="session", params=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def model(config):
    return build(config)


@pytest.fixture(scope="session")
def run(model):
    return forward(model)


@pytest.fixture(scope="session")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 30), 0, 61)


@pytest.fixture(scope="session")
def output(run, tokens):
    return run(tokens)
