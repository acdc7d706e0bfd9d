"""Time of decoding with whole models, dense and sparse of equal parameters: `python -m benchmarks.decode`.

Weights are random, drawn from one pool of numbers into buffers of their own; so are the keys and values of the context.
Nothing is said about quality. `--model spark` is the 2B shape, `blockffn` the 2.8B one, `deco` the 0.1B one, `moe` the
1.2B one with latent attention, `moex` the 1.8B one, `prosparse` the 1B one; `--size` takes another. The routers of
BlockFFN and DECO keep the share of the largest scores that their configuration expects, and ProSparse's threshold keeps
the paper's share of the gates, for random ones have no sparsity.

Variants take turns, a few tokens each, in every round; figures
are medians over the rounds. Ratios are against the native dense model of the same precision, and their limit is the
ratio of the bytes that both have to read. `read` is the bandwidth that a variant's bytes make of its time; `stream`
that of reading one large array.

`--run DIR` takes a trained model and the beginning of its validation text as context; the dense twin stays random.

`--figure FILE.svg` draws milliseconds a token, native, by number format and context.

`--forms xla` adds plain JAX, the models packed and as trained; `--torch` the same dense shapes in PyTorch, if there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.bars import Group, bar_figure
from benchmarks.decode_layers import Draw
from benchmarks.run_text import validation_text
from sparsezoo_jax import native
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.inference import Formats, Sampling, packed
from sparsezoo_jax.inference.cost import bytes_read
from sparsezoo_jax.inference.ffn import PackedReGLUFFN
from sparsezoo_jax.inference.generation import next_token
from sparsezoo_jax.models import Decoder, DecoderConfig, bytes_per_token, dense_twin
from sparsezoo_jax.models.blockffn import BlockFFN
from sparsezoo_jax.models.cache import DecoderCache
from sparsezoo_jax.models.deco import DECOFFN
from sparsezoo_jax.models.ffn import GatedFFN, GatedFFNConfig

#: Tokens that a variant decodes in its turn of a round.
TURN = 4
#: Share of ReLU gates that are kept: of ProSparse's 1B model (arXiv 2402.13516, table 1: 87.89 % zeros).
RELU_ACTIVE = 0.1211
PRESETS = {
    "prosparse": ("prosparse", "1b"),
    "spark": ("spark", "2b"),
    "blockffn": ("blockffn", "2_8b"),
    "deco": ("deco", "0_1b"),
    "moe": ("moe", "xlarge"),
    "moex": ("moex", "medium"),
}
FORMATS = {
    "float32": ("float32", Formats()),
    "bfloat16": ("bfloat16", Formats()),
    "int8": ("bfloat16", Formats("int8")),
    "int8-head": ("bfloat16", Formats("model", head="int8")),
    "int8-predictor": ("bfloat16", Formats("model", predictor="int8")),
}


class Variant(NamedTuple):
    """A model with a cache that holds the context, ready to decode one turn."""

    turn: Callable[[], None]
    bytes: float
    """That one token has to read."""
    stats: dict[str, Any] = {}
    """Statistics of the model in its first turn."""


def configs(
    model: DecoderConfig, vocab: int | None, layers: int | None, dtype: str
) -> tuple[DecoderConfig, DecoderConfig]:
    """The sparse decoder like `model` and its dense twin."""
    changed = {"dtype": dtype, "param_dtype": dtype, "max_seq_len": 65_536}
    changed |= {} if vocab is None else {"vocab_size": vocab}
    changed |= {} if layers is None else {"layers": layers}
    sparse = dataclasses.replace(model, **changed)
    dense = dense_twin(sparse)
    if dense is None:
        raise UserError(f"model.ffn.kind={model.ffn.kind}: has no dense twin to compare with")
    if isinstance(dense.ffn, GatedFFNConfig) and dense.ffn.activation == "relu":
        # Half of a ReLU's units are 0, which is not dense.
        dense = dataclasses.replace(dense, ffn=dataclasses.replace(dense.ffn, activation="silu"))
    return sparse, dense


def drawn(config: DecoderConfig) -> Decoder:
    """A decoder of unstacked layers with random weights."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).unstacked()))
    draw = Draw(config.param_dtype, huge_pages=False)
    scale = 0 if config.norm.zero_centered else 1  # of norms

    def weight(variable: Any) -> Any:
        value = variable.get_value()
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return variable.replace(jax.random.key(0))
        scaled = 0.02 * draw(*value.shape) if value.ndim > 1 else jnp.full(value.shape, scale)
        return variable.replace(scaled.astype(value.dtype))

    flat = [(path, weight(variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def router_logits(ffn: BlockFFN | DECOFFN) -> Callable[[jax.Array], jax.Array]:
    """The map from tokens to the logits of a layer's router, in float32."""
    if isinstance(ffn, DECOFFN):
        return ffn.logits
    return lambda x_BTD: x_BTD.astype(jnp.float32) @ ffn.router_DE[...].astype(jnp.float32)


def keep_largest(model: Decoder) -> None:
    """Let routers of BlockFFN and DECO, and ReLU gates, keep the share that is expected, whatever the weights are."""
    for period in model.segments:
        for block in period.blocks:
            ffn: Any = block.ffn
            if isinstance(ffn, GatedFFN) and ffn.config.activation == "relu":
                # Of a normalised token, gates are normal.
                gate = ffn.gate.restored() if isinstance(ffn, PackedReGLUFFN) else ffn.gate_DF[...]
                spread = float(jnp.std(gate, dtype=jnp.float32)) * math.sqrt(gate.size / ffn.config.d_ff)
                threshold = spread * statistics.NormalDist().inv_cdf(1 - RELU_ACTIVE)
                object.__setattr__(ffn, "config", dataclasses.replace(ffn.config, threshold=threshold))
                continue
            if not isinstance(ffn, BlockFFN | DECOFFN):
                continue
            kept, logits = round(ffn.config.expected_density * ffn.config.experts), router_logits(ffn)

            def largest(x_BTD: jax.Array, ffn: Any = ffn, logits=logits, kept=kept) -> tuple[jax.Array, ...]:
                logits_BTE = logits(x_BTD)
                # Counted, not sorted: a sort takes longer than the router's product.
                larger = jnp.sum(logits_BTE[..., None, :] > logits_BTE[..., None], axis=-1, dtype=jnp.float32)
                scores = jnp.where(larger < kept, 1 + jnp.abs(logits_BTE), 0)
                return (scores, scores) if isinstance(ffn, DECOFFN) else (logits_BTE, scores, scores)

            object.__setattr__(ffn, "route", largest)


@contextmanager
def form(name: str) -> Iterator[None]:
    """Trace within this to have operations native or in plain JAX."""
    if name == "native":
        yield
    else:
        with (
            mock.patch.object(native, "why_missing", return_value="switched off"),
            mock.patch.object(native, "warn_missing"),
        ):
            yield


def random_cache(model: Decoder, context: int) -> DecoderCache:
    """The cache of a context whose keys and values are drawn."""
    fill = Draw(model.config.dtype, huge_pages=False)
    empty = model.init_cache(1, context + 64)
    layers = jax.tree.map(lambda x: fill(*x.shape).astype(x.dtype), empty.layers)
    positions = jnp.where(jnp.arange(context + 64) < context, jnp.arange(context + 64), -1)[None].astype(jnp.int32)
    return DecoderCache(layers, positions, jnp.int32(context))


class Trained(NamedTuple):
    """A trained model in its run's types, and text that it reads."""

    model: Decoder
    text: np.ndarray

    def context(self, packed_model: Decoder, length: int) -> tuple[DecoderCache, jax.Array]:
        """The cache after `length` tokens of the text, and the token that follows [1, 1]."""
        if length >= self.text.size:
            raise UserError(f"--contexts {length}: the text has {self.text.size} tokens, one of them to go on with")
        cache = packed_model.init_cache(1, length + 64)
        tokens, ones = jnp.asarray(self.text[None, :length]), jnp.ones((1, length), jnp.int32)
        filled = jax.jit(lambda cache: packed_model(tokens, segment_ids=ones, cache=cache, logits=False).cache)(cache)
        return filled, jnp.asarray(self.text[None, length : length + 1])


def in_types_of(model: Decoder, config: DecoderConfig) -> Decoder:
    """The trained weights in a decoder of `config`, whose types may be others."""
    graphdef, like = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).unstacked()))
    cast = jax.tree.map(
        lambda x, to: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.astype(to.dtype),
        nnx.state(model.unstacked()),
        like,
    )
    return nnx.merge(graphdef, cast)


def variant(
    config: DecoderConfig,
    formats: Formats | None,
    context: int,
    how: str,
    trained: Trained | None = None,
    model: Decoder | None = None,
) -> Variant:
    """`config` with weights in `formats` (None: as trained) after `context` tokens; random ones, or those of `model`,
    or `trained`.
    """
    if model is None:
        model = drawn(config) if trained is None else in_types_of(trained.model, config)
    if formats is not None:
        model = packed(model, formats)
    if trained is None:
        keep_largest(model)
    graphdef, state = nnx.split(model)
    token, one, key = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), jax.random.key(0)
    if trained is None:
        cache = random_cache(model, context)
    else:
        cache, token = trained.context(model, context)

    def restart(cache):
        # Every turn begins where the first did: the context stays the same.
        return cache.truncated(jnp.int32(context))

    with form(how):
        step = jax.jit(partial(next_token, Sampling(temperature=0), graphdef), donate_argnums=1)
        step = step.lower(state, cache, token, one, jnp.int32(0), key).compile()
    again = jax.jit(restart, donate_argnums=0).lower(cache).compile()
    held = {"cache": cache, "stats": {}}

    def turn() -> None:
        cache, following = again(held["cache"]), token
        for _ in range(TURN):
            made = step(state, cache, following, one, jnp.int32(0), key)
            cache, following = made.cache, made.tokens[:, None]
        held["cache"], held["stats"] = jax.block_until_ready((cache, made.stats))

    turn()
    return Variant(turn, bytes_read(model, context, held["stats"]), held["stats"])


def torch_dense(config: DecoderConfig, context: int) -> Variant:
    """The dense decoder's matrix products and attention in PyTorch, bfloat16; norms and rotation left out."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]

    a: Any = config.attention
    shapes = {
        "qkv": ((a.heads + 2 * a.kv_heads) * a.head_dim, config.d_model),
        "out": (config.d_model, a.heads * a.head_dim),
        "gate": (config.ffn.d_ff, config.d_model),
        "up": (config.ffn.d_ff, config.d_model),
        "down": (config.d_model, config.ffn.d_ff),
    }

    def weight(*shape: int) -> Any:
        return 0.02 * torch.randn(shape, dtype=torch.bfloat16)

    layers = [{name: weight(*shape) for name, shape in shapes.items()} for _ in range(config.layers)]
    head = weight(config.vocab_size, config.d_model)
    caches = [[torch.randn(1, a.kv_heads, context, a.head_dim, dtype=torch.bfloat16) for _ in "kv"] for _ in layers]
    gelu = partial(F.gelu, approximate="tanh") if getattr(config.ffn, "activation", "") == "gelu_tanh" else F.silu

    def turn() -> None:
        with torch.inference_mode():
            for _ in range(TURN):
                x = torch.ones(1, config.d_model, dtype=torch.bfloat16)
                for layer, (k, v) in zip(layers, caches, strict=True):
                    q = F.linear(x, layer["qkv"])[:, : a.heads * a.head_dim].reshape(1, a.heads, 1, a.head_dim)
                    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                    x = F.linear(mixed.reshape(1, -1), layer["out"])
                    x = F.linear(gelu(F.linear(x, layer["gate"])) * F.linear(x, layer["up"]), layer["down"])
                F.linear(x, head).argmax()

    turn()
    return Variant(turn, bytes_per_token(config, context, logits=True))


def stream_rate(rounds: int = 5) -> float:
    """GB/s of reading one large array with the library's threads."""
    array = jnp.ones(1 << 28, jnp.float32)
    read = jax.jit(lambda x: native.call("stream", [jax.ShapeDtypeStruct((1,), jnp.float32)], x))
    jax.block_until_ready(read(array))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(read(array))
        times.append(time.perf_counter() - started)
    return array.nbytes / statistics.median(times) / 1e9


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PRESETS), default="spark")
    parser.add_argument("--size", help="of the model; None: the one above")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--vocab", type=int, default=None, help="rows of the output projection; None: the preset's")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the preset has")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bfloat16"])
    parser.add_argument("--forms", nargs="+", choices=["native", "xla"], default=["native"])
    parser.add_argument("--run", type=Path, help="run directory to take the sparse model and the context from")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--figure", type=Path, help="SVG file to draw")
    options = parser.parse_args()
    trained = None
    if options.run is not None:
        if any(value is not None for value in (options.size, options.vocab, options.layers)):
            parser.error("--run: has its own layers and vocabulary, which --size, --layers and --vocab can't change")
        model, tokens, segments = validation_text(options.run, 64)
        # One long text: documents are packed into rows one after the other.
        trained = Trained(model, tokens[segments > 0])
        options.model = options.run.name
    cases = [(context, formats) for context in options.contexts for formats in options.formats]
    groups = []
    for context, formats in cases:
        groups.append(print_table(options, context, formats, trained))
        if options.figure is not None:
            options.figure.write_text(bar_figure(f"Decoding, {options.model}", options.model, groups))


def print_table(options: argparse.Namespace, context: int, formats: str, trained: Trained | None) -> Group:
    """Measure all variants of one context and number format, taking turns; what the figure shows of them."""
    dtype, form_of = FORMATS[formats]
    arch, size = PRESETS.get(options.model, (options.model, ""))
    like = trained.model.config if trained is not None else preset(arch, options.size or size).model
    sparse, dense = configs(like, options.vocab, options.layers, dtype)
    variants: dict[str, Variant] = {}
    for how in options.forms:
        plain = form_of if formats != "int8-predictor" else Formats()
        variants[f"dense, {how}"] = variant(dense, plain, context, how)
        variants[f"{options.model}, {how}"] = variant(sparse, form_of, context, how, trained)
        if how == "xla" and formats in DTYPES_AS_TRAINED:
            variants["dense, as trained, xla"] = variant(dense, None, context, how)
    if options.torch and formats == "bfloat16":
        variants["dense, PyTorch"] = torch_dense(dense, context)
    times: dict[str, list[float]] = {name: [] for name in variants}
    streams = []
    for _ in range(options.rounds):
        streams.append(stream_rate(1))
        for name, made in variants.items():
            started = time.perf_counter()
            made.turn()
            times[name].append((time.perf_counter() - started) / TURN)
    baseline = next(iter(variants))
    print(
        f"\n{options.model}, {formats}, {sparse.vocab_size:,} tokens, {sparse.layers} layers, context {context:,}; "
        f"stream {statistics.median(streams):.1f} GB/s\n"
    )
    print("| variant | MB a token | ms a token | tokens/s | read GB/s | ratio | quartiles | limit by bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for name, made in variants.items():
        median = statistics.median(times[name])
        ratios = [base / own for base, own in zip(times[baseline], times[name], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rate = made.bytes / median / 1e9
        print(
            f"| {name} | {made.bytes / 1e6:,.0f} | {1e3 * median:.1f} | {1 / median:.1f} | {rate:.1f} "
            f"| {statistics.median(times[baseline]) / median:.2f} | {low:.2f} .. {high:.2f} "
            f"| {variants[baseline].bytes / made.bytes:.2f} |",
            flush=True,
        )
    dense_ms, sparse_ms = (1e3 * statistics.median(times[name]) for name in list(variants)[:2])
    limit = dense_ms * variants[list(variants)[1]].bytes / variants[baseline].bytes
    return Group(f"{formats}, {context:,}", dense_ms, sparse_ms, limit)


DTYPES_AS_TRAINED = ("float32", "bfloat16")


if __name__ == "__main__":
    main()
