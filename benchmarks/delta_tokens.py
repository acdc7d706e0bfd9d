"""Delta activations over tokens, at tiny scale: `python -m benchmarks.delta_tokens`.

Trains delta tiny on the embedded corpus with a small vocabulary and short sequences, for some rates of the loss on what
changes from token to token, and prints validation loss, active units and what changes. Then the packed model decodes
validation text token by token: the share of rows that it reads, and how far its logits are from those of the whole
forward pass. Finished runs are kept in `--runs` and not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.run_text import validation_text
from benchmarks.training_runs import figures_of
from sparsezoo_jax.inference import packed
from sparsezoo_jax.inference.delta import READ, READ_INPUTS, REFRESH, Reference, product_by_changes
from sparsezoo_jax.inference.matrices import Rows
from sparsezoo_jax.models.delta_ffn import CHANGED, CHANGED_INPUTS, DELTA_SPIKES

#: What is rounded, and the weight of the loss; "none" is the layer without rounding.
VARIANTS = ("none", "hidden:0", "hidden:1e-4", "hidden:1e-3", "hidden:1e-2", "both:0", "both:1e-4", "both:1e-3")


def flags_of(options: argparse.Namespace, variant: str) -> tuple[str, dict[str, Any]]:
    """Architecture and flags of a variant's run."""
    flags = {
        "data.bpe-vocab-size": options.vocab,
        "model.vocab-size": options.vocab,
        "data.batch-size": options.batch_size,
        "data.seq-len": options.seq_len,
        "train.seed": options.seed,
        "train.steps": options.steps,
        "train.eval-every": 0,
        "model.d-model": options.width,
        "model.ffn.d-ff": 4 * options.width,
        "model.layers": options.layers,
    }
    if variant == "none":
        return "lazy", flags
    rounded, rate = variant.split(":")
    objective = f'[{{"kind": "fixed", "loss": "{DELTA_SPIKES}", "weight": {rate}}}]'
    return "delta", {**flags, "model.ffn.rounded": rounded, "train.objectives": objective}


def decoded(run: Path, length: int) -> dict[str, float]:
    """What decoding `length` tokens of validation text reads, and how far its logits are from the whole pass."""
    model, tokens, segments = validation_text(run, 1)
    tokens, segments = tokens[:1, :length], (segments[:1, :length] == segments[0, 0]).astype(np.int32)
    expected = np.asarray(model(jnp.asarray(tokens), segment_ids=jnp.asarray(segments)).logits)
    laid_out = packed(model)
    graphdef, state = nnx.split(laid_out)

    @jax.jit
    def step(cache: Any, token: jax.Array) -> Any:
        out = nnx.merge(graphdef, state)(token, cache=cache)
        return out.cache, out.logits[0, 0], out.stats

    cache, errors, read = laid_out.init_cache(1, length), [], {READ: [], READ_INPUTS: []}
    real = int(segments.sum())  # the first document, or all that the sequence has of it
    for t in range(real):
        cache, logits, stats = step(cache, jnp.asarray(tokens[:, t : t + 1]))
        errors.append(float(np.abs(np.asarray(logits) - expected[0, t]).max()))
        for name, values in read.items():
            if name in stats:
                values.append(float(jnp.mean(stats[name])))
    found = {name: statistics.fmean(values[1:]) for name, values in read.items() if values}
    return {**found, "tokens": real, "error": statistics.median(errors), "flipped": sum(e > 1e-3 for e in errors)}


def drift(sums: int, refresh: int) -> None:
    """Print how far products by changes are from whole ones: 512 channels, of which a tenth is drawn anew each time."""
    channels, outputs = 512, 128
    rows = Rows(
        jax.random.normal(jax.random.key(0), (channels, outputs)) / channels**0.5, "model", jnp.dtype("float32")
    )
    steps = 0.1 * (1 + jax.random.uniform(jax.random.key(1), (channels,)))

    def step(carry: Any, key: jax.Array) -> Any:
        counts, kept = carry
        moves, drawn = jax.random.split(key)
        moved = jax.random.bernoulli(moves, 0.1, (channels,))
        counts = jnp.where(moved, jax.random.randint(drawn, (channels,), -8, 9), counts)
        x = (counts * steps)[None, None]
        y, kept, read = product_by_changes(x, rows, kept, jnp.ones((1, 1), bool), refresh=refresh)
        whole = x @ rows.restored()
        return (counts, kept), (jnp.linalg.norm(y - whole) / jnp.linalg.norm(whole), read)

    start = jnp.zeros(channels, jnp.int32), Reference.empty(1, rows)
    keys = jax.random.split(jax.random.key(2), sums)
    _, (errors, read) = jax.jit(lambda keys: jax.lax.scan(step, start, keys))(keys)
    print(
        f"made anew after {refresh:,} sums: {float(jnp.mean(read)):.2%} of the rows read, at most {jnp.max(errors):.1e}"
    )
    print("\n| sums | relative difference, mean of the last 50 |\n|---|---|")
    for n in (50, 200, 1000, 4000, 16_000, 64_000):
        if n <= sums:
            print(f"| {n:,} | {jnp.mean(errors[n - 50 : n]):.1e} |")


def percent(values: Sequence[float] | float | None) -> str:
    """A share, or the mean of some, for a table."""
    if values is None:
        return ""
    return f"{np.mean(values):.1%}"


def main() -> None:
    """Make what runs are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/delta_tokens"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="none, or what is rounded and a rate: hidden:0")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--drift", type=int, metavar="SUMS", help="instead: how differences add up over so many sums")
    options = parser.parse_args()
    if options.drift is not None:
        for refresh in (options.drift, REFRESH):
            drift(options.drift, refresh)
        return
    columns = ("rounded: rate", "loss", "active units", "units that change", "inputs that change", "mean step of units")
    columns += ("rows read, second map", "first map", "logits: median difference", "tokens above 1e-3")
    print(f"| {' | '.join(columns)} |")
    print("|---" * 10 + "|")
    for variant in options.variants:
        arch, flags = flags_of(options, variant)
        run = options.runs / f"{variant.replace(':', '-')}-seed{options.seed}-steps{options.steps}"
        found = figures_of(run, arch, flags)
        row = [variant, f"{found['loss']:.4f}", percent(found["ffn_density"]), percent(found.get(CHANGED))]
        steps = found.get("hidden_step")
        row += [percent(found.get(CHANGED_INPUTS)), f"{statistics.fmean(steps):.3f}" if steps else ""]
        if arch == "delta":
            text = decoded(run, options.seq_len)
            row += [percent(text[READ]), percent(text.get(READ_INPUTS)), f"{text['error']:.1e}"]
            row += [f"{text['flipped']} of {text['tokens']}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
