import itertools

from tests.covering import pairs

SETTINGS = ["abcd", [False, True], [1, 3, 8], [0.3, 1.0], [None, {}]]


def test_any_two_values_of_two_settings_meet():
    cases = pairs(*SETTINGS)
    for (i, ours), (j, theirs) in itertools.combinations(enumerate(SETTINGS), 2):
        met = [(case[i], case[j]) for case in cases]
        assert all(values in met for values in itertools.product(ours, theirs))


def test_cases_are_few_and_always_the_same():
    assert len(pairs(*SETTINGS)) <= 14  # no fewer than 12, of 96
    assert pairs(*SETTINGS) == pairs(*SETTINGS)
    assert pairs("ab", [1, 2]) == list(itertools.product("ab", [1, 2]))
