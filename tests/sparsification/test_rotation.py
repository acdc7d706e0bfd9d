"""WINA's bases: nothing changes while nothing is left out, and the channels' errors add up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import run_dir, sparsify
from sparsezoo_jax.inference import packed
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.sparsification import METHODS, sparsified_config, wrapped
from sparsezoo_jax.sparsification.config import CalibrationConfig
from sparsezoo_jax.sparsification.rotation import basis, rotate
from sparsezoo_jax.training.state import ModelTemplate, flatten, nested
from tests.models.conftest import forward
from tests.sparsification.test_pruning import called


def test_rows_of_the_reference_are_orthogonal():
    """So `||y - y_dense||^2` is the sum of x_i^2 c_i^2 over channels left out, whatever the weights were."""
    draw = np.random.default_rng(0)
    weight, gain, normed = draw.standard_normal((8, 5)), draw.uniform(0.5, 2, 8), draw.standard_normal((3, 8))
    forth, back = basis(weight, gain)
    np.testing.assert_allclose(back @ forth, np.eye(8), atol=1e-12)
    rotated = back @ weight
    product = rotated @ rotated.T
    np.testing.assert_allclose(product, np.diag(np.diag(product)), atol=1e-12)
    singular = np.linalg.svd(gain[:, None] * weight, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), [*singular, 0, 0, 0], atol=1e-12)
    x = (normed * gain) @ forth
    np.testing.assert_allclose(x @ rotated, (normed * gain) @ weight, atol=1e-12)
    kept = np.arange(8) % 2 == 0
    error = np.sum(np.square((x * ~kept) @ rotated), axis=1)
    np.testing.assert_allclose(error, np.square(x[:, ~kept]) @ np.square(np.linalg.norm(rotated, axis=1)[~kept]))


def test_a_gain_of_0_takes_nothing_away():
    weight = np.random.default_rng(1).standard_normal((4, 4))
    forth, back = basis(weight, np.array([1.0, 0.0, 2.0, 1e-12]))
    np.testing.assert_allclose(forth @ back, np.eye(4), atol=1e-12)


def test_rotated_layers_compute_the_same_while_nothing_is_left_out(dense, batches):
    template = ModelTemplate(lambda rngs: Decoder(dense.config, rngs=rngs))
    params, variables = template.split(dense)
    flat = flatten(params)
    gains = {
        path: x + 0.5 * jax.random.uniform(jax.random.key(3), x.shape) for path, x in flat.items() if "/pre/" in path
    }
    assert gains
    model = template.merge(nested({**flat, **gains}), variables)
    method = METHODS["wina"]._replace(rotate=True)
    sparse = wrapped(model, sparsified_config(dense.config, method.sparsity(0.4)))
    before = sparse.segments[0].blocks[0].ffn.inner.gate_DF[...]
    rotate(sparse)
    expected = called(model)(batches[0]).logits
    np.testing.assert_allclose(called(sparse)(batches[0]).logits, expected, atol=1e-4)
    block = sparse.segments[0].blocks[0]
    assert not np.allclose(before, block.ffn.inner.gate_DF[...], atol=0.01)
    for layer in range(2):
        gate = np.asarray(block.ffn.inner.gate_DF[layer], np.float64)
        product = gate @ gate.T
        np.testing.assert_allclose(product, np.diag(np.diag(product)), atol=1e-5)


def test_a_rotated_run_pays_for_its_matrices_and_decodes_as_it_computes(made, tmp_path):
    changes = {"out": tmp_path / "new", "method": "wina", "sparsity": 0.4, "rotate": True}
    changes["calibration"] = CalibrationConfig(sequences=6)
    figures = sparsify.sparsify(dataclasses.replace(made[1], **changes))
    assert figures["rotated"]
    # 32^2 for attention and for the FFN of both layers; all maps leave out 0.4.
    expected = 0.6 * figures["weights_dense"] + 4 * 32**2
    assert figures["weights"] == pytest.approx(expected, rel=0.02)
    model, config, _ = run_dir.load(tmp_path / "new")
    ffn, attention = config.model.ffn, config.model.attention
    assert ffn.weights(32) - (0.6 * ffn.of.weights(32)) == pytest.approx(32**2)
    assert attention.projection_flops(32) - 0.6 * attention.of.projection_flops(32) == pytest.approx(2 * 32**2)
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 320)
    expected, laid_out = forward(model)(tokens).logits, packed(model)
    cache, step = laid_out.init_cache(1, 12), forward(laid_out)
    for start, length in ((0, 11), (11, 1)):
        out = step(tokens[:, start : start + length], cache=cache)
        np.testing.assert_allclose(out.logits, expected[:, start : start + length], atol=2e-4)
        cache = out.cache
    assert jnp.all(jnp.isfinite(out.logits))


def test_neurons_are_not_rotated(made, tmp_path):
    command = dataclasses.replace(made[1], out=tmp_path / "new", method="cats", rotate=True)
    with pytest.raises(sparsify.UserError, match=r"--rotate=True: is for --method teal, wina"):
        sparsify.sparsify(command)
    assert not (tmp_path / "new").exists()
