"""Train steps of every architecture: tokens a second, model FLOPs utilisation, memory, and a loss that falls."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.device import dense_attention
from benchmarks.device.dense_attention import AS_TRAINED
from benchmarks.device.machine import Peaks, memory_stats
from benchmarks.device.rows import ABSENT, FAILED, OK, WRONG, Job, Row, first_line
from benchmarks.train_step import compiled_step
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.accounting import count_parameters, train_flops_per_token
from sparsezoo_jax.training.config import Cosine, TrainConfig

STAGE = "training"
STEPS = 50


class Sizes(NamedTuple):
    """What is trained: presets, tokens of a batch, steps."""

    presets: tuple[tuple[str, str], ...]
    batch: int
    length: int
    steps: int = STEPS


FULL = Sizes(
    (
        ("dense", "0_1b"),
        ("spark", "small"),
        ("blockffn", "small"),
        ("moe", "small"),
        ("moex", "chess"),
        ("mohd", "355m_c50"),
    ),
    batch=16,
    length=1024,
)
TINY = Sizes((("dense", "tiny"), ("spark", "tiny")), batch=2, length=32, steps=12)


def jobs(sizes: Sizes, platform: str, peaks: Peaks, tiny: bool) -> list[Job]:
    """The dense decoder in every form of attention, then the sparse ones."""
    found = []
    for arch, size in sizes.presets:
        config = preset(arch, size).model
        if tiny:
            config = dataclasses.replace(config, layers=2, vocab_size=256)
        forms = dense_attention.forms(platform, tiny) if arch == "dense" else (AS_TRAINED,)
        found.append(Job(f"{arch} {size}", lambda a=arch, s=size, c=config, f=forms: _job(a, s, c, f, sizes, peaks)))
    return found


# One architecture ---------------------------------------------------------------------------------------------------


def batches(config: DecoderConfig, batch: int, length: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches that can be learned: 64 words, of which each is followed by one of three."""
    draw = np.random.default_rng(0)
    words = draw.choice(config.vocab_size, min(64, config.vocab_size), replace=False).astype(np.int32)
    following = draw.integers(0, words.size, (words.size, 3))
    for _ in range(count):
        row = np.zeros((batch, length + 1), np.int64)
        row[:, 0] = draw.integers(0, words.size, batch)
        for t in range(length):
            row[:, t + 1] = following[row[:, t], draw.integers(0, 3, batch)]
        tokens = words[row]
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.ones((batch, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)),
            "mask": np.ones((batch, length), bool),
        }


def _job(
    arch: str, size: str, config: DecoderConfig, forms: Sequence[str], sizes: Sizes, peaks: Peaks
) -> Callable[[], Iterator[Row]]:
    data = [jax.device_put(b) for b in batches(config, sizes.batch, sizes.length, 8)]
    train = TrainConfig(
        steps=sizes.steps,
        schedule=Cosine(learning_rate=1e-3, warmup_steps=5),
        objectives=preset(arch, size).train.objectives,
    )
    steps, failed = {}, {}
    for form in forms:
        try:
            with dense_attention.using(form):
                steps[form] = compiled_step(config, data[0], train)
        except Exception as error:
            failed[form] = error
    name = f"{arch} {size}"
    tokens = sizes.batch * sizes.length

    def run() -> Iterator[Row]:
        memory = {form: compiled.memory_analysis() for form, (compiled, _) in steps.items()}
        times, losses = _trained(steps, data, sizes.steps)
        for form in forms:
            row = f"{name}, {form}"
            if form in failed:
                status = ABSENT if form == dense_attention.CUDNN else FAILED
                yield Row(STAGE, row, status, note=first_line(failed[form]), job=name)
                continue
            seconds = statistics.median(times[form][min(5, sizes.steps // 2) :])
            loss = losses[form]
            found: dict[str, Any] = {
                "parameters M": count_parameters(config).total / 1e6,
                "ms": 1e3 * seconds,
                "tokens/s": tokens / seconds,
                **_utilisation(config, sizes.length, tokens / seconds, peaks),
                "program GB": _program_bytes(memory[form]) / 1e9,
            }
            if "peak_bytes_in_use" in (stats := memory_stats(jax.local_devices()[0])):
                found["peak of the process GB"] = stats["peak_bytes_in_use"] / 1e9
            found |= {"first loss": loss[0], "last loss": loss[-1]}
            found["losses"] = " ".join(f"{x:.2f}" for x in loss[:: max(1, len(loss) // 10)])
            fell = np.isfinite(loss).all() and np.mean(loss[-3:]) < 0.9 * np.mean(loss[:3])
            yield Row(STAGE, row, OK if fell else WRONG, found, "" if fell else "the loss does not fall", job=name)

    return run


def _trained(
    steps: dict[str, tuple[Any, Any]], data: list[Any], count: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and loss of every step; the forms take turns, so that a disturbance hits all alike."""
    states = {form: state for form, (_, state) in steps.items()}
    times: dict[str, list[float]] = {form: [] for form in steps}
    losses: dict[str, list[float]] = {form: [] for form in steps}
    for i in range(count):
        for form, (compiled, _) in steps.items():
            started = time.perf_counter()
            states[form], metrics = compiled(states[form], data[i % len(data)])
            jax.block_until_ready(states[form])
            times[form].append(time.perf_counter() - started)
            losses[form].append(float(metrics["loss"]))
    steps.clear()
    return times, losses


def _utilisation(config: DecoderConfig, length: int, rate: float, peaks: Peaks) -> dict[str, float]:
    """Share of the peak FLOP/s: counted as the decoder of equal parameters without sparsity, and by what a token needs.

    A train step is three forward passes; what remat computes again does not count.
    """
    if peaks.flops is None:
        return {}
    counted = train_flops_per_token(config, length)
    return {"MFU dense": counted.dense * rate / peaks.flops, "MFU sparse": counted.sparse * rate / peaks.flops}


def _program_bytes(memory: Any) -> int:
    """Arguments, results that do not take their place, and temporaries."""
    if memory is None:
        return 0
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
