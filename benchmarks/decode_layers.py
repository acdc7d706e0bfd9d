"""Time of decoding through one layer, dense and sparse, native and plain JAX: `python -m benchmarks.decode_layers`.

Random weights. Each variant runs through enough layers that no cache holds what it reads, all variants in interleaved
rounds; medians. Ratios are against the native dense layer of the same precision and equal parameters, and their limit
is the ratio of the bytes that both have to read. `stream` reads one large array and does nothing with it, before and
after each round: rounds in which it was slow, for another process ran, are left out.

`chunk --run DIR` takes the experts that tokens choose from a trained run on its validation text instead of at random.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run_text import chunk_sparsity, expert_choices, validation_text
from benchmarks.timing import interleaved
from sparsezoo_jax import native
from sparsezoo_jax.models.topk import top_k_mask
from sparsezoo_jax.pallas_kernels import (
    active_rows,
    attention_rows,
    block_ffn_rows,
    gated_ffn_rows,
    linear,
    spark_attention_rows,
    spark_ffn_rows,
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}
FORMS = ("native", "xla")
Layer = tuple[Any, ...]


class Variant(NamedTuple):
    """A way through `layers` layers, and the bytes of weights or cache that one of them has to read."""

    run: Callable[[], object]
    layers: int
    layer_bytes: float


class Draw:
    """Random arrays, cut out of one pool of normal numbers: drawing them all would take minutes."""

    def __init__(self, dtype: str, huge_pages: bool):
        self.dtype, self.huge_pages = DTYPES[dtype], huge_pages
        self.rng = np.random.default_rng(0)
        self.pool = self.rng.standard_normal(1 << 25, np.float32)

    def __call__(self, *shape: int, dtype: Any = None) -> jax.Array:
        start = int(self.rng.integers(self.pool.size // 2))
        values = np.resize(self.pool[start:], shape)
        dtype = self.dtype if dtype is None else dtype
        drawn = jnp.asarray(values * 40 if dtype == jnp.int8 else values).astype(dtype)
        if self.huge_pages:
            native.advise_huge_pages(drawn)
        return drawn

    def scale(self, *shape: int) -> jax.Array | None:
        return jnp.full(shape, 1 / 40, jnp.float32) if self.dtype == jnp.int8 else None

    @property
    def tokens(self) -> Any:
        return jnp.bfloat16 if self.dtype == jnp.bfloat16 else jnp.float32

    @property
    def bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize


def through(layer: Callable[..., Any], layers: Sequence[Layer], inputs: Sequence[Layer]) -> Callable[[], object]:
    """Run all layers, each on a state that depends on the one before; every call takes the next of `inputs`."""

    @jax.jit
    def run(x, extra, layers):
        counts = []
        for weights in layers:
            y, *count = layer(x, *extra, *weights)
            x = x + (1e-6 * y).astype(x.dtype)
            counts += count
        return x, counts

    turns = itertools.cycle(inputs)

    def call():
        x, *extra = next(turns)
        return run(x, extra, layers)

    return call


def spark_ffn(draw: Draw, d: int, dense: int, neurons: int, r: int, top_k: int, layers: int) -> dict[str, Variant]:
    """The Spark FFN against a gated layer of equal parameters."""
    x = draw(1, d, dtype=draw.tokens)
    gated = [(draw(dense, d), draw(dense, d), draw(dense, d)) for _ in range(layers)]
    spark = [(draw(neurons, r), draw(neurons, 2 * d - r)) for _ in range(layers)]
    gated_scales = (draw.scale(dense), draw.scale(dense), draw.scale(dense))
    spark_scales = (draw.scale(neurons), draw.scale(neurons, 2))
    found = {}
    for form in FORMS:
        run = partial(gated_ffn_rows, scales=gated_scales, implementation=form)
        dense_layer = lambda x, *w, run=run: (run(x, *w),)  # noqa: E731
        found[f"dense, {form}"] = Variant(through(dense_layer, gated, [(x,)]), layers, 3 * dense * d * draw.bytes)
        run = partial(spark_ffn_rows, top_k=top_k, scales=spark_scales, implementation=form)
        read = (neurons * r + top_k * (2 * d - r)) * draw.bytes
        found[f"spark, {form}"] = Variant(through(run, spark, [(x,)]), layers, read)
    return found


def plain_ffn(draw: Draw, d: int, neurons: int, top_k: int, layers: int) -> dict[str, Variant]:
    """A plain ReLU layer of which a token keeps the k largest units, against reading all of both matrices."""
    x, scales = draw(1, d, dtype=draw.tokens), (draw.scale(neurons), draw.scale(d))
    whole = [(draw(neurons, d), draw(d, neurons)) for _ in range(layers)]
    by_neuron = [(draw(neurons, d), draw(neurons, d)) for _ in range(layers)]
    found = {}
    for form in FORMS:

        def dense(x, up, down, form=form):
            hidden = jax.nn.relu(linear(x, up, scales[0], implementation=form))
            return (linear(hidden, down, scales[1], implementation=form),)

        def sparse(x, up, down, form=form):
            hidden = jax.nn.relu(linear(x, up, scales[0], implementation=form))
            hidden = jnp.where(top_k_mask(hidden, top_k), hidden, 0)
            return (active_rows(hidden, down, scales[0], implementation=form),)

        found[f"dense, {form}"] = Variant(through(dense, whole, [(x,)]), layers, 2 * neurons * d * draw.bytes)
        read = (neurons + top_k) * d * draw.bytes
        found[f"top-k, {form}"] = Variant(through(sparse, by_neuron, [(x,)]), layers, read)
    return found


def random_choices(rng: np.random.Generator, experts: int, density: float, tokens: int, pool: float) -> np.ndarray:
    """Experts of each token, of a share `pool` of all that changes from chunk to chunk: booleans [8, tokens, E]."""
    choices = np.zeros((8, tokens, experts), bool)
    for chunk in choices:
        candidates = rng.permutation(experts)[: max(1, round(pool * experts))]
        for row in chunk:
            row[rng.choice(candidates, round(density * experts), replace=False)] = True
    return choices


def block_ffn(
    draw: Draw, d: int, experts: int, width: int, density: float, tokens: int, pool: float, layers: int
) -> dict[str, Variant]:
    """BlockFFN against a gated layer of equal parameters; each token draws its experts from a share `pool` of all."""
    return chosen_experts(draw, d, width, random_choices(draw.rng, experts, density, tokens, pool), layers)


def chosen_experts(draw: Draw, d: int, width: int, choices: np.ndarray, layers: int) -> dict[str, Variant]:
    """BlockFFN against a gated layer of equal parameters, for the experts [chunks, tokens, E] that tokens take."""
    _, tokens, experts = choices.shape
    inputs = [(draw(tokens, d, dtype=draw.tokens), jnp.asarray(chosen, draw.tokens)) for chosen in choices]
    read = choices.any(axis=1).sum(axis=-1)
    print(f"\nCLS_{tokens} {chunk_sparsity(choices):.3f}, {choices.mean():.3f} of the experts active for a token")
    dense = 2 * experts * width // 3
    gated = [(draw(dense, d), draw(dense, d), draw(dense, d)) for _ in range(layers)]
    blocks = [(draw(experts, width, d), draw(experts, width, d)) for _ in range(layers)]
    gated_scales = (draw.scale(dense), draw.scale(dense), draw.scale(dense))
    block_scales = (draw.scale(experts, width), draw.scale(experts, width), None)
    found = {}
    for form in FORMS:
        run = partial(gated_ffn_rows, activation="silu", scales=gated_scales, implementation=form)
        dense_layer = lambda x, scores, *w, run=run: (run(x, *w),)  # noqa: E731
        found[f"dense, {form}"] = Variant(through(dense_layer, gated, inputs), layers, 3 * dense * d * draw.bytes)
        run = partial(block_ffn_rows, scales=block_scales, implementation=form)
        block_layer = lambda x, scores, *w, run=run: (run(x, scores, *w),)  # noqa: E731
        union = float(np.mean(read)) * 2 * width * d * draw.bytes
        found[f"experts, {form}"] = Variant(through(block_layer, blocks, inputs), layers, union)
    return found


def attention(draw: Draw, heads: int, kv_heads: int, width: int, r: int, keys: int, top_k: int, layers: int):
    """Spark attention against attention to all keys of the same cache."""
    shape = (1, kv_heads, keys)
    caches = [(draw(*shape, width), draw(*shape, width)) for _ in range(layers)]
    split = [(draw(*shape, r), draw(*shape, 2 * width - r)) for _ in range(layers)]
    mask = jnp.ones((1, keys), bool)
    q = draw(1, heads, width, dtype=draw.tokens)
    found = {}
    for form in FORMS:
        run = partial(attention_rows, implementation=form)
        dense_layer = lambda q, mask, k, v, run=run: (run(q, k, v, mask),)  # noqa: E731
        read = 2 * kv_heads * keys * width * draw.bytes
        found[f"dense, {form}"] = Variant(through(dense_layer, caches, [(q, mask)]), layers, read)
        run = partial(spark_attention_rows, top_k=top_k, implementation=form)
        spark_layer = lambda q, mask, k1, rest, run=run: run(q, k1, rest, mask)  # noqa: E731
        read = (kv_heads * keys * r + heads * top_k * (2 * width - r)) * draw.bytes
        found[f"spark, {form}"] = Variant(through(spark_layer, split, [(q, mask)]), layers, read)
    return found


def chunk_of_run(draw: Draw, choices: np.ndarray) -> dict[str, Variant]:
    """The layer of `chunk`, cut into as many experts as a run has, of which tokens take the run's choices."""
    chosen = draw.rng.choice(choices, 64, replace=False)
    return chosen_experts(draw, 1536, 48 * 64 // chosen.shape[-1], chosen, layers=24)


TABLES: dict[str, Callable[[Draw], dict[str, Variant]]] = {
    "spark": lambda draw: spark_ffn(draw, 2304, 9216, 13824, 1024, 1106, layers=4),
    "plain": lambda draw: plain_ffn(draw, 2048, 8192, 328, layers=6),
    "block10": lambda draw: block_ffn(draw, 1536, 48, 64, 0.1, 1, 1.0, layers=40),
    "block20": lambda draw: block_ffn(draw, 1536, 48, 64, 0.2, 1, 1.0, layers=40),
    "wide10": lambda draw: block_ffn(draw, 2048, 128, 128, 0.1, 1, 1.0, layers=6),
    "wide20": lambda draw: block_ffn(draw, 2048, 128, 128, 0.2, 1, 1.0, layers=6),
    "chunk": lambda draw: block_ffn(draw, 1536, 48, 64, 0.1, 8, 1.0, layers=24),
    "pooled": lambda draw: block_ffn(draw, 1536, 48, 64, 0.1, 8, 0.25, layers=24),
    "attention4k": lambda draw: attention(draw, 8, 4, 128, 32, 4096, 256, layers=40),
    "attention32k": lambda draw: attention(draw, 8, 4, 128, 32, 32768, 256, layers=8),
}
TITLES = {
    "spark": "Spark FFN, width 2304: 13,824 neurons, predictor of 1024, 8 % active; dense 9,216",
    "plain": "Plain ReLU layer, width 2048: 8,192 neurons, of which the largest 4 % are kept",
    "block10": "BlockFFN, width 1536: 48 experts of 64, 10 % active, one token",
    "block20": "BlockFFN, width 1536: 48 experts of 64, 20 % active, one token",
    "wide10": "BlockFFN, width 2048: 128 experts of 128, 10 % active, one token",
    "wide20": "BlockFFN, width 2048: 128 experts of 128, 20 % active, one token",
    "chunk": "BlockFFN, width 1536: 48 experts of 64, 8 tokens with 10 % each, independent",
    "pooled": "BlockFFN, width 1536: 48 experts of 64, 8 tokens with 10 % each, of the same quarter",
    "attention4k": "Attention, 8 heads of 128, 4 for keys and values, 4,096 keys: 256 selected by 32 dimensions",
    "attention32k": "Attention, 8 heads of 128, 4 for keys and values, 32,768 keys: 256 selected by 32 dimensions",
}


def table(name: str, draw: Draw, rounds: int, forms: Sequence[str]) -> None:
    """Time one table's variants and print it."""
    variants = {key: v for key, v in TABLES[name](draw).items() if key.rsplit(" ", 1)[1] in forms}
    data = draw(1 << 26, dtype=jnp.float32)
    read = jax.jit(lambda data: native.call("stream", [jax.ShapeDtypeStruct((1,), jnp.uint32)], data))
    stream = partial(read, data)
    times = interleaved({"stream": stream, **{key: v.run for key, v in variants.items()}, "after": stream}, rounds)
    best = min(times["stream"] + times["after"])
    quiet = [i for i, pair in enumerate(zip(times["stream"], times["after"], strict=True)) if max(pair) < 1.25 * best]
    medians = {key: statistics.median(values[i] for i in quiet or range(rounds)) for key, values in times.items()}
    bandwidth = data.nbytes / medians["stream"]
    precision = jnp.dtype(draw.dtype).name
    print(f"\n{TITLES[name]}; {precision}; stream {bandwidth / 1e9:.1f} GB/s, {len(quiet)} of {rounds} rounds quiet\n")
    print("| variant | ms | GB/s | of stream | x native dense | limit by bytes | x dense at stream |")
    print("|---|---|---|---|---|---|---|")
    base = variants["dense, native"]
    base_ms = 1e3 * medians["dense, native"] / base.layers
    for key, variant in variants.items():
        ms = 1e3 * medians[key] / variant.layers
        rate = variant.layer_bytes / ms / 1e6
        limit, ideal = base.layer_bytes / variant.layer_bytes, 1e3 * base.layer_bytes / bandwidth
        of_stream = rate * 1e9 / bandwidth
        print(
            f"| {key} | {ms:.3f} | {rate:.1f} | {of_stream:.2f} | {base_ms / ms:.2f} | {limit:.2f} | {ideal / ms:.2f} |"
        )


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], metavar="table", help=", ".join(TABLES))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=["bfloat16", "float32", "int8"])
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="implementations")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--run", type=Path, help="run directory whose choices of experts the table chunk takes")
    parser.add_argument("--huge-pages", action="store_true", help="ask for huge pages, for all variants alike")
    options = parser.parse_args()
    print(f"{jax.local_device_count()} device, native level {native.level()}, {options.rounds} rounds")
    if options.run is not None:
        choices = expert_choices(*validation_text(options.run, 16), chunk=8)
        TABLES["chunk"] = lambda draw: chunk_of_run(draw, choices)
        TITLES["chunk"] = f"BlockFFN, width 1536: {choices.shape[-1]} experts, 8 tokens as in {options.run.name}"
    for name in options.tables or TABLES:
        for dtype in options.dtypes:
            if name.startswith("attention") and dtype == "int8":
                continue  # caches are not quantised
            table(name, Draw(dtype, options.huge_pages), options.rounds, options.forms)


if __name__ == "__main__":
    main()
