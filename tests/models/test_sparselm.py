"""SparseLM: a worked-out decoder, the L1 loss as a mean over all tokens, and the revival of dead neurons."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.configs.sparselm import l1
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import BuildContext, InitConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.rope import RopeConfig
from sparsezoo_jax.models.sparselm import SparseLMFFN, SparseLMFFNConfig
from tests.kernels.test_relu_ffn import fill
from tests.models.conftest import build

WORKED = DecoderConfig(
    vocab_size=12,
    d_model=8,
    layers=2,
    max_seq_len=16,
    attention=GQAConfig(heads=2, kv_heads=2, head_dim=4, rope=RopeConfig(base=1e5)),
    ffn=SparseLMFFNConfig(d_ff=16),
    norm=NormConfig(eps=1e-5),
)
#: Our parameters by the order of the checkpoint's sorted names, and whether a tensor is stored as [out, in].
NAMES = (
    "attention_residual/pre/scale",
    "ffn/down_FD",
    "ffn/gate_DF",
    "ffn/up_DF",
    "ffn_residual/pre/scale",
    "attention/projections/k_DKH",
    "attention/projections/o_NHD",
    "attention/projections/q_DNH",
    "attention/projections/v_DKH",
)
TOKENS = jnp.array([[1, 5, 3, 7, 2, 9]])


def worked_out() -> Decoder:
    """The decoder whose i-th parameter, in the order of a checkpoint's names, is `fill(shape, 0.37 i, 0.4)`."""
    model = build(WORKED)
    number = iter(range(1, 21))

    def drawn(shape):
        values = fill(shape, 0.37 * next(number), 0.4)
        return 1 + 0.1 * values if len(shape) == 1 else values

    model.embedding_VD[...] = jnp.asarray(drawn((12, 8)), jnp.float32)
    block = model.segments[0].blocks[0]
    for layer in range(2):
        for name in NAMES:
            variable = block
            for part in name.split("/"):
                variable = getattr(variable, part)
            shape = variable[...].shape[1:]
            inputs = 2 if name.endswith("NHD") else 1
            matrix = (int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:])))
            values = drawn(shape) if len(shape) == 1 else drawn(matrix[::-1]).T.reshape(shape)
            variable[...] = variable[...].at[layer].set(jnp.asarray(values, jnp.float32))
    model.final_norm.scale[...] = jnp.asarray(drawn((8,)), jnp.float32)
    return model


def test_a_worked_out_decoder():
    """Numbers of an independent computation in float64, which the authors' classes agree with."""
    graphdef, params, rest = nnx.split(worked_out(), nnx.Param, ...)

    @jax.jit
    def losses(params):
        def objective(params):
            out = nnx.merge(graphdef, params, rest)(TOKENS)
            log_p = jax.nn.log_softmax(out.logits[0, :-1])
            cross_entropy = -jnp.mean(log_p[jnp.arange(5), TOKENS[0, 1:]])
            return cross_entropy + 0.01 * out.losses["l1"], (cross_entropy, out)

        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, (cross_entropy, out)), grads = losses(params)
    np.testing.assert_allclose([cross_entropy, out.losses["l1"], loss], [3.44671411, 6.80309532, 3.51474507], rtol=1e-6)
    np.testing.assert_allclose(out.stats["l0"], [9.33333333, 7.66666667], rtol=1e-6)
    np.testing.assert_allclose(out.stats["ffn_density"], np.array([9.33333333, 7.66666667]) / 16, rtol=1e-6)
    logits = [1.17447535, 0.66876323, -1.92480664, 1.49080922, 0.252165636, -1.77373112]
    logits += [1.73790484, -0.176143387, -1.5402775, 1.90428625, -0.596271712, -1.23528816]
    np.testing.assert_allclose(out.logits[0, 5], logits, rtol=2e-6, atol=2e-6)  # float32: order of sums differs
    block = grads.segments[0].blocks[0]
    # As a checkpoint stores them, [out, in]: sum, sum of squares, first and last entry.
    expected = {
        "embedding": (0.509934758, 3.16429351, -0.00239595138, 0.0476928695),
        "gate": (0.202290122, 1.37266412, -0.218484171, -0.00258170973),
        "down": (-0.580938832, 2.41527039, -0.0956231785, 0.141741418),
        "query": (0.104841811, 0.0110382307, -0.0173912015, 0.0117079801),
    }
    found = {
        "embedding": grads.embedding_VD[...],
        "gate": block.ffn.gate_DF[...][0].T,
        "down": block.ffn.down_FD[...][1].T,
        "query": block.attention.projections.q_DNH[...][0].reshape(8, 8).T,
    }
    for name, numbers in expected.items():
        flat = np.asarray(found[name], np.float64).ravel()
        # The sums have up to 128 terms, each within 1e-7 of the largest.
        np.testing.assert_allclose((flat.sum(), flat @ flat, flat[0], flat[-1]), numbers, rtol=1e-6, atol=1e-6)


def layer(**config) -> SparseLMFFN:
    ctx = BuildContext(8, 1, InitConfig(kind="fixed", scale=0.02), jnp.dtype("float32"), jnp.dtype("float32"))
    return SparseLMFFN(SparseLMFFNConfig(d_ff=2048, **config), ctx, nnx.Rngs(0))


def observed(fired):
    return {"fired": jnp.asarray(fired, jnp.float32), "tokens": jnp.float32(1)}


@pytest.mark.parametrize("gated", [True, False])
def test_dead_neurons_get_new_weights_step_by_step(gated):
    ffn = layer(dead_after=2, gated=gated)
    fired = np.arange(2048) % 2
    name = "gate_DF" if gated else "up_DF"
    other = [part for part in ("up_DF", "down_FD") if part != name]
    before = jax.tree.map(np.asarray, {part: getattr(ffn, part)[...] for part in (name, *other)})
    ffn.after_step(observed(fired), jax.random.key(0))
    np.testing.assert_array_equal(getattr(ffn, name)[...], before[name], err_msg="silent for one step only")
    np.testing.assert_array_equal(ffn.silent_F[...], 1 - fired)
    ffn.after_step(observed(fired), jax.random.key(1))
    once = np.asarray(getattr(ffn, name)[...])
    np.testing.assert_array_equal(once[:, 1::2], before[name][:, 1::2])
    drawn = once[:, ::2] - 0.9 * before[name][:, ::2]
    # 8,192 draws: the standard deviation is known to 1 %, the mean to 1 % of it.
    np.testing.assert_allclose(drawn.std(), 0.1 * 0.02, rtol=0.04)
    assert abs(drawn.mean()) < 0.04 * 0.002
    for part in other:
        np.testing.assert_array_equal(getattr(ffn, part)[...], before[part])
    ffn.after_step(observed(np.ones(2048)), jax.random.key(2))
    np.testing.assert_array_equal(getattr(ffn, name)[...], once, err_msg="revived neurons are left alone")
    assert not np.asarray(ffn.silent_F[...]).any()


def test_a_step_without_tokens_kills_nothing():
    ffn = layer()
    before = np.asarray(ffn.gate_DF[...])
    ffn.after_step({"fired": jnp.zeros(2048), "tokens": jnp.float32(0)}, jax.random.key(0))
    np.testing.assert_array_equal(ffn.gate_DF[...], before)


def test_the_weight_counts_what_the_authors_trainer_multiplies():
    (objective,) = preset("sparselm", "2b").train.objectives
    assert objective.weight == l1(2e-5).weight == pytest.approx(1.28e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_ff": 0}, "model.ffn.d_ff=0: must be above 0"),
        ({"revival": 1.5}, "model.ffn.revival=1.5: must be from 0 to 1"),
        ({"revival_std": 0.0}, "model.ffn.revival_std=0.0: must be above 0 or None"),
        ({"dead_after": 0}, "model.ffn.dead_after=0: must be above 0"),
        ({"stored_neurons": 17}, "model.ffn.stored_neurons=17: must be from 1 to model.ffn.d_ff=16, or None"),
        ({"stored_tokens": 1.0}, r"model.ffn.stored_tokens=1.0: must be in \[0, 1\)"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        dataclasses.replace(SparseLMFFNConfig(d_ff=16), **values)
