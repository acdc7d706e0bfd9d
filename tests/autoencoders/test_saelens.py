"""Autoencoders in SAELens' layout: files by hand with their formulas in NumPy, and ours there and back."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsezoo_jax import convert
from sparsezoo_jax.autoencoders import (
    GBASAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    SAERun,
    SAETrainConfig,
    StandardSAE,
    TopKSAE,
    Trainer,
    load_sae,
    save_sae,
)
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface.saelens import from_saelens, to_saelens
from tests.test_commands import call

D, F, N = 6, 10, 20
RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(N, D)) + 1).astype(np.float32)
SHAPES = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), "W_skip": (D, D)}
ARCHITECTURES = {
    "standard": ["b_enc"],
    "gated": ["b_gate", "b_mag", "r_mag"],
    "jumprelu": ["b_enc", "threshold"],
    "topk": ["b_enc"],
    "transcoder": ["b_enc"],
    "skip_transcoder": ["b_enc", "W_skip"],
    "jumprelu_transcoder": ["b_enc", "threshold"],
    "jumprelu_skip_transcoder": ["b_enc", "threshold", "W_skip"],
}


def tensors_of(architecture):
    rng = np.random.default_rng(1)
    names = ["W_enc", "W_dec", "b_dec", *ARCHITECTURES[architecture]]
    return {name: rng.normal(size=SHAPES.get(name, (F,))).astype(np.float32) for name in names}


def fields_of(architecture, **changes):
    transcoder = "transcoder" in architecture
    fields = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cuda"}
    fields |= {"apply_b_dec_to_input": not transcoder, "normalize_activations": "none", "reshape_activations": "none"}
    fields |= {"d_out": D} if transcoder else {}
    fields |= {"k": 3, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    fields["metadata"] = {"sae_lens_version": "6.54.12", "model_name": "gemma", "hook_name": "blocks.4.hook_resid_post"}
    return fields | changes


def write(folder, fields, tensors):
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def computed(fields, t, x):
    """Features and reconstructions of a file in this layout, as its architectures are defined."""
    x, t = x.astype(np.float64), {name: value.astype(np.float64) for name, value in t.items()}
    scale = 1.0
    if fields.get("normalize_activations") == "constant_norm_rescale":
        scale = D**0.5 / np.linalg.norm(x, axis=-1, keepdims=True)
    inside = x * scale - t["b_dec"] * fields.get("apply_b_dec_to_input", True)
    if "b_gate" in t:
        size = np.maximum(inside @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"], 0)
        code = (inside @ t["W_enc"] + t["b_gate"] > 0) * size
    else:
        pre = inside @ t["W_enc"] + t["b_enc"]
        norm = np.linalg.norm(t["W_dec"], axis=-1) if fields.get("rescale_acts_by_decoder_norm") else 1.0
        pre = pre * norm
        if "k" in fields:
            pre = np.where(pre >= np.sort(pre, axis=-1)[:, -fields["k"]][:, None], pre, 0)
        code = np.maximum(pre, 0) * (pre > t.get("threshold", 0))
        t["W_dec"] = t["W_dec"] / np.reshape(norm, (-1, 1))
    made = (code @ t["W_dec"] + t["b_dec"]) / scale
    return code, made + x @ t["W_skip"].T if "W_skip" in t else made


def check(autoencoder, fields, tensors):
    code, made = computed(fields, tensors, X)
    assert 0 < (code > 0).mean() < 1
    np.testing.assert_allclose(autoencoder.encode(jnp.asarray(X)), code, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(autoencoder.reconstruct(jnp.asarray(X)), made, rtol=2e-4, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------- in


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("standard", {"apply_b_dec_to_input": False, "normalize_activations": "expected_average_only_in"}),
        ("gated", {"apply_b_dec_to_input": False}),
        ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
    ],
)
def test_files_by_hand(tmp_path, architecture, changes):
    fields, tensors = fields_of(architecture, **changes), tensors_of(architecture)
    made = from_saelens(write(tmp_path / "lens", fields, tensors), tmp_path / "ours")
    assert (made.width, made.features) == (D, F)
    autoencoder, run = load_sae(tmp_path / "ours")
    transcoder = "transcoder" in architecture
    assert (run.train.layer, run.train.site) == (5, "transcoder" if transcoder else "residual")
    assert (run.source, run.train.skip) == ("gemma", "skip" in architecture)
    check(autoencoder, fields, tensors)
    # And out again: what is written computes the same by the layout's own formulas.
    to_saelens(tmp_path / "ours", tmp_path / "back")
    again = json.loads((tmp_path / "back" / "cfg.json").read_text())
    assert again["architecture"] == architecture
    code, rebuilt = computed(again, load_file(tmp_path / "back" / "sae_weights.safetensors"), X)
    np.testing.assert_allclose(code, computed(fields, tensors, X)[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(rebuilt, computed(fields, tensors, X)[1], rtol=1e-3, atol=1e-3)


def test_older_files(tmp_path):
    old = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "hook_point": "blocks.2.hook_mlp_out"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "normalize_activations": False}
    tensors = tensors_of("topk") | {"scaling_factor": np.ones(F, np.float32)}
    from_saelens(write(tmp_path / "lens", old, tensors), tmp_path / "ours")
    autoencoder, run = load_sae(tmp_path / "ours")
    assert (run.train.layer, run.train.site, autoencoder.config.k) == (3, "ffn_output", 2)
    check(autoencoder, {"k": 2}, tensors)
    tensors["scaling_factor"] *= 2
    with pytest.raises(UserError, match="scaling_factor is not 1, which is not read"):
        from_saelens(write(tmp_path / "scaled", old, tensors), tmp_path / "none")


def test_half_precision(tmp_path):
    fields, tensors = fields_of("standard", dtype="float16"), tensors_of("standard")
    tensors = {name: value.astype(np.float16) for name, value in tensors.items()}
    from_saelens(write(tmp_path / "lens", fields, tensors), tmp_path / "ours")
    check(load_sae(tmp_path / "ours").autoencoder, fields, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "temporal"},
            "cfg.json: architecture=temporal: must be one of standard, gated, jumprelu, topk",
        ),
        ({"normalize_activations": "layer_norm"}, "normalize_activations=layer_norm: must be one of none, expected"),
        ({"reshape_activations": "hook_z"}, "reshape_activations=hook_z: must be none"),
        ({"d_sae": 11}, r"sae_weights.safetensors: W_dec is \(10, 6\), not \(11, 6\); W_enc is .*; b_enc is"),
        ({"d_sae": "many"}, "d_sae=many: must be a whole number"),
        ({"architecture": "jumprelu"}, "sae_weights.safetensors: threshold is missing"),
        ({"architecture": "gated"}, "b_gate is missing; b_mag is missing; r_mag is missing; b_enc is unexpected"),
        ({"architecture": "topk", "k": 11}, "k=11: must be a whole number from 1 to d_sae=10"),
        ({"architecture": "transcoder", "d_out": 9}, "d_out=9: must be d_in=6, the width of an FFN here"),
        (
            {"metadata": {"sae_lens_version": "6.1.0", "hook_name": "blocks.0.hook_resid_pre"}},
            "name its --layer and --site",
        ),
        ({"metadata": []}, "metadata: must be an object"),
        ({"metadata": {}, "activation_fn": "tanh-relu"}, "activation_fn=tanh-relu: must be relu or topk"),
    ],
)
def test_what_is_not_read(tmp_path, changes, message):
    source = write(tmp_path / "lens", fields_of("standard") | changes, tensors_of("standard"))
    with pytest.raises(UserError, match=message):
        from_saelens(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_values_that_are_no_numbers(tmp_path):
    tensors = tensors_of("standard")
    tensors["W_dec"][2, 1] = np.nan
    with pytest.raises(UserError, match="W_dec: values that are not finite"):
        from_saelens(write(tmp_path / "lens", fields_of("standard"), tensors), tmp_path / "ours")


# ---------------------------------------------------------------------------------------------------------------- out

GROUPS = {"groups": 2, "highest": 0.5, "lowest": 0.3}
OURS = [
    (StandardSAE(features=F), "standard"),
    (StandardSAE(features=F, normalisation="none"), "standard"),
    (GatedSAE(features=F), "gated"),
    (JumpReLUSAE(features=F, threshold=0.4), "jumprelu"),
    (TopKSAE(features=F, k=3), "topk"),
    (TopKSAE(features=F, k=3, tied=True, output_scale=0.3, normalisation="token"), "topk"),
    (BatchTopKSAE(features=F, k=3), "jumprelu"),
    (FeatureChoiceSAE(features=F, k=3), "jumprelu"),
    (GBASAE(features=F, **GROUPS), "jumprelu"),
    (GBASAE(features=F, activation="relu", **GROUPS), "standard"),
]


def shaken(config, train, rows):
    """An autoencoder as it could have been trained, without training one."""
    rng = np.random.default_rng(2)
    made = Trainer(config, train, rows).autoencoder
    params = {name: x + 0.2 * jnp.asarray(rng.normal(size=x.shape), jnp.float32) for name, x in made.params.items()}
    state = dict(made.state)
    if "threshold_F" in state:
        state["threshold_F"] = jnp.asarray(rng.uniform(0.1, 1, F), jnp.float32)
    if "bias_F" in state:
        state["bias_F"] = -jnp.asarray(rng.uniform(0, 0.5, F), jnp.float32)
    if "threshold_F" in params:
        params["threshold_F"] = jnp.abs(params["threshold_F"])
    return dataclasses.replace(made, params=params, state=state)


def round_trip(folder, autoencoder, train):
    save_sae(folder / "ours", SAERun(source="runs/x", step=1, sae=autoencoder.config, train=train), autoencoder)
    made = to_saelens(folder / "ours", folder / "lens")
    fields = json.loads((folder / "lens" / "cfg.json").read_text())
    tensors = load_file(folder / "lens" / "sae_weights.safetensors")
    assert {"sae_lens_version", "hook_name", "model_name"} <= set(fields["metadata"])
    code, rebuilt = computed(fields, tensors, X)
    np.testing.assert_allclose(autoencoder.encode(jnp.asarray(X)), code, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(autoencoder.reconstruct(jnp.asarray(X)), rebuilt, rtol=1e-3, atol=1e-3)
    from_saelens(folder / "lens", folder / "back")
    back, run = load_sae(folder / "back")
    np.testing.assert_allclose(back.encode(jnp.asarray(X)), code, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(back.reconstruct(jnp.asarray(X)), rebuilt, rtol=1e-3, atol=1e-3)
    assert (run.train.layer, run.train.site, run.train.skip) == (train.layer, train.site, train.skip)
    return made.kind


@pytest.mark.parametrize(("config", "architecture"), OURS)
def test_ours_there_and_back(tmp_path, config, architecture):
    train = SAETrainConfig(layer=3, site="ffn_output")
    assert round_trip(tmp_path, shaken(config, train, X), train) == architecture


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_there_and_back(tmp_path, skip):
    train = SAETrainConfig(layer=1, site="transcoder", skip=skip)
    rows = np.concatenate([X, 0.1 * X[::-1]], -1)
    suffix = "skip_transcoder" if skip else "transcoder"
    assert round_trip(tmp_path / "a", shaken(StandardSAE(features=F), train, rows), train) == suffix
    made = shaken(BatchTopKSAE(features=F, k=3), train, rows)
    assert round_trip(tmp_path / "b", made, train) == f"jumprelu_{suffix}"
    gated = shaken(GatedSAE(features=F), train, rows)
    save_sae(tmp_path / "c", SAERun(source="x", step=None, sae=gated.config, train=train), gated)
    with pytest.raises(UserError, match=r"sae.kind=gated: SAELens has no transcoder of this kind"):
        to_saelens(tmp_path / "c", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    fields = fields_of("standard", metadata={"sae_lens_version": "6.0.0", "hook_name": "model.layers.3"})
    source = write(tmp_path / "lens", fields, tensors_of("standard"))
    assert call(convert, ["from-saelens", source, tmp_path / "ours"], monkeypatch) == 2
    assert "metadata.hook_name=model.layers.3: is not read; name its --layer and --site" in capsys.readouterr().err
    args = ["from-saelens", source, tmp_path / "ours", "--layer", 4, "--site"]
    assert call(convert, [*args, "transcoder"], monkeypatch) == 2
    assert "--site=transcoder: must be another for standard" in capsys.readouterr().err
    assert call(convert, [*args, "residual"], monkeypatch) == 0
    assert "ours: standard, 10 features of width 6" in capsys.readouterr().out
    assert load_sae(tmp_path / "ours").run.train.layer == 4
    assert call(convert, ["to-saelens", tmp_path / "ours", tmp_path / "back"], monkeypatch) == 0
    assert call(convert, ["to-saelens", tmp_path / "ours", tmp_path / "back"], monkeypatch) == 2
    assert "is not empty" in capsys.readouterr().err
    assert call(convert, ["from-saelens", tmp_path, tmp_path / "none"], monkeypatch) == 2
    assert "cfg.json is missing" in capsys.readouterr().err
    (source / "sae_weights.safetensors").unlink()
    assert (
        call(convert, ["from-saelens", source, tmp_path / "none", "--layer", 4, "--site", "residual"], monkeypatch) == 2
    )
    assert "sae_weights.safetensors is missing" in capsys.readouterr().err
