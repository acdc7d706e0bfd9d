import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsezoo_jax.data.batches import batch_from_records
from sparsezoo_jax.data.packing import Packer, Records, positions_of, with_specials

PAD = 0
lengths = st.lists(st.integers(0, 30), max_size=20)


def pack(document_lengths, seq_len, chunk):
    """Packs documents whose tokens are all different, so that a token tells where it comes from."""
    ends = np.cumsum(document_lengths).astype(int).tolist()
    documents = [np.arange(end - n, end, dtype=np.int32) + 1 for n, end in zip(document_lengths, ends, strict=True)]
    packer = Packer(seq_len, PAD)
    parts = [packer.push(documents[i : i + chunk]) for i in range(0, len(documents), chunk)] + [packer.finish()]
    return documents, Records(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@given(lengths, st.integers(1, 12), st.integers(1, 5))
def test_every_target_exactly_once_and_from_its_own_document(document_lengths, seq_len, chunk):
    documents, records = pack(document_lengths, seq_len, chunk)
    batch = batch_from_records(records)
    found = sorted(zip(batch["tokens"][batch["mask"]], batch["targets"][batch["mask"]], strict=True))
    expected = sorted((d[i], d[i + 1]) for d in documents for i in range(len(d) - 1))
    assert found == expected


@given(lengths, st.integers(1, 12), st.integers(1, 5))
def test_segments_are_documents_and_positions_restart(document_lengths, seq_len, chunk):
    documents, records = pack(document_lengths, seq_len, chunk)
    owner = {int(token): n for n, document in enumerate(documents) for token in document}
    positions = positions_of(records.segment_ids)
    for tokens, segments, places in zip(records.tokens, records.segment_ids, positions, strict=True):
        real = segments > 0
        assert np.all(tokens[~real] == PAD)
        assert np.all(places[~real] == 0)
        # Padding only at the end; segments count 1, 2, ... in the order of the documents.
        assert np.all(np.diff(real.astype(int)) <= 0)
        owners = [owner[int(t)] for t in tokens[real]]
        assert list(segments[real]) == list(1 + np.unique(owners, return_inverse=True)[1])
        for segment in set(segments[real]):
            assert list(places[segments == segment]) == list(range(int((segments == segment).sum())))


@given(lengths, st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_chunks_do_not_matter(document_lengths, seq_len, chunk, other_chunk):
    _, one = pack(document_lengths, seq_len, chunk)
    _, other = pack(document_lengths, seq_len, other_chunk)
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.segment_ids, other.segment_ids)


def test_records_overlap_by_one_token():
    _, records = pack([5, 3, 2], 4, 1)
    assert records.tokens.tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 0, 0, 0]]
    assert records.segment_ids.tolist() == [[1, 1, 1, 1, 1], [1, 2, 2, 2, 3], [1, 1, 0, 0, 0]]
    assert batch_from_records(records)["mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]


def test_specials():
    assert with_specials([5, 6], 1, 2).tolist() == [1, 5, 6, 2]
    assert with_specials([5, 6], None, None).tolist() == [5, 6]
    assert with_specials([], 1, 2).tolist() == []
