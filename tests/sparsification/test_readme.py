"""Experts by domain: choice, losses and schedule restated in NumPy, conversion, and the command on two corpora."""

import dataclasses
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax import data, evaluate, run_dir, sparsify
from sparsezoo_jax.errors import ConfigError, NumericsError, UserError
from sparsezoo_jax.inference import packed
from sparsezoo_jax.inference.experts import PackedReadMEFFN
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.sparsification import conversion, readme
from sparsezoo_jax.sparsification.config import CalibrationConfig, ReadMEConfig
from sparsezoo_jax.sparsification.making import ReadMEPlan
from tests.models.conftest import CONFIGS, forward
from tests.sparsification.test_pruning import called

SMALL = ReadMEConfig(router_width=16, router_heads=2, router_d_ff=16)
DRAW = np.random.default_rng(0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_an_expert_has_the_neurons_that_its_domain_activates_most():
    magnitudes = DRAW.random((3, 4, 20))
    magnitudes[:, :, 7] = magnitudes[:, :, 11] = magnitudes[:, :, 2] = 2.0  # large in all domains
    magnitudes[0, :, 13] = 1.5  # one more of the first layer
    found = readme.choose_experts(magnitudes, 10)
    common = []
    for layer in range(3):
        sets = [set(np.argsort(-magnitudes[layer, e])[:10]) for e in range(4)]
        common.append(set.intersection(*sets))
        for e in range(4):
            assert set(np.flatnonzero(found.masks_LEF[layer, e])) == sets[e]
            # What is shared and what is its own are the expert's neurons, each once.
            own = found.own_LEW[layer, e].tolist()
            assert sorted([*own, *found.shared_LS[layer].tolist()]) == sorted(sets[e])
        assert {2, 7, 11} <= set(found.shared_LS[layer].tolist()) <= common[layer]
    assert found.shared_LS.shape == (3, min(len(each) for each in common))
    assert len(common[0]) > min(len(each) for each in common), "experts have copies of one that all have"


def test_shared_neurons_are_a_multiple_and_leave_each_expert_some():
    alike = np.broadcast_to(DRAW.random((2, 1, 20)), (2, 3, 20))
    assert readme.choose_experts(alike, 10).own_LEW.shape == (2, 3, 1)
    found = readme.choose_experts(alike, 12, 4)
    assert (found.shared_LS.shape, found.own_LEW.shape) == ((2, 8), (2, 3, 4))
    # Of those that all have, the largest over all domains.
    np.testing.assert_array_equal(found.shared_LS[0], np.sort(np.argsort(-alike[0, 0])[:8]))
    assert readme.choose_experts(alike, 3, 4).shared_LS.shape == (2, 0)


HIDDEN = DRAW.standard_normal((2, 5, 12)).astype(np.float32)
MASKS = np.stack([np.isin(np.arange(12), own) for own in ([0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 8, 9], [0, 1, 4, 5, 6, 11])])
SCORES = DRAW.standard_normal((2, 5, 3)).astype(np.float32)
VALID = np.arange(5)[None] < np.array([[5], [3]])


def test_overlaps_count_the_neurons_that_are_largest_for_a_token():
    found = readme.overlaps(jnp.asarray(HIDDEN), jnp.asarray(MASKS), 6)
    for b, t in np.ndindex(2, 5):
        largest = set(np.argsort(-np.abs(HIDDEN[b, t]))[:6])
        np.testing.assert_array_equal(found[b, t], [len(largest & set(np.flatnonzero(mask))) for mask in MASKS])


def test_released_overlaps():
    found = readme.released_overlaps(jnp.asarray(HIDDEN), jnp.asarray(MASKS))
    own, size = MASKS & ~MASKS.all(axis=0), 4  # without neurons 0 and 1
    for b, t in np.ndindex(2, 5):
        nested = [set(np.argsort(-HIDDEN[b, t])[:n]) for n in (size - 1, *(int(size / 5 * i) for i in (4, 3, 2, 1)))]
        expected = [10 / 3 / size * sum(len(n & set(np.flatnonzero(mask))) for n in nested) for mask in own]
        np.testing.assert_allclose(found[b, t], expected, rtol=1e-5)


def test_routing_loss():
    """Layer by layer, KL(P || Q) with P of the router's scores, over real tokens."""
    overlaps = DRAW.integers(0, 7, (4, 2, 5, 3)).astype(np.float32)
    p, q = softmax(SCORES), softmax(overlaps)
    tokens = np.sum(p * (np.log(p) - np.log(q)), axis=-1).sum(0)
    found = readme.routing_loss(jnp.asarray(SCORES), jnp.asarray(overlaps), jnp.asarray(VALID))
    np.testing.assert_allclose(found, tokens[VALID].mean(), rtol=1e-5)
    # A router that agrees with every layer has none.
    same = np.broadcast_to(SCORES, overlaps.shape)
    assert abs(float(readme.routing_loss(jnp.asarray(SCORES), jnp.asarray(same), jnp.asarray(VALID)))) < 1e-6


def test_released_routing_loss():
    overlaps = DRAW.random((4, 2, 5, 3)).astype(np.float32)
    logs, total = np.log(softmax(SCORES)), 0.0
    for layer in range(4):
        best = np.eye(3)[overlaps[layer].argmax(-1)]
        smooth = 0.5 * best + 0.5 / 3
        own = 0.75 * -np.sum(smooth * logs, axis=-1) + 0.25 * -np.sum(softmax(overlaps[layer]) * logs, axis=-1)
        total = total + own
    found = readme.released_routing_loss(jnp.asarray(SCORES), jnp.asarray(overlaps), jnp.asarray(VALID))
    np.testing.assert_allclose(found, total[VALID].mean(), rtol=1e-5)


def test_agreement_is_with_the_experts_of_most_neurons_over_all_layers():
    overlaps = np.array([[[[3, 0, 1], [0, 2, 1]]], [[[0, 1, 1], [1, 0, 1]]]], np.float32)  # totals 3 1 2, and 1 2 2
    for chosen, expected in ((0, 0.5), (1, 0.5), (2, 0.5)):
        scores = jnp.asarray(np.tile(np.eye(3, dtype=np.float32)[chosen], (1, 2, 1)))
        assert float(readme.agreement(scores, jnp.asarray(overlaps), jnp.ones((1, 2), bool))) == expected
    scores = jnp.asarray(np.eye(3, dtype=np.float32)[[0, 2]][None])
    assert float(readme.agreement(scores, jnp.asarray(overlaps), jnp.ones((1, 2), bool))) == 1
    assert float(readme.agreement(scores, jnp.asarray(overlaps), jnp.array([[False, True]]))) == 1


def test_learning_rates_fall_in_each_turn_and_from_turn_to_turn():
    rates = [readme.learning_rate(5e-4, 0.8, turn, step, 100) for turn in range(8) for step in range(100)]
    assert rates[0] == 5e-4
    assert rates[350] == pytest.approx(5e-4 * 0.8**3 / 2)
    assert rates[725] == pytest.approx(5e-4 * 0.8**7 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.fixture(scope="module")
def units(dense):
    return readme.DenseUnits(dense)


@pytest.fixture(scope="module")
def seen(dense, batches):
    """Hidden units of the dense model as it records them."""
    return [np.stack(called(dense, record=("ffn_hidden",))(batch).records["ffn_hidden"]) for batch in batches]


def test_magnitudes_are_means_over_real_tokens(units, batches, seen):
    found = readme.mean_magnitudes(units, batches)
    real = [batch["segment_ids"] > 0 for batch in batches]
    expected = sum(np.abs(h[:, mask]).sum(1) for h, mask in zip(seen, real, strict=True))
    np.testing.assert_allclose(found, expected / sum(mask.sum() for mask in real), rtol=1e-4)


def choices(model, batch):
    routing, _ = model.pre_gate(batch["tokens"], batch["segment_ids"], batch["positions"])
    return np.asarray(routing.experts_BTK[..., 0])


@pytest.mark.slow
def test_gathered_experts_compute_what_masks_on_the_dense_model_do(dense, batches):
    """Each token with the mask of its expert in every layer; the copies of what one layer shares less, too."""
    layers, neurons = dense.config.layers, dense.config.ffn.d_ff
    magnitudes = np.random.default_rng(1).random((layers, 3, neurons)) + np.linspace(0, 0.6, neurons)
    experts = readme.choose_experts(magnitudes, 24)
    assert experts.shared_LS.shape[1] > 0
    mixture = readme.converted(dense, experts, SMALL)
    batch = batches[0]
    chosen = choices(mixture, batch)
    assert len(np.unique(chosen)) > 1
    masks = jnp.asarray(experts.masks_LEF)
    keep = lambda layer, records, dictionary: masks[layer][chosen]  # noqa: E731
    call = jax.jit(
        lambda: (
            dense(
                batch["tokens"],
                segment_ids=batch["segment_ids"],
                positions=batch["positions"],
                record=("ffn_hidden",),
                keep=keep,
            ).logits
        )
    )
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(called(mixture)(batch).logits[real], call()[real], atol=2e-5)


@pytest.mark.slow
def test_one_expert_of_all_neurons_is_the_dense_model(dense, batches):
    magnitudes = np.random.default_rng(1).random((dense.config.layers, 1, dense.config.ffn.d_ff))
    mixture = readme.converted(dense, readme.choose_experts(magnitudes, dense.config.ffn.d_ff), SMALL)
    expected = called(dense)(batches[0]).logits
    np.testing.assert_allclose(called(mixture)(batches[0]).logits, expected, atol=2e-5)


# ------------------------------------------------------------------------------------------------------- The command

FLAGS = ReadMEConfig(
    rounds=2,
    router_steps=12,
    expert_steps=6,
    router_rate=2e-2,
    expert_rate=2e-3,
    batch_size=4,
    router_width=16,
    router_heads=2,
    router_d_ff=16,
)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Two corpora of different words."""
    folder, draw = tmp_path_factory.mktemp("domains"), random.Random(1)
    for name, words in (("laws", "congress law union state peace"), ("digits", "17 4 2025 99 1 88 3.5")):
        (folder / name).mkdir()
        for i in range(40):
            text = " ".join(draw.choices(words.split(), k=120))
            (folder / name / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return tuple(str(folder / name) for name in ("laws", "digits"))


@pytest.fixture(scope="module")
def mixture(made, domains):
    """A run of experts by domain, and its figures."""
    folder, command, _ = made
    flags = dataclasses.replace(FLAGS, domains=domains)
    changes = {"out": folder / "readme", "method": "readme", "readme": flags}
    changes["calibration"] = CalibrationConfig(sequences=6)
    return folder / "readme", sparsify.sparsify(dataclasses.replace(command, **changes))


@pytest.mark.slow
def test_the_run_is_a_mixture_of_its_own(mixture, made):
    run, figures = mixture
    model, config, _ = run_dir.load(run)
    ffn = config.model.ffn
    assert (ffn.kind, ffn.experts, ffn.target_active) == ("readme", 2, 24)
    assert figures["domains"] == ["laws", "digits"]
    assert figures["calibration_tokens"] == 2 * 6 * 32
    assert (figures["shared"], figures["expert_width"]) == (ffn.shared_width, ffn.expert_width)
    assert figures["shared"] == min(*figures["common"], 23)
    assert json.loads((run / "sparsify.json").read_text()) == figures
    router = 4 * 16**2 + 3 * 16**2 + 2 * 16
    assert figures["weights_dense"] - figures["weights"] == 2 * 3 * 32 * 24 - router
    # Parameters that are trained moved from the dense run's, and the router's layer came along.
    attention = model.segments[0].blocks[0].attention.projections.o_NHD[...]
    before = run_dir.load(made[0] / "dense").model.segments[0].blocks[0].attention.projections.o_NHD[...]
    assert 0 < float(jnp.abs(attention - before).max()) < 0.1
    assert model.pre_gate.decoder.config.layers == 1


@pytest.mark.slow
def test_the_router_learns_the_domains_and_the_experts_the_text(mixture):
    _, figures = mixture
    assert len(figures["router_losses"]) == len(figures["agreement"]) == len(figures["expert_losses"]) == 2
    assert figures["router_losses"][1] < figures["router_losses"][0]
    assert figures["agreement"][1] > 0.6
    assert figures["expert_losses"][1] < figures["expert_losses"][0]
    laws, digits = (np.array(figures["routed"][name]) for name in ("laws", "digits"))
    assert laws.sum() == pytest.approx(1)
    assert laws[0] - digits[0] > 0.2


@pytest.mark.slow
def test_evaluation_and_decoding_are_the_models(mixture, capsys):
    run, figures = mixture
    evaluate.main([str(run), "--no-meters", "--batches", str(figures["batches"])])
    shown = capsys.readouterr().out
    assert f"{figures['loss']:.4f} at this sparsity" in shown
    assert "Weights that are 0" not in shown
    model = run_dir.load(run).model
    laid_out = packed(model)
    assert type(laid_out.segments[0].blocks[0].ffn) is PackedReadMEFFN
    tokens = jax.random.randint(jax.random.key(1), (1, 24), 0, 320)
    expected, step, cache, start = forward(model)(tokens).logits, forward(laid_out), laid_out.init_cache(1, 24), 0
    for length in (21, 1, 1, 1):
        out = step(tokens[:, start : start + length], cache=cache)
        np.testing.assert_allclose(out.logits, expected[:, start : start + length], atol=2e-4)
        cache, start = out.cache, start + length


@pytest.mark.slow
def test_nothing_is_trained_in_no_rounds_and_a_loss_that_is_no_number_ends_the_command(dense, units, batches):
    magnitudes = np.random.default_rng(1).random((2, 2, 48))
    experts = readme.choose_experts(magnitudes, 24)
    mixture = readme.converted(dense, experts, SMALL)

    def endless(seed):
        while True:
            yield batches[seed % 2]

    trained = readme.train(mixture, units, experts, endless, dataclasses.replace(SMALL, rounds=0))
    assert trained[1:] == ([], [], [])
    before, after = (model.pre_gate.router_DE[...] for model in (mixture, trained.model))
    np.testing.assert_array_equal(before, after)
    mixture.pre_gate.router_DE[...] = before * jnp.nan
    flags = dataclasses.replace(SMALL, rounds=1, router_steps=2, expert_steps=0)
    with pytest.raises(NumericsError, match=r"a loss is not finite; lower --readme.router-rate"):
        readme.train(mixture, units, experts, endless, flags)


def test_a_mixture_that_a_run_was_trained_on_names_the_domains(made):
    parts = (data.Component(dataset="sotu", weight=2.0, epochs=3), data.Component(dataset="lm1b", weight=1.0))
    config = dataclasses.replace(run_dir.load(made[0] / "dense").config.data, dataset=None, mixture=parts)
    found = ReadMEPlan(0.5, ReadMEConfig(), 1, False).corpora(config)
    assert [(part.label, part.weight, part.epochs) for part in found.mixture] == [
        ("sotu", 2.0, None),
        ("lm1b", 1.0, None),
    ]
    named = ReadMEPlan(0.5, ReadMEConfig(domains=("lm1b", "sotu")), 1, False).corpora(config)
    assert [part.label for part in named.mixture] == ["lm1b", "sotu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"--readme.domains=none: must name two corpora or more: the run was not trained on a mixture"),
        ({"calibration": CalibrationConfig(dataset="sotu")}, r"--calibration.dataset=sotu: is for --method cats"),
        ({"method": "teal", "readme": ReadMEConfig(rounds=1)}, r"--readme.rounds=1: is for --method readme"),
        ({"maps": ("up",)}, r"--maps=\('up',\): is for --method"),
        ({"directory": "teal"}, r"teal: is sparsified already"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(made, changes, message):
    folder, command, _ = made
    changes = {name: folder / value if name == "directory" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        sparsify.sparsify(dataclasses.replace(command, **{"method": "readme", **changes}))
    assert "\n" not in str(error.value)
    assert not (folder / "new").exists()


def test_too_little_text_of_one_domain_is_refused(made, domains, tmp_path):
    folder, command, _ = made
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("peace")
    flags = ReadMEConfig(domains=(domains[0], str(tmp_path)))
    with pytest.raises(UserError, match=r"has \d+ tokens?, less than a sequence of 32"):
        sparsify.sparsify(dataclasses.replace(command, method="readme", readme=flags))
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ("sotu",)}, r"--readme.domains=sotu: must name two corpora or more"),
        ({"domains": ("sotu", "sotu")}, r"--readme.domains=sotu, sotu: must name each corpus once"),
        ({"rounds": -1}, r"--readme.rounds=-1: must be at least 0"),
        ({"router_rate": 0.0}, r"--readme.router-rate=0.0: must be above 0, and finite"),
        ({"expert_rate": math.inf}, r"--readme.expert-rate=inf: must be above 0, and finite"),
        ({"router_width": 12}, r"--readme.router-width=12: must be a multiple of twice --readme.router-heads=4"),
    ],
)
def test_impossible_flags(changes, message):
    with pytest.raises(ConfigError, match=message):
        ReadMEConfig(**changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", r"model.ffn.kind=plain: can't be made into experts of neurons; gated can"),
        ("readme", r"model.ffn.kind=readme: can't be made into experts"),
        ("altup", r"model.altup.streams=3: must be 1"),
        ("mohd", r"model.residual.kind=mohd: has a residual stream whose width is routed"),
        ("gemma3n", r"model.ffn.activation_sparsity_pattern=.*: selects neurons"),
    ],
)
def test_decoders_without_such_neurons_are_named(name, message):
    with pytest.raises(ConfigError, match=message):
        readme.check_decoder(CONFIGS[name])


def test_other_networks_are_named(dense):
    for changes, message in (
        ({"ffn.bias": True}, r"model.ffn.bias=True: must be False: experts have no such thing"),
        ({"ffn.up_activation": "relu"}, r"model.ffn.up_activation=relu: must be None"),
        ({"mtp_layers": 1}, r"model.mtp_layers=1: must be 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            readme.check_decoder(with_values(dense.config, changes))


def test_layers_of_one_router_are_not_sparsified_one_by_one():
    with pytest.raises(ConfigError, match=r"model.ffn.kind=readme: has one router for all layers"):
        conversion.check_stream(CONFIGS["readme"])
