"""What a run's speed is compared with."""

from types import SimpleNamespace

import jax
import pytest

from sparsezoo_jax.chips import CHIPS
from sparsezoo_jax.training.speed import SpeedMeter, yardstick

FLOPS = {"mfu_dense": 3e9, "mfu_sparse": 1e9}


def devices(kind, count):
    return [SimpleNamespace(device_kind=kind) for _ in range(count)]


@pytest.mark.parametrize(("kind", "chip", "count", "chips"), [("TPU v5", "v5p", 4, 4), ("TPU7x", "tpu7x", 4, 2)])
def test_shares_of_the_peak_of_all_chips(kind, chip, count, chips):
    metrics = yardstick(devices(kind, count), FLOPS).of(1e5 * chips)
    assert metrics == {
        "tokens_per_second_per_chip": 1e5,
        "mfu_dense": pytest.approx(3e14 / CHIPS[chip].bf16_flops),
        "mfu_sparse": pytest.approx(1e14 / CHIPS[chip].bf16_flops),
    }


def test_a_row_has_them_where_the_peak_is_known():
    assert yardstick(jax.devices(), FLOPS) is None, "a CPU"
    for compared_with in (None, yardstick(devices("TPU v6 lite", 1), FLOPS)):
        meter = SpeedMeter(compared_with)
        assert meter.take() == {}
        meter.add(1000)
        row = meter.take()
        assert row.pop("tokens_per_second") > 0
        assert row.keys() == (set() if compared_with is None else {"tokens_per_second_per_chip", *FLOPS})
