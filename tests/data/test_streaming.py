import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sparsezoo_jax.data import DataConfig, merge_states, open_documents, streaming_batches
from sparsezoo_jax.data.packing import positions_of
from sparsezoo_jax.errors import DataError

from .test_pipeline import SHAPES, same, take


@pytest.fixture
def stream(config, tokenizer):
    opened = []

    def make(process_index=0, process_count=1, **fields):
        iterator = streaming_batches(
            replace(config, **fields), "train", tokenizer, process_index=process_index, process_count=process_count
        )
        opened.append(iterator)
        return iterator

    yield make
    for iterator in opened:
        iterator.close()


def test_shapes_and_types(stream):
    batch = next(stream())
    assert {k: v.dtype.type for k, v in batch.items()} == SHAPES
    assert {v.shape for v in batch.values()} == {(4, 16)}
    assert batch["mask"].all()
    assert np.array_equal(batch["positions"], positions_of(batch["segment_ids"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_target_exactly_once_an_epoch(stream, config, tokenizer, workers):
    documents = open_documents(config, "train")
    encoded = [[1, *tokenizer.encode(documents[i].text), 2] for i in range(len(documents))]
    pairs = Counter(p for ids in encoded for p in pairwise(ids))
    # With one lane the stream is the shuffled documents one after another.
    iterator = stream(batch_size=1, seq_len=1, workers=workers)
    first, second = (take(iterator, sum(pairs.values())) for _ in range(2))
    for epoch in (first, second):
        assert Counter((int(b["tokens"].item()), int(b["targets"].item())) for b in epoch) == pairs
    assert [b["tokens"].item() for b in first] != [b["tokens"].item() for b in second]


def test_segments_are_whole_pieces_of_documents(stream, config, tokenizer):
    documents = open_documents(config, "train")
    encoded = [" ".join(map(str, [1, *tokenizer.encode(documents[i].text), 2])) for i in range(len(documents))]
    for batch in take(stream(), 20):
        for row in range(4):
            for segment in set(batch["segment_ids"][row].tolist()):
                here = batch["segment_ids"][row] == segment
                inputs, targets = batch["tokens"][row][here].tolist(), batch["targets"][row][here].tolist()
                assert inputs[1:] == targets[:-1]
                text = " ".join(map(str, [*inputs, targets[-1]]))
                assert any(text in document for document in encoded)


def test_rows_read_different_documents(stream, config):
    order = stream()
    take(order, 3)
    documents = [lane[0] for lane in order.get_state()["lanes"].values()]
    assert len(documents) == 4
    whole = take(stream(), 1)[0]["tokens"]
    assert len({tuple(row) for row in whole.tolist()}) == 4


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_global_batch(stream, count):
    whole, parts = stream(), [stream(p, count) for p in range(count)]
    for _ in range(10):
        expected, local = next(whole), [next(part) for part in parts]
        assert same({k: np.concatenate([b[k] for b in local]) for k in expected}, expected)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("consumed", [0, 1, 13, 60])
def test_state_is_json_and_exact(stream, consumed, prefetch):
    iterator = stream(prefetch=prefetch)
    take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    resumed = stream()
    take(resumed, 2)
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(take(resumed, 5), expected, strict=True))


def test_restore_on_another_number_of_hosts(stream):
    parts = [stream(p, 2) for p in range(2)]
    for part in parts:
        take(part, 9)
    whole = stream()
    take(whole, 9)
    with pytest.raises(DataError, match=r"no position for rows \[2, 3\]"):
        whole.set_state(parts[0].get_state())
    merged = merge_states(part.get_state() for part in parts)
    assert merged == whole.get_state()
    resumed = [stream(p, 4) for p in range(4)]
    for part in resumed:
        part.set_state(merged)
    expected = next(whole)
    assert np.array_equal(np.concatenate([next(part)["tokens"] for part in resumed]), expected["tokens"])


def test_a_state_of_another_stream_is_refused(stream):
    state = stream().get_state()
    with pytest.raises(DataError, match="saved with seed=0, but this run has seed=5"):
        stream(seed=5).set_state(state)
    with pytest.raises(DataError, match="saved with seq_len=16"):
        stream(seq_len=8).set_state(state)
    with pytest.raises(DataError, match="has no 'documents'"):
        stream().set_state({"next_batch": 1})


def test_fewer_documents_than_rows(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("peace")
    config = DataConfig(dataset=str(tmp_path / "x.txt"), batch_size=4, seq_len=8)
    iterator = streaming_batches(config, "train", tokenizer)
    assert next(iterator)["mask"].all()
    iterator.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_corpus_without_text_ends_with_an_error(tokenizer, tmp_path, prefetch):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n' * 3)
    config = DataConfig(dataset=str(tmp_path / "x.jsonl"), validation_fraction=0, prefetch=prefetch)
    iterator = streaming_batches(config, "train", tokenizer)
    with pytest.raises(DataError, match="no text to predict"):
        next(iterator)
    iterator.close()


def test_states_of_different_streams_are_not_joined(stream):
    first, second = stream(0, 2), stream(1, 2, seed=5)
    with pytest.raises(DataError, match="one process has seed=0, another seed=5"):
        merge_states([first.get_state(), second.get_state()])
    second = stream(0, 2)
    take(second, 1)
    with pytest.raises(DataError, match="one process has 0="):
        merge_states([first.get_state(), second.get_state()])
