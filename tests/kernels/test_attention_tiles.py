"""Which tiles of scores attention visits, of whole sequences, packed documents, caches and parts of sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.pallas_kernels.spark_attention.tiles import Read, Tiles, bounds, padded_visibility, reads, walk
from sparsezoo_jax.pallas_kernels.spark_attention.zigzag import Layout


@pytest.mark.parametrize("window", [None, 100])
def test_bounds_leave_out_what_nothing_can_see(window):
    tiles, places = Tiles(64, 32), np.arange(512)
    # One document, several, and a cache that is filled from the end.
    segments = jnp.asarray(np.stack([places // 512, places // 150, places // 512]).astype(np.int32))
    visible = Visibility.of_tokens(segments, window)
    positions = visible.key_positions_BS.at[2].set(511 - visible.key_positions_BS[2])
    visible = padded_visibility(dataclasses.replace(visible, key_positions_BS=positions, ordered=False), tiles)
    pairs = np.asarray(visible.mask).reshape(3, 8, 64, 16, 32)
    for found, order in zip(bounds(visible, tiles), ((0, 1, 2), (0, 2, 1)), strict=True):
        needed, whole = (x.transpose(order) for x in (pairs.any((2, 4)), pairs.all((2, 4))))
        for (b, i), here in np.ndenumerate(needed.any(-1)):
            there, (first, full, rest, stop) = np.flatnonzero(needed[b, i]), (int(x[b, i]) for x in found)
            assert not here or first <= there[0] <= there[-1] < stop
            assert whole[b, i, full:rest].all()
            assert rest - full == whole[b, i].sum()
            assert not here or first <= full <= rest <= stop
            if b != 1:  # documents are told apart by tiles only
                assert max(0, stop - first) == len(there), "no tile is idle"


def test_one_run_of_tiles_is_without_a_mask():
    """Places without order: of several runs the last; the tiles between them keep their masks."""
    places = jnp.zeros((1, 256), jnp.int32).at[:, 64:128].set(5)
    segments = jnp.ones((1, 256), jnp.int32)
    visible = Visibility(
        query_positions_BT=jnp.full((1, 64), 3),
        key_positions_BS=places,
        query_segments_BT=segments[:, :64],
        key_segments_BS=segments,
    )
    assert [int(x[0, 0]) for x in bounds(visible, Tiles(64, 64))[0]] == [0, 2, 4, 4]


@pytest.mark.parametrize("window", [None, 100])
def test_walk_leaves_out_what_nothing_can_see(window):
    tiles, places = Tiles(64, 128), np.arange(512)
    segments = jnp.asarray(np.stack([places // 512, places // 150]).astype(np.int32))
    visible = padded_visibility(Visibility.of_tokens(segments, window), tiles)
    steps = walk(tiles, 8, range(4), visible)
    read = jax.tree.map(lambda x: np.asarray(x).reshape(2, -1), Read.of(reads(steps, tiles, visible)))
    pairs = np.asarray(visible.mask).reshape(2, 8, 64, 4, 128)
    needed, full = pairs.any((2, 4)), pairs.all((2, 4))
    for b in range(2):
        for at, (i, j) in enumerate(zip(steps.query_P, steps.key_P, strict=True)):
            assert read.visible[b, at] == needed[b, i, j] or b == 1, "documents are told apart by tiles only"
            assert read.tile[b, at] == j if read.visible[b, at] else not needed[b, i, j]
            assert read.full[b, at] == full[b, i, j]
        walked = set(zip(steps.query_P.tolist(), steps.key_P.tolist(), strict=True))
        assert {(i, j) for i, j in np.argwhere(needed[b]).tolist()} <= walked
    assert len(walked) == int(needed[0].sum()), "one document: no step is idle"
    assert not read.visible[1].all(), "several: what lies before a document is not read"
    idle = np.flatnonzero(~read.visible[1, 1:]) + 1
    assert (read.tile[1, idle] == read.tile[1, idle - 1]).all(), "nothing new is read"


def test_walks_of_the_parts_of_a_sequence():
    """32,768 tokens over 8 devices, tiles of 512 x 512: 260 on each in zigzag order, 36 to 484 as it is stored."""
    tiles, layout = Tiles(512, 512), Layout("context", 8, 4096)
    whole = Visibility.of_tokens(jnp.ones((1, 32_768), jnp.int32))
    working = {}
    for name, parts in (("contiguous", layout.contiguous), ("zigzag", layout.zigzag)):
        found = []
        for i, part in enumerate(parts):
            places = np.concatenate([np.arange(place, place + 4096 // len(part)) for place in part])[None]
            own = whole.replaced(jnp.asarray(places), whole.key_positions_BS, whole.query_segments_BT[:, :4096],
                                 whole.key_segments_BS, ordered=False).part_of(parts, jnp.int32(i))  # fmt: skip
            steps = walk(tiles, 8, range(64), own)
            read = Read.of(reads(steps, tiles, own))
            rows = places[0, ::512] // 512
            walked = [(rows[q], k) for q, k, seen in zip(*steps[:2], np.asarray(read.visible), strict=True) if seen]
            assert sorted(walked) == [(row, k) for row in sorted(rows) for k in range(row + 1)]
            found.append(len(walked))
        working[name] = found
        assert len(steps.key_P) == max(found), "no longer than the busiest device needs"
    assert working["zigzag"] == [260] * 8
    assert (min(working["contiguous"]), max(working["contiguous"])) == (36, 484)
