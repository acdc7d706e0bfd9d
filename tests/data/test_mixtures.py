"""Mixtures of corpora: which corpus each sequence has, batches, positions, and what is refused."""

import contextlib
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsezoo_jax.data import (
    Component,
    DataConfig,
    components_of,
    evaluation_batches,
    merge_states,
    open_documents,
    open_tokenizer,
    prepare,
    prepared_batches,
    streaming_batches,
    weighted,
)
from sparsezoo_jax.data.dataset_names import short_name
from sparsezoo_jax.data.schedule import Schedule, row_order, seed_of
from sparsezoo_jax.errors import ConfigError, DataError

from .test_pipeline import same, take


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A smaller corpus of other letters, in a field within another."""
    path = tmp_path_factory.mktemp("other") / "other.jsonl"
    lines = ({"meta": {"text": f"ZZZ {n} " + "QXJ WVK " * (n % 7 + 3)}} for n in range(24))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def mixture(corpus, other, config, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    parts = (
        Component(dataset=str(corpus), weight=7, name="main"),
        Component(dataset=str(other), weight=3, text_field="meta.text", validation_fraction=0.3),
    )
    return dataclasses.replace(config, dataset=None, mixture=parts, tokenizer=str(folder), batch_size=10)


def with_epochs(config, *epochs, **fields):
    parts = (dataclasses.replace(part, epochs=times) for part, times in zip(config.mixture, epochs, strict=True))
    return dataclasses.replace(config, mixture=tuple(parts), **fields)


@pytest.fixture(scope="session")
def both(mixture, tokenizer):
    return prepare(mixture, "train", tokenizer)


def is_other(row, tokenizer):
    """Which corpus a row of token ids is of: only one has these letters."""
    return any(letter in tokenizer.decode(row) for letter in "ZQXJWVK")


# ------------------------------------------------------------------------------------------------------------- Schedule
weights = st.lists(st.floats(0.01, 100, allow_nan=False), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(weights, st.data())
def test_a_sequence_is_known_without_those_before_it(weights, data):
    limits = data.draw(
        st.lists(st.none() | st.integers(1, 20), min_size=len(weights), max_size=len(weights)), label="limits"
    )
    schedule = Schedule(weights, limits)
    count = int(min(schedule.length, 80))
    seen = Counter()
    for position in range(count):
        assert schedule.counts(position) == [seen[c] for c in range(len(weights))]
        corpus, number = schedule.at(position)
        assert number == seen[corpus]
        seen[corpus] += 1
        assert position < schedule.ends[corpus]
    for corpus, limit in enumerate(limits):
        assert limit is None or seen[corpus] <= limit
        if schedule.length <= 80:
            assert seen[corpus] == limit
            assert schedule.ends[corpus] <= schedule.length
    if None in limits:
        assert math.isinf(schedule.length)
    else:
        assert schedule.length == sum(limits)
        with pytest.raises(IndexError):
            schedule.at(int(schedule.length))


@settings(max_examples=25, deadline=None)
@given(weights, st.integers(1, 10**15))
def test_shares_are_exact_for_ever(weights, position):
    counts = Schedule(weights).counts(position)
    assert sum(counts) == position
    total = sum(weights)
    for count, weight in zip(counts, weights, strict=True):
        # Below half a sequence for each of at most five corpora; beyond 2^53 the expectation is the less exact one.
        assert abs(count - position * weight / total) < 2.5 + position * 1e-15


def test_a_corpus_that_has_ended_leaves_its_share_to_the_others_by_their_weights():
    schedule = Schedule([0.5, 0.3, 0.2], [10, None, None])
    assert schedule.ends[0] == 19
    before = np.array(schedule.counts(schedule.ends[0]))
    after = np.array(schedule.counts(schedule.ends[0] + 1000)) - before
    assert before[0] == 10
    assert np.abs(after - [0, 600, 400]).max() <= 1


def test_the_schedule_is_pinned():
    # A run resumes on another version only if these never change.
    assert "".join("abc"[Schedule([5, 3, 2]).at(i)[0]] for i in range(20)) == "abacabacababacabacab"
    assert row_order(8, 0, 0) != row_order(8, 0, 1)
    assert row_order(8, 3, 5) == [7, 6, 0, 5, 2, 1, 4, 3]
    assert sorted(row_order(8, 1, 2)) == list(range(8))
    assert [seed_of(5, 0), seed_of(5, 1)] == [5, 2_654_435_766]


# ------------------------------------------------------------------------------------------------------------- Prepared
def test_every_batch_has_its_shares(both, tokenizer):
    batches = prepared_batches(both, batch_size=10, seed=0)
    drawn, rows = Counter(), []
    for n in range(12):
        batch = next(batches)
        found = [is_other(row, tokenizer) for row in batch["tokens"]]
        assert found == [name == "other" for name in batches.corpora_at(n)]
        assert sum(found) == 3
        tokens = batches.tokens_by_corpus()
        assert tokens == {
            "main": int(batch["mask"][np.logical_not(found)].sum()),
            "other": int(batch["mask"][found].sum()),
        }
        drawn.update(tokens)
        rows.append(tuple(found))
    assert drawn["other"] / drawn.total() == pytest.approx(0.3, abs=0.02)
    assert len(set(rows)) > 6, "each device, and each micro-batch, sees all corpora in turn"
    batches.close()


def test_a_batch_is_a_function_of_its_number_and_every_corpus_keeps_its_order(both):
    batches = prepared_batches(both, batch_size=10, seed=3)
    expected = take(batches, 30)
    fresh = prepared_batches(both, batch_size=10, seed=3, start=17, prefetch=0)
    assert all(same(fresh.batch_at(n), expected[n]) for n in (29, 0, 17))
    assert same(next(fresh), expected[17])
    # The sequences of the first corpus are those that it alone would give: an epoch has every record once.
    first = both.components[0].split
    alone = prepared_batches(first, batch_size=1, seed=3, prefetch=0)
    found = [
        tuple(row)
        for n, batch in enumerate(expected)
        for row, name in zip(batch["tokens"].tolist(), batches.corpora_at(n), strict=True)
        if name == "main"
    ]
    count = len(found)
    own = [tuple(alone.batch_at(n)["tokens"][0].tolist()) for n in range(count)]
    assert sorted(found) == sorted(own)
    for iterator in (batches, fresh, alone):
        iterator.close()


@pytest.mark.parametrize("count", [2, 5])
def test_hosts_share_the_global_batch(both, count):
    whole = prepared_batches(both, batch_size=10, seed=0)
    parts = [prepared_batches(both, batch_size=10, seed=0, process_index=p, process_count=count) for p in range(count)]
    for _ in range(6):
        expected, local = next(whole), [next(part) for part in parts]
        assert same({k: np.concatenate([b[k] for b in local]) for k in expected}, expected)
        assert sum((Counter(part.tokens_by_corpus()) for part in parts), Counter()) == Counter(whole.tokens_by_corpus())
    for part in (whole, *parts):
        part.close()


def test_a_position_is_exact_on_any_number_of_hosts(both):
    whole = prepared_batches(both, batch_size=10, seed=0, prefetch=3)
    take(whole, 7)
    state = json.loads(json.dumps(whole.get_state()))
    expected = take(whole, 3)
    resumed = [prepared_batches(both, batch_size=10, seed=0, process_index=p, process_count=2) for p in range(2)]
    for part in resumed:
        part.set_state(state)
    for batch in expected:
        local = [next(part) for part in resumed]
        assert same({k: np.concatenate([b[k] for b in local]) for k in batch}, batch)
    assert merge_states(part.get_state() for part in resumed) == whole.get_state()
    for part in (whole, *resumed):
        part.close()


@pytest.mark.parametrize("field", ["weights", "fingerprint", "epochs"])
def test_a_position_in_another_mixture_is_refused(both, field):
    batches = prepared_batches(both, batch_size=10, seed=0)
    with pytest.raises(DataError, match=f"data state: saved with {field}="):
        batches.set_state({**batches.get_state(), field: [1, 2]})
    batches.close()


def test_epochs_end(mixture, tokenizer):
    limited = prepare(with_epochs(mixture, None, 2), "train", tokenizer)
    records = limited.components[1].split.num_records
    batches = prepared_batches(limited, batch_size=10, seed=0)
    last = math.ceil(batches.schedule.ends[1] / 10)
    names = [Counter(batches.corpora_at(n)) for n in range(last + 5)]
    assert sum(found["other"] for found in names) == 2 * records
    assert all(found["other"] == 3 for found in names[: last - 1])
    assert all(found == {"main": 10} for found in names[last:])
    assert math.isinf(batches.num_batches)
    batches.close()
    finite = prepare(with_epochs(mixture, 1, 2), "train", tokenizer)
    batches = prepared_batches(finite, batch_size=10, seed=0)
    assert len(list(batches)) == batches.num_batches == (finite.components[0].split.num_records + 2 * records) // 10
    batches.close()


def test_evaluation_counts_every_target_once(mixture, tokenizer):
    held = prepare(mixture, "validation", tokenizer)
    assert [part.name for part in components_of(held)] == ["main", "other"]
    targets = sum(part.split.num_targets for part in held.components)
    assert sum(int(batch["mask"].sum()) for batch in evaluation_batches(held, 4)) == targets
    parts = [list(evaluation_batches(held, 4, process_index=p, process_count=2)) for p in range(2)]
    assert sum(int(batch["mask"].sum()) for part in parts for batch in part) == targets
    first = next(evaluation_batches(held, 10, max_batches=1))
    assert sum(is_other(row, tokenizer) for row in first["tokens"]) == 3
    sizes = [part.split.num_bytes / part.split.num_targets for part in held.components]
    assert held.bytes_per_token == weighted(held, lambda split: split.bytes_per_token)
    assert held.bytes_per_token == pytest.approx(0.7 * sizes[0] + 0.3 * sizes[1])


def test_a_changed_corpus_is_refused_before_anything_is_prepared(mixture, both, tokenizer):
    fingerprints = both.fingerprint
    assert prepare(mixture, "train", tokenizer, expected=fingerprints) == both
    with pytest.raises(DataError, match=r"data.dataset=.*other.jsonl: is not what this run was trained on"):
        prepare(mixture, "train", tokenizer, expected=[fingerprints[0], "another"])
    for before in (fingerprints[0], fingerprints[:1]):
        with pytest.raises(DataError, match="trained on other corpora"):
            prepare(mixture, "train", tokenizer, expected=before)


def test_prepared_directories_are_mixed(mixture, both, tokenizer):
    parts = zip(mixture.mixture, both.components, strict=True)
    places = tuple(Component(dataset=made.split.path, weight=part.weight, name=part.label) for part, made in parts)
    config = dataclasses.replace(mixture, mixture=places, tokenizer=None)
    assert open_tokenizer(config).fingerprint == tokenizer.fingerprint
    assert prepare(config, "train", tokenizer).fingerprint == both.fingerprint
    with pytest.raises(ConfigError, match=r"data\.seq_len=8: must be 16"):
        prepare(dataclasses.replace(config, seq_len=8), "train", tokenizer)
    with pytest.raises(DataError, match=r"is a prepared corpus; data\.mode=streaming reads text"):
        streaming_batches(dataclasses.replace(config, mode="streaming"), "train", tokenizer)


def test_a_tokenizer_of_all_corpora(mixture, tmp_path, monkeypatch):
    config = dataclasses.replace(mixture, tokenizer=None, cache_dir=str(tmp_path))
    found = open_tokenizer(config)
    assert open_tokenizer(config).fingerprint == found.fingerprint
    # Words of either corpus are tokens.
    assert len(found.encode("QXJ WVK QXJ WVK")) < 9
    assert len(found.encode("the union of states")) < 14
    # Of each its share of what is read.
    monkeypatch.setattr("sparsezoo_jax.data.trained_tokenizers.BPE_MAX_DOCUMENTS", 10)
    read = []
    monkeypatch.setattr(
        "sparsezoo_jax.data.trained_tokenizers._train", lambda texts, size, folder: read.extend(texts) or found
    )
    open_tokenizer(config)
    assert [sum("ZZZ" in text for text in read), len(read)] == [3, 10]


# ------------------------------------------------------------------------------------------------------------ Streaming
@pytest.fixture
def stream(mixture, tokenizer):
    opened = []

    def make(process_index=0, process_count=1, epochs=(None, None), **fields):
        config = with_epochs(mixture, *epochs, mode="streaming", **fields)
        opened.append(
            streaming_batches(config, "train", tokenizer, process_index=process_index, process_count=process_count)
        )
        return opened[-1]

    yield make
    for iterator in opened:
        iterator.close()


def test_streaming_has_its_shares(stream, tokenizer):
    batches = stream()
    drawn = Counter()
    for _ in range(20):
        batch = next(batches)
        assert batch["mask"].all()
        found = [is_other(row, tokenizer) for row in batch["tokens"]]
        assert batches.tokens_by_corpus() == {"main": 16 * found.count(False), "other": 16 * found.count(True)}
        drawn.update(found)
    assert drawn[True] == 60


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_positions_are_exact_on_any_number_of_hosts(stream, workers):
    whole = stream()
    parts = [stream(p, 2, workers=workers) for p in range(2)]
    for part in (whole, *parts):
        take(part, 9)
    state = json.loads(json.dumps(merge_states(part.get_state() for part in parts)))
    assert state == whole.get_state()
    with pytest.raises(DataError, match=r"no position for rows \[5, 6, 7, 8, 9\]"):
        stream().set_state(parts[0].get_state())
    resumed = [stream(p, 5) for p in range(5)]
    for part in resumed:
        take(part, 1)
        part.set_state(state)
    for expected in take(whole, 9):
        local = [next(part) for part in resumed]
        assert same({k: np.concatenate([b[k] for b in local]) for k in expected}, expected)


def test_streaming_epochs_end_and_rows_have_no_gaps(stream, tokenizer, mixture):
    batches = stream(epochs=(None, 3))
    documents = open_documents(mixture.of(mixture.mixture[1]), "train")
    encoded = [tokenizer.encode(documents[i].text) for i in range(len(documents))]
    targets = 3 * sum(len(ids) + 1 for ids in encoded)
    drawn = Counter()
    for _ in range(400):
        batch = next(batches)
        assert batch["mask"].all()
        drawn.update(batches.tokens_by_corpus())
        if drawn["other"] == targets:
            break
    assert drawn["other"] == targets, "every target three times, and then no more"
    for _ in range(3):
        next(batches)
        assert batches.tokens_by_corpus() == {"main": 160, "other": 0}
    # The position after the end restores as well.
    again = stream(epochs=(None, 3))
    again.set_state(json.loads(json.dumps(batches.get_state())))
    assert same(next(again), next(batches))


def test_a_streaming_corpus_that_changed_is_refused(stream):
    batches = stream()
    state = batches.get_state()
    with pytest.raises(DataError, match=r"data.dataset=.*other.jsonl: is not what this run was trained on"):
        batches.set_state({**state, "documents": [state["documents"][0], "another"]})
    with pytest.raises(DataError, match="data state: saved with weights="):
        batches.set_state({**state, "weights": [1, 1]})
    with pytest.raises(DataError, match="data state: saved with documents="):
        batches.set_state({**state, "documents": state["documents"][0]})


# -------------------------------------------------------------------------------------------------------- Configuration
@pytest.mark.parametrize(
    ("parts", "fields", "message"),
    [
        ([], {}, r"data\.mixture=0 corpora: must be 1 to 256"),
        ([{"weight": 0.0}], {}, r"data\.mixture\[a\]\.weight=0\.0: must be above 0, and finite"),
        ([{"weight": -1.0}], {}, r"weight=-1\.0"),
        ([{"weight": math.nan}], {}, r"weight=nan"),
        ([{"weight": math.inf}], {}, r"weight=inf"),
        ([{"epochs": 0}], {}, r"data\.mixture\[a\]\.epochs=0: must be at least 1, or none"),
        ([{"name": "a/b"}], {}, r"data\.mixture\.name=a/b: must be of at most 64 letters"),
        ([{"dataset": " "}], {}, r"data\.mixture=' ': names no dataset"),
        ([{}, {}], {}, r"data\.mixture\.name=a: is the name of two corpora"),
        ([{}], {"dataset": "sotu"}, r"data\.dataset=sotu: can't be given with data\.mixture"),
        ([{}], {"validation_dataset": "sotu"}, r"data\.validation_dataset=sotu: can't be given with data\.mixture"),
        ([{"epochs": 1}], {"mode": "streaming"}, r"data\.mode=streaming: needs a corpus without epochs"),
        ([{"validation_split": "../b"}], {}, r"data\.validation_split=\.\./b"),
        ([{"validation_fraction": 1.0}], {}, r"data\.validation_fraction=1\.0"),
        ([{}] * 257, {}, r"257 corpora"),
    ],
)
def test_what_is_no_mixture(parts, fields, message):
    def make():
        made = tuple(Component(**{"dataset": "a.jsonl", "weight": 1.0} | part) for part in parts)
        return DataConfig(**{"dataset": None, "mixture": made} | fields)

    with pytest.raises(ConfigError, match=message):
        make()


def test_one_corpus_has_to_be_named_where_one_is_read(mixture):
    with pytest.raises(ConfigError, match=r"data\.mixture=\(several corpora\): one has to be named here: --dataset"):
        open_documents(mixture, "train")


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("c4/en", "c4-en"),
        ("hf://allenai/c4:realnewslike/train", "allenai-c4-realnewslike-train"),
        ("/data/books/*.jsonl.zst", "books"),
        ("./web/all.JSONL.gz", "all"),
        ("../code/", "code"),
        ("a.txt,b.txt", "a"),
        ("/data/日本/", "corpus"),
        ("sotu", "sotu"),
    ],
)
def test_corpora_are_called_as_people_call_them(dataset, name):
    assert short_name(dataset) == name


def test_games_and_their_tokenizer():
    games = Component(dataset="chess", weight=1.0)
    assert DataConfig(dataset=None, mixture=(games,)).tokenizer_name == "chess"
    both = DataConfig(dataset=None, mixture=(games, Component(dataset="sotu", weight=1.0)))
    assert both.tokenizer_name is None
    assert both.of(games).in_blocks


def test_games_and_a_data_set_of_the_hub(corpus, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "laws").mkdir()
    laws = datasets.Dataset.from_dict({"text": [f"law {n} of peace" for n in range(40)]})
    laws.to_parquet(tmp_path / "laws" / "train.parquet")
    parts = (
        Component(dataset=str(corpus), weight=2, name="texts"),
        Component(dataset=f"hf://{tmp_path / 'laws'}", weight=1),
        Component(dataset=str(Path(__file__).with_name("games.pgn")), weight=1),
    )
    config = DataConfig(
        dataset=None, mixture=parts, seq_len=24, batch_size=8, bpe_vocab_size=300, cache_dir=str(tmp_path / "cache")
    )
    tokenizer = open_tokenizer(config)
    made = prepare(config, "train", tokenizer)
    assert [component.name for component in made.components] == ["texts", "laws", "games"]
    found = Counter()
    with contextlib.closing(prepared_batches(made, batch_size=8, seed=0, prefetch=0)) as batches:
        for n in range(4):
            for row in batches.batch_at(n)["tokens"]:
                text = tokenizer.decode(row)
                found["games" if ";1." in text else "laws" if "law" in text else "texts"] += 1
                # Games are in blocks, each of which begins with one.
                assert ";1." not in text or row[0] == tokenizer.bos_id
    assert found == {"texts": 16, "laws": 8, "games": 8}
    with pytest.raises(ConfigError, match=r"data.packing=blocks: needs data.mode=prepared"):
        dataclasses.replace(config, mode="streaming")
    games = dataclasses.replace(config, mixture=parts[2:])
    assert games.tokenizer_name == "chess"
