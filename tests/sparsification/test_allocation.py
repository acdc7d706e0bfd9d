"""TEAL's greedy allocation: the order of its steps, its budget, and that a layer's output changes less by it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import run_dir, sparsify
from sparsezoo_jax.configs import preset
from sparsezoo_jax.sparsification import METHODS, allocation, calibrate, layers, sparsified_config, wrapped
from sparsezoo_jax.sparsification.calibration import threshold
from sparsezoo_jax.sparsification.config import AllocationConfig, CalibrationConfig


def test_each_step_is_that_with_the_least_error():
    """Restated: steps of base / w_p, the least error first, until the weighted mean is what is wanted."""
    sizes, cost = {"q": 1.0, "k": 0.25, "up": 2.0}, {"q": 3.0, "k": 1.0, "up": 0.5}

    tried_first = []

    def error(shares):
        tried_first.append(shares)
        return sum(cost[name] * share**2 for name, share in shares.items())

    shares, expected = allocation.greedy_shares(sizes, 0.5, 0.1, error), dict.fromkeys(sizes, 0.0)
    assert tried_first[:3] == [{**expected, name: 0.1 / sizes[name]} for name in sizes]
    while True:
        tried = [{**expected, name: expected[name] + 0.1 / sizes[name]} for name in sizes]
        best = min((t for t in tried if max(t.values()) <= 1), key=error)
        if sum(sizes[name] * share for name, share in best.items()) > 0.5 * 3.25 + 1e-9:
            break
        expected = best
    for name, share in shares.items():
        assert abs(share - expected[name]) <= 0.1 / sizes[name]
    assert sum(sizes[name] * share for name, share in shares.items()) == pytest.approx(0.5 * 3.25)
    assert shares["up"] > shares["q"]
    assert allocation.greedy_shares(sizes, 0.0, 0.1, error) == dict.fromkeys(sizes, 0.0)
    assert max(allocation.greedy_shares(sizes, 0.95, 0.3, error).values()) <= 1


@pytest.fixture(scope="module")
def sparse(dense, batches):
    model = wrapped(dense, sparsified_config(dense.config, METHODS["teal"].sparsity(0.5)))
    return model, calibrate(model, batches)


def test_sizes_are_weights(sparse):
    (_, block), _ = layers.layers_of(sparse[0])
    sizes, unread = allocation.sizes_of(allocation.masked_maps(block, 32), 32)
    assert sizes == {
        **{"q": 1.0, "k": 0.5, "v": 0.5, "o": 1.0},
        **dict.fromkeys(("gate", "up", "down"), 1.5),
    }
    assert unread == dict.fromkeys(sizes, 0.0)


def test_what_is_not_read_anyway_is_left_out_first_and_saves_nothing():
    sizes, unread = {"q": 1.0, "down": 2.0}, {"down": 0.75}
    shares = allocation.greedy_shares(sizes, 0.5, 0.05, lambda shares: sum(shares.values()), unread)
    assert shares["down"] >= 0.75
    # Of 1 + 2 / 4 that are read.
    assert shares["q"] + 2 * (shares["down"] - 0.75) == pytest.approx(0.5 * 1.5)
    assert allocation.greedy_shares(sizes, 0.0, 0.05, lambda shares: 0.0, unread) == {"q": 0.0, "down": 0.75}


def test_neurons_that_spark_leaves_out_are_not_read_anyway():
    """Of the tiny preset's 768 neurons a token has 61, and of these rows of both maps."""
    model = preset("spark", "tiny").model
    sizes, unread = allocation.sizes_of(model.ffn.linear_maps(model.d_model), model.d_model)
    assert unread == pytest.approx({"gate": 0, "up": 0, "down": 1 - 61 / 768, "neurons": 1 - 61 / 768})
    assert sizes["up"] == pytest.approx((1 - model.ffn.r / model.d_model) * 61 / model.d_model)


def test_layers_with_arrays_of_their_own_are_those_of_the_stack(sparse):
    model, _ = sparse
    single = model.unstacked()
    for (place, stacked), (own, block) in zip(layers.layers_of(model), layers.layers_of(single), strict=True):
        assert place.layer == own.layer
        jax.tree.map(np.testing.assert_array_equal, nnx.split(block)[1], nnx.split(stacked)[1])


def test_a_layers_output_changes_no_more_than_with_equal_shares(sparse, batches):
    model, calibration = sparse
    config = AllocationConfig(step=0.3)
    shares = allocation.greedy(model, calibration, batches, 0.5, config, threshold)
    held, streams = layers.streams_below(model, batches)
    for place, block in layers.layers_of(model):
        graphdef, state = nnx.split(block)
        outputs = [allocation._output(model.config, graphdef, state, x, b) for x, b in zip(streams, held, strict=True)]
        errors = []
        for own in ({name: float(values[place.layer]) for name, values in shares.items()}, dict.fromkeys(shares, 0.5)):
            sizes, _ = allocation.sizes_of(allocation.masked_maps(block, 32), 32)
            assert sum(sizes[name] * own[name] for name in sizes) == pytest.approx(0.5 * sum(sizes.values()))
            cuts = {name: threshold(calibration.maps[name].counts[place.layer], share) for name, share in own.items()}
            allocation.set_cuts(block, cuts)
            changed, total = nnx.split(block)[1], 0
            for x, dense, batch in zip(streams, outputs, held, strict=True):
                y = allocation._output(model.config, graphdef, changed, x, batch)
                counted = (batch["segment_ids"] > 0)[:, 24:, None]
                total += np.sum(np.linalg.norm(np.where(counted, np.asarray(dense - y)[:, 24:], 0), axis=1))
            errors.append(total)
        assert errors[0] < errors[1]
        streams = outputs


def test_a_run_has_the_shares_that_were_found(made, tmp_path):
    changes = {"sparsity": 0.4, "calibration": CalibrationConfig(sequences=6), "method": "wina"}
    changes |= {"allocation": AllocationConfig(kind="greedy", step=0.4, sequences=3)}
    figures = sparsify.sparsify(dataclasses.replace(made[1], out=tmp_path / "new", **changes))
    assert figures["cuts"] == figures["shares"]
    (block,) = run_dir.load(tmp_path / "new").model.segments[0].blocks
    for part in (block.attention, block.ffn):
        for place, name in enumerate(part.masks.names):
            np.testing.assert_array_equal(part.masks.cut_P[:, place], np.float32(figures["shares"][name]))
    for layer in range(2):
        assert len({shares[layer] for shares in figures["shares"].values()}) > 1
    assert figures["weights"] / figures["weights_dense"] == pytest.approx(0.6, abs=0.03)


def test_a_method_of_one_map_has_nothing_to_allocate(made, tmp_path):
    command = dataclasses.replace(made[1], method="cats", allocation=AllocationConfig(kind="greedy"))
    with pytest.raises(sparsify.UserError, match=r"--allocation.kind=greedy: is for --method teal, wina"):
        sparsify.sparsify(dataclasses.replace(command, out=tmp_path / "new"))
