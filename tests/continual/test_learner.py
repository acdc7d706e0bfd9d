"""A small network that learns three tasks: what stays, what is counted, and what is refused."""

import dataclasses

import numpy as np
import pytest

from sparsezoo_jax.continual import FINE_TUNING, ContinualConfig, Learner, Outcome, class_tasks
from sparsezoo_jax.errors import ConfigError, DataError
from tests.test_docs import values_of


def images(count, seed):
    """Six classes that the place of a bright square tells apart."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 6
    x = draw.integers(0, 60, (count, 4, 4, 1))
    x[np.arange(count), labels % 4, labels // 2] += 190
    return x.repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8), labels


TASKS = class_tasks(images(240, 0), images(60, 1), 2, [3, 0, 5, 1, 2, 4])
SMALL = ContinualConfig(
    channels=(4,), widths=(24, 16), phases=4, epochs=4, batch_size=20, learning_rate=5e-3, cosine_phases=6
)


def arrays(learner):
    return {
        name: [(np.asarray(m.weight[...]), np.asarray(m.bias[...]), np.asarray(m.connected[...])) for m in layers]
        for name, layers in (("early", learner.network.early), ("later", learner.network.later))
    }


@pytest.fixture(scope="module")
def course():
    """The learner, and its arrays and ages after each task."""
    learner, states, ages = Learner(SMALL, (8, 8, 1), 6), [], []
    for task in TASKS:
        learner.learn(task)
        states.append(arrays(learner))
        ages.append([a.copy() for a in learner.ages])
    return learner, states, ages


def test_tasks_have_classes_of_their_own():
    assert [sorted(set(task.labels.tolist())) for task in TASKS] == [[0, 3], [1, 5], [2, 4]]
    assert sum(len(task.test_labels) for task in TASKS) == 60
    with pytest.raises(ConfigError, match="classes_per_task=4: must divide 6 classes"):
        class_tasks(images(12, 0), images(12, 1), 4, range(6))


def test_as_many_connections_after_every_task(course):
    _, states, _ = course
    counts = [[connected.sum() for layers in state.values() for _, _, connected in layers] for state in states]
    assert counts[0] == counts[1] == counts[2] == [round(0.4 * n) for n in (9 * 4, 64 * 24, 24 * 16)]
    assert (states[0]["later"][1][2] != states[2]["later"][1][2]).any()


def test_no_connection_leads_from_a_free_unit_into_another(course):
    _, states, ages = course
    for state, (first, last) in zip(states, ages, strict=True):
        assert (first > 0).any()
        assert not state["later"][1][2][np.ix_(first == 0, last > 0)].any()


def test_what_stays_as_it_is(course):
    """The early layers after the first task; connections into units whose task is replayed no more."""
    _, states, ages = course
    for before, after in zip(states[0]["early"], states[2]["early"], strict=True):
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x, y)
    for layer in (0, 1):
        old = ages[1][layer] > 2  # chosen in the first task, older by the second
        assert old.any()
        (w1, b1, c1), (w2, b2, c2) = states[1]["later"][layer], states[2]["later"][layer]
        np.testing.assert_array_equal((w1 * c1)[:, old], (w2 * c2)[:, old])
        np.testing.assert_array_equal(b1[old], b2[old])
        moved = (ages[1][layer] == 2) & (np.abs(w1 * c1 - w2 * c2).sum(axis=0) > 0)
        assert moved.any()


def test_learnt_classes_are_told_apart(course):
    learner, _, _ = course
    found = [np.mean(learner.predict(task.test_images) == task.test_labels) for task in TASKS]
    assert np.mean(found) > 0.8  # one in six by chance
    assert [part.codes.shape for part in learner.kept] == [(50, 64)] * 3


def test_without_protection_earlier_tasks_are_forgotten():
    learner = Learner(
        dataclasses.replace(FINE_TUNING, channels=(4,), widths=(16,), batch_size=20, learning_rate=5e-3), (8, 8, 1), 6
    )
    for task in TASKS[:2]:
        learner.learn(task)
    first, second = (np.mean(learner.predict(task.test_images) == task.test_labels) for task in TASKS[:2])
    assert second > 0.8
    assert first < 0.2
    assert learner.kept == []


def test_accuracy_and_forgetting():
    nan = np.nan
    found = Outcome(np.array([[1.0, nan, nan], [0.7, 0.9, nan], [0.8, 0.5, 0.6]]), [], 0)
    assert found.average_accuracy == pytest.approx((0.8 + 0.5 + 0.6) / 3)
    assert found.average_forgetting == pytest.approx(((1 - 0.8) + (0.9 - 0.5)) / 2)
    assert Outcome(np.array([[0.5]]), [], 0).average_forgetting == 0


def test_the_python_of_continual_md(capsys):
    found = values_of("docs/continual.md")
    assert found["found"].accuracy.shape == (2, 2)
    assert found["found"].kept_bytes == 4 * 25 * 32
    assert f"{found['found'].average_accuracy} " in capsys.readouterr().out


def test_refused():
    with pytest.raises(ConfigError, match=r"density=0\.0: must be above 0 and at most 1"):
        ContinualConfig(density=0)
    with pytest.raises(ConfigError, match="replay=none: must be hidden or images"):
        ContinualConfig(replay="none")
    with pytest.raises(ConfigError, match="rewiring=False: must be on for freezing"):
        ContinualConfig(rewiring=False)
    with pytest.raises(ConfigError, match=r"channels=.*images of 6 x 6 are no multiples of 4"):
        Learner(ContinualConfig(), (6, 6, 1), 2)
    empty = TASKS[0]._replace(images=TASKS[0].images[:0], labels=TASKS[0].labels[:0])
    with pytest.raises(DataError, match="no images to learn from"):
        Learner(SMALL, (8, 8, 1), 6).learn(empty)
