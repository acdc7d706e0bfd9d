"""Token-by-token generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.inference.sampling import Sampling, sample
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.cache import DecoderCache


def generate_tokens(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> Iterator[int]:
    """Continue `prompt` token by token: a generator of token ids, up to `max_new_tokens` or the first of `stop`.

    The prompt is read in one pass; every further token is one step on the model's unstacked layers with a donated
    cache. The stop token itself is not yielded.

    Raises:
      UserError: an empty prompt, or one that together with the new tokens exceeds the model's `max_seq_len`.
    """
    sampling = sampling or Sampling()
    limit = model.config.max_seq_len
    if not prompt:
        raise UserError("--prompt: is empty; this model has no start-of-text token to begin with")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={max_new_tokens}: must be above 0")
    if len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"--max-new-tokens={max_new_tokens}: {len(prompt)} prompt tokens and these exceed model.max_seq_len={limit}"
        )
    graphdef, state = nnx.split(model.unstacked())
    # Round lengths up to powers of two: prompts of similar length share compiled programs.
    padded = min(limit, _power_of_two(len(prompt)))
    cache_length = min(limit, _power_of_two(padded + max_new_tokens))

    forward = jax.jit(partial(next_token, graphdef, sampling), donate_argnums=1)

    # Padding goes in front, so that the cache's next free slot follows the prompt directly.
    gap = padded - len(prompt) if padded + max_new_tokens <= limit else 0
    tokens = np.concatenate([np.zeros(gap, np.int32), np.asarray(prompt, np.int32)])
    real = np.arange(len(tokens)) >= gap
    keys = jax.random.split(jax.random.key(seed), max_new_tokens)
    cache = model.init_cache(1, cache_length)
    token, cache = forward(state, cache, tokens[None], real[None].astype(np.int32), len(tokens) - 1, keys[0])
    one = jnp.ones((1, 1), jnp.int32)
    for index in range(max_new_tokens):
        # The next step is sent before this token is handed out, so that decoding it to text overlaps with computing.
        current = token
        if index + 1 < max_new_tokens:
            token, cache = forward(state, cache, current[:, None], one, 0, keys[index + 1])
        value = int(current[0])
        if value in stop:
            return
        yield value


def next_token(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    state: nnx.State,
    cache: DecoderCache,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    last: jax.Array | int,
    key: jax.Array,
) -> tuple[jax.Array, DecoderCache]:
    """Put tokens [B, T] into the cache and sample the one after position `last` of them: int32 [B], and the cache.

    Pure, meant to be jitted with the cache donated. Segment ids are 0 for padding.
    """
    model = nnx.merge(graphdef, state)
    out = model(tokens_BT, segment_ids=segment_ids_BT, cache=cache, logits=False)
    # Logits of the one position that is sampled: those of a whole prompt would take more memory than the model.
    logits_BV = model.logits_of(out.hidden[:, last][:, None])[:, 0]
    return sample(logits_BV, key, sampling), out.cache


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()
