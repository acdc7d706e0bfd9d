"""Step times from their parts."""

import pytest

from sparsezoo_jax.compilation.estimate import step_seconds, utilisation


def test_overlaps():
    seconds = step_seconds({"compute": 3.0, "hbm": 4.0, "interconnect": 1.0})
    assert seconds == {"none": 8.0, "half": 6.0, "full": 4.0}
    found = utilisation({"dense": 60.0, "sparse": 30.0}, seconds, peak=20.0)
    assert found["dense"] == {"none": pytest.approx(0.375), "half": 0.5, "full": 0.75}
    assert found["sparse"]["half"] == 0.25
