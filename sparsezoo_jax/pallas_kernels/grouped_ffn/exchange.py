"""Tokens sent to the devices that hold their experts, and back: nothing is dropped.

Shapes: N tokens of a device, k experts of a token, A = N k assignments, D model width, E experts, L of them on a
device, n devices that split the experts, C rows that a device can receive.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsezoo_jax.torus import all_gather, largest_ring

ROOM = 1.5
"""Rows that a device can receive, of those that it would receive if all experts were taken equally often."""

Apply = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""A form of the experts' layer: x, experts, weights and maps to the sums and counts of each assignment by name."""


class Route(NamedTuple):
    """Which rows of one array go where in another, for each of the n devices at the other end."""

    first_n: jax.Array
    """First row here of those for the device."""
    rows_n: jax.Array
    """How many they are."""
    there_n: jax.Array
    """The row there at which they start."""
    first_received_n: jax.Array
    """First row of those from the device, in the array that is received."""
    received_n: jax.Array
    """How many they are."""

    def back(self, first_sent_n: jax.Array) -> Route:
        """The way back; `first_sent_n` is for each device the first of the rows that it sent here."""
        return Route(self.first_received_n, self.received_n, first_sent_n, self.first_n, self.rows_n)


def _before(x: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(x, axis=axis) - x


def routes(table_nn: jax.Array, axis_name: str) -> tuple[Route, Route]:
    """There and back, for rows sorted by destination: `table_nn` [source, destination] counts them."""
    me = jax.lax.axis_index(axis_name)
    there = Route(
        first_n=_before(table_nn[me]),
        rows_n=table_nn[me],
        there_n=_before(table_nn)[me],
        first_received_n=_before(table_nn[:, me]),
        received_n=table_nn[:, me],
    )
    return there, there.back(_before(table_nn, axis=1)[:, me])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def send(x: jax.Array, there: Route, back: Route, rows: int, most: int, axis_name: str) -> jax.Array:
    """`x` [rows here, ...] as [rows there, ...], moved along `there`; rows that nobody sends are 0.

    `rows` is the height of the result, `most` a bound on the rows between two devices. On TPUs and GPUs
    `jax.lax.ragged_all_to_all`; XLA for CPUs lacks it, so pieces there are padded to `most` rows.
    """
    return jax.lax.platform_dependent(
        x,
        there,
        cpu=partial(_padded, rows=rows, most=most, axis_name=axis_name),
        default=partial(_ragged, rows=rows, axis_name=axis_name),
    )


def _ragged(x: jax.Array, route: Route, *, rows: int, axis_name: str) -> jax.Array:
    empty = jnp.zeros((rows, *x.shape[1:]), x.dtype)
    sizes = (route.first_n, route.rows_n, route.there_n, route.received_n)
    return jax.lax.ragged_all_to_all(x, empty, *(size.astype(jnp.int32) for size in sizes), axis_name=axis_name)


def _padded(x: jax.Array, route: Route, *, rows: int, most: int, axis_name: str) -> jax.Array:
    within = jnp.arange(most)
    # Rows past those of a piece are another piece's: the receiver does not read them.
    pieces = x[jnp.minimum(route.first_n[:, None] + within, x.shape[0] - 1)]
    found = jax.lax.all_to_all(pieces, axis_name, 0, 0)
    row = jnp.arange(rows)
    source = jnp.searchsorted(jnp.cumsum(route.received_n), row, side="right")
    source = jnp.minimum(source, route.received_n.shape[0] - 1)
    mine = found[source, jnp.clip(row - route.first_received_n[source], 0, most - 1)]
    is_sent = row < jnp.sum(route.received_n)
    return jnp.where(is_sent.reshape(-1, *(1 for _ in x.shape[1:])), mine, 0)


def _send_forward(x, there, back, rows, most, axis_name):
    return send(x, there, back, rows, most, axis_name), (there, back, x.shape[0])


def _send_backward(rows, most, axis_name, residuals, g):
    there, back, height = residuals
    return send(g, back, there, height, most, axis_name), None, None


send.defvjp(_send_forward, _send_backward)


def exchanged(
    x_ND: jax.Array, experts_NK: jax.Array, weights_NK: jax.Array, maps: tuple[Any, ...], apply: Apply, axis_name: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What `apply` gives with all experts, of this device's maps (trees of [L, ...]): by sending tokens, with room.

    Where any device would receive more than `ROOM` times its share, all gather the weights in this call instead.
    """
    result: Any = _exchanged(x_ND, weights_NK, maps, experts_NK, apply, axis_name)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _exchanged(x_ND, weights_NK, maps, experts_NK, apply: Apply, axis_name: str):
    return _exchanged_forward(x_ND, weights_NK, maps, experts_NK, apply, axis_name)[0]


def _exchanged_forward(x_ND, weights_NK, maps, experts_NK, apply: Apply, axis_name: str):
    table_nn, table_nL = _counts(experts_NK, maps[0].shape[0], axis_name)
    arrays = (x_ND, weights_NK, maps)
    sending = partial(_by_tokens, experts_NK, table_nn, table_nL, apply, axis_name)
    gathering = partial(_by_weights, experts_NK, apply, axis_name)
    crowded = _is_crowded(table_nn, experts_NK.size)
    return jax.lax.cond(crowded, gathering, sending, *arrays), (arrays, experts_NK)


def _exchanged_backward(apply: Apply, axis_name: str, residuals, cotangents):
    arrays, experts_NK = residuals
    table_nn, table_nL = _counts(experts_NK, arrays[2][0].shape[0], axis_name)

    def gradients(function):
        return lambda arrays, g: jax.vjp(function, *arrays)[1](g)

    # Each branch computes its own forward pass again, so that neither keeps room for what the other would need.
    sending = gradients(partial(_by_tokens, experts_NK, table_nn, table_nL, apply, axis_name))
    gathering = gradients(partial(_by_weights, experts_NK, apply, axis_name))
    crowded = _is_crowded(table_nn, experts_NK.size)
    return *jax.lax.cond(crowded, gathering, sending, arrays, cotangents), None


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _counts(experts_NK: jax.Array, local: int, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """Assignments from each device to each [n, n], and from each device to each expert of this one [n, L]."""
    count = jax.lax.axis_size(axis_name)
    own_E = jnp.bincount(experts_NK.reshape(-1), length=count * local)
    table = jax.lax.all_gather(own_E, axis_name).reshape(count, count, local)
    return jnp.sum(table, axis=-1), table[:, jax.lax.axis_index(axis_name)]


def _room(assignments: int) -> int:
    return -(-round(ROOM * assignments) // 128) * 128


def _is_crowded(table_nn: jax.Array, assignments: int) -> jax.Array:
    crowded = jnp.any(jnp.sum(table_nn, axis=0) > _room(assignments))
    # All devices of the mesh take the same branch: collectives of other axes may share a barrier with those of this.
    return jax.lax.pmax(crowded.astype(jnp.int32), jax.sharding.get_abstract_mesh().axis_names) > 0


def _by_weights(experts_NK, apply: Apply, axis_name: str, x_ND, weights_NK, maps):
    return apply(x_ND, experts_NK, weights_NK, *jax.tree.map(lambda w: all_gather(w, axis_name, 0), maps))


def _by_tokens(experts_NK, table_nn, table_nL, apply: Apply, axis_name: str, x_ND, weights_NK, maps):
    tokens, k = experts_NK.shape
    local = maps[0].shape[0]
    room = _room(tokens * k)
    there, back = routes(table_nn, axis_name)
    most = tokens * k
    order_A = jnp.argsort(experts_NK.reshape(-1), stable=True)
    x_CD: Any = send(x_ND[order_A // k], there, back, room, most, axis_name)
    weights_C: Any = send(weights_NK.reshape(-1)[order_A], there, back, room, most, axis_name)
    # Rows come sorted by device and then by expert; those that nobody sent belong to no expert.
    ends = jnp.cumsum(table_nL.reshape(-1))
    row_C = jnp.arange(room)
    expert_C = jnp.searchsorted(ends, row_C, side="right") % local
    is_sent_C = row_C < ends[-1]
    y_CD, counts = apply(x_CD, jnp.where(is_sent_C, expert_C, local)[:, None], weights_C[:, None], *maps)
    y_CD = jnp.where(is_sent_C[:, None], y_CD, 0)
    y_AD: Any = send(y_CD, back, there, tokens * k, most, axis_name)
    back_A = jnp.argsort(order_A)

    def of_tokens(count_C1: jax.Array) -> jax.Array:
        count_A: Any = send(count_C1[:, 0], back, there, tokens * k, most, axis_name)
        return count_A[back_A].reshape(tokens, k)

    return jnp.sum(y_AD[back_A].reshape(tokens, k, -1), axis=1), jax.tree.map(of_tokens, counts)


def sends_fewer_bytes(tokens: int, k: int, experts: int, width: int, maps: int, devices: int, axis: str) -> str | None:
    """Why sending tokens moves fewer bytes over the links than gathering weights; None if it does not.

    On a ring of n devices that each exchange b bytes, links are busy for about n b / 4 divided by their bandwidth; a
    gather of b bytes takes b of it. Of `tokens` a device, two exchanges of `tokens k` rows forward and two backward
    stand against gathering, and scattering the gradients of, `maps` matrices of this `width` on a device of every
    expert; both sides then have half as much again (rows, or weights, for the backward pass). On a torus n is its
    longest side.
    """
    side = largest_ring(axis, devices)
    sent, gathered = side * tokens * k, 2 * maps * experts * width
    if sent >= gathered:
        return None
    return f"{side} * {tokens} tokens * k={k} = {sent} < {2 * maps} * {experts} experts * {width} neurons = {gathered}"
