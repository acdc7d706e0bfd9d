"""Models that transformers has no class for: written with PyTorch code, read back, the same logits on both sides."""

import ast
import dataclasses
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sparsezoo_jax
from sparsezoo_jax import huggingface
from sparsezoo_jax.config import RunConfig, read_config
from sparsezoo_jax.configs import PRESETS
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.huggingface import remote_code
from sparsezoo_jax.huggingface.conversion import places
from sparsezoo_jax.huggingface.layouts import read_model, written_for_transformers
from sparsezoo_jax.huggingface.remote_code import remote_files
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.adapter import AdapterConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.deco import DECOConfig
from sparsezoo_jax.models.delta_ffn import DeltaFFNConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.mohd import MoHDConfig
from sparsezoo_jax.models.norms import NormConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.models.rope import RopeConfig, RopeScaling
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig
from sparsezoo_jax.models.sparselm import SparseLMFFNConfig
from sparsezoo_jax.run_dir import CHECKPOINTS, write_config
from sparsezoo_jax.training.parameters import save_params
from sparsezoo_jax.training.state import ModelTemplate, initial_variables
from tests.test_convert import assert_same

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
GQA = GQAConfig(heads=4, kv_heads=2, head_dim=8)
LATENT = MLAConfig(
    heads=3, q_lora_rank=10, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, window=5
)
YARN = RopeScaling(kind="yarn", factor=4.0, original_length=8)
MOHD = MoHDConfig(blocks=8, active=5, shared=2, router_std=1.0)
MOE = {"experts": 6, "expert_width": 5, "k": 2}


def decoder(attention, ffn, **changes):
    return DecoderConfig(
        **{
            "vocab_size": 40,
            "d_model": 24,
            "layers": 2,
            "max_seq_len": 32,
            "attention": attention,
            "ffn": ffn,
            **changes,
        }
    )


MODELS = {
    "spark": decoder(
        SparkAttentionConfig(heads=4, kv_heads=2, head_dim=8, top_k=3, r=4, window=6, softcap=5.0, qk_norm=True),
        SparkFFNConfig(d_ff=48, top_k=8, r=10, huber_delta=0.2),
        residual=PreNormConfig(post_norm=True),
        norm=NormConfig(zero_centered=True),
        layer_pattern=("local", "global"),
        embedding_scale="sqrt_d_model",
        final_softcap=3.0,
    ),
    "spark_exact": decoder(
        SparkAttentionConfig(
            heads=2, kv_heads=2, head_dim=8, top_k=3, r=4, selection="exact", softcap_values=2.0, bias=True
        ),
        SparkFFNConfig(d_ff=32, top_k=6, r=10, selection="exact"),
    ),
    "gated": decoder(
        GQAConfig(
            heads=4,
            kv_heads=2,
            head_dim=8,
            window=4,
            softcap=4.0,
            query_scale=0.5,
            bias=True,
            qk_norm=True,
            qk_norm_over="heads",
            rope=RopeConfig(base=500.0, local_base=100.0, fraction=0.5, scaling=YARN),
        ),
        GatedFFNConfig(d_ff=30, activation_sparsity_pattern=(0.8, 0.0), up_activation="relu", bias=True),
        layer_pattern=("local", "global"),
        adapter=AdapterConfig(width=4, after=("ffn",)),
        residual=PreNormConfig(input_norm=False, post_norm=True),
    ),
    "prosparse": decoder(
        dataclasses.replace(
            GQA,
            rope=RopeConfig(scaling=dataclasses.replace(YARN, kind="llama3")),
            qk_norm=True,
            qk_norm_zero_centered=True,
        ),
        GatedFFNConfig(d_ff=30, activation="relu", threshold=0.3, l1=True),
        tie_embeddings=False,
    ),
    "lazy": decoder(
        dataclasses.replace(GQA, rope=None),
        PlainFFNConfig(d_ff=40, activation="relu", top_k=6, bias=True),
        learned_positions=True,
        norm=NormConfig(kind="layer", bias=True, eps=1e-5),
    ),
    "plm": decoder(
        dataclasses.replace(LATENT, q_lora_rank=None, rope=RopeConfig(scaling=RopeScaling(kind="linear", factor=4.0))),
        PlainFFNConfig(d_ff=40, activation="relu2"),
    ),
    "sparselm": decoder(GQA, SparseLMFFNConfig(d_ff=40)),
    "sparselm_without_a_gate": decoder(GQA, SparseLMFFNConfig(d_ff=40, gated=False)),
    "blockffn": decoder(
        LATENT,
        BlockFFNConfig(experts=6, expert_width=4),
        layer_pattern=("global", "local"),
        residual=PreNormConfig(scale=0.7),
        embedding_scale=3.0,
        logit_divisor=2.0,
    ),
    "blockffn_sum": decoder(
        GQA, BlockFFNConfig(experts=6, expert_width=4, gated=True, norm_after_router="sum", norm_scale=0.5)
    ),
    "delta": decoder(GQA, DeltaFFNConfig(d_ff=40, gated=True, rounded="both")),
    "delta_layer": decoder(GQA, DeltaFFNConfig(d_ff=40, activation="gelu", step_per="layer")),
    "deco": decoder(
        GQA,
        DECOConfig(experts=6, expert_width=4, shared_width=5),
        first_layers=1,
        first_ffn=GatedFFNConfig(d_ff=20, activation="silu"),
    ),
    "moex": decoder(GQA, MoEXFFNConfig(experts=5, expert_width=6, k=2)),
    "moex_switch": decoder(GQA, MoEXFFNConfig(experts=5, expert_width=6, k=2, gate="switch", activation="gelu")),
    "topk": decoder(GQA, MoEFFNConfig(**MOE, gated=True)),
    "deepseek": decoder(GQA, MoEFFNConfig(**{**MOE, "k": 4}, router="deepseek")),
    "grin": decoder(GQA, MoEFFNConfig(**MOE, router="grin")),
    "remoe": decoder(GQA, MoEFFNConfig(**MOE, router="remoe")),
    "topp": decoder(GQA, MoEFFNConfig(**MOE, router="topp")),
    "ling": decoder(
        dataclasses.replace(GQA, qk_norm=True, rope=RopeConfig(fraction=0.5)),
        MoEFFNConfig(
            experts=9, expert_width=5, k=4, router="ling", shared_experts=1, gated=True, groups=4, kept_groups=2,
            routed_scale=2.5,
        ),
        first_layers=1,
        first_ffn=GatedFFNConfig(d_ff=20, activation="silu"),
        mtp_layers=1,
    ),
    "mohd": decoder(
        GQA,
        GatedFFNConfig(d_ff=30),
        residual=dataclasses.replace(MOHD, output_blocks="routed", balance="bias", masked_head=True),
    ),
    "mohd_layer": decoder(
        GQA,
        GatedFFNConfig(d_ff=30),
        residual=dataclasses.replace(
            MOHD, routers="layer", norm_after_mask=True, post_norm=True, shared_gate="hard", fusion="square"
        ),
    ),
    "mohd_attention": decoder(
        GQA,
        GatedFFNConfig(d_ff=30),
        residual=dataclasses.replace(
            MOHD, sublayers="attention", scale_mode="y_literal", fusion="block_diagonal", implementation="dense"
        ),
    ),
}  # fmt: skip
#: Without torch all these are too many for CI to compile; the others differ by a branch.
IN_CI = ("spark", "gated", "blockffn", "deco", "moex", "ling", "lazy", "mohd")
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 12))


def make_run(folder, model, arch="dense"):
    """A run of random parameters, norms and biases too, which would otherwise be 1 and 0."""

    def build(rngs):
        return Decoder(model, rngs=rngs)

    template = ModelTemplate(build)
    draw, arrays = np.random.default_rng(0), {}
    for path, variable in sorted({**template.parameters, **template.variables}.items()):
        value = (0.1 if path.endswith(("/scale", "bias_E")) else 0.35) * draw.standard_normal(variable.shape)
        centre = path.endswith("/scale") and not (model.norm.zero_centered and "residual" in path)
        arrays[path] = (value + centre).astype(np.float32)
    others = initial_variables(template, build) if template.variables else {}
    drawn = {path: arrays.pop(path) for path in template.variables}
    others |= {path: value for path, value in drawn.items() if path.endswith("bias_E")}
    save_params(folder / CHECKPOINTS, arrays, others)
    write_config(
        folder, RunConfig(arch=arch, size="own", model=model, data=DataConfig(seq_len=16, tokenizer=str(folder)))
    )
    return arrays


def ours(run):
    return jax.jit(lambda model, tokens: model(tokens).logits)(sparsezoo_jax.load(run).model, jnp.asarray(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_there_and_back_and_the_logits_of_the_code(name, tmp_path):
    """Files, names and configuration come back as they were; logits are those that the PyTorch code once gave."""
    model = MODELS[name]
    saved = make_run(tmp_path / "run", model, name)
    made = huggingface.to_hf(tmp_path / "run", tmp_path / "there")
    stored = {path: value for path, value in saved.items() if not path.startswith("mtp/")}
    assert made.parameters == sum(value.size for value in stored.values())
    assert made.notes == (
        ("modules of multi-token prediction are left out: only training uses them",) * (name == "ling")
    )
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [
        *("README.md", "config.json", "configuration_sparsezoo.py", "generation_config.json", "model.safetensors"),
        "modeling_sparsezoo.py",
    ]
    huggingface.from_hf(tmp_path / "there", tmp_path / "again")
    config = read_config(tmp_path / "again" / "config.json")
    assert config.arch == name
    assert config.model.layer_specs() == model.layer_specs()
    huggingface.to_hf(tmp_path / "again", tmp_path / "twice")
    assert_same(*(load_file(tmp_path / where / "model.safetensors") for where in ("there", "twice")))
    for file in ("config.json", "modeling_sparsezoo.py"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
    np.testing.assert_allclose(ours(tmp_path / "again")[0, -1, :6], GOLDEN[name], atol=1e-4)


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch and transformers")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    make_run(tmp_path / "run", MODELS[name], name)
    huggingface.to_hf(tmp_path / "run", tmp_path / "there", max_file_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "there", trust_remote_code=True).eval()
    tokens, wanted = torch.tensor(TOKENS), np.asarray(ours(tmp_path / "run"))
    with torch.no_grad():
        out = model(tokens, labels=tokens)
        np.testing.assert_allclose(out.logits.numpy(), wanted, atol=1e-4)
        print(name, [round(float(value), 5) for value in out.logits[0, -1, :6]])
        if name in GOLDEN:
            np.testing.assert_allclose(out.logits[0, -1, :6].numpy(), GOLDEN[name], atol=3e-5)
        of_tokens = jax.nn.log_softmax(wanted[:, :-1])[np.arange(2)[:, None], np.arange(11), TOKENS[:, 1:]]
        assert float(out.loss) == pytest.approx(-float(of_tokens.mean()), abs=1e-4)

        # Padding on the left, as texts of several lengths are generated from.
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)], dim=1)
        np.testing.assert_allclose(model(padded, attention_mask=mask).logits[:, 3:].numpy(), wanted, atol=1e-4)

        # By steps: of one forward pass and by `generate`, with the cache and without.
        cache, made = None, []
        for start, end in ((0, 5), (5, 6), (6, 12)):
            step = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            made.append(step.logits)
        np.testing.assert_allclose(torch.cat(made, dim=1).numpy(), wanted, atol=1e-4)
        form = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        with_cache = model.generate(padded, **form)
        assert with_cache.shape == (2, 23)
        assert torch.equal(with_cache, model.generate(padded, use_cache=False, **form))

    # A gradient reaches every parameter that the loss depends on.
    model.train()
    model(tokens, labels=tokens).loss.backward()
    without = {key for key, value in model.named_parameters() if value.grad is None}
    assert without <= {"model.head.router.bias"}
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def imported(text):
    """Top-level names of a module's own code."""
    return [
        node.name
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@pytest.mark.parametrize("arch", [arch for arch in PRESETS if PRESETS[arch]["tiny"].model.images.patch is None])
def test_presets_have_code_and_a_place_for_every_parameter(arch):
    model = PRESETS[arch]["tiny"].model
    layout, values = written_for_transformers(model, "run")
    if layout.model_type != "sparsezoo":
        assert (arch, layout.model_type) == ("dense", "gemma2")
        return
    template = ModelTemplate(lambda rngs: Decoder(model, rngs=rngs))
    shapes = {path: variable.shape for path, variable in {**template.parameters, **template.variables}.items()}
    found = list(places(layout, model, shapes))
    missing = template.parameters.keys() - {path for place in found for path in place.paths}
    assert all(path.startswith("mtp/") for path in missing)  # only training uses these
    assert len({place.name for place in found}) == len(found)
    assert read_model(json.loads(json.dumps(values)), "config.json")[1].layer_specs() == model.layer_specs()

    files = remote_files(model, "run")
    for name, text in files.items():
        compile(text, name, "exec")
        assert len(set(imported(text))) == len(imported(text))
        # What stands alone imports torch, transformers, the standard library, and the configuration beside it.
        sources = set(re.findall(r"^(?:from|import) (\.?\w+)", text, re.MULTILINE))
        assert sources <= {
            "torch",
            "transformers",
            "math",
            "dataclasses",
            "typing",
            "statistics",
            ".configuration_sparsezoo",
        }
    kinds = re.findall(r'^@kind\("(\w+)", "(\w+)"\)', files["modeling_sparsezoo.py"], re.MULTILINE)
    used = {("attention", model.attention.kind), ("ffn", model.ffn.kind), ("residual", model.residual.kind)}
    assert used <= set(kinds)
    # Of other kinds only what these are made of.
    assert set(kinds) - used <= {("attention", "gqa"), ("residual", "pre_norm"), ("head", "mohd"), ("ffn", "gated")}


def test_the_configuration_tells_code_apart():
    """transformers takes two models for one if their configurations' files are equal."""
    texts = [
        remote_files(MODELS[name], "run")["configuration_sparsezoo.py"] for name in ("spark", "moex", "moex_switch")
    ]
    assert texts[0] != texts[1] == texts[2]


def test_kinds_without_a_pytorch_form_are_refused(monkeypatch, tmp_path):
    (tmp_path / "ffn_gated.py").write_text("")
    (tmp_path / "attention_spark.py").write_text("")
    monkeypatch.setattr(remote_code, "_MODULES", tmp_path)
    message = (
        "^run: model.ffn.kind=spark: has no PyTorch form that could be written for transformers; those of gated have$"
    )
    with pytest.raises(UserError, match=message):
        remote_files(MODELS["spark"], "run")


def test_a_routed_width_in_its_warm_up_is_refused(tmp_path):
    residual = dataclasses.replace(MOHD, warmup_steps=3, implementation="dense")
    model = dataclasses.replace(MODELS["mohd"], residual=residual)
    write_config(
        tmp_path / "run",
        RunConfig(arch="mohd", size="own", model=model, data=DataConfig(seq_len=16, tokenizer=str(tmp_path))),
    )
    with pytest.raises(UserError, match=r"model.residual.warmup_steps=3: must be over, but .* is of step 0$"):
        huggingface.to_hf(tmp_path / "run", tmp_path / "there")
    assert not (tmp_path / "there").exists()
    # Once it is over, nothing of it is left.
    assert written_for_transformers(model, "run")[1]["residual"]["warmup_steps"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, r"d_model: Input should be a valid integer"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000: must be an integer from 1 to 4096"),
        ({"ffn": {"kind": "spark", "d_ff": 8, "top_k": 9, "r": 4}}, r"model.ffn.top_k=9: must be between 1 and"),
        ({"ffn": {"kind": "unheard"}}, "unheard"),
        ({"attention": None}, "attention"),
        ({"residual": {"kind": "pre_norm", "power": 9000}}, "power: Unexpected keyword argument"),
        ({"arch": 7}, "arch=7: must be the name of an architecture"),
    ],
)
def test_configurations_that_cannot_be_read(change, message):
    values = {**written_for_transformers(MODELS["spark"], "run")[1], **change}
    with pytest.raises(UserError, match=message) as caught:
        read_model(values, "config.json")
    assert "\n" not in str(caught.value)


#: First six logits after the last of TOKENS' first text, as the PyTorch code computes them (torch 2.13).
GOLDEN = {
    "spark": [-0.99567, 0.89226, 0.03307, 2.283, -2.23558, 1.69913],
    "gated": [-0.51527, 0.57269, -0.34283, -3.42133, 0.18138, -0.48796],
    "lazy": [2.22125, -3.04988, 0.25197, 0.92522, -1.55693, 1.30751],
    "blockffn": [-0.44093, 0.00622, 0.77095, 0.61522, -0.31426, 0.98893],
    "deco": [0.35588, 0.28601, -0.17861, 2.49908, 2.1257, 1.589],
    "moex": [0.61806, 3.07116, 3.0712, 3.09215, -0.67935, -0.78769],
    "mohd": [0.05081, -0.32257, -0.43685, -0.27416, -0.1181, -0.40325],
    "ling": [2.09103, -0.47987, -1.67508, -0.09454, -0.28541, 2.06767],
}
