"""The comparison of all architectures: what of it needs no training."""

import json

import pytest

from benchmarks import records, zoo


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.0, [0.5, 1.0, 2.0]),
        (4.0, [0.5, 1.0, 2.0, 4.0, 8.0]),  # the outermost of the first three, so it goes on past the best
        (0.25, [0.125, 0.25, 0.5, 1.0, 2.0]),
        (64.0, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]),  # at most three further ones
    ],
)
def test_rates_are_searched_past_the_outermost(best, tried):
    seen = []

    def loss(rate):
        seen.append(rate)
        return abs(rate - best)

    assert zoo.searched([0.5, 1.0, 2.0], loss) == min(tried, key=lambda rate: abs(rate - best))
    assert sorted(seen) == tried


def test_one_rate_is_not_searched():
    assert zoo.searched([3.0], lambda rate: rate) == 3.0


def test_recorded_runs_are_not_repeated(tmp_path):
    record = tmp_path / "zoo.json"
    records.recorded(record, "a", lambda: {"loss": 1.0})
    records.recorded(record, "b", lambda: {"loss": 2.0})
    assert records.recorded(record, "a", lambda: pytest.fail("repeated"))["loss"] == 1.0
    assert sorted(json.loads(record.read_text())) == ["a", "b"]
