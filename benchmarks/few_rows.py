"""Where native operations stop being the faster ones as tokens become more: `python -m benchmarks.few_rows`.

The layers of Spark 2B and BlockFFN 2.8B, laid out for decoding, with random weights, for 1 to 64 tokens: the native
form, plain JAX, and, of all weights, XLA's product of the form that is trained. Medians of interleaved rounds, a layer
at a time out of several, so that no cache holds what is read; ratios are to the native form.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.decode_layers import DTYPES, Draw, through
from benchmarks.timing import interleaved
from sparsezoo_jax.pallas_kernels import block_ffn, block_ffn_rows, gated_ffn_rows, linear, spark_ffn, spark_ffn_rows

LAYERS = 4


def spark(draw: Draw, tokens: int) -> tuple[Any, ...]:
    """The packed operation, that of training, layers for both, and their tokens, as of the functions that follow."""
    d, neurons, r, top_k = 2304, 13_824, 1024, 1106
    layers = [(draw(neurons, r), draw(neurons, 2 * d - r)) for _ in range(LAYERS)]
    trained = [(k1.T, rows[:, : d - r].T, rows[:, d - r :]) for k1, rows in layers]
    packed = partial(spark_ffn_rows, top_k=top_k)
    return packed, lambda x, *w: (spark_ffn(x, *w, top_k=top_k),), layers, trained, (draw(tokens, d),)


def experts(draw: Draw, tokens: int) -> tuple[Any, ...]:
    """15 % of BlockFFN's experts, each token's own."""
    d, count, width, active = 2048, 128, 128, 19
    layers = [(draw(count, width, d), draw(count, width, d)) for _ in range(LAYERS)]
    trained = [(up.reshape(-1, d).T, down.reshape(-1, d)) for up, down in layers]
    chosen = jnp.argsort(jax.random.uniform(jax.random.key(0), (tokens, count)), axis=-1) < active
    packed = lambda *arrays, implementation: (block_ffn_rows(*arrays, implementation=implementation),)  # noqa: E731
    dense = lambda *arrays: (block_ffn(*arrays, expert_width=width),)  # noqa: E731
    return packed, dense, layers, trained, (draw(tokens, d), chosen.astype(draw.dtype))


def gated(draw: Draw, tokens: int) -> tuple[Any, ...]:
    """The dense twin of Spark's FFN."""
    d, neurons = 2304, 9216
    layers = [(draw(neurons, d), draw(neurons, d), draw(neurons, d)) for _ in range(LAYERS)]
    packed = lambda *arrays, implementation: (gated_ffn_rows(*arrays, implementation=implementation),)  # noqa: E731
    dense = lambda x, gate, up, down: ((jax.nn.gelu(x @ gate) * (x @ up)) @ down,)  # noqa: E731
    return packed, dense, layers, [(gate.T, up.T, down) for gate, up, down in layers], (draw(tokens, d),)


def projection(draw: Draw, tokens: int) -> tuple[Any, ...]:
    """A square map, small enough to need more layers."""
    layers = [(draw(2304, 2304),) for _ in range(6 * LAYERS)]
    packed = lambda *arrays, implementation: (linear(*arrays, implementation=implementation),)  # noqa: E731
    return packed, lambda x, w: (x @ w,), layers, [(w.T,) for (w,) in layers], (draw(tokens, 2304),)


OPERATIONS = {"linear": projection, "gated_ffn_rows": gated, "spark_ffn_rows": spark, "block_ffn_rows": experts}


def main() -> None:
    """Print a table for each operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "operations", nargs="*", choices=[*OPERATIONS, []], metavar="operation", help=", ".join(OPERATIONS)
    )
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "int8"], default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for operation in options.operations or OPERATIONS:
        print(f"\n{operation}, {options.dtype}\n\n| tokens | native ms | plain JAX / native | as trained / native |")
        print("|---|---|---|---|")
        for tokens in options.tokens:
            made = OPERATIONS[operation](Draw(options.dtype, huge_pages=False), tokens)
            packed, trained, layers, trained_layers, inputs = made
            forms = {
                form: through(partial(packed, implementation=form), layers, [inputs]) for form in ("native", "xla")
            }
            times = interleaved({**forms, "trained": through(trained, trained_layers, [inputs])}, options.rounds)
            native, *others = (statistics.median(values) for values in times.values())
            ratios = " | ".join(f"{other / native:.2f}" for other in others)
            print(f"| {tokens} | {1e3 * native / len(layers):.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
