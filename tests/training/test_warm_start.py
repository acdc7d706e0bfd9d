"""Runs that start from the parameters of another one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsezoo_jax
from sparsezoo_jax import train
from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.training.parameters import save_params
from sparsezoo_jax.training.state import ModelTemplate, flatten
from sparsezoo_jax.training.warm_start import open_warm_start
from tests.models.conftest import CONFIGS
from tests.test_commands import call

MOEX = dataclasses.replace(CONFIGS["moex"], layers=3)
DENSE = dataclasses.replace(MOEX, ffn=PlainFFNConfig(d_ff=12, activation="relu"))


def template_of(config):
    return ModelTemplate(lambda rngs: Decoder(config, rngs=rngs))


def parameters(config, seed):
    return template_of(config).split(Decoder(config, rngs=nnx.Rngs(seed)))[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The checkpoint directory of a dense model, and its parameters."""
    directory = tmp_path_factory.mktemp("dense") / "checkpoints"
    params = parameters(DENSE, 0)
    save_params(directory, flatten(params), step=4)
    return directory, params


def started(directory, source, target, **changes):
    params = parameters(target, 1)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, params)
    start = open_warm_start(directory, source, target, **changes)
    return start((params, {}), (shardings, {}), lambda axes, shape: device)[0]


def logits(config, params, tokens):
    model = template_of(config).merge(params, {})
    return nnx.jit(lambda model, tokens: model(tokens).logits)(model, tokens)


@pytest.mark.slow
def test_copies_without_noise_are_the_dense_model(dense):
    directory, params = dense
    tokens = jax.random.randint(jax.random.key(3), (2, 20), 0, 61)
    expected = logits(DENSE, params, tokens)
    copies = started(directory, DENSE, MOEX)
    np.testing.assert_allclose(logits(MOEX, copies, tokens), expected, atol=2e-6)
    noisy = started(directory, DENSE, MOEX, noise=0.05)
    assert 1e-4 < jnp.abs(logits(MOEX, noisy, tokens) - expected).max() < 0.5
    # A learned gate stays as it was made.
    switch = dataclasses.replace(MOEX, ffn=dataclasses.replace(MOEX.ffn, gate="switch"))
    np.testing.assert_allclose(logits(switch, started(directory, DENSE, switch), tokens), expected, atol=2e-6)


@pytest.mark.slow
def test_noise_follows_the_seed_and_differs_between_layers_and_experts(dense):
    directory, params = dense

    def factors(seed):
        up = flatten(started(directory, DENSE, MOEX, noise=0.02, seed=seed))["segments/0/blocks/0/ffn/up_EDW"]
        return np.asarray(up / flatten(params)["segments/0/blocks/0/ffn/up_DF"][:, None]) - 1

    first = factors(0)
    np.testing.assert_array_equal(factors(0), first)
    assert not np.allclose(factors(1), first)
    assert len(np.unique(first[..., 0, 0].round(6))) == 3 * 8
    assert first.std() == pytest.approx(0.02, rel=0.05)


def test_the_same_architecture_one_to_one(dense):
    directory, params = dense
    copied = started(directory, DENSE, DENSE, noise=0.5)
    for a, b in zip(jax.tree.leaves(copied), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_biases_of_routers_come_along(tmp_path):
    """Of what is no parameter, all but random streams."""
    ling, device = CONFIGS["moe"].ffn, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    grin = MoEFFNConfig(experts=4, expert_width=8, k=2, router="grin")
    config = dataclasses.replace(CONFIGS["moe"], layers=2, first_ffn=ling, ffn=grin)
    template = template_of(config)
    params, state = (flatten(part) for part in template.split(Decoder(config, rngs=nnx.Rngs(0))))
    (bias,) = state.keys() - template.streams
    assert len(template.streams) == 2
    save_params(tmp_path, params, {name: x + 7 for name, x in state.items()})
    own = template.split(Decoder(config, rngs=nnx.Rngs(1)))
    shardings = jax.tree.map(lambda _: device, own)
    found = flatten(open_warm_start(tmp_path, config, config)(own, shardings, lambda axes, shape: device)[1])
    for name, expected in flatten(own[1]).items():
        np.testing.assert_array_equal(found[name], state[name] + 7 if name == bias else expected)


def with_ffn(**changes):
    return dataclasses.replace(MOEX, ffn=dataclasses.replace(MOEX.ffn, **changes))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (DENSE, with_ffn(expert_width=10), r"d_ff=12: must be model.ffn.expert_width=10"),
        (
            dataclasses.replace(DENSE, ffn=GatedFFNConfig(d_ff=12)),
            MOEX,
            r"=gated: experts can only be copies of .* plain",
        ),
        (
            dataclasses.replace(DENSE, ffn=PlainFFNConfig(d_ff=12, bias=True)),
            MOEX,
            r"=bias=True: experts have no biases",
        ),
        (MOEX, DENSE, r"=moex: an FFN of kind plain can't be made of another kind"),
        (DENSE, dataclasses.replace(MOEX, layers=2), r"is \(3, 24, 6\) there and \(2, 24, 6\) here|is \(3,"),
        (DENSE, dataclasses.replace(MOEX, max_seq_len=50), r"positions_PD: is \(48, 24\) there and \(50, 24\) here"),
        (DENSE, dataclasses.replace(MOEX, tie_embeddings=False), r"output_DV: is absent there and \(24, 61\) here"),
    ],
)
def test_what_does_not_fit(dense, source, target, message):
    with pytest.raises(ConfigError, match=f"train.init_from.*{message}"):
        open_warm_start(dense[0], source, target)


def test_missing_steps(dense, tmp_path):
    with pytest.raises(UserError, match=r"has no step 3; steps there are: 4"):
        open_warm_start(dense[0], DENSE, MOEX, step=3)
    with pytest.raises(UserError, match=r"has no checkpoint; steps there are: none"):
        open_warm_start(tmp_path / "checkpoints", DENSE, MOEX)


# ------------------------------------------------------------------------------------------------------- the command

SMALL = {
    "model.vocab-size": 320,
    "model.d-model": 16,
    "model.layers": 2,
    "model.max-seq-len": 32,
    "model.attention.heads": 2,
    "model.attention.kv-heads": 2,
    "model.attention.head-dim": 8,
    "data.bpe-vocab-size": 300,
    "data.seq-len": 16,
    "data.batch-size": 2,
    "data.validation-fraction": 0.2,
    "train.steps": 2,
    "eval.final-batches": 1,
}


def flags(corpus, workdir, **changes):
    values = {**SMALL, "data.dataset": corpus, "workdir": workdir}
    values |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [
        "--arch",
        "moex",
        "--size",
        "tiny",
        "--eval.no-report",
        *(str(x) for name, v in values.items() for x in (f"--{name}", v)),
    ]


@pytest.mark.slow
def test_upcycling_by_the_command(small_corpus, tmp_path, monkeypatch, capsys):
    dense, moex = tmp_path / "dense", tmp_path / "moex"
    # "plain" keeps neither width nor losses of the preset's FFN, so it is a change of kind with fields of its own.
    plain = ["--train.objectives", "[]", "--model.ffn.kind", "plain", "--model.ffn.activation", "relu"]
    assert call(train, [*flags(small_corpus, dense, model__ffn__d_ff=8), *plain], monkeypatch) == 0
    given = {"model__ffn__expert_width": 8, "train__init_from": dense, "train__upcycle_noise": 0.03}
    # Another split of the corpus would give another tokenizer: the run takes that of the dense one.
    args = flags(small_corpus, moex, **given, data__validation_fraction=0.5)
    capsys.readouterr()
    assert call(train, args, monkeypatch) == 0
    assert f"parameters of {dense}, step 2" in capsys.readouterr().err
    assert (moex / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    stored = json.loads((moex / "config.json").read_text())["train"]
    assert (stored["init_from"], stored["upcycle_noise"]) == (str(dense), 0.03)
    before, after = (sparsezoo_jax.load(run).model for run in (dense, moex))
    # Two steps of warm-up move little.
    np.testing.assert_allclose(after.embedding_VD[...], before.embedding_VD[...], atol=0.02)
    assert isinstance(after.config.ffn, MoEXFFNConfig)
    # A finished run goes on without the other one.
    dense.rename(tmp_path / "elsewhere")
    assert call(train, args, monkeypatch) == 0
    assert "resuming from step 2" in capsys.readouterr().err
    for changes, message in (
        ({"train__init_from": tmp_path / "none"}, "none: is no run directory (config.json is missing)"),
        ({"train__init_from": tmp_path / "elsewhere", "train__init_step": 9}, "has no step 9; steps there are: 2"),
        ({"train__init_step": 9}, "train.init_step=9: must be at least 0, and train.init_from given"),
        ({"train__init_from": tmp_path / "elsewhere", "model__ffn__expert_width": 6}, "d_ff=8: must be model.ffn.exp"),
        ({"train__upcycle_noise": -1}, "train.upcycle_noise=-1.0: must be at least 0"),
    ):
        assert call(train, flags(small_corpus, tmp_path / "new", **changes), monkeypatch) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_model_that_computes_otherwise_is_warned_of(small_corpus, tmp_path, monkeypatch, capsys):
    first = tmp_path / "first"
    assert call(train, flags(small_corpus, first, model__ffn__expert_width=8), monkeypatch) == 0
    args = flags(small_corpus, tmp_path / "second", model__ffn__expert_width=8, train__init_from=first)
    capsys.readouterr()
    assert call(train, [*args, "--model.embedding-scale", "2.0", "--train.stop-at", "1"], monkeypatch) == 0
    assert f"warning: train.init_from={first}: model.embedding_scale was 1.0, is 2.0" in capsys.readouterr().err
