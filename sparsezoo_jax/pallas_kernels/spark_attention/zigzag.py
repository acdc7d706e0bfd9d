"""Zigzag: which pieces of a split sequence each device attends for, so that all have the same work.

A sequence over n devices is 2n equal pieces. Device i holds pieces 2i and 2i + 1, and attends for pieces i and
2n - 1 - i: under a causal mask every such pair sees equally many keys.

Source: the zigzag order of ring attention's public implementations; here keys are gathered, and queries move.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layout(NamedTuple):
    """How a sequence lies over a mesh axis; methods are called within a `shard_map` over it."""

    axis: str
    devices: int
    own: int
    """Tokens on a device, even where anything is exchanged."""

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.devices * self.own

    @property
    def even(self) -> bool:
        """Whether a device's tokens are two equal pieces."""
        return self.own % 2 == 0

    @property
    def contiguous(self) -> tuple[tuple[int, ...], ...]:
        """For each device the place where its tokens begin, as the sequence is stored."""
        return tuple((i * self.own,) for i in range(self.devices))

    @property
    def zigzag(self) -> tuple[tuple[int, ...], ...]:
        """For each device the places where its two pieces begin, after `exchanged`."""
        pieces: list[tuple[int, ...]] = [() for _ in range(self.devices)]
        for moves in self._moves:
            for piece, _, device in moves:
                pieces[device] += (piece * (self.own // 2),)
        return tuple(pieces)

    @property
    def _moves(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """For first and for second halves: piece, device that holds it, device that attends for it."""
        pieces = range(2 * self.devices)
        moves = [(p, p // 2, min(p, len(pieces) - 1 - p)) for p in pieces]
        return moves[::2], moves[1::2]

    def exchanged(self, x_BT: jax.Array) -> jax.Array:
        """Each device's pieces of an array [B, T, ...] that is stored contiguously; differentiable."""
        return self._permuted(x_BT, back=False)

    def returned(self, x_BT: jax.Array) -> jax.Array:
        """The inverse of `exchanged`."""
        return self._permuted(x_BT, back=True)

    def _permuted(self, x_BT: jax.Array, *, back: bool) -> jax.Array:
        halves = jnp.split(x_BT, 2, axis=1)
        moved = []
        for half, moves in zip(halves, self._moves, strict=True):
            pairs = [(to, source) if back else (source, to) for _, source, to in moves]
            moved.append(jax.lax.ppermute(half, self.axis, pairs))
        return jnp.concatenate(moved, axis=1)
