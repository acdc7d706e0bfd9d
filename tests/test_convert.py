"""Conversion of Hugging Face checkpoints there and back, on tiny random ones in that layout."""

import builtins
import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sparsezoo_jax
from sparsezoo_jax import cli, convert, huggingface
from sparsezoo_jax.config import read_config
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.huggingface.layouts import LAYOUTS, read_model
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.run_dir import write_config
from sparsezoo_jax.training.state import ModelTemplate

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
}
CONFIGS = {
    "gemma2": {
        "model_type": "gemma2",
        **SIZES,
        "num_hidden_layers": 3,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "model_type": "llama",
        **SIZES,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "llama_sparse_relu": {
        "model_type": "llama_sparse_relu",
        **SIZES,
        "num_hidden_layers": 2,
        "hidden_act": "relu",
        "attention_bias": False,
        "sparsity_gated_mlp": True,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 40,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 32,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
}


def shapes_of(config):
    """Names and shapes as transformers has them, written out independently of the tables under test."""
    if config["model_type"] == "gpt2":
        v, d, p = config["vocab_size"], config["n_embd"], config["n_positions"]
        shapes = {"transformer.wte.weight": (v, d), "transformer.wpe.weight": (p, d)}
        norms, layers = ["transformer.ln_f"], {}
        for i in range(config["n_layer"]):
            h = f"transformer.h.{i}"
            norms += [f"{h}.ln_1", f"{h}.ln_2"]
            layers |= {
                f"{h}.attn.c_attn": (d, 3 * d),
                f"{h}.attn.c_proj": (d, d),
                f"{h}.mlp.c_fc": (d, 4 * d),
                f"{h}.mlp.c_proj": (4 * d, d),
            }
        shapes |= {f"{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}
        shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
        return shapes | {f"{name}.bias": shape[1:] for name, shape in layers.items()}
    v, d, f = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    q, kv = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    norms = ["input", "post_attention"]
    if config["model_type"] == "gemma2":
        norms += ["pre_feedforward", "post_feedforward"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (d,) for norm in norms}
        linear = {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in linear.items()}
        biased = {"self_attn": config.get("attention_bias"), "mlp": config.get("mlp_bias")}
        shapes |= {f"{layer}.{n}.bias": shape[:1] for n, shape in linear.items() if biased[n.partition(".")[0]]}
    return shapes


def tensors_of(config, dtype=np.float32):
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape).astype(dtype) for name, shape in shapes_of(config).items()}


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(name, dtype, tmp_path):
    config = CONFIGS[name]
    tensors = tensors_of(config, dtype)
    source, run, back = write(tmp_path / "source", config, tensors), tmp_path / "run", tmp_path / "back"
    made = huggingface.from_hf(source, run)
    assert made.parameters == sum(x.size for x in tensors.values())
    model, run_config, tokenizer = sparsezoo_jax.load(run)
    assert tokenizer is None
    assert run_config.model.param_dtype == made.dtype == np.dtype(dtype).name
    assert bool(jnp.isfinite(model(jnp.arange(12).reshape(1, 12)).logits).all())
    huggingface.to_hf(run, back, released=True)
    assert_same(load_file_any(back), tensors)
    written = json.loads((back / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert written["architectures"] == [LAYOUTS[name].architecture]


#: First six logits after tokens 0..11 of the checkpoints above, scaled by 0.3, as transformers 5 computes them in
#: float32 (eager attention); SparseLM, which it lacks, by NumPy in float64, which gives Llama's numbers as well.
GOLDEN = {
    "gemma2": [-0.37965, -1.03692, -2.66351, -0.67734, -0.80705, 0.19384],
    "llama": [-0.92912, -0.17903, 0.03796, 0.1825, 0.82719, -0.4067],
    "llama_sparse_relu": [-0.21841, -0.29364, -0.99401, -0.93664, 0.10712, -1.00103],
    "gpt2": [-1.49771, 0.2459, -0.02707, -1.21553, -0.11611, 0.17474],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    tensors = {key: np.float32(0.3) * value for key, value in tensors_of(CONFIGS[name]).items()}
    huggingface.from_hf(write(tmp_path / "source", CONFIGS[name], tensors), tmp_path / "run")
    logits = sparsezoo_jax.load(tmp_path / "run").model(jnp.arange(12)[None]).logits
    # The numbers are rounded to five places; the rest is float32 summed in another order.
    np.testing.assert_allclose(logits[0, -1, :6], GOLDEN[name], atol=3e-5)


def load_file_any(folder):
    """`load_file`, in one dict over all shards."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_every_layer_goes_to_its_place(tmp_path):
    config = {**CONFIGS["gemma2"], "num_hidden_layers": 5, "layer_types": None}
    tensors = tensors_of(config)
    huggingface.from_hf(write(tmp_path / "source", config, tensors), tmp_path / "run")
    unstacked = sparsezoo_jax.load(tmp_path / "run").model.unstacked()
    blocks = [block for period in unstacked.segments for block in period.blocks]
    assert len(blocks) == 5
    for i, block in enumerate(blocks):
        q = tensors[f"model.layers.{i}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(block.attention.projections.q_DNH[...].reshape(24, 32), q.T)
        o = tensors[f"model.layers.{i}.self_attn.o_proj.weight"]
        np.testing.assert_array_equal(block.attention.projections.o_NHD[...].reshape(32, 24), o.T)
        assert block.attention.layer_type == ("local", "global")[i % 2]
        norm = tensors[f"model.layers.{i}.pre_feedforward_layernorm.weight"]
        np.testing.assert_array_equal(block.ffn_residual.pre.scale[...], norm)


def test_sharded_there_and_back(tmp_path):
    config = CONFIGS["llama"]
    tensors = tensors_of(config)
    source, run, back = write(tmp_path / "source", config, tensors), tmp_path / "run", tmp_path / "back"
    huggingface.from_hf(source, run)
    huggingface.to_hf(run, back, max_file_bytes=8000)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 1
    assert not (back / "model.safetensors").exists()
    huggingface.from_hf(back, tmp_path / "again")
    huggingface.to_hf(tmp_path / "again", tmp_path / "single")
    assert_same(load_file(tmp_path / "single" / "model.safetensors"), tensors)
    first = sorted(back.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match=f"missing: .*{first.name}"):
        huggingface.from_hf(back, tmp_path / "third")


def test_names_without_prefix_and_tensors_that_are_no_parameters(tmp_path):
    for name, extra in (("gpt2", "h.0.attn.bias"), ("llama", "layers.1.self_attn.rotary_emb.inv_freq")):
        config = CONFIGS[name]
        tensors = tensors_of(config)
        bare = {key.removeprefix(LAYOUTS[name].prefix): value for key, value in tensors.items()}
        bare[extra] = np.ones((1, 1, 32, 32), np.float32)
        huggingface.from_hf(write(tmp_path / name, config, bare), tmp_path / f"{name}-run")
        huggingface.to_hf(tmp_path / f"{name}-run", tmp_path / f"{name}-back")
        assert_same(load_file(tmp_path / f"{name}-back" / "model.safetensors"), tensors)


def test_sparselm_as_its_authors_store_it(tmp_path):
    """A ReLU whatever `hidden_act` says; matrices as their kernels hold them; a copy of the embedding as the head."""
    config = {**CONFIGS["llama_sparse_relu"], "hidden_act": "silu", "sparsity_new_intermediate_size": 20}
    config["intermediate_size"] = 99
    tensors = tensors_of(CONFIGS["llama_sparse_relu"])
    mlp = {key: tensors[key] for key in tensors if ".mlp." in key}
    rest = {key: tensors[key] for key in tensors.keys() - mlp.keys()}
    rest |= {"lm_head.weight": tensors["model.embed_tokens.weight"], "tracker.counts": np.zeros((3,), np.float32)}

    def stored(names):
        parts = {"gate_proj.weight": names[0], "up_proj.weight": names[1], "down_proj.weight": names[2]}
        for key, value in mlp.items():
            layer, name = key.rsplit(".mlp.", 1)
            other, transposed = parts[name]
            yield f"{layer}.mlp.{other}", np.ascontiguousarray(value.T if transposed else value)

    forms = {
        "kernels": (("gate_weight", True), ("up_weight", False), ("down_weight", True)),
        "older": (("GATE", False), ("UP", False), ("DOWN", True)),
        "torch": (("gate_proj.weight", False), ("up_proj.weight", False), ("down_proj.weight", False)),
    }
    for form, names in forms.items():
        run, back = tmp_path / f"{form}-run", tmp_path / f"{form}-back"
        huggingface.from_hf(write(tmp_path / form, config, rest | dict(stored(names))), run)
        huggingface.to_hf(run, back, released=True)
        assert_same(load_file(back / "model.safetensors"), tensors)
    assert read_config(run / "config.json").train.objectives[0].weight == pytest.approx(64 * 2e-5)
    rest["lm_head.weight"] = rest["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight, though tie_word_embeddings"):
        huggingface.from_hf(write(tmp_path / "untied", config, rest | mlp), tmp_path / "untied-run")


def test_sparselm_without_a_gate(tmp_path):
    config = {**CONFIGS["llama_sparse_relu"], "sparsity_gated_mlp": False}
    tensors = {key: x for key, x in tensors_of(CONFIGS["llama_sparse_relu"]).items() if "gate_proj" not in key}
    kernels = {key: x for key, x in tensors.items() if ".mlp." not in key}
    for i in range(2):
        for name in ("up", "down"):
            matrix = tensors[f"model.layers.{i}.mlp.{name}_proj.weight"]
            kernels[f"model.layers.{i}.mlp.{name}_weight"] = np.ascontiguousarray(matrix.T)
    for form, stored in (("torch", tensors), ("kernels", kernels)):
        huggingface.from_hf(write(tmp_path / form, config, stored), tmp_path / f"{form}-run")
        huggingface.to_hf(tmp_path / f"{form}-run", tmp_path / f"{form}-back", released=True)
        assert_same(load_file(tmp_path / f"{form}-back" / "model.safetensors"), tensors)


def test_mixed_types_become_float32(tmp_path):
    tensors = tensors_of(CONFIGS["gpt2"])
    halves = {name: x.astype(ml_dtypes.bfloat16) if x.ndim > 1 else x for name, x in tensors.items()}
    made = huggingface.from_hf(write(tmp_path / "source", CONFIGS["gpt2"], halves), tmp_path / "run")
    assert made.dtype == "float32"
    assert "bfloat16 and float32" in made.notes[0]
    huggingface.to_hf(tmp_path / "run", tmp_path / "back")
    assert_same(
        load_file(tmp_path / "back" / "model.safetensors"), {n: x.astype(np.float32) for n, x in halves.items()}
    )


def test_all_faults_of_the_tensors_at_once(tmp_path):
    tensors = tensors_of(CONFIGS["llama"])
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.norm.weight"] = np.zeros((5,), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros((32,), np.int64)
    with pytest.raises(UserError) as caught:
        huggingface.from_hf(write(tmp_path / "source", CONFIGS["llama"], tensors), tmp_path / "run")
    for text in (
        "missing: lm_head.weight, model.layers.1.mlp.up_proj.weight",
        "unexpected: model.layers.7.mlp.up_proj.weight",
        "model.norm.weight is [5], must be [24]",
        "model.layers.0.self_attn.q_proj.bias is I64",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_all_faults_of_the_config_at_once(tmp_path):
    changes = {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "hidden_act": "mish",
        "attention_bias": "yes",
        "num_attention_heads": 0,
        "intermediate_size": None,
    }
    with pytest.raises(UserError) as caught:
        read_model({**CONFIGS["llama"], **changes}, "config.json")
    for text in (
        "rope_scaling.low_freq_factor",
        "hidden_act=mish",
        "attention_bias=yes",
        "num_attention_heads=0",
        "intermediate",
    ):
        assert text in str(caught.value)
    with pytest.raises(
        UserError, match="model_type=bert: must be one of llama, gemma2, gemma3_text, gemma3n_text, gpt2"
    ):
        read_model({"model_type": "bert"}, "config.json")
    with pytest.raises(UserError, match="kv_heads=3: must divide"):
        read_model({**CONFIGS["llama"], "num_key_value_heads": 3}, "config.json")
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx=True"):
        read_model({**CONFIGS["gpt2"], "scale_attn_by_inverse_layer_idx": True}, "config.json")


def test_newer_rope_parameters():
    config = {k: v for k, v in CONFIGS["llama"].items() if k != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 7000.0}
    _, model = read_model(config, "config.json")
    assert model.attention.rope.base == 7000.0


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        ("spark", "tiny", "model.attention.kind=spark: only gqa; model.ffn.kind=spark: only gated"),
        ("mohd", "tiny", "model.residual"),
    ],
)
def test_runs_that_no_released_layout_holds(arch, size, message, tmp_path):
    write_config(tmp_path / "run", preset(arch, size))
    with pytest.raises(UserError, match=message):
        huggingface.to_hf(tmp_path / "run", tmp_path / "back", released=True)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("size", ["tiny", "gemma2_2b", "0_1b", "gpt2"])
def test_presets_have_a_layout_that_covers_every_parameter(size):
    from sparsezoo_jax.huggingface.conversion import places
    from sparsezoo_jax.huggingface.layouts import write_model

    model = preset("dense", size).model
    layout, _ = write_model(model, "run")
    template = ModelTemplate(lambda rngs: Decoder(model, rngs=rngs))
    parameters = {path: variable.shape for path, variable in template.parameters.items()}
    assert not template.variables
    assert {path for place in places(layout, model, parameters) for path in place.paths} == set(parameters)


def call(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, args)])
    try:
        cli.run(convert.main)
    except SystemExit as error:
        return error.code
    return 0


def test_command_with_tokenizer(tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, models

    source = write(tmp_path / "source", CONFIGS["gpt2"], tensors_of(CONFIGS["gpt2"]))
    Tokenizer(models.WordLevel({"<unk>": 0, "peace": 1, "</s>": 2}, unk_token="<unk>")).save(
        str(source / "tokenizer.json")
    )
    assert call(["from-hf", source, tmp_path / "run"], monkeypatch) == 0
    assert "gpt2, 16,224 parameters in float32, with its tokenizer" in capsys.readouterr().out
    assert sparsezoo_jax.load(tmp_path / "run").tokenizer.encode("peace") == [1]
    assert call(["to-hf", tmp_path / "run", tmp_path / "back"], monkeypatch) == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 2
    capsys.readouterr()
    for args in (["from-hf", source, tmp_path / "back"], ["to-hf", tmp_path / "run", source]):
        assert call(args, monkeypatch) == 2
        assert "is not empty" in capsys.readouterr().err
    assert call(["from-hf", tmp_path / "nowhere", tmp_path / "new"], monkeypatch) == 2
    assert "no such directory" in capsys.readouterr().err
    assert call(["to-hf", source, tmp_path / "new"], monkeypatch) == 2
    assert not (tmp_path / "new").exists()
    assert call(["--help"], monkeypatch) == 0
    assert "from-hf" in capsys.readouterr().out


def test_tokenizer_larger_than_the_model(tmp_path):
    from tokenizers import Tokenizer, models

    source = write(tmp_path / "source", CONFIGS["gpt2"], tensors_of(CONFIGS["gpt2"]))
    Tokenizer(models.WordLevel({str(i): i for i in range(41)}, unk_token="0")).save(str(source / "tokenizer.json"))
    with pytest.raises(UserError, match="vocab_size=40: must be at least the tokenizer's 41"):
        huggingface.from_hf(source, tmp_path / "run")


def test_damaged_file(tmp_path):
    source = write(tmp_path / "source", CONFIGS["gpt2"], tensors_of(CONFIGS["gpt2"]))
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match="damaged"):
        huggingface.from_hf(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def without_safetensors(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_safetensors)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hf\]'"):
        huggingface.from_hf(tmp_path, tmp_path / "run")
