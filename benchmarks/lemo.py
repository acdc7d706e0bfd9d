"""Memory of a train step that leaves out blocks of tokens, by the compiler's account: `python -m benchmarks.lemo`.

A train step of adapters on one sequence of each length is compiled for this platform and not run. What is counted
are its temporaries (`compiled.memory_analysis()`): what the backward pass needs of the forward one, and whatever else
lives at the same time. Parameters, adapters and their optimizer state are the same with and without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.elimination import Network
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.lemo import Fitted, LeMoConfig
from sparsezoo_jax.training.lora import LoRAConfig
from sparsezoo_jax.training.state import first_device

CHUNK = 1024


def model_of(length: int, args: argparse.Namespace) -> DecoderConfig:
    """A decoder of Llama's form."""
    heads = args.d_model // 64
    return DecoderConfig(
        vocab_size=8192,
        d_model=args.d_model,
        layers=args.layers,
        max_seq_len=length,
        attention=GQAConfig(heads=heads, kv_heads=max(heads // 4, 1), head_dim=64),
        ffn=GatedFFNConfig(d_ff=args.d_model * 7 // 2, activation="silu"),
        dtype="bfloat16",
        remat=args.remat,
    )


def shapes_of_predictors(config: LeMoConfig, model: DecoderConfig) -> dict[str, Any]:
    """Those of networks as they are at the end of their fit."""
    rank, kept = config.predictor.rank or model.d_model // 8, 1 - config.predictor.prune
    inner, outer = round(kept * rank), round(kept * model.d_model)

    def network(outputs: int) -> Network:
        shapes = ((model.d_model, inner), (inner, outer), (outer, outputs))
        made: Any = (jax.ShapeDtypeStruct((model.layers, *shape), jnp.float32) for shape in shapes)
        return Network(*made)

    return {"attention": {"query": network(rank), "key": network(rank)}, "ffn": network(1)}


def measured(length: int, lemo: LeMoConfig, args: argparse.Namespace) -> dict[str, float]:
    """Bytes of temporaries and of arguments of a step, and seconds to compile it."""
    model = model_of(length, args)
    config = TrainConfig(lora=LoRAConfig(rank=8), loss_chunk=min(CHUNK, length), lemo=lemo)
    fitted = Fitted({}, shapes_of_predictors(lemo, model)) if lemo.scores == "predicted" else None
    shape = (1, length)
    prepared = prepare_step(config, lambda rngs: Decoder(model, rngs=rngs), shape, first_device, fitted=fitted)
    started = time.monotonic()
    compiled = prepared.train_step.lower(prepared.abstract, prepared.batch, predictors=prepared.predictors).compile()
    found = compiled.memory_analysis()
    return {
        "temporaries": found.temp_size_in_bytes,
        "arguments": found.argument_size_in_bytes,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Print a row for each length and setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lemo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scores", nargs="+", default=["exact", "predicted"], choices=["exact", "predicted"])
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    args = parser.parse_args()
    settings = [("adapters alone", LeMoConfig())]
    for scores in args.scores:
        settings += [(f"{c:g}, {scores}", LeMoConfig(capacity=(c,), scores=scores)) for c in args.capacities]
    for length in args.lengths:
        whole = None
        for name, lemo in settings:
            found = measured(length, lemo, args)
            whole = found["temporaries"] if whole is None else whole
            if args.json:
                print(json.dumps({"length": length, **dataclasses.asdict(lemo), **found}), flush=True)
                continue
            size = found["temporaries"] / 2**20
            share = found["temporaries"] / whole
            print(f"{length:>6}  {name:<16} {size:>9,.1f} MiB  {share:>6.1%}  ({found['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
