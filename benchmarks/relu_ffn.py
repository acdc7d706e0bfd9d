"""The sparse ReLU layer on a CPU, forward and backward, token by token against products of all neurons, by density:
`python -m benchmarks.relu_ffn`.

Tokens use neurons independently of each other, which is the case with the least to gain from caches.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from statistics import NormalDist
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import interleaved
from sparsezoo_jax.pallas_kernels.relu_ffn import by_token, relu_ffn


def arrays(tokens: int, d: int, neurons: int, share: float) -> list[jax.Array]:
    """Input, weights and cotangent: as the input's first column is 1, its weight sets the share of scores above 0."""
    rng = np.random.default_rng(0)
    x, gate, up = rng.normal(size=(8, tokens // 8, d)), rng.normal(size=(d, neurons)), rng.normal(size=(d, neurons))
    down, cotangent = rng.normal(size=(neurons, d)), rng.normal(size=x.shape)
    x[..., 0], gate = 1, gate / d**0.5
    gate[0] = NormalDist().inv_cdf(share)
    return [jnp.asarray(a, jnp.float32) for a in (x, gate, up / d**0.5, down / neurons**0.5, cotangent)]


def gradient(implementation: str):
    """Loss and gradients, jitted."""

    def loss(x, gate, up, down, cotangent):
        out = relu_ffn(x, gate, up, down, jnp.ones(x.shape[:2], bool), implementation=implementation)
        return jnp.sum(out.y * cotangent) + jnp.sum(out.l1)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shapes", type=int, nargs="+", default=[2048, 256, 1024, 1024, 1024, 2816])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.005, 0.02, 0.05, 0.08, 0.12, 0.2])
    options = parser.parse_args()
    print("| tokens | width x neurons | active | all neurons ms | token by token ms | ratio | quartiles |")
    print("|---|---|---|---|---|---|---|")
    with mock.patch.object(by_token, "LARGEST", 1.0):  # never all neurons
        for tokens, d, neurons in zip(*[iter(options.shapes)] * 3, strict=True):
            for share in options.shares:
                given = arrays(tokens, d, neurons, share)
                forms = {name: gradient(name) for name in ("xla", "native")}
                times = interleaved({name: partial(form, *given) for name, form in forms.items()}, options.rounds)
                ratios = [b / a for a, b in zip(times["xla"], times["native"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                whole, own = (1e3 * statistics.median(times[name]) for name in forms)
                print(
                    f"| {tokens:,} | {d:,} x {neurons:,} | {share:.1%} | {whole:.1f} | {own:.1f} | {middle:.2f} | "
                    f"{low:.2f} .. {high:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
