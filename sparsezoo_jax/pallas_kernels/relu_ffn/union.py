"""The sparse feed-forward layer by unions: blocks of tokens read only the neurons that one of their tokens uses.

The map before the ReLU is computed whole; it says which neurons a token uses. Every other product, forward and
backward, is one of kernels over blocks: of tokens, with the union of the neurons that they use; and for the gradients
of the weights of neurons, with the union of the tokens that use them. Unions are lists of any length, so that nothing
overflows. Where they are not smaller than `LARGEST` on average, the layer is computed whole, by plain products.

Shapes: M tokens, D model width, F neurons, P blocks of tokens, Q blocks of neurons.

Source: Sparser, Faster, Lighter Transformer Language Models (arXiv 2603.23198) skips neurons token by token; by blocks,
products stay those of matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.pallas_kernels.checkpoint_names import product
from sparsezoo_jax.pallas_kernels.dispatch import CustomVJP
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.relu_ffn import gpu, stored

#: Mean share of the neurons in the unions of blocks above which all are computed. By arithmetic the kernels gain a
#: fifth there; it was not measured.
LARGEST = 0.8


class Lists(NamedTuple):
    """For each block, which columns it uses."""

    places: jax.Array
    """Ascending columns, int32 [blocks, columns]; what comes after `count` of them is not to be read."""
    count: jax.Array
    """int32 [blocks]."""


def lists_of(used: jax.Array, block: int) -> Lists:
    """Columns that any row of a block of rows uses; `used` is bool [rows, columns]."""
    rows, columns = used.shape
    blocks = jnp.any(jnp.pad(used, ((0, -rows % block), (0, 0))).reshape(-1, block, columns), axis=1)
    rank = jnp.cumsum(blocks, axis=1, dtype=jnp.int32)
    slot = jnp.where(blocks, rank - 1, columns)
    numbers = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), slot.shape)
    empty = jnp.zeros_like(slot)
    places = jax.vmap(lambda into, where, values: into.at[where].set(values, mode="drop"))(empty, slot, numbers)
    return Lists(places, rank[:, -1])


def share(lists: Lists) -> jax.Array:
    """Mean share of the columns that a block uses, float32."""
    return jnp.mean(lists.count, dtype=jnp.float32) / lists.places.shape[1]


def rule(storage: stored.Storage | None) -> CustomVJP[tuple[jax.Array, ...]]:
    """The layer, of x [M, D], gate or None, up [D, F] and down [F, D].

    It returns the output [M, D], the L1 norms [M], the scores before the ReLU [M, F], whether these were stored, and
    the mean share of the neurons in a union; only the first two have gradients.

    `storage` has the scores kept by the numbers of active neurons for the backward pass; None keeps all.
    """

    def forward(x, gate, up, down, *, interpret):
        (z,) = scores(x, up if gate is None else gate)
        kept: Any = (z,) if storage is None else jax.tree.map(product, stored.pack((z[None],), storage))
        fits = jnp.float32(1) if storage is None else kept.fits.astype(jnp.float32)
        unions = lists_of(z > 0, gpu.tokens_of_a_block(z.dtype))
        rows = (None if gate is None else up.T, down)

        def by_unions():
            return gpu.forward(x, z, *rows, *unions, interpret=interpret)

        used = share(unions)
        y, l1 = jax.lax.cond(used <= LARGEST, by_unions, lambda: whole(x, z, gate, up, down))
        return (y, l1, z, fits, used), kept

    def backward(arrays, kept, cotangent, *, interpret):
        x, gate, up, down = arrays
        first = up if gate is None else gate
        if storage is None:
            (z,) = kept
        else:
            again = lambda: scores(x, first)  # noqa: E731
            (z,) = jax.lax.cond(kept.fits, lambda: (stored.unpack(kept, up.shape[1])[0][0],), again)
        d_y, d_l1 = cotangent[:2]
        used = z > 0
        unions = lists_of(used, gpu.tokens_of_a_block(z.dtype))
        # Blocks of neurons, with the tokens that use them.
        tokens = lists_of(used.T, gpu.neurons_of_a_block(z.dtype))

        def by_unions():
            second = None if gate is None else up.T
            found = gpu.backward(x, z, first.T, second, down, d_y, d_l1, unions, tokens, interpret=interpret)
            d_x, d_first, d_second, d_down = found
            return (d_x, None, d_first.T, d_down) if gate is None else (d_x, d_first.T, d_second.T, d_down)

        def by_all():
            def function(x, gate, up, down):
                return whole(x, *scores(x, up if gate is None else gate), gate, up, down)

            return jax.vjp(function, x, gate, up, down)[1]((d_y, d_l1))

        return jax.lax.cond(share(unions) <= LARGEST, by_unions, by_all)

    return CustomVJP(forward, backward)


def scores(x: jax.Array, first: jax.Array) -> tuple[jax.Array]:
    """What is before the ReLU, [M, F]."""
    return (matmul(x, first),)


def whole(x: Any, z: Any, gate: Any, up: Any, down: Any) -> tuple[jax.Array, jax.Array]:
    """The output and the L1 norms, of all neurons."""
    hidden = jax.nn.relu(z)
    if gate is not None:
        hidden = hidden * matmul(x, up)
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return matmul(hidden, down), jnp.sum(jnp.abs(wide), axis=-1)
