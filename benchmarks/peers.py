"""Training, prompts and batches beside PyTorch and llama.cpp: `python -m benchmarks.peers`.

A Llama with random weights reads a prompt, decodes some tokens of each of several sequences, or generates from end to
end (`--generations PROMPT:NEW`: the prompt is read and then token after token made), through this package's packed
decoder, through PyTorch (eager; its own matrix products and `scaled_dot_product_attention`, where it is installed) and
through llama.cpp's server (`--llama-cpp PYTHON`, a Python with xllamacpp and gguf, which may be another environment's;
several sequences are as many requests at once), with as many threads. All norm, rotate, keep caches and make the logits
of the last token only. Ours runs as `generate` runs it, natively, and with `--plain` also without kernels, which is
what XLA makes of it. Programs are compiled and models loaded before. llama.cpp's int8 is Q8_0, with a factor for 32
weights; ours has one for a row.

`--train` are lengths of sequences. As many of each as make 2,048 tokens are a batch, on which a small Llama makes train
steps in float32, with AdamW and clipping, here and in PyTorch, eager and compiled.

Sides take turns. Of every round there are two times: that of the wall, which others lengthen, and the processes'
CPU time by the number of threads, which they do less. Ratios are to PyTorch's time (without PyTorch to llama.cpp's),
medians and quartiles over the rounds, so below 1 is faster.

    python -m benchmarks.peers [--prompts 256 1024] [--batches 1 4 8 16 64] [--generations 64:64]
        [--formats bfloat16 float32] [--rounds 9]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import re
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
from benchmarks.train_step import random_batch, step_of
from benchmarks.workers import Worker
from sparsezoo_jax import native, platforms
from sparsezoo_jax.inference import Engine, Formats, Sampling, packed
from sparsezoo_jax.inference.generation import first_token, next_token
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.pallas_kernels import without_kernels

#: Tokens in the caches before a batch decodes.
CONTEXT = 128
#: Tokens that a decoding call makes one after the other.
DECODED = 16
#: Tokens of a train step, where sequences are no longer.
TRAINED = 2048
PYTORCH, LLAMA_CPP = "PyTorch", "llama.cpp"


class Shape(NamedTuple):
    """A Llama."""

    d_model: int = 2048
    layers: int = 4
    d_ff: int = 5632
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 32_000


#: The Llama that trains: as large as the tiny presets.
SMALL = Shape(d_model=128, layers=4, d_ff=512, heads=4, kv_heads=2, head_dim=32, vocab=4096)


class Case(NamedTuple):
    """What one call computes: of each row a prompt is read, or is in the cache, and tokens are made."""

    rows: int
    prompt: int
    """Tokens; 0 where `CONTEXT` tokens are in the cache."""
    new: int
    """Tokens of each row; the first one comes with the prompt."""

    @property
    def name(self) -> str:
        if not self.prompt:
            return f"a token of each of {self.rows} sequences"
        read = f"prompt of {self.prompt:,}"
        return read if self.new == 1 else f"{read}, {self.new} tokens generated"

    @property
    def asked(self) -> str:
        """Of `llama_cpp_worker.py`."""
        return f"generate {self.prompt} {self.new}" if self.prompt else f"decode {self.new}"


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


def ours(shape: Shape, dtype: str) -> Callable[[Case], Callable[[], None]]:
    """From a case to a call of our decoder of this shape that computes it."""
    formats = Formats("int8" if dtype == "int8" else "model")
    model = packed(drawn(config_of(shape, "float32" if dtype == "float32" else "bfloat16")), formats)
    single = calls_of(model)

    def case(asked: Case) -> Callable[[], None]:
        if not asked.prompt:
            return repeated(single(asked.rows, 1), asked.new)
        return single(asked.rows, asked.prompt) if asked.new == 1 else generations_of(model, asked)

    return case


def generations_of(model: Decoder, case: Case) -> Callable[[], None]:
    """A call that generates as `generate` does, by its engine, token by token in Python."""
    engine = Engine(model)
    prompts = [[1] * case.prompt] * case.rows

    def run() -> None:
        made = list(engine.generate(prompts, max_new_tokens=case.new, sampling=Sampling(temperature=0)))
        assert len(made) == case.new

    run()  # compiles
    return run


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


def repeated(run: Callable[[], None], times: int) -> Callable[[], None]:
    """A call that makes several."""

    def several() -> None:
        for _ in range(times):
            run()

    return several


def our_step(shape: Shape, rows: int, tokens: int) -> Callable[[], None]:
    """A train step of ours, in float32."""
    config = dataclasses.replace(config_of(shape, "float32"), scan_layers=False, max_seq_len=max(tokens, 1024))
    step = step_of(config, random_batch(config, rows, tokens))
    return lambda: jax.block_until_ready(step())


class Sides(NamedTuple):
    """Whom to compare with."""

    torch: bool
    llama_cpp: str | None
    """A Python with xllamacpp."""
    plain: bool
    threads: int

    @property
    def baseline(self) -> str:
        return PYTORCH if self.torch else LLAMA_CPP


HEADER = """
| case | side | ms (CPU / threads) | x {baseline} | quartiles | ms (wall) | x {baseline} | quartiles |
|---|---|---|---|---|---|---|---|"""


def compare_inference(sides: Sides, shape: Shape, dtype: str, cases: list[Case], rounds: int) -> None:
    """Print a table of one number format."""
    s = sides._replace(torch=sides.torch and dtype != "int8")  # PyTorch has no rows of int8 here
    mine = ours(shape, dtype)
    theirs = None
    if s.torch:
        from benchmarks import pytorch_llama

        theirs = pytorch_llama.inference(shape, dtype, s.threads, CONTEXT)
    # llama.cpp shares its memory out among the sequences that it was started for.
    for number, (rows, alike) in enumerate(itertools.groupby(cases, lambda case: case.rows)):
        with contextlib.ExitStack() as stack:
            worker = None
            if s.llama_cpp is not None:
                first = f"{' '.join(map(str, shape))} {dtype} {s.threads} {rows}"
                worker = stack.enter_context(Worker(s.llama_cpp, "llama_cpp_worker.py", first))
                said = worker.answer()
                print("" if number else f"\n{said}\n", end="")
            if not number:
                print(f"\n{dtype}\n{HEADER.format(baseline=s.baseline)}")
            for case in alike:
                runs = {"ours": mine(case)}
                if theirs is not None:
                    runs[PYTORCH] = theirs(*case)
                if s.plain and dtype != "int8":
                    with without_kernels():
                        runs["ours, plain JAX"] = mine(case)
                if worker is not None:
                    runs[LLAMA_CPP] = partial(worker, case.asked)
                baseline = s.baseline if s.baseline in runs else "ours"
                # Of a generation the whole is reported, of decoding one token.
                report(case.name, runs, rounds, s.threads, baseline, worker, 1 if case.prompt else case.new)


def compare_training(sides: Sides, lengths: list[int], rounds: int) -> None:
    """Print a table of train steps."""
    from benchmarks import pytorch_llama

    print(f"\ntrain steps, {SMALL}\n{HEADER.format(baseline=PYTORCH)}")
    for tokens in lengths:
        count = max(1, TRAINED // tokens)
        runs = {"ours": our_step(SMALL, count, tokens)}
        if sides.plain:
            with without_kernels():
                runs["ours, plain JAX"] = our_step(SMALL, count, tokens)
        runs[PYTORCH] = pytorch_llama.training(SMALL, count, tokens, sides.threads, compiled=False)
        runs["PyTorch, compiled"] = pytorch_llama.training(SMALL, count, tokens, sides.threads, compiled=True)
        report(f"{count} x {tokens:,}", runs, rounds, sides.threads, PYTORCH)


def generation(text: str) -> Case:
    """The case that `PROMPT:NEW` names."""
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be PROMPT:NEW, two numbers of tokens above 0")
    prompt, new = map(int, text.split(":"))
    return Case(1, prompt, new)


def main() -> int:
    """Measure and print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--generations", nargs="*", type=generation, default=[], metavar="PROMPT:NEW")
    parser.add_argument("--formats", nargs="*", choices=["bfloat16", "float32", "int8"], default=["bfloat16"])
    parser.add_argument("--train", type=int, nargs="*", default=[], help="lengths of sequences to train on")
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with xllamacpp and gguf")
    parser.add_argument("--plain", action="store_true", help="also ours without kernels")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    platforms.keep_freed_memory()  # as commands do
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        torch = None
    if torch is None and (options.llama_cpp is None or options.train):
        print("PyTorch is not installed, and there is nothing to compare with: pip install torch", file=sys.stderr)
        return 2
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    level = native.level() or f"plain JAX ({native.why_missing()})"
    print(f"{threads} threads; ours: {level}, jax {jax.__version__}; {options.rounds} rounds")
    if torch is not None:
        print(f"PyTorch {torch.__version__}: {torch.backends.cpu.get_cpu_capability()}")
    sides = Sides(torch is not None, options.llama_cpp, options.plain, threads)
    if options.train:
        compare_training(sides, options.train, options.rounds)
    shape = Shape(layers=options.layers)
    cases = [Case(1, tokens, 1) for tokens in options.prompts] + options.generations
    cases += [Case(rows, 0, DECODED) for rows in options.batches]
    if options.formats:
        print(f"\n{shape}")
    for dtype in options.formats:
        compare_inference(sides, shape, dtype, cases, options.rounds)
    return 0


def report(
    name: str,
    sides: dict[str, Callable[[], None]],
    rounds: int,
    threads: int,
    baseline: str = PYTORCH,
    worker: Worker | None = None,
    times: int = 1,
) -> None:
    """Measure one case and print its rows, of one of the `times` that a call computes it."""

    def processor() -> float:
        return time.process_time() + (0 if worker is None else worker.cpu)

    cpu, wall = interleaved_by(sides, rounds, (processor, time.perf_counter))
    for side in sides:
        cells = []
        for found, scale in ((cpu, 1e3 / threads), (wall, 1e3)):
            low, middle, high = ratios(found, baseline)[side]
            took = scale * statistics.median(found[side]) / times
            cells.append(f"{took:.1f} | {middle:.2f} | {low:.2f} .. {high:.2f}")
        print(f"| {name} | {side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
