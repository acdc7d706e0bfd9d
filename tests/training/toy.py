"""A tiny language model, a batch iterator and a config that the training tests share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.schedules import Constant

VOCAB, WIDTH, HIDDEN, LAYERS = 17, 8, 16, 2
BATCH, LENGTH = 4, 6


class Output(NamedTuple):
    logits: jax.Array
    losses: dict
    stats: dict


class Counter(nnx.Variable):
    """Non-parameter state."""


class ToyModel(nnx.Module):
    """Embedding, stacked residual ReLU layers, logits; one auxiliary loss, one statistic, one running counter."""

    def __init__(self, rngs: nnx.Rngs):
        def normal(shape, axes):
            return nnx.Param(0.3 * jax.random.normal(rngs.params(), shape), axes=axes)

        self.embedding = normal((VOCAB, WIDTH), ("vocab", "embed"))
        self.layers = nnx.List([nnx.Dict(norm=nnx.Param(jnp.ones((LAYERS, WIDTH)), axes=("embed",)))])
        self.up = normal((LAYERS, WIDTH, HIDDEN), ("embed", "ffn"))
        self.router = normal((LAYERS, WIDTH, HIDDEN), ("embed", "ffn"))
        self.down = normal((LAYERS, HIDDEN, WIDTH), ("ffn", "embed"))
        self.tokens_seen = Counter(jnp.zeros((), jnp.int32))

    def __call__(self, tokens_BT, *, segment_ids, positions):
        valid = (segment_ids > 0)[..., None].astype(jnp.float32)
        tokens = jnp.maximum(valid.sum(), 1)
        x = self.embedding[...][tokens_BT]
        activation, densities = jnp.float32(0), []
        for layer in range(LAYERS):
            h = x * self.layers[0]["norm"][...][layer]
            h = jax.nn.relu(h @ self.up[...][layer]) * jax.nn.sigmoid(h @ self.router[...][layer])
            x = x + h @ self.down[...][layer]
            activation += jnp.sum(jnp.abs(h) * valid) / tokens / LAYERS
            densities.append(jnp.sum((h > 0) * valid) / tokens / HIDDEN)
        self.tokens_seen[...] = self.tokens_seen[...] + tokens.astype(jnp.int32)
        return Output(x @ self.embedding[...].T, {"activation": activation}, {"ffn_density": jnp.stack(densities)})


class ToyData:
    """Batch n is a function of n alone; mask differs from row to row."""

    def __init__(self, batch=BATCH):
        self.batch, self.n, self.closed = batch, 0, False

    def __next__(self):
        rng = np.random.default_rng(self.n)
        self.n += 1
        tokens = rng.integers(1, VOCAB, (self.batch, LENGTH + 1)).astype(np.int32)
        tokens[:, 1::2] = (3 * tokens[:, ::2][:, : tokens[:, 1::2].shape[1]] + 1) % VOCAB
        lengths = rng.integers(2, LENGTH + 1, (self.batch, 1))
        mask = np.arange(LENGTH)[None] < lengths
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": mask.astype(np.int32),
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), mask.shape).copy(),
            "mask": mask,
        }

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


def config(**changes) -> TrainConfig:
    base = {"steps": 6, "log_every": 1, "schedule": Constant(learning_rate=1e-2, warmup_steps=0)}
    return TrainConfig(**{**base, **changes})
