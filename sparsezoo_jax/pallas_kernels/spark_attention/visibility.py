"""Which keys a query may see, without an array of one entry for every pair of them."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_positions_BT", "key_positions_BS", "query_segments_BT", "key_segments_BS", "part_B"),
    meta_fields=("window", "ordered", "parts"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """A query sees the keys of its own segment at its own position and before, `window` of them at most.

    The rule of causal attention over packed documents, and over a cache whose empty slots have a segment that no query
    has. Shapes: B batch, T query position, S key position.
    """

    query_positions_BT: jax.Array
    """int32, comparable with the keys' within a segment."""
    key_positions_BS: jax.Array
    query_segments_BT: jax.Array
    """int32, equal to those of the keys that may be seen."""
    key_segments_BS: jax.Array
    window: int | None = None
    """Keys at this distance or farther are not seen; None: no such limit."""
    ordered: bool = False
    """Queries and keys are those of the same tokens and positions are their places, so that T = S and nothing behind
    the diagonal is visible: kernels then don't even look there."""
    parts: tuple[tuple[int, ...], ...] | None = None
    """Where the queries are one of several parts of an ordered sequence, and the keys all of it: for each part the
    places at which its pieces, equally long, begin. Kernels then look at no more than their own part can see."""
    part_B: jax.Array | None = None
    """Which of `parts` the queries are, int32, the same for all sequences."""

    @classmethod
    def of_tokens(cls, segments_BT: jax.Array, window: int | None = None) -> Visibility:
        """The visibility of causal self-attention over a sequence with these segments [B, T]."""
        places_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
        return cls(
            query_positions_BT=places_BT,
            key_positions_BS=places_BT,
            query_segments_BT=segments_BT,
            key_segments_BS=segments_BT,
            window=window,
            ordered=True,
        )

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Positions of queries and keys, segments of queries and keys."""
        return self.query_positions_BT, self.key_positions_BS, self.query_segments_BT, self.key_segments_BS

    def replaced(self, *arrays: jax.Array, ordered: bool) -> Visibility:
        """The same rule over other positions and segments, in the order of `arrays`."""
        names = ("query_positions_BT", "key_positions_BS", "query_segments_BT", "key_segments_BS")
        return dataclasses.replace(self, ordered=ordered, **dict(zip(names, arrays, strict=True)))

    def part_of(self, parts: tuple[tuple[int, ...], ...], index: jax.Array) -> Visibility:
        """The same, whose queries are number `index` of these `parts` of the sequence that the keys are."""
        batch = self.query_positions_BT.shape[0]
        return dataclasses.replace(self, ordered=False, parts=parts, part_B=jnp.broadcast_to(index, (batch,)))

    def within(self, window: int | None) -> Visibility:
        """The same positions and segments under another window."""
        return dataclasses.replace(self, window=window)

    @property
    def mask(self) -> jax.Array:
        """Booleans [B, T, S], true where the query may see the key."""
        queries, keys = (slice(None), slice(None), None), (slice(None), None, slice(None))
        return sees(
            self.query_positions_BT[queries],
            self.key_positions_BS[keys],
            self.query_segments_BT[queries],
            self.key_segments_BS[keys],
            self.window,
        )

    @property
    def pairs(self) -> float:
        """Queries and keys of a sequence that see each other, as far as shapes tell: all, or those of one document."""
        queries, keys = self.query_positions_BT.shape[1], self.key_positions_BS.shape[1]
        if not self.ordered and self.parts is None:
            return queries * keys
        # Query t of all sees min(t + 1, window) keys; a part of the sequence has an even share of these pairs.
        limit = keys if self.window is None else min(self.window, keys)
        return (limit * (limit + 1) / 2 + (keys - limit) * limit) * queries / keys

    @property
    def keys_seen(self) -> jax.Array:
        """How many keys each query may see, int32 [B, T]; compiled programs count without storing the pairs."""
        return jnp.sum(self.mask, axis=-1, dtype=jnp.int32)


def sees(q_positions, k_positions, q_segments, k_segments, window: int | None) -> jax.Array:
    """Whether a query sees a key, elementwise over arrays that broadcast against each other."""
    distance = q_positions - k_positions
    visible = (q_segments == k_segments) & (distance >= 0)
    return visible if window is None else visible & (distance < window)


def mask_of(visible: jax.Array | Visibility) -> jax.Array:
    """Booleans [B, T, S], true where a query may see a key, from a `Visibility` or from such booleans."""
    return visible.mask if isinstance(visible, Visibility) else visible
