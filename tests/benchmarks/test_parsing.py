"""The examples of the benchmark of parsing are labelled as they were made, and new victims are new."""

import argparse
import json

import numpy as np
import pytest

from benchmarks import parsing
from benchmarks.parsing import ATTRIBUTES, FAMILIES, examples, parsed
from sparsezoo_jax.parsing.attacks import ATTACKS
from sparsezoo_jax.parsing.victims import ACTIVATIONS, KERNEL_SIZES, SPARSITIES


@pytest.fixture(scope="module")
def families():
    """Perturbations whose numbers say what they are of: family, attack, seed, sparsity, image."""
    shape = (3, len(SPARSITIES), 4, 16, 16, 1)
    places = np.moveaxis(np.indices(shape[:3]), 0, -1).astype(np.float32)
    found = []
    for family in range(len(FAMILIES)):
        of = {}
        for attack, name in enumerate(ATTACKS):
            of[name] = np.zeros(shape, np.float32)
            of[name][:, :, :, 0, :5, 0] = np.insert(places, [0, 0], [family, attack], axis=-1)
        found.append(of)
    return found


def test_labels(families):
    changes, labels, parents = examples(families, tuple(ATTACKS), slice(1, None), slice(2, 4))
    family, attack, seed, sparsity, image = changes[:, 0, :5, 0].astype(int).T
    assert len(changes) == len(FAMILIES) * 3 * 2 * len(SPARSITIES) * 2
    assert (set(seed), set(image)) == ({1, 2}, {2, 3})
    activations = list(ACTIVATIONS)
    assert [KERNEL_SIZES[i] for i in labels["kernel size"]] == [FAMILIES[i][0] for i in family]
    assert [activations[i] for i in labels["activation"]] == [FAMILIES[i][1] for i in family]
    np.testing.assert_array_equal(labels["weight sparsity"], sparsity)
    np.testing.assert_array_equal(labels["which attack"], attack)
    # Those of one dense network are a group.
    assert len(set(zip(family, seed, parents, strict=True))) == len(set(parents)) == 2 * len(FAMILIES)


def test_a_parser_is_asked_of_new_images_and_victims_and_kept(families, tmp_path, monkeypatch):
    seen = []

    class Told:
        def tell(self, changes):
            seen.append(changes[:, 0, :5, 0].astype(int))
            return {name: np.zeros(len(changes), int) for name in ATTRIBUTES}

    def train(changes, labels, *, steps):
        seen.append(changes[:, 0, :5, 0].astype(int))
        assert steps == 7
        assert set(labels) == set(ATTRIBUTES)
        return Told()

    monkeypatch.setattr(parsing, "train_parser", train)
    sizes = {"seeds": 2, "new_seeds": 1, "images": 3, "new_images": 1, "steps": 1, "tuning_steps": 1, "parser_steps": 7}
    options = argparse.Namespace(runs=tmp_path, **sizes)
    rows = parsed(options, families, "pgd-l2")
    trained, again, images, victims = ({(s, i) for _, _, s, _, i in each} for each in seen)
    assert trained == again == {(s, i) for s in (0, 1) for i in (0, 1, 2)}
    assert images == {(0, 3), (1, 3)}
    assert victims == {(2, 3)}
    assert all(set(each[:, 1]) == {list(ATTACKS).index("pgd-l2")} for each in seen)
    assert [row["attribute"] for row in rows] == list(ATTRIBUTES)
    assert {row["new victims"][0] for row in rows} == {1 / 3}
    kept = parsed(options, families, "pgd-l2")
    assert len(seen) == 4
    assert kept == json.loads(json.dumps(rows))
