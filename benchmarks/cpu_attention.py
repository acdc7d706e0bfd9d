"""Attention of whole sequences on a CPU, in blocks and over all pairs at once: `python -m benchmarks.cpu_attention`.

attention: forward and backward alone, dense and Spark, beside PyTorch's `scaled_dot_product_attention` where `--torch`
names a Python that has it (another environment's will do). step: train steps of the tiny presets, "xla" being the form
with the scores of all pairs. memory: what compiled programs take for the temporaries of one layer's attention.

Rounds are interleaved, PyTorch's in a process of its own that waits meanwhile. Processor time of both cores stands
beside wall time, which other processes on the machine disturb.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import interleaved_by, print_ratios
from benchmarks.train_step import dense_attention_of, random_batch, step_of
from benchmarks.workers import Worker
from sparsezoo_jax import platforms
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.spark import SparkFFNConfig
from sparsezoo_jax.pallas_kernels import flash_attention, spark_attention
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility

FORMS = ("xla", "blocked", "native")


class Heads(NamedTuple):
    """Heads of queries, of keys, and their width."""

    queries: int
    keys: int
    width: int


def peer(python: str | None, batch: int, length: int, heads: Heads) -> contextlib.AbstractContextManager[Worker | None]:
    """PyTorch's attention of these shapes; None without a Python that has it."""
    if python is None:
        return contextlib.nullcontext()
    return Worker(python, "sdpa_worker.py", f"{batch} {length} {' '.join(map(str, heads))}")


def both_passes(kind: str, form: str, window: int | None) -> Any:
    """The function of q, k, v, the gradient of y and segments that gives y and gradients."""

    def run(q, k, v, dy, segments):
        visible = Visibility.of_tokens(segments, window)

        def attend(q, k, v):
            if kind == "dense":
                return flash_attention(q, k, v, visible, implementation=form)
            # As in the presets of Spark: half of the width predicts, about an eighth of the keys is attended.
            sizes = {"r": q.shape[-1] // 2, "top_k": q.shape[1] // 8}
            return spark_attention(q, k, v, visible, implementation=form, **sizes)[0]

        y, pull = jax.vjp(attend, q, k, v)
        return y, pull(dy)

    return jax.jit(run)


def arrays_of(batch: int, length: int, heads: Heads) -> list[jax.Array]:
    """Random q, k, v and gradient of y, and the segments of whole sequences."""
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads.queries, heads.keys, heads.keys, heads.queries)
    shapes = [(batch, length, count, heads.width) for count in counts]
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return [*drawn, jnp.ones((batch, length), jnp.int32)]


def print_times(
    variants: dict[str, Callable[[], Any]], rounds: int, baseline: str, other: Worker | None = None
) -> None:
    """One table by wall time and one by processor time."""

    def processor() -> float:
        return time.process_time() + (0 if other is None else other.cpu)

    for clock, times in zip(
        ("wall", "processor"), interleaved_by(variants, rounds, (time.perf_counter, processor)), strict=True
    ):
        print(f"\n{clock} time\n")
        print_ratios(times, baseline)


def attention_alone(options: argparse.Namespace) -> None:
    """Print the tables of one shape."""
    heads = Heads(*options.heads)
    print(f"\nattention, {options.batch_size} x {options.seq_len}, heads {heads}, window {options.window}")
    arrays = arrays_of(options.batch_size, options.seq_len, heads)
    variants: dict[str, Callable[[], Any]] = {
        f"{kind}, {form}": partial(both_passes(kind, form, options.window), *arrays)
        for kind in ("dense", "spark")
        for form in options.forms
    }
    with peer(options.torch, options.batch_size, options.seq_len, heads) as torch:
        if torch is not None:
            variants["PyTorch SDPA"] = torch
        print_times(variants, options.rounds, f"dense, {options.forms[-1]}", torch)


def train_steps(options: argparse.Namespace) -> None:
    """Print the tables of the tiny Spark preset and its dense twin."""
    shape = options.batch_size, options.seq_len
    spark = preset("spark", "tiny").model
    assert isinstance(spark.ffn, SparkFFNConfig)
    longest = max(spark.max_seq_len, options.seq_len)
    spark = dataclasses.replace(spark, remat="none", max_seq_len=longest)
    ffn = GatedFFNConfig(d_ff=spark.ffn.d_ff * 2 // 3)
    dense = dataclasses.replace(spark, attention=dense_attention_of(spark), ffn=ffn)
    batch = random_batch(spark, *shape)

    def in_form(config: DecoderConfig, form: str) -> DecoderConfig:
        return dataclasses.replace(config, attention=dataclasses.replace(config.attention, implementation=form))

    print(f"\ntrain step, {shape[0]} x {shape[1]}, {spark.layers} layers")
    variants = {
        f"{name}, {form}": step_of(in_form(config, form), batch)
        for name, config in (("dense", dense), ("spark", spark))
        for form in options.forms
    }
    print_times(variants, options.rounds, f"dense, {options.forms[-1]}")


def memory(options: argparse.Namespace) -> None:
    """Print temporaries by length."""
    heads = Heads(*options.heads)
    print(f"\nMiB of temporaries, forward and backward, heads {heads}\n\n| | {options.seq_len} | 4 times as long |")
    print("|---|---|---|")
    for kind in ("dense", "spark"):
        for form in options.forms:
            found = []
            for length in (options.seq_len, 4 * options.seq_len):
                shapes = jax.eval_shape(partial(arrays_of, 1, length, heads))
                analysis = both_passes(kind, form, options.window).lower(*shapes).compile().memory_analysis()
                found.append(analysis.temp_size_in_bytes / 2**20)
            print(f"| {kind}, {form} | {' | '.join(f'{size:.0f}' for size in found)} |", flush=True)


PARTS = {"attention": attention_alone, "step": train_steps, "memory": memory}


def main() -> None:
    """Measure the parts that are asked for."""
    platforms.keep_freed_memory()  # as training does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--heads", type=int, nargs=3, default=(4, 2, 32), help="of queries, of keys, their width")
    parser.add_argument("--window", type=int)
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=FORMS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--torch", help="a Python with torch")
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
