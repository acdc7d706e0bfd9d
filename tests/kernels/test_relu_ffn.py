"""The sparse ReLU feed-forward layer: worked-out numbers, and the stored form of its backward pass."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.pallas_kernels.relu_ffn import Storage, relu_ffn, scores, stored


def fill(shape, s, a):
    """a sin(s + 1.3 i), i the place in C order."""
    return a * np.sin(s + 1.3 * np.arange(np.prod(shape))).reshape(shape)


X, COTANGENT = fill((4, 4), 0.1, 1.0), fill((4, 4), 0.5, 1.0)
GATE, UP, DOWN = fill((16, 4), 0.2, 0.8) - 0.15, fill((16, 4), 0.3, 0.7), fill((4, 16), 0.4, 0.6)
L1_WEIGHT = 0.05


def arrays(dtype, *, gated=True, batch=1):
    """The worked-out layer with its tokens as one sequence, or as two; and the loss's weights of y."""
    x, weights = X.reshape(batch, -1, 4), (GATE.T if gated else None, UP.T, DOWN.T)
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (x, *weights, COTANGENT.reshape(x.shape)))


def loss(x, gate, up, down, cotangent, storage=None):
    out = relu_ffn(x, gate, up, down, jnp.ones(x.shape[:2], bool), storage=storage)
    return jnp.sum(out.y * cotangent) + L1_WEIGHT * jnp.mean(out.l1), out


@cache
def gradient(storage=None):
    """The loss with what the layer returned, and gradients in x, gate, up and down; jitted once for all tests."""
    return jax.jit(jax.value_and_grad(partial(loss, storage=storage), argnums=(0, 1, 2, 3), has_aux=True))


# Sum, sum of squares, first and last entry, from an independent computation in float64.
WORKED = {
    "y": (-2.5619664, 57.6548632, 1.96384791, -1.82883334),
    "x": (1.75029211, 74.5980735, 0.635693999, -1.84564746),
    "gate": (0.670676997, 33.292731, 0.0875567981, -0.155575482),
    "up": (1.08136676, 42.5361795, 0.10578554, -0.0466841432),
    "down": (8.81576094, 192.809969, 0.768652469, 1.34731827),
}


#: All active neurons; one of each token, and so whole tokens; too few of both.
STORAGES = [Storage(9, 0.0), Storage(1, 1.0), Storage(2, 0.3)]


@pytest.mark.parametrize("storage", [None, *STORAGES], ids=str)
def test_worked_out_values_and_gradients(storage):
    with jax.enable_x64(True):
        (value, out), grads = jax.device_get(gradient(storage)(*arrays(jnp.float64)))
    assert out.active.tolist() == [[7, 9, 9, 9]]
    assert float(out.stored) == (storage != Storage(2, 0.3))
    np.testing.assert_allclose(np.mean(out.l1), 9.15488894, rtol=1e-8)
    np.testing.assert_allclose(value, 0.719823984, rtol=1e-8)
    np.testing.assert_allclose(out.y[0, 0], [1.96384791, -0.863842617, -1.32357929, 1.84486192], rtol=1e-8)
    # The paper's matrices are those of torch: rows of outputs.
    found = dict(zip(("y", "x", "gate", "up", "down"), (out.y[0], grads[0][0], *(g.T for g in grads[1:])), strict=True))
    for name, expected in WORKED.items():
        flat = np.asarray(found[name]).ravel()
        np.testing.assert_allclose((flat.sum(), flat @ flat, flat[0], flat[-1]), expected, rtol=2e-8, err_msg=name)


def test_without_a_gate():
    with jax.enable_x64(True):
        _, out = jax.device_get(jax.jit(loss)(*arrays(jnp.float64, gated=False)))
    np.testing.assert_allclose(np.mean(out.l1), 7.51427261, rtol=1e-8)
    np.testing.assert_allclose(np.sum(out.y), -1.19576897, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "gated"), [(jnp.bfloat16, True), (jnp.float32, False)], ids=["gated", "plain"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_stored_gradients_are_the_dense_ones_bit_by_bit(dtype, gated, storage):
    expected, kept = (gradient(s)(*arrays(dtype, gated=gated, batch=2)) for s in (None, storage))
    for a, b in zip(jax.tree.leaves((expected[1], expected[0][1]._replace(stored=0))),
                    jax.tree.leaves((kept[1], kept[0][1]._replace(stored=0))), strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_packing_keeps_active_neurons_in_order_and_whole_tokens():
    x, gate, up, *_ = arrays(jnp.float32)
    parts = scores(x, gate, up)
    kept = jax.jit(stored.pack, static_argnums=1)(parts, Storage(8, 0.75))
    active = np.flatnonzero(np.asarray(parts[0])[0, 0] > 0)
    assert kept.places[0, 0, 0].tolist() == [*active, 16]
    assert kept.rows.tolist() == [[1, 2, 3]]
    assert bool(kept.fits)
    unpacked = jax.jit(stored.unpack, static_argnums=1)(kept, 16)
    for part, again in zip(parts, unpacked, strict=True):
        np.testing.assert_array_equal(again[0, 0], np.where(parts[0][0, 0] > 0, part[0, 0], 0))
        np.testing.assert_array_equal(again[0, 1:], part[0, 1:])
    assert not bool(stored.pack(parts, Storage(8, 0.5)).fits), "three tokens have more neurons, two may be whole"


def test_dead_neurons_have_no_gradients():
    x, gate, up, down, cotangent = arrays(jnp.float32)
    gate = gate.at[:, 3].set(0)  # a score of 0 is not active
    (_, out), (_, *grads) = gradient()(x, gate, up, down, cotangent)
    assert out.fired[3] == 0
    assert (out.fired[:3] > 0).any()
    for of_neurons in (grads[0].T, grads[1].T, grads[2]):
        assert not np.asarray(of_neurons[3]).any()
        assert np.asarray(of_neurons).any()


def test_padding_neurons_change_nothing():
    """The loss is a sum over neurons: more of them that are 0 leave it."""
    x, gate, up, down, cotangent = arrays(jnp.float32)
    wider = (jnp.pad(gate, ((0, 0), (0, 5))), jnp.pad(up, ((0, 0), (0, 5)), constant_values=2.0))
    (value, _), _ = gradient()(x, gate, up, down, cotangent)
    padded, _ = jax.jit(loss)(x, *wider, jnp.pad(down, ((0, 5), (0, 0))), cotangent)
    np.testing.assert_allclose(padded, value, rtol=1e-6)


def test_the_l1_norm_does_not_reach_the_output_map():
    x, gate, up, down, cotangent = arrays(jnp.float32)
    _, grads = gradient()(x, gate, up, down, 0 * cotangent)
    assert np.asarray(grads[1]).any()
    assert not np.asarray(grads[3]).any()


def test_only_counted_tokens_fire():
    x, gate, up, down, _ = arrays(jnp.float32)
    where = jnp.array([[True, False, False, False]])
    out = jax.jit(relu_ffn)(x, gate, up, down, where)
    np.testing.assert_array_equal(out.fired, np.asarray(scores(x, gate, up)[0])[0, 0] > 0)
    assert out.active[0, 1] == 9


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("x", (1, 4, 5)), ("gate", (4, 15)), ("down", (15, 4)), ("where", (1, 3))],
)
def test_wrong_shapes(name, wrong):
    shapes = {"x": (1, 4, 4), "gate": (4, 16), "up": (4, 16), "down": (16, 4), "where": (1, 4), name: wrong}
    with pytest.raises(ConfigError, match=rf"relu_ffn\.{name}={re.escape(str(wrong))}: must be "):
        relu_ffn(*(jnp.zeros(shape, bool if part == "where" else float) for part, shape in shapes.items()))


def test_less_memory_is_kept_for_the_backward_pass():
    """By the compiler's account of the residuals of a gradient in two steps: forward, and from what it left."""

    def kept(storage):
        shapes = ((2, 256, 64), (64, 1024), (64, 1024), (1024, 64), (2, 256))
        x, gate, up, down, where = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
        where = jax.ShapeDtypeStruct(where.shape, bool)

        def forward(x, gate, up, down, where):
            return jax.vjp(lambda *a: relu_ffn(*a, where, storage=storage)[:2], x, gate, up, down)[1]

        compiled = jax.jit(forward).lower(x, gate, up, down, where).compile()
        return compiled.memory_analysis().output_size_in_bytes

    tokens, inputs = 512, 2 * (512 * 64 + 3 * 64 * 1024) + 512
    dense, packed = kept(None) - inputs, kept(Storage(32, 0.125)) - inputs
    # Scores of the gate and beside it at the least, in bfloat16.
    assert dense >= tokens * 1024 * 4
    whole = 2 * 32 * (1024 * 4 + 4)
    assert packed <= tokens * 32 * 6 + whole + 1024
