"""Forward and backward time of the expert feed-forward by implementation: `python -m benchmarks.moe_dispatch`."""

from __future__ import annotations

import argparse
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.timing import interleaved, print_ratios
from sparsezoo_jax.pallas_kernels.grouped_ffn import grouped_ffn
from sparsezoo_jax.pallas_kernels.grouped_ffn.by_expert import loop


def main() -> None:
    """Time the implementations on random tokens and routes, interleaved, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 2048), ("d-model", 128), ("experts", 24), ("width", 32), ("k", 5), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    forms = ("dense", "ragged", "native")
    parser.add_argument("--forms", nargs="+", choices=forms, default=forms, help="beside the loop over tiles")
    parser.add_argument("--tiles", type=int, nargs="*", default=[64, 128, 256])
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (args.tokens, args.d_model))
    experts = jax.lax.top_k(jax.random.normal(keys[1], (args.tokens, args.experts)), args.k)[1]
    weights = jax.nn.softmax(jax.random.normal(keys[2], (args.tokens, args.k)))
    up = jax.random.normal(keys[3], (args.experts, args.d_model, args.width))
    down = jax.random.normal(keys[4], (args.experts, args.width, args.d_model))

    def step(apply):
        def total(x, weights, up, down, experts):
            return jnp.sum(jnp.square(apply(x, experts, weights, up, down)))

        return partial(jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3))), x, weights, up, down, experts)

    variants = {name: step(partial(grouped_ffn, implementation=name)) for name in args.forms}
    for tile in args.tiles:
        variants[f"loop, tiles of {tile}"] = step(
            lambda x, e, w, up, down, tile=tile: loop(x, e, w, up, down, None, {}, activation=jax.nn.silu, tile=tile)[0]
        )
    print_ratios(interleaved(variants, args.rounds), args.forms[0])


if __name__ == "__main__":
    main()
