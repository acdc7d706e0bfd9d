"""Time of a train step against the dense twin of equal parameters: `python -m benchmarks.train_step [--arch spark]`.

The whole step (forward, backward, AdamW) of a preset with parts of it exchanged, in interleaved rounds.

spark: "FFN alone" is the Spark FFN with the dense twin's attention. `lax.top_k` and `approx_max_k` are the same FFN
with the threshold taken from a sort; "autodiff" differentiates the mean and the standard deviation instead of using
the closed form.

blockffn: with its losses and objectives, and without; beside it top-k and ReMoE mixtures of the same sizes.

sparselm: as trained, about half of the neurons active at first; and with one in a hundred that can be, the others being
silent, the step as it is, by products of all neurons, and with 64 neurons of a token stored.

deco: with its loss and controller; with plain SiLU in place of NormSiLU.

lazy: all units of the ReLU ("dense") or of a GELU; a token's k largest, found by counting bits and by lax.top_k.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from benchmarks.timing import interleaved, print_ratios
from sparsezoo_jax import platforms
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import Decoder, DecoderConfig, dense_twin
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.deco import DECOConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.spark import SparkAttentionConfig
from sparsezoo_jax.models.sparselm import SparseLMFFNConfig
from sparsezoo_jax.pallas_kernels.statistical_topk import reference
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.objectives import ObjectiveConfig
from sparsezoo_jax.training.optimizer import build_optimizer
from sparsezoo_jax.training.state import ModelTemplate, TrainState, initial_state, map_with_path
from sparsezoo_jax.training.step import build_train_step


def dense_attention_of(config: DecoderConfig) -> GQAConfig:
    """Grouped-query attention of the same shape."""
    spark = config.attention
    assert isinstance(spark, SparkAttentionConfig)
    return GQAConfig(
        heads=spark.heads, kv_heads=spark.kv_heads, head_dim=spark.head_dim, window=spark.window, softcap=spark.softcap
    )


def compiled_step(config: DecoderConfig, batch: Mapping[str, Any], train: TrainConfig) -> tuple[Any, TrainState]:
    """The compiled train step, which takes (state, batch) and donates the state, and the state to begin with."""

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config, rngs=rngs)

    template = ModelTemplate(build)
    optimizer = build_optimizer(train, template.parameters)
    state = jax.jit(lambda key: initial_state(template, build, optimizer, train.objectives, key))(jax.random.key(0))
    step = jax.jit(build_train_step(train, template, optimizer), donate_argnums=0)
    return step.lower(state, batch).compile(), state


def step_of(
    config: DecoderConfig,
    batch: dict[str, np.ndarray],
    objectives: tuple[ObjectiveConfig, ...] = (),
    begin: Callable[[TrainState], TrainState] = lambda state: state,
):
    """A function that makes one train step and returns its metrics; it begins from `begin` of a new state."""
    compiled, state = compiled_step(config, batch, TrainConfig(objectives=objectives))
    held = [begin(state)]

    def run():
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return run


def random_batch(model: DecoderConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """A batch of whole sequences of random tokens, [rows, length] each."""
    draw, shape = np.random.default_rng(0), (rows, length)
    return {
        "tokens": draw.integers(0, model.vocab_size, shape, np.int32),
        "targets": draw.integers(0, model.vocab_size, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "mask": np.ones(shape, bool),
    }


def main() -> None:
    """Time the variants and print the table."""
    platforms.keep_freed_memory()  # as training does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="spark", choices=sorted(VARIANTS))
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--layers", type=int, help="fewer layers of the preset, for large sizes on a small machine")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()

    model = preset(options.arch, options.size).model
    # Unrolled and in float32: what a CPU runs best, for all variants alike.
    model = dataclasses.replace(
        model, scan_layers=False, remat="none", dtype="float32", layers=options.layers or model.layers
    )
    batch = random_batch(model, options.batch_size, options.seq_len)
    variants = VARIANTS[options.arch](model, options.size, batch)
    title = f"{options.arch} {options.size}, {model.layers} layers"
    print(f"{title}, {options.batch_size} x {options.seq_len} tokens, {options.rounds} rounds\n")
    print_ratios(interleaved(variants, options.rounds), "dense")


def spark_variants(spark: DecoderConfig, size: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Steps by name, the dense twin's first."""
    plain = dense_attention_of(spark)
    gated = GatedFFNConfig(d_ff=spark.ffn.d_ff * 2 // 3)
    ffn_only = dataclasses.replace(spark, attention=plain)
    configs = {
        "dense": dataclasses.replace(spark, attention=plain, ffn=gated),
        "Spark FFN alone": ffn_only,
        "Spark FFN alone, lax.top_k": _selecting(ffn_only, "exact"),
        "Spark FFN alone, approx_max_k": _selecting(ffn_only, "approximate"),
        "Spark FFN and attention": spark,
    }
    variants = {name: step_of(config, batch) for name, config in configs.items()}

    def autodiff(x, k, **kwargs):
        for name in ("implementation", "shift"):  # of which the definition knows nothing
            kwargs.pop(name)
        return reference.statistical_topk(x, k, **kwargs)

    with mock.patch("sparsezoo_jax.pallas_kernels.spark_ffn.statistical_topk", autodiff):
        variants["Spark FFN alone, autodiff of mean and std"] = step_of(ffn_only, batch)
    return variants


def blockffn_variants(model: DecoderConfig, size: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Steps by name, the dense twin's first."""
    assert isinstance(model.ffn, BlockFFNConfig)
    without = dataclasses.replace(model.ffn, auxiliary_losses=False)
    variants = {
        "dense": step_of(dataclasses.replace(model, ffn=model.ffn.dense_twin()), batch),
        "BlockFFN": step_of(model, batch, preset("blockffn", size).train.objectives),
        "BlockFFN without losses": step_of(dataclasses.replace(model, ffn=without), batch),
    }
    for name, other in (("top-k", size), ("ReMoE", f"{size}_remoe")):
        mixture = preset("moe", other)
        config = dataclasses.replace(model, ffn=mixture.model.ffn)
        variants[f"{name} mixture"] = step_of(config, batch, mixture.train.objectives)
    return variants


def sparselm_variants(model: DecoderConfig, size: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Steps by name, the dense twin's first."""
    assert isinstance(model.ffn, SparseLMFFNConfig)
    objectives = preset("sparselm", size).train.objectives
    still = dataclasses.replace(model.ffn, revival=0)  # the silent ones are to stay so

    def silenced(state: TrainState) -> TrainState:
        def cleared(path: str, array: jax.Array) -> jax.Array:
            return array.at[..., model.ffn.d_ff // 100 :].set(0) if path.endswith("ffn/gate_DF") else array

        return dataclasses.replace(state, params=map_with_path(cleared, state.params))

    variants = {
        "dense": step_of(dataclasses.replace(model, ffn=model.ffn.dense_twin()), batch),
        "SparseLM": step_of(model, batch, objectives),
    }
    forms = {
        "": {},
        ", all neurons": {"implementation": "xla"},
        ", stored": {"stored_neurons": min(64, model.ffn.d_ff)},
    }
    for name, form in forms.items():
        config = dataclasses.replace(model, ffn=dataclasses.replace(still, **form))
        variants[f"SparseLM, 1 %{name}"] = step_of(config, batch, objectives, silenced)
    return variants


def deco_variants(model: DecoderConfig, size: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Steps by name, the dense twin's first."""
    twin = dense_twin(model)
    assert isinstance(model.ffn, DECOConfig)
    assert twin is not None
    plain = dataclasses.replace(model.ffn, expert_activation="silu")
    objectives = preset("deco", size).train.objectives
    return {
        "dense": step_of(twin, batch),
        "DECO": step_of(model, batch, objectives),
        "DECO, SiLU": step_of(dataclasses.replace(model, ffn=plain), batch, objectives),
    }


def lazy_variants(model: DecoderConfig, size: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Steps by name, the dense twin's first."""
    ffn = model.ffn
    assert isinstance(ffn, PlainFFNConfig)
    ffns = {
        "dense": dataclasses.replace(ffn, top_k=None),
        "GELU": dataclasses.replace(ffn, top_k=None, activation="gelu_tanh"),
        f"{ffn.top_k or ffn.d_ff // 24} largest": dataclasses.replace(ffn, top_k=ffn.top_k or ffn.d_ff // 24),
    }
    variants = {name: step_of(dataclasses.replace(model, ffn=of), batch) for name, of in ffns.items()}
    name, kept = list(ffns.items())[-1]

    def sorted_mask(x: jax.Array, k: int) -> jax.Array:
        return x >= jax.lax.top_k(jax.lax.stop_gradient(x), k)[0][..., -1:]

    with mock.patch("sparsezoo_jax.models.ffn.top_k_mask", sorted_mask):
        variants[f"{name}, lax.top_k"] = step_of(dataclasses.replace(model, ffn=kept), batch)
    return variants


VARIANTS = {
    "spark": spark_variants,
    "blockffn": blockffn_variants,
    "sparselm": sparselm_variants,
    "deco": deco_variants,
    "lazy": lazy_variants,
}


def _selecting(config: DecoderConfig, selection: str) -> DecoderConfig:
    return dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, selection=selection))


if __name__ == "__main__":
    main()
