"""Training of autoencoders: losses by hand, what holds after every step, files and the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import sae as command
from sparsezoo_jax.autoencoders import (
    GBASAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    SAERun,
    SAETrainConfig,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
    Trainer,
    load_sae,
    save_sae,
)
from sparsezoo_jax.autoencoders.activations import fidelity, reader, sae_features, stream
from sparsezoo_jax.autoencoders.model import auxiliary_loss, geometric_median
from sparsezoo_jax.autoencoders.training import anneal_powers, dying_features, matched_penalty
from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.models import Decoder
from tests.models.conftest import CONFIGS
from tests.test_commands import call, flags

D, F, N = 12, 40, 96
KINDS = [
    StandardSAE(features=F),
    StandardSAE(features=F, anneal_start=5),
    GatedSAE(features=F),
    JumpReLUSAE(features=F, target_l0=4, penalty=1.0),
    TopKSAE(features=F, k=4),
    TopKSAE(features=F, k=4, tied=True),
    BatchTopKSAE(features=F, k=4),
    FeatureChoiceSAE(features=F, k=4),
    FeatureChoiceSAE(features=F, k=4, budget="uniform", aux="dead", mutual_choice=0.0),
    GBASAE(features=F, groups=4, interval=5, highest=0.3, lowest=0.05),
]
TRAIN = SAETrainConfig(steps=60, batch_size=N, learning_rate=3e-3, warmup_steps=5, dead_after=300)


def batches(seed=0):
    """Sums of few of 24 directions."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(24, D))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    while True:
        yield ((rng.random((N, 24)) < 0.12) * rng.uniform(1, 3, (N, 24)) @ directions + 0.5).astype(np.float32)


def unexplained(autoencoder, x):
    error = np.square(x - autoencoder.reconstruct(jnp.asarray(x))).sum()
    return error / np.square(x - x.mean(0)).sum()


def name(config):
    variant = "tied" if getattr(config, "tied", False) else getattr(config, "budget", "")
    return f"{config.kind}-{variant}"


@pytest.fixture(scope="module", params=KINDS, ids=name)
def run(request):
    source = batches()
    trainer = Trainer(request.param, TRAIN, next(source))
    first = unexplained(trainer.autoencoder, next(source))
    rows = []
    for _ in range(TRAIN.steps):
        x = next(source)
        rows.append({name: float(value) for name, value in trainer.step(x).items()})
        norms = np.linalg.norm(np.asarray(trainer.params["w_dec_FD"]), axis=-1)
        np.testing.assert_allclose(norms, 1, atol=1e-6)
    return trainer, rows, first, next(source)


@pytest.mark.slow
def test_it_learns_to_reconstruct(run):
    trainer, rows, first, x = run
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert unexplained(trainer.autoencoder, x) < 0.75 * first
    assert rows[-1]["fvu"] < rows[0]["fvu"]


@pytest.mark.slow
def test_sparsity_is_as_asked_for(run):
    trainer, rows, _, x = run
    config = trainer.config
    codes = np.asarray(trainer.autoencoder.encode(jnp.asarray(x)))
    assert codes.shape == (N, F)
    if config.kind == "topk":
        assert rows[-1]["l0"] == 4
        np.testing.assert_array_equal((codes > 0).sum(-1), 4)
    if config.kind in ("batch_topk", "feature_choice"):
        # Budgets are met in training, and in use by thresholds up to what one batch differs from the others.
        assert rows[-1]["l0"] == pytest.approx(4, rel=0.15)
        assert (codes > 0).sum(-1).mean() == pytest.approx(4, rel=0.4)
    # A token's features are its own, whoever else is in the batch.
    alone = np.asarray(trainer.autoencoder.encode(jnp.asarray(x[:3])))
    np.testing.assert_allclose(alone, codes[:3], atol=1e-5)


@pytest.mark.slow
def test_dead_features_are_counted(run):
    trainer, rows, _, _ = run
    silent = np.asarray(trainer.state["silent_F"])
    assert rows[-1]["dead"] == (silent >= 300).sum()
    assert set(np.unique(silent)) <= set(range(0, N * TRAIN.steps + 1, N))


@pytest.mark.slow
def test_stored_and_loaded(run, tmp_path):
    trainer, _, _, x = run
    stored = SAERun(source="runs/x", step=3, sae=trainer.config, train=TRAIN)
    save_sae(tmp_path / "sae", stored, trainer.autoencoder)
    autoencoder, found = load_sae(tmp_path / "sae")
    assert found == stored
    np.testing.assert_array_equal(autoencoder.encode(jnp.asarray(x)), trainer.autoencoder.encode(jnp.asarray(x)))


def test_thresholds_follow_the_smallest_kept_code():
    source = batches()
    trainer = Trainer(BatchTopKSAE(features=F, k=4, normalisation="none"), TRAIN, next(source))
    x = next(source)
    pre = np.maximum((x - trainer.params["b_dec_D"]) @ trainer.params["w_enc_DF"] + trainer.params["b_enc_F"], 0)
    trainer.step(x)
    np.testing.assert_allclose(trainer.state["threshold_F"], np.sort(pre.ravel())[-4 * N], rtol=1e-4)
    config = FeatureChoiceSAE(features=F, k=4, budget="uniform", mutual_choice=0.0, normalisation="none")
    choice = Trainer(config, TRAIN, next(source))
    x = next(source)
    pre = np.maximum((x - choice.params["b_dec_D"]) @ choice.params["w_enc_DF"] + choice.params["b_enc_F"], 0)
    choice.step(x)
    budgets = np.asarray(choice.state["budgets_F"])  # 4 * 96 / 40 = 9.6
    assert sorted(set(budgets)) == [9, 10]
    smallest = np.sort(pre, axis=0)[::-1][budgets - 1, np.arange(F)]
    np.testing.assert_allclose(choice.state["threshold_F"], smallest, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- auxiliary loss


def test_auxiliary_loss():
    rng = np.random.default_rng(0)
    pre, w, e = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((N, F), (F, D), (N, D)))
    nobody, some = jnp.zeros(F, bool), jnp.zeros(F, bool).at[:5].set(True)
    assert auxiliary_loss(pre, nobody, w, e, 3) == 0
    # Dead features whose codes are all 0 explain nothing: the residual against its variance.
    silent = jnp.where(some, -1.0, pre)
    expected = jnp.sum(e**2) / jnp.sum((e - e.mean(0)) ** 2)
    assert float(auxiliary_loss(silent, some, w, e, 3)) == pytest.approx(float(expected), rel=1e-5)
    # By hand: the 3 best of the first 5.
    codes = np.maximum(np.asarray(pre[:, :5]), 0)
    codes[codes < np.sort(codes, axis=-1)[:, -3:-2]] = 0
    left = np.square(e - codes @ w[:5]).sum() / np.square(e - e.mean(0)).sum()
    assert float(auxiliary_loss(pre, some, w, e, 3)) == pytest.approx(left, rel=1e-5)
    # Fewer eligible than asked for: the others don't fill up.
    assert float(auxiliary_loss(pre, some, w, e, 20)) == pytest.approx(
        np.square(e - np.maximum(pre[:, :5], 0) @ w[:5]).sum() / np.square(e - e.mean(0)).sum(), rel=1e-5
    )
    grads = jax.grad(auxiliary_loss, argnums=(0, 2, 3))(pre, some, w, e, 3)
    np.testing.assert_array_equal(grads[2], 0)
    np.testing.assert_array_equal(grads[0][:, 5:], 0)
    np.testing.assert_array_equal(grads[1][5:], 0)
    assert jnp.abs(grads[1][:5]).max() > 0
    assert auxiliary_loss(pre, some, w, jnp.zeros((N, D)), 3) == 0, "a perfect reconstruction is no division by 0"


def test_dying_features():
    law = 4 * np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    np.testing.assert_array_equal(dying_features(jnp.asarray(law * 1.01, jnp.float32), 4), False)
    # Ranked by density, wherever they stand.
    density = np.array([law[2] * 0.9, law[0] * 1.1, 0.0, law[1] * 1.1])
    np.testing.assert_array_equal(dying_features(jnp.asarray(density, jnp.float32), 4), [True, False, True, False])


# -------------------------------------------------------------------------------------------------------- annealing


def test_powers_of_the_penalty():
    values = anneal_powers(StandardSAE())
    np.testing.assert_allclose(values, np.linspace(1, 0.2, 10), rtol=1e-6)
    rng = np.random.default_rng(0)
    codes = rng.uniform(0, 3, (10, 50))
    old, new = codes**1.0, codes**0.9111
    penalty = matched_penalty(jnp.float32(0.05), jnp.asarray(old.sum(-1)), jnp.asarray(new.sum(-1)))
    assert float(penalty) * new.sum() == pytest.approx(0.05 * old.sum(), rel=1e-6)


def test_annealing_in_training():
    source = batches()
    config = StandardSAE(features=F, anneal_start=20, penalty=0.1)
    train = dataclasses.replace(TRAIN, steps=120)
    trainer = Trainer(config, train, next(source))
    indices, penalties = [], []
    for _ in range(120):
        before = trainer.state
        trainer.step(next(source))
        indices.append(int(trainer.state["p_index"]))
        penalties.append(float(trainer.state["penalty"]))
        if trainer.state["p_index"] != before["p_index"]:
            old, new = np.asarray(trainer.state["powers_2Q"]).mean(1)
            assert penalties[-1] * new == pytest.approx(float(before["penalty"]) * old, rel=1e-5)
        else:
            assert penalties[-1] == float(before["penalty"])
    assert sorted(set(indices)) == list(range(10))
    # Ten values over the 100 steps from step 20 on: the first move comes after ten of them.
    assert indices.index(1) == 29
    assert penalties[0] == pytest.approx(0.1)


def test_centre():
    x = np.zeros((101, 3), np.float32)
    x[:50] = 100  # the mean is near 50, most points are at 0
    np.testing.assert_allclose(geometric_median(jnp.asarray(x), 500), 0, atol=0.5)


# ------------------------------------------------------------------------------------------------ a model's activations

MODEL = dataclasses.replace(CONFIGS["moex"], layers=2)


@pytest.fixture(scope="module")
def model():
    return Decoder(MODEL, rngs=nnx.Rngs(0))


def token_batches(count=3, padding=4):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(0, 61, (4, 17))
        segments = np.broadcast_to(np.arange(16) < 16 - padding, (4, 16)).astype(np.int32)
        yield {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments,
            "positions": np.broadcast_to(np.arange(16), (4, 16)), "mask": segments > 0,
        }  # fmt: skip


def test_stream_gives_every_token_once(model):
    read = reader(model, 2, "residual")
    rows = np.concatenate(list(stream(read, token_batches(40), 16, seed=0)))
    expected = np.concatenate([np.asarray(read(b))[:, :12].reshape(-1, 24) for b in token_batches(40)])
    assert len(rows) == len(expected) // 16 * 16
    keys = lambda x: sorted(map(tuple, x.round(4).tolist()))  # noqa: E731
    assert set(keys(rows)) <= set(keys(expected))
    assert not np.allclose(rows[:100], expected[:100])


def autoencoder_of(w_dec):
    """ReLU codes of x and -x: reconstructs exactly what `w_dec` does not lose."""
    d = w_dec.shape[0]
    params = {"w_enc_DF": jnp.concatenate([jnp.eye(d), -jnp.eye(d)], axis=1), "b_enc_F": jnp.zeros(2 * d)}
    params |= {"w_dec_FD": jnp.concatenate([w_dec, -w_dec]), "b_dec_D": jnp.zeros(d)}
    config = StandardSAE(features=2 * d, normalisation="none")
    return SparseAutoencoder(config, params, {"input_scale": jnp.float32(1)})


@pytest.mark.slow
@pytest.mark.parametrize("site", ["residual", "ffn_output"])
def test_fidelity(model, site):
    perfect = fidelity(autoencoder_of(jnp.eye(24)), model, token_batches(), 2, site)
    assert perfect.tokens == 3 * 4 * 12
    assert perfect.fvu == pytest.approx(0, abs=1e-6)
    assert perfect.loss_reconstructed == pytest.approx(perfect.loss, abs=1e-5)
    assert perfect.loss_recovered == pytest.approx(1, abs=1e-3)
    assert perfect.l0 == pytest.approx(24, abs=0.1), "every entry has a sign"
    useless = fidelity(autoencoder_of(jnp.zeros((24, 24))), model, token_batches(), 2, site)
    assert useless.loss_reconstructed == pytest.approx(useless.loss_ablated, abs=1e-6)
    assert useless.loss_recovered == pytest.approx(0, abs=1e-6)
    assert useless.loss == pytest.approx(perfect.loss)
    x = np.concatenate([np.asarray(reader(model, 2, site)(b))[:, :12].reshape(-1, 24) for b in token_batches()])
    assert useless.fvu == pytest.approx(np.square(x).sum() / np.square(x - x.mean(0)).sum(), rel=1e-4)
    if site == "residual":  # nothing is left of what the last layer gave
        assert useless.loss_ablated == pytest.approx(np.log(61), rel=1e-5)


@pytest.mark.slow
def test_a_transcoder_stands_for_the_ffn(model):
    """Its output takes that of the FFN's place, made of what the FFN reads."""
    rows = np.concatenate([np.asarray(reader(model, 2, "transcoder")(b))[:, :12] for b in token_batches()])
    batch = next(token_batches())
    np.testing.assert_allclose(rows[:4, :, 24:], np.asarray(reader(model, 2, "ffn_output")(batch))[:, :12], atol=1e-6)
    train = SAETrainConfig(site="transcoder", skip=True)
    transcoder = Trainer(TopKSAE(features=16, k=2), train, rows.reshape(-1, 48)).autoencoder
    found = fidelity(transcoder, model, [batch], 2, "transcoder")
    arrays = [jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions")]
    made_BTD = transcoder.reconstruct(reader(model, 2, "transcoder")(batch)[..., :24])
    graphdef, state = nnx.split(model)

    @jax.jit
    def logits_of(state, tokens, segments, positions):
        edit = lambda name, layer, y_BTD: made_BTD if (name, layer) == ("ffn_output", 1) else y_BTD  # noqa: E731
        return nnx.merge(graphdef, state)(tokens, segment_ids=segments, positions=positions, edit=edit).logits

    logits = logits_of(state, *arrays)
    losses = jax.nn.logsumexp(logits, -1) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    assert found.loss_reconstructed == pytest.approx(float(np.mean(losses[batch["mask"]])), rel=1e-5)
    assert found.loss_reconstructed != pytest.approx(found.loss, rel=1e-5)
    made = np.asarray(transcoder.reconstruct(jnp.asarray(rows[:4, :, :24])))
    x = rows[:4, :, 24:].reshape(-1, 24)
    fvu = np.square(rows[:4, :, 24:] - made).sum() / np.square(x - x.mean(0)).sum()
    assert found.fvu == pytest.approx(fvu, rel=1e-4)
    features = sae_features(transcoder, model, 2, "transcoder")(batch["tokens"], batch["segment_ids"])
    np.testing.assert_allclose(features[:, :12], transcoder.encode(jnp.asarray(rows[:4, :, :24])), atol=1e-5)


def test_hidden_units_have_no_loss_recovered(model):
    config = TopKSAE(features=16, k=2)
    read = reader(model, 1, "ffn_gate")
    first = np.concatenate(list(stream(read, token_batches(), 16, 0)))
    trainer = Trainer(config, SAETrainConfig(site="ffn_gate"), first)
    result = fidelity(trainer.autoencoder, model, token_batches(), 1, "ffn_gate")
    assert result.loss_recovered is None
    batch = next(token_batches())
    features = sae_features(trainer.autoencoder, model, 1, "ffn_gate")(batch["tokens"], batch["segment_ids"])
    expected = trainer.autoencoder.encode(read(batch))
    np.testing.assert_allclose(features[:, :12], expected[:, :12], atol=1e-6)  # positions of padding differ
    assert result.l0 <= 2


@pytest.mark.slow
def test_the_command(small_corpus, tmp_path, monkeypatch, capsys):
    from sparsezoo_jax import train

    run = tmp_path / "run"
    train.main([*flags(small_corpus, train__steps=2), "--eval.no-report", "--workdir", str(run)])
    capsys.readouterr()
    small = ["--sae.features", 32, "--train.steps", 4, "--train.batch-size", 64, "--batches", 2]
    args = [run, "--kind", "batch_topk", "--sae.k", 3, *small, "--train.layer", 1, "--json"]
    assert call(command, args, monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    directory = run / "sae" / "batch_topk-residual-1"
    assert json.loads((directory / "evaluation.json").read_text()) == figures
    assert {"l0", "fvu", "dead", "loss_recovered", "explained_variance", "zipf", "kind", "layer"} <= set(figures)
    assert {"exponent", "offset", "r_squared", "ranks"} <= set(figures["zipf"])
    autoencoder, stored = load_sae(directory)
    assert (stored.train.layer, stored.sae.k, stored.source) == (1, 3, str(run))
    assert autoencoder.encode(jnp.ones((2, 32))).shape == (2, 32)
    assert (
        call(command, [run, "--kind", "gba", *small, "--sae.groups", 4, "--workdir", tmp_path / "g"], monkeypatch) == 0
    )
    shown = capsys.readouterr().out
    assert "loss recovered" in shown
    assert "Zipf law of densities" in shown
    for bad, message in (
        (args, "is not empty; name another"),
        ([run, "--kind", "tok"], "--kind=tok: must be one of standard, gated, jump_relu, topk, batch_topk"),
        ([run, "--train.skip"], "train.skip=True: is for train.site=transcoder only"),
        ([run, "--kind", "gba", "--train.site", "transcoder"], "sae.kind=gba: of a transcoder must have"),
        ([run, "--train.layer", 3], "train.layer=3: must be from 1 to 2"),
        ([run, "--sae.k", 0], "sae.k=0: must be from 1 to 4096 features"),
        ([run, "--kind", "gba", "--sae.k", 3], "--sae.k"),
        ([tmp_path / "none"], "no run here"),
        ([], "DIR"),
    ):
        assert call(command, [*bad, "--json"], monkeypatch) == 2
        assert message in capsys.readouterr().err.replace("│", "")


def test_bad_values():
    for make, message in (
        (lambda: TopKSAE(features=8, k=9), r"sae.k=9: must be from 1 to 8 features"),
        (lambda: StandardSAE(penalty=-1), r"sae.penalty=-1"),
        (lambda: GBASAE(lowest=0.6), r"sae.lowest=0.6: must be in \(0, sae.highest\]"),
        (lambda: FeatureChoiceSAE(zipf_offset=-1.0), r"sae.zipf_offset=-1.0: must be above -1"),
        (lambda: SAETrainConfig(layer=0), r"train.layer=0: must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    with pytest.raises(UserError, match="no autoencoder here"):
        load_sae("no/such")
