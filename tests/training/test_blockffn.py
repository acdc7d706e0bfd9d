"""What BlockFFN's losses do to the sparsity of a small model: the directions of the paper's ablation (its table 3)."""

import dataclasses

import jax
import numpy as np
import pytest

from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.blockffn import ACTIVATION_LOCALITY, CHUNK_SPARSIFICATION, BlockFFNConfig
from sparsezoo_jax.training.objectives import FixedObjective

from .test_step import setup

TOPICS, VOCAB, ROWS, LENGTH, STEPS = 4, 32, 8, 64, 150
LOCALITY = FixedObjective(loss=ACTIVATION_LOCALITY, weight=1e-2)
CHUNKS = FixedObjective(loss=CHUNK_SPARSIFICATION, weight=0.1)


def batch_of(step):
    """Rows about one topic each, whose tokens come from that topic's own Markov chain."""
    draw = np.random.default_rng(step)
    chains = np.random.default_rng(99).permuted(np.tile(np.arange(VOCAB), (TOPICS, 1)), axis=1)
    topics = draw.integers(0, TOPICS, ROWS)
    tokens = np.empty((ROWS, LENGTH + 1), np.int32)
    tokens[:, 0] = draw.integers(0, VOCAB, ROWS)
    for t in range(LENGTH):
        tokens[:, t + 1] = (chains[topics, tokens[:, t]] + draw.integers(0, 2, ROWS)) % VOCAB
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "mask": np.ones((ROWS, LENGTH), bool),
    }


def sparsity(*objectives, gated=False):
    """TLS and CLS_8, averaged over layers and the last steps of training."""
    config = dataclasses.replace(
        preset("blockffn").model,
        vocab_size=VOCAB,
        d_model=32,
        layers=2,
        attention=GQAConfig(heads=2, kv_heads=1, head_dim=16),
        ffn=BlockFFNConfig(experts=16, expert_width=8, gated=gated, chunk_length=16),
    )
    _, state, step = setup(lambda rngs: Decoder(config, rngs=rngs), objectives=objectives)
    rows = []
    for number in range(STEPS):
        state, row = step(state, batch_of(number))
        rows.append(row)
    found = jax.device_get(rows[-20:])
    assert found[-1]["loss"] < rows[0]["loss"] - 0.5, "the model learns"
    return tuple(1 - np.mean([np.mean(row[name]) for row in found]) for name in ("ffn_density", "chunk_density_8"))


@pytest.fixture(scope="module")
def without():
    return sparsity()


@pytest.fixture(scope="module")
def both():
    return sparsity(LOCALITY, CHUNKS)


@pytest.mark.slow
def test_both_losses_raise_token_and_chunk_sparsity(without, both):
    assert both[0] > without[0] + 0.1
    assert both[1] > without[1] + 0.1


@pytest.mark.slow
def test_locality_alone_closes_the_gap(without):
    tls, cls = sparsity(LOCALITY)
    assert tls - cls < 0.5 * (without[0] - without[1])


@pytest.mark.slow
def test_gated_experts_lower_token_sparsity(both):
    assert sparsity(LOCALITY, CHUNKS, gated=True)[0] < both[0]
