import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.config import ParameterGroup
from sparsezoo_jax.training.optimizer import build_optimizer, clip_gradients
from sparsezoo_jax.training.optimizers import Adafactor, AdamW, Muon, is_matrix, matrix_axes
from sparsezoo_jax.training.schedules import Constant
from sparsezoo_jax.training.state import ModelTemplate, Variable, flatten

from .toy import ToyModel, config


def toy_tree(seed=0):
    template = ModelTemplate(ToyModel)
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), template.split(ToyModel_())[0])
    return template.parameters, tree


def ToyModel_():
    from flax import nnx

    return ToyModel(nnx.Rngs(0))


def one_update(train_config, step=0, steps=1):
    parameters, params = toy_tree()
    optimizer = build_optimizer(train_config, parameters)
    state = optimizer.init(params)
    updates = params
    for i in range(steps):
        grads = toy_tree(seed=i + 1)[1]
        updates, state = optimizer.update(grads, state, params, step=jnp.int32(step + i))
    return flatten(params), flatten(toy_tree(seed=steps)[1]), flatten(updates)


@pytest.mark.parametrize(
    ("axes", "shape", "matrix", "muon"),
    [
        (("embed", "ffn"), (3, 4), True, ((-2,), (-1,))),
        (("embed", "ffn"), (9, 3, 4), True, ((-2,), (-1,))),
        (("embed",), (9, 3), False, None),
        (("vocab", "embed"), (5, 3), True, None),
        (("positions", "embed"), (5, 3), True, None),
        (("embed", "heads", "head_dim"), (3, 2, 4), True, ((-3,), (-2, -1))),
        (("heads", "head_dim", "embed"), (9, 2, 4, 3), True, ((-3, -2), (-1,))),
        (("kv_heads", "head_dim"), (2, 4), False, None),
        (("experts", "embed", "ffn"), (9, 2, 3, 4), True, ((-2,), (-1,))),
        (("experts", "ffn"), (2, 4), False, None),
        (("embed", "experts"), (3, 2), True, ((-2,), (-1,))),
        (None, (3, 4), True, None),
        (None, (4,), False, None),
    ],
)
def test_what_is_a_matrix(axes, shape, matrix, muon):
    variable = Variable(shape, axes)
    assert is_matrix(variable) is matrix
    assert matrix_axes(variable) == muon


@pytest.mark.slow
def test_adamw_matches_optax_with_decay_on_matrices_only():
    _, params = toy_tree()
    decays = {"embedding": False, "layers/0/norm": False, "up": True, "router": True, "down": True}
    _, _, found = one_update(config(optimizer=AdamW(weight_decay=0.3)), steps=3)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: decays[jax.tree_util.keystr(path, simple=True, separator="/")], params
    )
    reference = optax.adamw(1e-2, b2=0.95, weight_decay=0.3, mask=mask)
    state = reference.init(params)
    updates = params
    for i in range(3):
        updates, state = reference.update(toy_tree(seed=i + 1)[1], state, params)
    expected = flatten(updates)
    for path in found:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-8, err_msg=path)


def test_embeddings_decay_when_asked():
    without = one_update(config(optimizer=AdamW(weight_decay=0.5)))
    with_decay = one_update(config(optimizer=AdamW(weight_decay=0.5, decay_embeddings=True)))
    change = with_decay[2]["embedding"] - without[2]["embedding"]
    np.testing.assert_allclose(change, -1e-2 * 0.5 * without[0]["embedding"], rtol=1e-3, atol=1e-7)


def test_the_learning_rate_is_that_of_the_given_step():
    train = config(schedule=Constant(learning_rate=1e-2, warmup_steps=4), optimizer=AdamW(weight_decay=0.0))
    halfway, full = one_update(train, step=2)[2], one_update(train, step=4)[2]
    np.testing.assert_allclose(2 * halfway["up"], full["up"], rtol=1e-6)
    # Adam's first update has the size of the learning rate.
    np.testing.assert_allclose(np.abs(full["up"]).max(), 1e-2, rtol=1e-3)


def test_groups_scale_the_rate_and_replace_the_decay():
    groups = (
        ParameterGroup(pattern="router", lr_multiplier=0.25),
        ParameterGroup(pattern="^(up|router)$", weight_decay=0.0),
        ParameterGroup(pattern="norm", weight_decay=0.5),
    )
    plain = one_update(config())
    grouped = one_update(config(groups=groups))
    undecayed = one_update(config(optimizer=AdamW(weight_decay=0.0)))
    np.testing.assert_allclose(grouped[2]["router"], 0.25 * plain[2]["router"], rtol=1e-6)
    np.testing.assert_allclose(grouped[2]["up"], undecayed[2]["up"], rtol=1e-6)
    norm = "layers/0/norm"
    expected = plain[2][norm] - 1e-2 * 0.5 * plain[0][norm]
    np.testing.assert_allclose(grouped[2][norm], expected, rtol=1e-5)
    np.testing.assert_array_equal(grouped[2]["down"], plain[2]["down"])


def test_a_group_without_parameters_lists_the_paths():
    with pytest.raises(ConfigError, match="layers/0/norm"):
        build_optimizer(config(groups=(ParameterGroup(pattern="routr"),)), ModelTemplate(ToyModel).parameters)


def test_muon_orthogonalises_every_layer_by_itself():
    _, _, updates = one_update(config(optimizer=Muon(weight_decay=0.0, update_rms=0.2)))
    _, _, adam = one_update(config(optimizer=AdamW(weight_decay=0.0)))
    for path in ("up", "down", "router"):
        for layer in updates[path]:
            singular = np.linalg.svd(layer / 1e-2 / (0.2 * 16**0.5), compute_uv=False)
            # Five Newton-Schulz steps bring singular values near 1, not to it.
            assert singular.min() > 0.5, path
            assert singular.max() < 1.4, path
            np.testing.assert_allclose(jnp.sqrt(jnp.mean(layer**2)), 1e-2 * 0.2, rtol=0.25)
    for path in ("embedding", "layers/0/norm"):
        np.testing.assert_allclose(updates[path], adam[path], rtol=1e-6)


def test_muon_takes_head_axes_together():
    parameters = {"o": Variable((2, 3, 4, 5), ("heads", "head_dim", "embed"))}
    params = {"o": jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))}
    optimizer = build_optimizer(config(optimizer=Muon(weight_decay=0.0)), parameters)
    updates, _ = optimizer.update(params, optimizer.init(params), params, step=jnp.int32(0))
    flat = {"o": Variable((2, 12, 5), ("ffn", "embed"))}
    flat_params = {"o": params["o"].reshape(2, 12, 5)}
    optimizer = build_optimizer(config(optimizer=Muon(weight_decay=0.0)), flat)
    expected, _ = optimizer.update(flat_params, optimizer.init(flat_params), flat_params, step=jnp.int32(0))
    np.testing.assert_allclose(updates["o"].reshape(2, 12, 5), expected["o"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale_by_parameter", [False, True])
def test_adafactor_does_not_mix_stacked_layers(scale_by_parameter):
    optimizer_config = Adafactor(
        min_factored_size=2, momentum=0.9, weight_decay=0.1, scale_by_parameter=scale_by_parameter
    )
    rng = np.random.default_rng(0)
    # Layers of very different scale: statistics over the whole stack would show.
    params = {"w": jnp.float32(rng.normal(size=(2, 5, 6)) * np.array([1, 50])[:, None, None])}
    grads = {"w": jnp.float32(rng.normal(size=(2, 5, 6)) * np.array([1, 100])[:, None, None])}

    def update(params, grads, shape):
        optimizer = build_optimizer(config(optimizer=optimizer_config), {"w": Variable(shape, ("embed", "ffn"))})
        state = optimizer.init(params)
        _, state = optimizer.update(jax.tree.map(lambda g: g[..., ::-1] * 0.3, grads), state, params, step=jnp.int32(0))
        return optimizer.update(grads, state, params, step=jnp.int32(1))[0]["w"]

    stacked = update(params, grads, (2, 5, 6))
    for layer in range(2):
        single = update({"w": params["w"][layer]}, {"w": grads["w"][layer]}, (5, 6))
        np.testing.assert_allclose(stacked[layer], single, rtol=1e-5)


def test_adafactor_matches_optax_on_one_matrix():
    rng = np.random.default_rng(0)
    params = {"w": jnp.float32(rng.normal(size=(5, 6)))}
    ours = build_optimizer(config(optimizer=Adafactor(min_factored_size=2)), {"w": Variable((5, 6), ("embed", "ffn"))})
    reference = optax.adafactor(1e-2, min_dim_size_to_factor=2, multiply_by_parameter_scale=False)
    state, reference_state = ours.init(params), reference.init(params)
    for step in range(3):
        grads = {"w": jnp.float32(rng.normal(size=(5, 6)))}
        found, state = ours.update(grads, state, params, step=jnp.int32(step))
        expected, reference_state = reference.update(grads, reference_state, params)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_first_moments_can_be_bfloat16(kind):
    parameters, params = toy_tree()
    state = build_optimizer(config(optimizer=kind(first_moment_dtype="bfloat16")), parameters).init(params)
    moments = {path: x.dtype for path, x in flatten(state).items() if "mu/" in path}
    assert len(moments) == 5
    assert set(moments.values()) == {jnp.dtype("bfloat16")}


def test_clipping_by_groups():
    groups = (ParameterGroup(pattern="router", clip=0.5), ParameterGroup(pattern="down", lr_multiplier=2.0))
    _, grads = toy_tree()
    clipped, norm = clip_gradients(grads, config(groups=groups, grad_clip=1.0))
    before, after = flatten(grads), flatten(clipped)
    np.testing.assert_allclose(norm, optax.global_norm(grads), rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(after["router"]), 0.5, rtol=1e-5)
    rest = {path: g for path, g in before.items() if path != "router"}
    for path, gradient in rest.items():
        np.testing.assert_allclose(after[path], gradient / optax.global_norm(rest), rtol=1e-5)


def test_small_gradients_and_no_clip_leave_gradients_alone():
    _, grads = toy_tree()
    unclipped, _ = clip_gradients(grads, config(grad_clip=None))
    small = jax.tree.map(lambda g: 1e-3 * g, grads)
    kept, _ = clip_gradients(small, config(grad_clip=1.0))
    for a, b in ((grads, unclipped), (small, kept)):
        jax.tree.map(np.testing.assert_array_equal, a, b)
