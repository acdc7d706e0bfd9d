"""A feed-forward layer whose hidden units are exactly zero where a ReLU is, with their L1 norm and what it did.

Shapes: B batch, T tokens, D model width, F neurons.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.errors import require
from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP, dispatch, native_cpu, pallas, plain
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.relu_ffn import by_token, gpu, stored, union
from sparsezoo_jax.sharding import constrain, shard_map, sum_shards

__all__ = ["ReluFFN", "Storage", "relu_ffn"]

HIDDEN = ("batch", "length", "ffn")
Storage = stored.Storage


class ReluFFN(NamedTuple):
    """What the layer returns. Only `y` and `l1` have gradients."""

    y: jax.Array
    """[B, T, D] in the dtype of x."""
    l1: jax.Array
    """Sum of the absolute hidden units of each token, float32 [B, T]."""
    active: jax.Array
    """Number of hidden units of each token that are not 0, float32 [B, T]."""
    fired: jax.Array
    """Number of tokens, of those that count, in which each neuron was not 0, float32 [F]."""
    stored: jax.Array
    """1 if all that the backward pass needs was stored, 0 if it computes the scores again; float32 scalar."""
    union: jax.Array
    """Mean share of the neurons that a block of tokens uses, float32 scalar; 1 where all are computed in any case."""


def relu_ffn(
    x: jax.Array,
    gate: jax.Array | None,
    up: jax.Array,
    down: jax.Array,
    where: jax.Array,
    *,
    storage: Storage | None = None,
    implementation: str | None = None,
) -> ReluFFN:
    """`y = h W_down` with `h = max(x W_gate, 0) * (x W_up)`, or `h = max(x W_up, 0)` without a gate.

    Derivatives of the ReLU and of |h| are 0 at 0. Sums over neurons and tokens are float32, whatever the dtype of x.

    Args:
      x: [B, T, D], float32 or bfloat16 (float64 where jax has it).
      gate, up: [D, F] in the dtype of x; gate may be None.
      down: [F, D] likewise.
      where: bool [B, T], the tokens that `fired` counts.
      storage: keep active neurons by their numbers for the backward pass, in place of all. None: all.
      implementation: "xla" computes all neurons; "native" those that a token uses, where they are few
        (`by_token.LARGEST`), for float32 without `storage`; "pallas_gpu", "pallas_gpu_interpret" (see `dispatch`) those
        that a block of tokens uses, where they are fewer than all (`union.LARGEST`), and there a hidden unit counts as
        not 0 where its ReLU is not. None: "native" on a CPU if it can take the arguments, else "xla".

    Raises:
      ConfigError: shapes or dtypes that don't fit, or an implementation that there is not.

    Source: Sparser, Faster, Lighter Transformer Language Models (arXiv 2603.23198), section 2; the L1 norm as its code
    has it, a sum over neurons.
    """
    d, neurons = up.shape
    require(x.ndim == 3 and x.shape[-1] == d, "relu_ffn.x", x.shape, f"must be [B, T, {d}] for up {up.shape}")
    require(gate is None or gate.shape == up.shape, "relu_ffn.gate", gate is None or gate.shape, f"must be {up.shape}")
    require(down.shape == (neurons, d), "relu_ffn.down", down.shape, f"must be {(neurons, d)}")
    require(where.shape == x.shape[:2], "relu_ffn.where", where.shape, f"must be {x.shape[:2]}")
    if storage is None:
        whole = CustomVJP(forward, backward)
        implementations = [plain(whole), native_cpu(by_token.rule(output, backward), by_token.refusal(x))]
    else:
        implementations = [plain(stored.rule(storage, scores, output))]
    if implementation in (None, *(found.name for found in implementations)):
        return dispatch("relu_ffn", implementation, implementations)(x, gate, up, down, where)

    def on_shards(x, gate, up, down, split):
        kernels = pallas("cuda", union.rule(storage), lambda interpret: gpu.refusal(x, up), default=False)
        apply: Any = dispatch("relu_ffn", implementation, [*implementations, *kernels])
        y, l1, z, *shares = apply(x.reshape(-1, d), gate, up, down)
        y, l1, z = (a.reshape(*x.shape[:2], *a.shape[1:]) for a in (y, l1, z))
        means: Any = jax.lax.pmean(tuple(shares), tuple(axis for axes in split.values() for axis in axes))
        sums: Any = sum_shards((y, l1), split["ffn"])
        return *sums, z, *means

    tokens, columns, rows = ("batch", "length", None), (None, "ffn"), ("ffn", None)
    y, l1, z, kept, used = shard_map(
        on_shards, [x, gate, up, down], [tokens, columns, columns, rows], (tokens, tokens[:2], HIDDEN, (), ())
    )
    nonzero = jax.lax.stop_gradient(z > 0)
    return ReluFFN(y, l1, *_counts(nonzero, where), stored=kept, union=used)


def scores(x: jax.Array, gate: jax.Array | None, up: jax.Array) -> tuple[jax.Array, ...]:
    """What hidden units are made of, [B, T, F] each: of the gate and of the map beside it, or of the one map."""
    return tuple(constrain(matmul(x, w), HIDDEN) for w in (gate, up) if w is not None)


def output(parts: tuple[jax.Array, ...], down: jax.Array, where: jax.Array) -> ReluFFN:
    """The layer's results, from `scores`."""
    hidden = jax.nn.relu(parts[0])
    if len(parts) == 2:
        hidden = hidden * parts[1]
    hidden = constrain(hidden, HIDDEN)
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    nonzero = jax.lax.stop_gradient(hidden != 0)
    one = jnp.float32(1)
    l1 = jnp.sum(jnp.abs(wide), axis=-1)
    return ReluFFN(matmul(hidden, down), l1, *_counts(nonzero, where), stored=one, union=one)


def _counts(nonzero: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`active` and `fired`."""
    fired = jnp.sum(nonzero & where[..., None], axis=(0, 1), dtype=jnp.float32)
    return jnp.sum(nonzero, axis=-1, dtype=jnp.float32), fired


def forward(x: jax.Array, gate: jax.Array | None, up: jax.Array, down: jax.Array, where: jax.Array) -> Any:
    """The definition: every neuron of every token; and the scores, which the backward pass reads."""
    parts = scores(x, gate, up)
    return output(parts, down, where), tuple(map(product, parts))


def backward(arrays: Any, parts: tuple[jax.Array, ...], cotangent: ReluFFN) -> tuple[Any, ...]:
    """Gradients of x, gate, up and down, from the scores and the cotangents of y and l1."""
    x, gate, up, down, where = arrays
    _, to_parts = jax.vjp(lambda parts, down: output(parts, down, where)[:2], parts, down)
    d_parts, d_down = to_parts(cotangent[:2])
    _, to_inputs = jax.vjp(scores, x, gate, up)
    return *to_inputs(d_parts), d_down, None
