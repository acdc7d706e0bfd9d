import gc
import json
from dataclasses import replace

import numpy as np
import pytest

from sparsezoo_jax.data import evaluation_batches, pipeline, prepare, prepared_batches
from sparsezoo_jax.data.batches import endless_order
from sparsezoo_jax.data.manifest import Shard, shard_name
from sparsezoo_jax.errors import ConfigError, DataError

SHAPES = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "positions": np.int32, "mask": np.bool_}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def rows(batches):
    return [tuple(row) for batch in batches for row in batch["tokens"].tolist()]


def batches(prepared, **options):
    return prepared_batches(prepared, **{"batch_size": 4, "seed": 0} | options)


def test_shapes_and_types(prepared):
    batch = next(batches(prepared))
    assert {k: v.dtype.type for k, v in batch.items()} == SHAPES
    assert {v.shape for v in batch.values()} == {(4, 16)}
    assert all(v.flags.c_contiguous for v in batch.values())


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_global_batch(prepared, count):
    whole = batches(prepared, batch_size=8)
    parts = [batches(prepared, batch_size=8, process_index=p, process_count=count) for p in range(count)]
    for _ in range(5):
        expected, local = next(whole), [next(part) for part in parts]
        assert same({k: np.concatenate([b[k] for b in local]) for k in expected}, expected)


def test_an_epoch_is_every_record_once_and_epochs_differ(prepared):
    n = prepared.num_records
    iterator = batches(prepared, batch_size=1)
    first, second = rows(take(iterator, n)), rows(take(iterator, n))
    ordered = rows(evaluation_batches(prepared, 1))
    assert sorted(first) == sorted(second) == sorted(ordered)
    assert first != second
    assert first != ordered
    assert rows(take(batches(prepared, batch_size=1, seed=1), n)) != first
    assert rows(take(batches(prepared, batch_size=1, shuffle=False), n)) == ordered


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3, 1000, 2**16, 4**8 + 1, 70_001])
def test_orders_are_permutations_that_differ_by_epoch_and_seed(length):
    order, other = endless_order(length, 3), endless_order(length, 4)
    epochs = [[order(e * length + i) for i in range(length)] for e in range(2)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length >= 1000:
        assert epochs[0] != epochs[1]
        assert epochs[0] != [other(i) for i in range(length)]


def test_the_order_is_pinned():
    # A run resumes on another machine or version only if these never change.
    order = endless_order(10, 0)
    assert [order(i) for i in range(20)] == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7, 5, 3, 7, 8, 2, 4, 1, 0, 6, 9]


def test_a_batch_is_a_function_of_its_number(prepared):
    iterator = batches(prepared)
    expected = take(iterator, 30)
    assert all(same(iterator.batch_at(n), expected[n]) for n in (29, 0, 17))
    assert same(next(batches(prepared, start=17)), expected[17])
    assert same(next(batches(prepared, start=17, prefetch=0)), expected[17])


def test_a_late_start_reads_no_earlier_record(prepared, monkeypatch):
    reads = []
    iterator = batches(prepared, start=10**9, prefetch=0)
    read = iterator._reader.read
    monkeypatch.setattr(iterator._reader, "read", lambda indices: reads.append(indices) or read(indices))
    next(iterator)
    assert len(reads) == 1


def test_state_is_json_and_exact_despite_prefetching(prepared):
    iterator = batches(prepared, prefetch=3)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["next_batch"] == 7
    expected = take(iterator, 3)
    resumed = batches(prepared)
    take(resumed, 2)
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(take(resumed, 3), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "saved with seed=1, but this run has seed=0"),
        ({"fingerprint": "x"}, "saved with fingerprint=x"),
        ({"batch_size": 8}, "saved with batch_size=8"),
    ],
)
def test_a_state_of_another_stream_is_refused(prepared, change, message):
    iterator = batches(prepared)
    with pytest.raises(DataError, match=message):
        iterator.set_state({**iterator.get_state(), **change})
    with pytest.raises(DataError, match="has no 'fingerprint'"):
        iterator.set_state({"next_batch": 3})


class Forged:
    """What a file of records would be read through: record i of the corpus holds i, and nothing is on disk."""

    opened = 0

    def __init__(self, path):
        Forged.opened += 1
        self.first = FORGED_RECORDS * int(path.name.split("-")[1])

    def ok(self):
        return True

    def num_records(self):
        return FORGED_RECORDS

    def read(self, numbers):
        return [np.array([[self.first + i] * 2, [1] * 2], "<u4").tobytes() for i in numbers]

    def __del__(self):
        Forged.opened -= 1


FORGED_RECORDS = 1_000_000


def test_a_large_corpus_costs_no_memory(prepared, monkeypatch):
    names = (shard_name(i, 2000) for i in range(2000))
    shards = tuple(Shard(name=name, records=FORGED_RECORDS, bytes=10**9, sha256="") for name in names)
    sizes = {"num_records": 2 * 10**9, "seq_len": 1, "vocab_size": 2**24}
    corpus = replace(prepared, shards=shards, **sizes)
    monkeypatch.setattr(pipeline, "open_reader", Forged)
    whole = batches(corpus, batch_size=256, start=10**6, prefetch=0)
    rows = whole.batch_at(10**7)["tokens"][:, 0]
    assert len(set(rows.tolist())) == 256
    assert rows.max() > 1.9e9
    gc.collect()
    assert Forged.opened <= 4, "indexes of four million records are kept"
    for count in (64, 256):
        parts = [
            batches(corpus, batch_size=256, process_index=p, process_count=count, prefetch=0) for p in range(count)
        ]
        assert np.array_equal(np.concatenate([part.batch_at(10**7)["tokens"][:, 0] for part in parts]), rows)
        for part in parts:
            part.close()
    whole.close()
    gc.collect()
    assert Forged.opened == 0
    # An order of more records than 32 bits can number.
    order = endless_order(7 * 10**9, 0)
    found = [order(i * 10**6) for i in range(3000)]
    assert len(set(found)) == 3000
    assert max(found) > 2**32


def test_finite_epochs_end(prepared):
    iterator = batches(prepared, epochs=2)
    count = 2 * prepared.num_records // 4
    assert len(list(iterator)) == count
    with pytest.raises(StopIteration):
        next(iterator)
    with pytest.raises(IndexError):
        iterator.batch_at(count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"process_count": 3}, "data.batch_size=4: must be a multiple of the 3 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"start": -1}, "start=-1"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_impossible_sizes(prepared, options, message):
    with pytest.raises(ConfigError, match=message):
        batches(prepared, **options)


def test_reading_errors_reach_the_consumer(prepared, monkeypatch):
    iterator = batches(prepared)
    monkeypatch.setattr(iterator, "batch_at", lambda n: 1 / 0)
    iterator.set_state(iterator.get_state())
    with pytest.raises(ZeroDivisionError):
        next(iterator)


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (4, 1), (4, 2), (6, 3), (1000, 4)])
def test_evaluation_counts_every_target_once(config, tokenizer, batch_size, count):
    prepared = prepare(config, "validation", tokenizer)
    batch_size = batch_size if batch_size % count == 0 else count
    parts = [list(evaluation_batches(prepared, batch_size, process_index=p, process_count=count)) for p in range(count)]
    assert len({len(part) for part in parts}) == 1
    assert {b["tokens"].shape for part in parts for b in part} == {(batch_size // count, 16)}
    assert sum(int(b["mask"].sum()) for part in parts for b in part) == prepared.num_targets
    padding = [b for part in parts for b in part if not b["mask"].any()]
    assert all((b["segment_ids"] == 0).all() for b in padding)


def test_evaluation_stops_at_max_batches(prepared):
    assert len(list(evaluation_batches(prepared, 4, max_batches=2))) == 2
    with pytest.raises(ConfigError, match="max_batches=0"):
        evaluation_batches(prepared, 4, max_batches=0)


def test_close_ends_the_background_thread(prepared):
    import threading

    iterator = batches(prepared, prefetch=2)
    next(iterator)
    assert any(t.name.startswith("data-prefetch") for t in threading.enumerate())
    iterator.close()
    assert not any(
        t.name.startswith("data-prefetch") and t in iterator._prefetcher._pool._threads and t.is_alive()
        for t in threading.enumerate()
    )
