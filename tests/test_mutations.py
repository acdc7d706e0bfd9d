"""The list of faults in tests/mutations holds together: running them is a command of its own."""

import pytest

from tests.mutations import ROOT, load

MUTATIONS = load()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_can_be_made_and_its_tests_exist(mutation):
    source = (ROOT / mutation.file).read_text()
    assert mutation.applied(source) != source
    assert mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text()


def test_names_are_unlike():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
