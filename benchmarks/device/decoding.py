"""Decoding with whole models of random weights: tokens a second, and the share of the memory's bandwidth."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.decode import PRESETS, configs, keep_largest
from benchmarks.device import dense_attention
from benchmarks.device.case import Draw
from benchmarks.device.machine import Peaks
from benchmarks.device.rows import ABSENT, FAILED, OK, Job, Row, first_line
from benchmarks.timing import interleaved
from sparsezoo_jax.configs import preset
from sparsezoo_jax.inference import Formats, Sampling, packed
from sparsezoo_jax.inference.cost import bytes_read
from sparsezoo_jax.inference.generation import next_token
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.cache import DecoderCache
from sparsezoo_jax.pallas_kernels import without_kernels

STAGE = "decoding"


class Sizes(NamedTuple):
    """What is decoded."""

    groups: tuple[tuple[int, int], ...]
    """Batch and context of each group of variants, the most valuable first."""
    turn: int
    """Tokens at a time."""
    rounds: int
    presets: dict[str, tuple[str, str]]


FULL = Sizes(((1, 8192), (1, 128), (8, 8192), (8, 128)), turn=16, rounds=8, presets=PRESETS)
TINY = Sizes(((1, 24),), turn=2, rounds=2, presets={"spark": ("spark", "tiny"), "blockffn": ("blockffn", "tiny")})


class Variant(NamedTuple):
    """A model in a form; the models are made once, whatever the number of groups."""

    model: Callable[[], Decoder]
    form: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def jobs(sizes: Sizes, platform: str, peaks: Peaks, tiny: bool) -> list[Job]:
    """One for each group."""
    variants = variants_of(sizes, platform, tiny)

    def job(batch: int, context: int) -> Job:
        name = f"batch {batch}, context {context}"
        return Job(name, lambda: _job(name, variants, batch, context, sizes, peaks))

    return [job(batch, context) for batch, context in sizes.groups]


def variants_of(sizes: Sizes, platform: str, tiny: bool) -> dict[str, Variant]:
    """By name."""

    def config_of(model: str) -> tuple[DecoderConfig, DecoderConfig]:
        layers, vocab = (2, 128) if tiny else (None, None)
        return configs(preset(*sizes.presets[model]).model, vocab, layers, "bfloat16")

    spark, dense = config_of("spark")
    block = config_of("blockffn")[0]
    without_cap = dataclasses.replace(dense, attention=dataclasses.replace(dense.attention, softcap=None))
    as_trained = _once(lambda: random_model(dense))
    spark_packed = _once(lambda: packed(random_model(spark), Formats()))
    found = {
        "dense, as trained": Variant(as_trained),
        "spark, kernels": Variant(spark_packed),
        "blockffn, kernels": Variant(_once(lambda: _block_ffn(block))),
        "dense, packed": Variant(_once(lambda: packed(as_trained(), Formats()))),
        "spark, xla": Variant(spark_packed, without_kernels),
    }
    if platform == "gpu" and not tiny:
        uncapped = _once(lambda: random_model(without_cap))
        found["dense without soft cap, cuDNN"] = Variant(
            uncapped, partial(dense_attention.using, dense_attention.CUDNN)
        )
    return found


def _once(make: Callable[[], Decoder]) -> Callable[[], Decoder]:
    """The same model for all who ask, whichever thread they are in."""
    lock, made = threading.Lock(), []

    def get() -> Decoder:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


def _block_ffn(config: DecoderConfig) -> Decoder:
    model = packed(random_model(config), Formats())
    keep_largest(model)
    return model


def random_model(config: DecoderConfig) -> Decoder:
    """A decoder of unstacked layers whose weights are drawn on the device."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).unstacked()))
    draw = Draw()
    scale = 0 if config.norm.zero_centered else 1  # of norms

    def weight(variable: Any) -> Any:
        value = variable.get_value()
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return variable.replace(jax.random.key(0))
        if value.ndim > 1:
            return variable.replace(draw(*value.shape, dtype=value.dtype, scale=0.02))
        return variable.replace(jnp.full(value.shape, scale, value.dtype))

    flat = [(path, weight(variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def random_cache(model: Decoder, batch: int, context: int) -> DecoderCache:
    """The cache of a context whose keys and values are drawn."""
    draw, slots = Draw(1), jnp.arange(context + 64)
    empty = model.init_cache(batch, context + 64)
    layers = jax.tree.map(lambda x: draw(*x.shape, dtype=x.dtype), empty.layers)
    positions = jnp.broadcast_to(jnp.where(slots < context, slots, -1), (batch, context + 64)).astype(jnp.int32)
    return DecoderCache(layers, positions, jnp.int32(context))


def _job(
    name: str, variants: dict[str, Variant], batch: int, context: int, sizes: Sizes, peaks: Peaks
) -> Callable[[], Iterator[Row]]:
    models = {}
    with ThreadPoolExecutor(max_workers=len(variants)) as pool:
        turns = {}
        for form, variant in variants.items():
            models[form] = variant.model()
            turns[form] = pool.submit(_turn, models[form], variant.form, batch, context, sizes.turn)

    def run() -> Iterator[Row]:
        ready, failed, needed = {}, {}, {}
        for form, future in turns.items():
            try:
                ready[form] = future.result()
                needed[form] = bytes_read(models[form], context, ready[form]())
            except Exception as error:
                failed[form] = error
        times = interleaved(ready, sizes.rounds)
        medians = {form: statistics.median(values) / sizes.turn for form, values in times.items()}
        for form in variants:
            row = f"{form}, {name}"
            if form in failed:
                status = ABSENT if "cuDNN" in form else FAILED
                yield Row(STAGE, row, status, note=first_line(failed[form]), job=name)
                continue
            found = {"ms a token": 1e3 * medians[form], "tokens/s": batch / medians[form]}
            if batch == 1:
                # Of several, each reads what it needs, and what all need is read once: no such bytes are counted.
                found |= {"MB a token": needed[form] / 1e6, "GB/s": needed[form] / medians[form] / 1e9}
                if peaks.bandwidth is not None:
                    found["of bandwidth"] = needed[form] / medians[form] / peaks.bandwidth
            if "dense, as trained" in medians:
                found["x dense as trained"] = medians["dense, as trained"] / medians[form]
            yield Row(STAGE, row, OK, found, job=name)

    return run


def _turn(model: Decoder, form: Callable[[], Any], batch: int, context: int, tokens: int) -> Callable[[], Any]:
    """A function that decodes some tokens after the context, from the same place every time; returns statistics."""
    graphdef, state = nnx.split(model)
    token, one, key = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch, 1), jnp.int32), jax.random.key(0)
    cache = random_cache(model, batch, context)
    with form():
        step = jax.jit(partial(next_token, Sampling(temperature=0), graphdef), donate_argnums=1)
        step = step.lower(state, cache, token, one, jnp.int32(0), key).compile()
    again = jax.jit(lambda cache: cache.truncated(jnp.int32(context)), donate_argnums=0).lower(cache).compile()
    held = {"cache": cache}

    def turn() -> Any:
        cache, following, made = again(held["cache"]), token, None
        for _ in range(tokens):
            made = step(state, cache, following, one, jnp.int32(0), key)
            cache, following = made.cache, made.tokens[:, None]
        held["cache"] = cache
        assert made is not None
        return made.stats

    return turn
