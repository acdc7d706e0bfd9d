"""Multi-token prediction: what its modules compute, what they see, and that only training has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation.cross_entropy import model_loss
from sparsezoo_jax.inference import packed
from sparsezoo_jax.models import Decoder, count_parameters
from sparsezoo_jax.models.accounting import train_flops_per_token
from sparsezoo_jax.models.decoder import call_context
from sparsezoo_jax.models.layers import Passed
from tests.models.conftest import CONFIGS, build, with_weights_of

CONFIG = dataclasses.replace(CONFIGS["moe"], mtp_layers=2)
LENGTHS = (9, 6, 2)  # documents of the row; padding follows
T = 20


def batch_of(tokens, lengths=LENGTHS):
    """One row of packed documents, each target the next token of its own document."""
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, len(tokens) - sum(lengths)])
    last = np.append(segments[1:] != segments[:-1], True)
    positions = np.concatenate([*map(np.arange, lengths), np.arange(len(tokens) - sum(lengths))])
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1), "segment_ids": segments, "positions": positions}
    batch = {name: jnp.asarray(x, jnp.int32)[None] for name, x in arrays.items()}
    return batch | {"mask": jnp.asarray(~last & (segments > 0))[None]}


TOKENS = np.random.default_rng(0).integers(0, 61, T)


def trained(config, model, chunk=None):
    """Loss, what the model returned and gradients, in training mode; and the function of a batch that gives them."""
    graphdef, params, rest = nnx.split(with_weights_of(config, model), nnx.Param, ...)

    @jax.jit
    def run(batch):
        def total(params):
            model = nnx.merge(graphdef, params, rest)
            model.train()
            loss, sums, out = model_loss(model, batch, chunk)
            return loss + 3 * out.losses["mtp"], (sums, out)

        gradient, (sums, out) = jax.grad(total, has_aux=True)(params)
        return sums, out._replace(tables=None), gradient

    return run


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def run(model):
    return trained(CONFIG, model)


@pytest.fixture(scope="module")
def result(run):
    return run(batch_of(TOKENS))


def losses_by_hand(model, out, batch, row=0):
    """For each depth, the losses of the tokens that have a target."""
    found = []
    for depth, ahead in enumerate(out.ahead, 1):
        logits = np.asarray(model.logits_of(ahead.hidden)[row], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start, own = 0, []
        for length in LENGTHS:
            own += [-log_p[t, TOKENS[t + depth + 1]] for t in range(start, start + length - depth - 1)]
            start += length
        found.append(own)
    return found


def test_loss_is_that_of_targets_in_the_tokens_own_document(model, result):
    _, out, _ = result
    by_depth = losses_by_hand(model, out, batch_of(TOKENS))
    assert [len(own) for own in by_depth] == [7 + 4, 6 + 3]
    np.testing.assert_allclose(out.losses["mtp"], np.mean([np.mean(own) for own in by_depth]), rtol=1e-5)


def test_a_masked_target_has_no_loss_at_any_depth(model, run):
    batch = batch_of(TOKENS)
    batch["mask"] = batch["mask"].at[0, 3].set(False)  # the target is token 4: depth 1 at token 2, depth 2 at 1
    _, out, _ = run(batch)
    by_depth = losses_by_hand(model, out, batch)
    del by_depth[0][2], by_depth[1][1]
    np.testing.assert_allclose(out.losses["mtp"], np.mean([np.mean(own) for own in by_depth]), rtol=1e-5)


def test_module_by_its_formula(model, result):
    """Depth 1 on its first document: W [norm(e_{t+1}); norm(h_t)], a layer, a norm."""
    _, out, _ = result
    module, length = model.mtp[0], LENGTHS[0] - 1
    embedded = model.embedding_VD[...][TOKENS[1 : length + 1]]

    def rms(x, scale):
        return np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * np.asarray(scale)

    joined = np.concatenate(
        [rms(embedded, module.embedding_norm.scale[...]), rms(out.hidden[0, :length], module.hidden_norm.scale[...])],
        -1,
    )
    x = jnp.asarray(joined @ np.asarray(module.joint_ED[...]))[None]
    ctx = call_context(model.config, jnp.zeros((1, length), jnp.int32))
    passed, _, _ = module.segment(Passed(x), ctx, None, scan=True, remat="none")
    x = passed.x
    expected = rms(x[0], module.final_norm.scale[...])
    np.testing.assert_allclose(out.ahead[0].hidden[0, :length], expected, atol=2e-5)


def test_documents_do_not_see_each_other(run, result):
    _, before, _ = result
    changed = TOKENS.copy()
    changed[LENGTHS[0] :] = (changed[LENGTHS[0] :] + 7) % 61
    _, after, _ = run(batch_of(changed))
    for depth, (a, b) in enumerate(zip(before.ahead, after.ahead, strict=True), 1):
        own = slice(0, LENGTHS[0] - depth)
        np.testing.assert_array_equal(a.hidden[0, own], b.hidden[0, own])
        np.testing.assert_array_equal(np.flatnonzero(a.valid[0, : LENGTHS[0]]), np.arange(own.stop))
        assert (a.hidden[0, LENGTHS[0] :] != b.hidden[0, LENGTHS[0] :]).any()


def test_loads_count_tokens_with_a_token_ahead_only(run, result):
    """Document 3 has 2 tokens: a module of depth 2 sees none of it, whatever it holds."""
    changed = TOKENS.copy()
    start = sum(LENGTHS[:2])
    changed[start:] = (changed[start:] + 7) % 61
    _, after, _ = run(batch_of(changed))
    load, other = (out.observed[4]["layer"]["ffn"]["load"] for out in (result[1], after))
    np.testing.assert_array_equal(load, other)
    np.testing.assert_allclose(load.sum(), 2, rtol=1e-6)


def test_every_parameter_learns_and_every_bias_moves(model, result):
    _, out, gradient = result
    still = [path for path, g in nnx.to_flat_state(gradient) if "mtp" in path and not np.any(g[...])]
    assert not still
    moved = build(CONFIG)
    moved.after_step(out.observed, jax.random.key(0))
    for module in moved.mtp:
        assert np.ptp(module.segment.blocks[0].ffn.bias_E[...]) > 0


def test_chunks_scans_and_rematerialisation_change_nothing(model, result):
    sums, out, gradient = result
    other = dataclasses.replace(CONFIG, scan_layers=False, remat="full")
    again, same, gradients = trained(other, model, chunk=5)(batch_of(TOKENS))
    np.testing.assert_allclose(again.cross_entropy_sum, sums.cross_entropy_sum, rtol=1e-5)
    np.testing.assert_allclose(same.losses["mtp"], out.losses["mtp"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_only_training_has_it(model, result):
    tokens = jnp.asarray(TOKENS)[None]
    plain = dataclasses.replace(CONFIG, mtp_layers=0)
    without = Decoder(plain, rngs=nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(model))
    nnx.update(without, nnx.from_flat_state([(path, x) for path, x in state if "mtp" not in path]))
    out = model(tokens)
    assert out.ahead == ()
    assert "mtp" not in out.losses
    np.testing.assert_array_equal(out.logits, without(tokens).logits)
    assert not nnx.state(packed(model).mtp)
    count, other = count_parameters(CONFIG), count_parameters(plain)
    assert dataclasses.replace(count, mtp=0) == other
    last = model.segments[-1].blocks[0]
    layer = sum(x.size for x in jax.tree.leaves(nnx.state(last, nnx.Param))) / 2  # two layers in the stack
    assert count.mtp == 2 * (layer + 2 * 24 * 24 + 3 * 24)
    assert train_flops_per_token(CONFIG, 20).sparse > train_flops_per_token(plain, 20).sparse + 6 * 2 * 24 * 61


def test_bad_depths():
    with pytest.raises(ConfigError, match=r"model.mtp_layers=-1: must be at least 0"):
        dataclasses.replace(CONFIG, mtp_layers=-1)
    with pytest.raises(ConfigError, match=r"model.mtp_layers=48: must be below model.max_seq_len=48"):
        dataclasses.replace(CONFIG, mtp_layers=48)
