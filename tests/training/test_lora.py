"""Low-rank adapters: how they sit in a tree of parameters, a train step, a run and its checkpoints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparsezoo_jax
from sparsezoo_jax import convert, evaluate, generate, huggingface, run_dir, train
from sparsezoo_jax.config import read_config, with_changes
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.loop import fit
from sparsezoo_jax.training.lora import Adapters, LoRAConfig, proportional_ranks
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.parameters import restore_params, saved_metadata
from sparsezoo_jax.training.state import ModelTemplate, first_device, flatten, nested
from tests.models.conftest import CONFIGS
from tests.test_commands import call
from tests.training.test_step import assert_equal, batch_number
from tests.training.toy import BATCH, LENGTH, ToyData, ToyModel, config

LAYER = "segments/0/blocks/0"


def parameters_of(name):
    return ModelTemplate(lambda rngs: Decoder(CONFIGS[name], rngs=rngs)).parameters


def drawn(shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {path: jax.random.normal(key, shapes[path], dtype) for key, path in zip(keys, shapes, strict=True)}


@pytest.mark.parametrize(
    ("name", "path", "product"),
    [
        ("gemma2", f"{LAYER}/attention/projections/q_DNH", "ldr,lrnh->ldnh"),
        ("gemma2", f"{LAYER}/attention/projections/o_NHD", "lnhr,lrd->lnhd"),
        ("gemma2", "embedding_VD", "vr,rd->vd"),
        ("moe", "segments/1/blocks/0/ffn/down_EWD", "lewr,lerd->lewd"),
        ("mohd", f"{LAYER}/ffn_residual/fusion/across_QPP", "lqar,lqrb->lqab"),
    ],
)
def test_a_parameter_is_its_base_and_the_scaled_product(name, path, product):
    parameters = parameters_of(name)
    adapters = Adapters(LoRAConfig(rank=3, alpha=6.0, targets=(f"^{path}$",)), parameters)
    shapes = {name: variable.shape for name, variable in parameters.items()}
    base = drawn(shapes)
    trained = drawn({name: variable.shape for name, variable in adapters.parameters.items()})
    assert set(trained) == {f"{path}/lora_a", f"{path}/lora_b"}
    merged = flatten(adapters.merged(nested(trained), nested(base)))
    expected = base[path] + 2.0 * jnp.einsum(product, trained[f"{path}/lora_a"], trained[f"{path}/lora_b"])
    np.testing.assert_allclose(merged.pop(path), expected, atol=2e-5)
    assert_equal(merged, {name: x for name, x in base.items() if name != path})


@pytest.mark.parametrize("name", CONFIGS)
def test_new_adapters_leave_every_architecture_as_it_is(name):
    parameters = parameters_of(name)
    adapters = Adapters(LoRAConfig(rank=2, whole=("final_norm/",)), parameters)
    base = nested(drawn({path: variable.shape for path, variable in parameters.items()}, jnp.bfloat16))
    trained, frozen = adapters.divided(base, adapters.create(jax.random.key(1)))
    assert flatten(trained).keys() == adapters.parameters.keys()
    assert not {path for path in adapters.parameters if "router" in path}
    for path, x in flatten(trained).items():
        variable = adapters.parameters[path]
        assert x.shape == variable.shape
        assert len(variable.full_axes) == x.ndim
        if path.endswith("lora_a"):
            # One row or column of the adapter for each of the matrix: they are split alike.
            matrix = parameters[path.removesuffix("/lora_a")]
            inputs = variable.full_axes[:-1]
            assert inputs == matrix.full_axes[: len(inputs)]
            outputs = matrix.full_axes[len(inputs) :]
            assert adapters.parameters[path[:-1] + "b"].full_axes[-len(outputs) :] == outputs
            assert jnp.std(x) > 0
    assert_equal(adapters.merged(trained, frozen), base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"train.lora.rank=0: must be at least 1 or None"),
        (
            {"rank": 9, "targets": ("down_EWD",)},
            r"train.lora.rank=9: must be at most 8, the smaller side of .*down_EWD",
        ),
        ({"rank": 2, "alpha": 0.0}, r"train.lora.alpha=0.0: must be above 0"),
        ({"rank": 2, "targets": ()}, r"train.lora.targets=\(\): needs at least one pattern"),
        (
            {"rank": 2, "targets": ("ffn/", "atention")},
            r"train.lora.targets=atention: finds no matrix; paths are embed",
        ),
        ({"rank": 2, "targets": ("final_norm",)}, r"train.lora.targets=final_norm: finds no matrix; paths are embed"),
        ({"rank": 2, "targets": ("(",)}, r"train.lora.targets=\(: is no regular expression"),
        ({"rank": 2, "whole": ("bias",)}, r"train.lora.whole=bias: finds no parameter; paths are embedding_VD"),
        ({"rank": 2, "whole": ("ffn/up",)}, r"train.lora.whole=\S*/up_DF: has adapters by train.lora.targets, too"),
        ({"rank": 2, "ranks": "importance"}, r"train.lora.ranks=importance: is known when a run begins"),
        ({"ranks": "importance"}, r"train.lora.ranks=importance: works together with train.lora.rank only"),
        ({"rank": 2, "layer_ranks": (1, 0, 2)}, r"train.lora.layer_ranks=.*: must all be at least 1"),
        ({"rank": 2, "layer_ranks": (1, 2)}, r"train.lora.layer_ranks=\(1, 2\): must be one for each of the 3 layers"),
        ({"rank": 2, "layer_ranks": (1, 2, 9)}, r"train.lora.layer_ranks=9: must be at most \d, the smaller side of"),
        ({"targets": ("ffn/",)}, r"train.lora.targets=\('ffn/',\): works together with train.lora.rank only"),
    ],
)
def test_what_can_not_be_adapted(changes, message):
    with pytest.raises(ConfigError, match=message):
        Adapters(LoRAConfig(**changes), parameters_of("moe"))


@pytest.mark.parametrize(
    ("importance", "mean", "expected"),
    [
        ([0.5, 0.5, 0.5], 4, (4, 4, 4)),
        ([3, 1, 2], 4, (6, 2, 4)),
        ([1, 1, 1.1], 3, (3, 3, 3)),
        ([1.0, 2.2, 2.8], 2, (1, 2, 3)),
        ([1e-6, 1.0, 1.0], 1, (1, 1, 1)),
        ([1e-6, 5.0, 1.0, 1.0], 2, (1, 5, 1, 1)),
    ],
)
def test_ranks_are_proportional_and_have_the_same_sum(importance, mean, expected):
    found = proportional_ranks(importance, mean)
    assert found == expected
    assert sum(found) == mean * len(importance)


def test_layers_have_ranks_of_their_own():
    """Layers 0, 2 and 1, 3 are stacked by the pattern's two types, layer 4 is by itself."""
    targets = ("ffn/up", "embed")
    settings = LoRAConfig(rank=3, ranks="importance", layer_ranks=(1, 5, 2, 4, 3), targets=targets)
    adapters = Adapters(settings, parameters_of("gemma2"))
    made = flatten(adapters.create(jax.random.key(0)))
    ranks = {"segments/0/blocks/0": [1, 2], "segments/0/blocks/1": [5, 4], "segments/1/blocks/0": [3]}
    for block, own in ranks.items():
        a, b = (made[f"{block}/ffn/up_DF/{name}"] for name in ("lora_a", "lora_b"))
        assert a.shape[-1] == b.shape[1] == max(own)
        np.testing.assert_array_equal((a != 0).all(axis=1).sum(-1), own)
        np.testing.assert_array_equal((a != 0).any(axis=1).sum(-1), own)
    assert made["embedding_VD/lora_a"].shape[-1] == 3
    assert (made["embedding_VD/lora_a"] != 0).all()


def test_a_lower_rank_stays_so_in_training():
    lora = LoRAConfig(rank=2, layer_ranks=(1, 3), targets=("ffn/up",))
    settings = config(lora=lora, optimizer=AdamW(weight_decay=0.1))
    build = lambda rngs: Decoder(CONFIGS["llama"], rngs=rngs)  # noqa: E731
    prepared = prepare_step(settings, build, (BATCH, LENGTH), first_device)
    state = jax.jit(prepared.initialise)(jax.random.key(0))
    for n in range(2):
        state, _ = prepared.train_step(state, batch_number(n))
    a, b = (np.asarray(flatten(state.params)[f"{LAYER}/ffn/up_DF/{name}"]) for name in ("lora_a", "lora_b"))
    np.testing.assert_array_equal(np.any(a != 0, axis=1).sum(-1), [1, 3])
    np.testing.assert_array_equal(np.any(b != 0, axis=2).sum(-1), [1, 3])


def test_ranks_come_from_the_record_of_the_base_and_stay_with_the_run(tmp_path):
    run = preset("dense", "tiny")
    layers, base, workdir = run.model.layers, tmp_path / "base", tmp_path / "run"
    changes = {"train.init_from": str(base), "train.lora.rank": 4, "train.lora.ranks": "importance"}
    asked = with_changes(run, changes)
    base.mkdir()
    with pytest.raises(ConfigError, match=rf"train.lora.ranks=importance: needs the importance of {layers} layers"):
        run_dir.with_layer_ranks(asked, workdir)
    importance = [1.0, 3.0] * (layers // 2) + [2.0] * (layers % 2)
    (base / "sparsify.json").write_text(json.dumps({"method": "cfsp", "importance": importance}))
    found = run_dir.with_layer_ranks(asked, workdir)
    assert found.train.lora.layer_ranks == tuple(int(2 * x) for x in importance)
    workdir.mkdir()
    run_dir.write_config(workdir, found)
    (base / "sparsify.json").unlink()
    assert run_dir.with_layer_ranks(asked, workdir) == found
    plain = with_changes(run, {"train.lora.rank": 4})
    assert run_dir.with_layer_ranks(plain, workdir) == plain


def test_gradients_reach_adapters_alone():
    """dA = s dW B^T and dB = s A^T dW, of the gradient dW that training the whole matrix has."""
    changes = {"optimizer": AdamW(b1=0.5), "grad_clip": None}
    whole = prepare_step(config(**changes), ToyModel, (BATCH, LENGTH), first_device)
    lora = LoRAConfig(rank=3, alpha=6.0, targets=("up", "down"), whole=("norm",))
    adapted = prepare_step(config(lora=lora, **changes), ToyModel, (BATCH, LENGTH), first_device)
    state = jax.jit(adapted.initialise)(jax.random.key(0))
    trained = drawn({path: x.shape for path, x in flatten(state.params).items()})
    state = dataclasses.replace(state, params=nested(trained))
    assert flatten(state.frozen).keys() == {"embedding", "up", "down", "router"}
    first = jax.jit(whole.initialise)(jax.random.key(0))
    first = dataclasses.replace(first, params=adapted.merge(state.params, state.frozen))
    before = jax.device_get((state.params, state.frozen))
    first, reference = whole.train_step(first, batch_number())
    state, metrics = adapted.train_step(state, batch_number())
    np.testing.assert_allclose(metrics["loss"], reference["loss"], rtol=1e-6)
    full, own = (
        {path.split("/mu/")[1]: 2 * x for path, x in flatten(s.opt_state).items() if "/mu/" in path}
        for s in (first, state)
    )
    assert own.keys() == flatten(before[0]).keys() == adapted.adapters.parameters.keys()
    np.testing.assert_allclose(own["layers/0/norm"], full["layers/0/norm"], rtol=1e-5, atol=1e-6)
    for name in ("up", "down"):
        a, b = trained[f"{name}/lora_a"], trained[f"{name}/lora_b"]
        np.testing.assert_allclose(own[f"{name}/lora_a"], 2 * full[name] @ b.mT, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own[f"{name}/lora_b"], 2 * a.mT @ full[name], rtol=1e-4, atol=1e-6)
    assert_equal(state.frozen, before[1])
    moved = {path for path, x in flatten(state.params).items() if np.any(x != flatten(before[0])[path])}
    assert moved == own.keys()


def test_the_base_comes_with_its_other_variables():
    """Router biases of the base, say; but not its random streams, which the seed of the run gives."""

    class Noisy(ToyModel):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    settings = config(lora=LoRAConfig(rank=2, targets=("up",), whole=("norm",)))
    prepared = prepare_step(settings, Noisy, (BATCH, LENGTH), first_device)
    first = prepared.first_state(jax.random.key(0))
    assert first.frozen == {}
    params, model_state = prepared.template.split(Noisy(nnx.Rngs(5)))
    model_state["tokens_seen"] += 7
    started = prepared.with_base(first, params, model_state)
    assert_equal(prepared.merge(started.params, started.frozen), params)
    own, taken = flatten(first.model_state), flatten(started.model_state)
    assert taken.pop("tokens_seen") == 7
    assert own.pop("tokens_seen") == 0
    assert_equal(own, taken)
    assert any(np.any(x != flatten(model_state)[path]) for path, x in own.items())


def test_a_run_of_adapters_needs_a_base(tmp_path):
    settings = config(lora=LoRAConfig(rank=2, targets=("up",)))
    with pytest.raises(ConfigError, match=r"train.lora.rank=2: needs train.init_from"):
        fit(settings, build=ToyModel, data=ToyData(), batch_shape=(BATCH, LENGTH), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- the command

SMALL = {
    "model.vocab-size": 320,
    "model.d-model": 16,
    "model.layers": 2,
    "model.max-seq-len": 32,
    "model.attention.heads": 2,
    "model.attention.kv-heads": 2,
    "model.attention.head-dim": 8,
    "model.attention.window": 16,
    "model.ffn.d-ff": 32,
    "data.bpe-vocab-size": 300,
    "data.seq-len": 16,
    "data.batch-size": 2,
    "data.validation-fraction": 0.2,
    "eval.final-batches": 1,
}


def flags(corpus, workdir, **changes):
    values = {**SMALL, "data.dataset": corpus, "workdir": workdir}
    values |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return ["--arch", "dense", "--eval.no-report", *(str(x) for name, v in values.items() for x in (f"--{name}", v))]


@pytest.mark.slow
def test_a_run_of_adapters(small_corpus, tmp_path, monkeypatch, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    assert call(train, flags(small_corpus, base, train__steps=2), monkeypatch) == 0
    monkeypatch.chdir(tmp_path)
    lora = {"train__lora__rank": 4, "train__steps": 4, "train__keep_last": 9, "train__checkpoint_every": 1}
    lora["train__schedule__warmup_steps"] = 2
    args = flags(small_corpus, run, train__init_from="base", **lora)
    # Stopped before its first step of warm-up has changed anything, the run is its base.
    assert call(train, [*args, "--train.stop-at", "1"], monkeypatch) == 0
    assert_equal(restore_params(base / "checkpoints")[0], stored(run, step=1))
    capsys.readouterr()
    assert call(train, args, monkeypatch) == 0
    err = capsys.readouterr().err
    assert f"parameters of {base}, step 2" in err
    assert "resuming from step 1" in err
    assert "trained, 4 steps" in err

    # Interrupted or not, the adapters are the same; their checkpoint holds nothing else.
    straight = tmp_path / "straight"
    assert call(train, flags(small_corpus, straight, train__init_from="base", **lora), monkeypatch) == 0
    adapters = flatten(restore_params(run / "checkpoints")[0])
    assert_equal(adapters, restore_params(straight / "checkpoints")[0])
    assert all(path.endswith(("lora_a", "lora_b")) for path in adapters)
    training = [path for path in saved_metadata(run / "checkpoints")["arrays"] if path.startswith("training/opt")]
    assert all("/lora_" in path for path in training if "/mu/" in path or "/nu/" in path)

    # Merged, it needs no base, and gives what the adapters give beside theirs; averaged checkpoints, too.
    assert call(convert, ["merge", run, tmp_path / "whole"], monkeypatch) == 0
    assert f"{tmp_path / 'whole'}: adapters of step 4 merged into their base" in capsys.readouterr().out
    assert call(convert, ["to-hf", run, tmp_path / "hf"], monkeypatch) == 0
    steps = [stored(run, step=step) for step in (3, 4)]
    averaged = run_dir.load(run, merge_last=2).model.segments[0].blocks[0].ffn.up_DF[...]
    weight = 1 - 2**-0.5
    expected = [x["segments/0/blocks/0/ffn/up_DF"] for x in steps]
    np.testing.assert_allclose(averaged, (1 - weight) * expected[0] + weight * expected[1], rtol=1e-5, atol=1e-7)
    assert np.any(expected[0] != expected[1])
    moved = base.rename(tmp_path / "moved")
    assert_equal(stored(tmp_path / "whole"), steps[1])
    huggingface.from_hf(tmp_path / "hf", tmp_path / "back")
    assert_equal(stored(tmp_path / "back"), steps[1])
    found = read_config(tmp_path / "whole" / "config.json").train
    assert (found.lora.rank, found.init_from) == (None, None)
    assert (tmp_path / "whole" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()

    # The base is known by what it holds: elsewhere it is the same, and what is there instead is not.
    with pytest.raises(
        UserError, match=rf"base: is no run directory .* missing\); {run} has adapters.*take --base DIR"
    ):
        run_dir.load(run)
    assert_equal(flatten(nnx_params(run_dir.load(run, base=moved).model)), steps[1])
    capsys.readouterr()
    short = [run, "--no-meters", "--batches", 1, "--json"]
    assert call(evaluate, [*short, "--base", moved], monkeypatch) == 0
    adapted = json.loads(capsys.readouterr().out)["loss"]
    assert call(evaluate, [tmp_path / "whole", *short[1:]], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == adapted
    prompt = ["--prompt", "The", "--max-new-tokens", 2]
    assert call(generate, [run, *prompt, "--base", moved], monkeypatch) == 0
    assert call(generate, [run, *prompt], monkeypatch) == 2
    assert "take --base DIR" in capsys.readouterr().err
    assert call(evaluate, [*short, "--base", tmp_path], monkeypatch) == 2
    assert call(evaluate, [moved, *short[1:], "--base", moved], monkeypatch) == 2
    assert f"base={moved}: {moved} holds no adapters" in capsys.readouterr().err
    assert call(train, flags(small_corpus, run, train__init_from="moved", **lora), monkeypatch) == 0
    other = flags(small_corpus, base, train__steps=2, train__seed=1)
    assert call(train, other, monkeypatch) == 0
    capsys.readouterr()
    for changes, message in (
        (
            {"train__init_from": "base", **lora},
            f"step 2 there does not hold the parameters that {run} has adap",
        ),
        ({"train__init_from": "moved", **lora, "train__lora__rank": 2}, "train.lora.rank is 4 there, 2 here"),
    ):
        assert call(train, flags(small_corpus, run, **changes), monkeypatch) == 2
        assert message in capsys.readouterr().err
    for changes, message in (
        ({"train__lora__rank": 4}, "train.lora.rank=4: needs train.init_from, the run whose parameters get adapters"),
        ({"train__init_from": run}, f"holds adapters alone; make a whole run of it with: convert merge {run} RUN"),
        ({"train__init_from": "moved", "train__lora__rank": 40}, "train.lora.rank=40: must be at most 16, the smaller"),
    ):
        assert call(train, flags(small_corpus, tmp_path / "new", **changes), monkeypatch) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert call(convert, ["merge", moved, tmp_path / "new"], monkeypatch) == 2
    assert f"DIR={moved}: holds no adapters to merge" in capsys.readouterr().err
    assert call(convert, ["merge", run, run], monkeypatch) == 2
    assert f"{run}: is not empty" in capsys.readouterr().err
    # Somebody else's adapters name no place on this machine.
    path = run / "config.json"
    path.write_text(path.read_text() + "\n")
    with (
        pytest.warns(UserWarning, match="init_from"),
        pytest.raises(UserError, match="unknown here; evaluate, generate and convert merge take --base"),
    ):
        run_dir.load(run)
    assert call(convert, ["merge", run, tmp_path / "new", "--base", moved], monkeypatch) == 0
    assert_equal(stored(tmp_path / "new"), steps[1])


def nnx_params(model):
    return ModelTemplate(lambda rngs: Decoder(model.config, rngs=rngs)).split(model)[0]


def stored(directory, step=None):
    """All parameters of a run by path."""
    return flatten(nnx_params(sparsezoo_jax.load(directory, step=step).model))


@pytest.mark.slow
def test_a_run_of_bottlenecks(small_corpus, tmp_path, monkeypatch, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    assert call(train, flags(small_corpus, base, train__steps=2), monkeypatch) == 0
    bottleneck = {"train__init_from": base, "model__adapter__width": 4, "train__lora__whole": "_adapter/"}
    args = flags(small_corpus, run, train__steps=4, train__checkpoint_every=2, **bottleneck)
    assert call(train, [*args, "--train.stop-at", "2"], monkeypatch) == 0
    assert call(train, args, monkeypatch) == 0
    assert "resuming from step 2" in capsys.readouterr().err

    # Checkpoints hold the adapters alone; loaded, everything else is the base's.
    trained = flatten(restore_params(run / "checkpoints")[0])
    assert all("_adapter/" in path for path in trained)
    assert np.any(trained["segments/0/blocks/0/ffn_adapter/up_RD"] != 0)
    held, whole = flatten(restore_params(base / "checkpoints")[0]), stored(run)
    assert_equal({path: whole[path] for path in held}, held)
    assert_equal({path: whole[path] for path in trained}, trained)
    assert held.keys() | trained.keys() == whole.keys()

    # Merging keeps them as layers and says so; released layouts can't hold them.
    assert call(convert, ["merge", run, tmp_path / "whole"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert (
        "note: a bottleneck has a non-linearity, which no matrix can take in: the adapters of model.adapter.wid" in out
    )
    assert_equal(stored(tmp_path / "whole"), whole)
    for directory in (run, tmp_path / "whole"):
        assert call(convert, ["to-hf", directory, tmp_path / "hf", "--released"], monkeypatch) == 2
        assert "can't hold model.adapter.width=4: only None" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    moved = base.rename(tmp_path / "moved")
    short = ["--no-meters", "--batches", 1, "--json"]
    losses = []
    for args in ([run, *short, "--base", moved], [tmp_path / "whole", *short], [moved, *short]):
        assert call(evaluate, args, monkeypatch) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert call(generate, [run, "--prompt", "The", "--max-new-tokens", 2, "--base", moved], monkeypatch) == 0
    capsys.readouterr()
    for changes, message in (
        ({"train__lora__whole": "scale$"}, "train.lora.whole=('scale$',): must find _adapter/"),
        ({"train__lora__whole": "_adapters/"}, "train.lora.whole=_adapters/: finds no parameter"),
    ):
        new = flags(small_corpus, tmp_path / "new", **{**bottleneck, "train__init_from": moved, **changes})
        assert call(train, new, monkeypatch) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
