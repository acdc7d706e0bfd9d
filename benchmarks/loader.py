"""Throughput of the data pipeline beside what a tiny model consumes: `python -m benchmarks.loader`.

Reads the embedded corpus (prepared on first use), prepared and streaming, and times spark tiny's train step in the same
process.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from typing import Any

from benchmarks.train_step import step_of
from sparsezoo_jax import data
from sparsezoo_jax.configs import preset


def tokens_per_second(batches, count: int) -> float:
    """Tokens a second over `count` batches after ten that warm up."""
    for _ in itertools.islice(batches, 10):
        pass
    started = time.perf_counter()
    tokens = sum(batch["tokens"].size for batch in itertools.islice(batches, count))
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=500)
    options = parser.parse_args()
    config = preset("spark")
    tokenizer = data.build_tokenizer(config.data, data.open_documents(config.data, "train"))
    prepared = data.prepare(config.data, "train", tokenizer)
    rates = {
        "prepared": tokens_per_second(
            data.prepared_batches(prepared, batch_size=config.data.batch_size, seed=0), options.batches
        ),
        "streaming": tokens_per_second(
            data.streaming_batches(dataclasses.replace(config.data, mode="streaming"), "train", tokenizer),
            options.batches // 2,
        ),
    }
    batch: dict[str, Any] = dict(next(data.prepared_batches(prepared, batch_size=config.data.batch_size, seed=0)))
    step = step_of(config.model, batch)
    float(step()["loss"])
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        float(step()["loss"])
        seconds.append(time.perf_counter() - started)
    model = batch["tokens"].size / statistics.median(seconds)
    print("| loader | tokens/s | times the model's |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / model:.0f} |")
    print(f"\nspark tiny train step: {model:,.0f} tokens/s")


if __name__ == "__main__":
    main()
