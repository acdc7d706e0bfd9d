"""Prompts and batches beside PyTorch, in one process: `python -m benchmarks.peers`.

A Llama with random weights reads a prompt, or decodes one token of each of several sequences, through this package's
packed decoder and through PyTorch (eager; its own matrix products and `scaled_dot_product_attention`), with as many
threads. Both norm, rotate, keep caches and make the logits of the last token only. Ours runs as `generate` runs it:
natively, and with `--plain` also without kernels, which is what XLA makes of it.

Sides take turns. Of every round there are two times: that of the wall, which others lengthen, and the process's
CPU time by the number of threads, which they do less. Ratios are to PyTorch's time, medians and quartiles over the
rounds, so below 1 is faster than PyTorch.

    python -m benchmarks.peers [--prompts 256 1024] [--batches 1 4 8 16 64] [--formats bfloat16 float32] [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.decode import drawn
from benchmarks.timing import interleaved_by, ratios
from sparsezoo_jax import native
from sparsezoo_jax.inference import Sampling, packed
from sparsezoo_jax.inference.generation import first_token, next_token
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.pallas_kernels import without_kernels

#: Tokens in the caches before a batch decodes.
CONTEXT = 128
PYTORCH = "PyTorch"


class Shape(NamedTuple):
    """A Llama."""

    d_model: int = 2048
    layers: int = 4
    d_ff: int = 5632
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 32_000


def config_of(shape: Shape, dtype: Literal["float32", "bfloat16"]) -> DecoderConfig:
    """Our decoder of this shape."""
    return DecoderConfig(
        d_model=shape.d_model,
        layers=shape.layers,
        vocab_size=shape.vocab,
        max_seq_len=65_536,
        attention=GQAConfig(heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim),
        ffn=GatedFFNConfig(d_ff=shape.d_ff, activation="silu"),
        tie_embeddings=False,
        dtype=dtype,
        param_dtype=dtype,
    )


def ours(shape: Shape, dtype: Literal["float32", "bfloat16"]) -> Callable[[int, int], Callable[[], None]]:
    """`calls_of` our decoder of this shape."""
    return calls_of(packed(drawn(config_of(shape, dtype))))


def calls_of(model: Decoder) -> Callable[[int, int], Callable[[], None]]:
    """From rows and tokens of each (1: decode after a context) to a call that computes them and waits."""
    graphdef, state = nnx.split(model)
    sampling, key = Sampling(temperature=0), jax.random.key(0)

    def case(rows: int, tokens: int) -> Callable[[], None]:
        prompt = tokens > 1
        function = partial(first_token if prompt else next_token, sampling, graphdef)
        ids, last = jnp.ones((rows, tokens), jnp.int32), jnp.int32(tokens - 1)
        # A prompt is read into a cache with room for an answer, whose size `generate` rounds up.
        slots = 2 * tokens if prompt else 2 * CONTEXT
        held = {"cache": model.init_cache(rows, slots)}
        if not prompt:
            filled = held["cache"]
            seen = jnp.where(jnp.arange(slots) < CONTEXT, jnp.arange(slots), -1)
            held["cache"] = filled._replace(
                positions_BS=jnp.tile(seen, (rows, 1)).astype(jnp.int32), end=jnp.int32(CONTEXT)
            )
        start = 0 if prompt else CONTEXT

        # Compiled here, with the kernels that are allowed here.
        arguments = (held["cache"], ids, jnp.ones_like(ids), last, key)
        step: Any = jax.jit(function, donate_argnums=1).lower(state, *arguments).compile()

        def run() -> None:
            made = step(state, held["cache"].truncated(jnp.int32(start)), *arguments[1:])
            held["cache"] = made.cache
            jax.block_until_ready(made.tokens)

        return run

    return case


def pytorch(shape: Shape, dtype: str, threads: int) -> Callable[[int, int], Callable[[], None]]:
    """The same in PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    s, queries, keys = shape, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def weight(*size: int) -> Any:
        return (0.02 * torch.randn(size)).to(kind)

    sizes = {
        "qkv": (queries + 2 * keys, s.d_model),
        "out": (s.d_model, queries),
        "gate": (s.d_ff, s.d_model),
        "up": (s.d_ff, s.d_model),
        "down": (s.d_model, s.d_ff),
    }
    layers = [{name: weight(*size) for name, size in sizes.items()} for _ in range(s.layers)]
    embedding, head, norm = weight(s.vocab, s.d_model), weight(s.vocab, s.d_model), torch.ones(s.d_model, dtype=kind)
    frequencies = 10_000.0 ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)

    def rotated(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(kind)

    def case(rows: int, tokens: int) -> Callable[[], None]:
        first = 0 if tokens > 1 else CONTEXT
        caches = [
            [torch.zeros(rows, s.kv_heads, first + tokens, s.head_dim, dtype=kind) for _ in "kv"]
            for _ in range(s.layers)
        ]
        ids = torch.ones(rows, tokens, dtype=torch.long)
        angles = torch.arange(first, first + tokens)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()

        def run() -> None:
            with torch.inference_mode():
                x = embedding[ids]
                for layer, (k_cache, v_cache) in zip(layers, caches, strict=True):
                    qkv = F.linear(F.rms_norm(x, (s.d_model,), norm), layer["qkv"])
                    q, k, v = (
                        part.reshape(rows, tokens, -1, s.head_dim).transpose(1, 2)
                        for part in qkv.split([queries, keys, keys], -1)
                    )
                    k_cache[:, :, first:], v_cache[:, :, first:] = rotated(k, cos, sin), v
                    y = F.scaled_dot_product_attention(
                        rotated(q, cos, sin), k_cache, v_cache, is_causal=tokens > 1, enable_gqa=True
                    )
                    x = x + F.linear(y.transpose(1, 2).reshape(rows, tokens, -1), layer["out"])
                    y = F.rms_norm(x, (s.d_model,), norm)
                    x = x + F.linear(F.silu(F.linear(y, layer["gate"])) * F.linear(y, layer["up"]), layer["down"])
                F.linear(F.rms_norm(x[:, -1], (s.d_model,), norm), head).argmax(-1)

        return run

    return case


def main() -> int:
    """Measure and print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--formats", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--plain", action="store_true", help="also ours without kernels")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("PyTorch is not installed, and there is nothing to compare with: pip install torch", file=sys.stderr)
        return 2
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shape = Shape(layers=options.layers)
    level = native.level() or f"plain JAX ({native.why_missing()})"
    print(
        f"{shape}\n{threads} threads; ours: {level}, jax {jax.__version__}; "
        f"PyTorch {torch.__version__}: {torch.backends.cpu.get_cpu_capability()}; {options.rounds} rounds"
    )
    for dtype in options.formats:
        mine, theirs = ours(shape, dtype), pytorch(shape, dtype, threads)
        cases = [(1, tokens) for tokens in options.prompts] + [(rows, 1) for rows in options.batches]
        print(
            f"\n{dtype}\n\n| case | side | ms (CPU / threads) | x PyTorch | quartiles "
            "| ms (wall) | x PyTorch | quartiles |\n|---|---|---|---|---|---|---|---|"
        )
        for rows, tokens in cases:
            name = f"prompt of {tokens:,}" if tokens > 1 else f"decode, {rows} sequences"
            sides = {"ours": mine(rows, tokens), PYTORCH: theirs(rows, tokens)}
            if options.plain:
                with without_kernels():
                    sides["ours, plain JAX"] = mine(rows, tokens)
            report(name, sides, options.rounds, threads)
    return 0


def report(name: str, sides: dict[str, Callable[[], None]], rounds: int, threads: int) -> None:
    """Measure one case and print its rows."""
    cpu, wall = interleaved_by(sides, rounds, (time.process_time, time.perf_counter))
    for side in sides:
        cells = []
        for times, scale in ((cpu, 1e3 / threads), (wall, 1e3)):
            low, middle, high = ratios(times, PYTORCH)[side]
            cells.append(f"{scale * statistics.median(times[side]):.1f} | {middle:.2f} | {low:.2f} .. {high:.2f}")
        print(f"| {name} | {side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
