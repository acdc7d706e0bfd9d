"""Whether tokens should loop in Python or inside of a program: `python -m benchmarks.token_loop`.

A spark or dense model of a preset with random weights decodes a few tokens a turn: one call of a compiled step
a token, or `jax.lax.fori_loop` over the same step in one program. Both get the cache donated and return it.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.decode import drawn
from benchmarks.timing import interleaved, print_ratios
from sparsezoo_jax.configs import preset
from sparsezoo_jax.inference import Sampling, packed
from sparsezoo_jax.inference.generation import next_token


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["spark", "dense"], default="spark")
    parser.add_argument("--size", default=None, help="None: small for spark, 0_1b for dense")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16, help="of a turn")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    config = preset(options.arch, options.size or {"spark": "small", "dense": "0_1b"}[options.arch]).model
    config = dataclasses.replace(config, dtype=options.dtype, param_dtype=options.dtype)
    model = drawn(config)
    runs = {}
    for layout, made in (("as trained", model), ("packed", packed(model))):
        graphdef, state = nnx.split(made)
        step = partial(next_token, Sampling(temperature=0), graphdef)
        one, key = jnp.ones((1, 1), jnp.int32), jax.random.key(0)

        def looped(state, cache, token, step=step, one=one, key=key):
            def body(_, carry):
                made = step(state, carry[0], carry[1], one, 0, key)
                return made.cache, made.tokens[:, None]

            return jax.lax.fori_loop(0, options.tokens, body, (cache, token))

        called, whole = jax.jit(step, donate_argnums=1), jax.jit(looped, donate_argnums=1)
        restart = jax.jit(lambda cache: cache.truncated(jnp.int32(options.context)), donate_argnums=0)
        caches = {name: made.init_cache(1, options.context + options.tokens + 1) for name in ("python", "program")}

        def in_python(state=state, called=called, restart=restart, caches=caches, one=one, key=key):
            cache, token = restart(caches["python"]), jnp.zeros((1, 1), jnp.int32)
            for _ in range(options.tokens):
                result = called(state, cache, token, one, 0, key)
                cache, token = result.cache, result.tokens[:, None]
            caches["python"] = cache
            return token

        def in_program(state=state, whole=whole, restart=restart, caches=caches):
            caches["program"], token = whole(state, restart(caches["program"]), jnp.zeros((1, 1), jnp.int32))
            return token

        runs[f"{layout}, loop in Python"] = in_python
        runs[f"{layout}, loop in the program"] = in_program
    print(
        f"{options.arch}, {options.dtype}, {options.tokens} tokens after {options.context}, {options.rounds} rounds\n"
    )
    print_ratios(interleaved(runs, options.rounds), next(iter(runs)))


if __name__ == "__main__":
    main()
