"""A bounded number of inputs, the same each time."""

import pytest

from tests.fuzz.run import property_of
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_only_own_errors(name):
    property_of(name, TARGETS[name].examples)()
