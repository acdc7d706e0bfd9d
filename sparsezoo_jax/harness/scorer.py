"""Log-likelihoods of texts and continuations of prompts in batches, as lm-evaluation-harness asks for them.

Nothing here knows that library: its model (`harness.model`) hands over texts and gets numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import NumericsError, UserError, require
from sparsezoo_jax.inference import Sampling
from sparsezoo_jax.text_model import TextModel

MAX_NEW_TOKENS = 256
"""Of an answer whose length a task leaves open, or half of the model's `max_seq_len` if that is less."""
_POSITIONS = 128
"""Positions of a batch whose logits exist at one time."""
_ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = {"until", "do_sample", "temperature", "top_k", "top_p", "min_p", *_ALIASES}


class Likelihood(NamedTuple):
    """Of a continuation after its context."""

    log_probability: float
    """Nats, summed over its tokens."""
    is_greedy: bool
    """Whether each token is the likeliest one."""


class Answer(NamedTuple):
    """How a prompt is to be continued."""

    max_new_tokens: int
    sampling: Sampling
    until: tuple[str, ...]


class Scorer:
    """A loaded run in the terms of the harness.

    Args:
      model: the run.
      batch_size: texts at a time.
      max_length: tokens that the model sees at most; None: its `max_seq_len`. Longer contexts lose their beginning.
      add_bos: put the start-of-text token before every text; None: if the tokenizer has one.
      seed: of the draws of answers that are sampled.

    Raises:
      ConfigError: an impossible value.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos: bool | None = None,
        seed: int = 0,
    ):
        longest, tokenizer = model.max_seq_len, model.tokenizer
        require(batch_size > 0, "batch_size", batch_size, "must be above 0")
        allowed = f"must be from 2 to the model's {longest}"
        require(max_length is None or 2 <= max_length <= longest, "max_length", max_length, allowed)
        has_bos = tokenizer.bos_id is not None
        require(has_bos or not add_bos, "add_bos_token", add_bos, "the tokenizer has no start-of-text token")
        prefix = tokenizer.bos_id if has_bos else tokenizer.eos_id
        if prefix is None:
            raise UserError(f"{model.directory}: its tokenizer has no token to begin a text with")
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.max_length = longest if max_length is None else max_length
        self.prefix: int = prefix
        """What the first token of a text is predicted from."""
        self._bos = [prefix] if has_bos and add_bos is not False else []
        self._score = jax.jit(partial(token_scores, model.engine.graphdef))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with its start-of-text token."""
        return self._bos + self.model.tokenizer.encode(text)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each continuation after its context; an empty context is the start of a text."""
        return self._likelihoods([self.encode_pair(*pair) for pair in pairs])

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it, as they are in the text of both.

        Spaces at the end of a context belong to the word after them.
        """
        if not context:
            ids = self.model.tokenizer.encode(continuation)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        kept = context.rstrip()
        whole, first = self.encode(context + continuation), self.encode(kept)
        # Nothing but spaces, and no token before it.
        return (first, whole[len(first) :]) if first else ([self.prefix], whole)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Of each whole text, in nats; one that is longer than the model sees in windows that touch."""
        # The start-of-text token is what the first one is predicted from, and not predicted itself.
        encode = self.model.tokenizer.encode
        windows = [list(rolling_windows(encode(text), self.prefix, self.max_length)) for text in texts]
        found = iter(self._likelihoods(list(itertools.chain.from_iterable(windows))))
        return [sum(next(found).log_probability for _ in own) for own in windows]

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The answer to each prompt, up to one of its `until` or the end of the text.

        Args:
          requests: prompts, and for each the harness' settings: `until`, `max_gen_toks`, `do_sample`, `temperature`,
            `top_k`, `top_p`, `min_p`.

        Raises:
          ConfigError: a setting that is not known, or a length that leaves no room for the prompt.
        """
        answers = [self.answer(settings) for _, settings in requests]
        prompts = [self.encode(text) or [self.prefix] for text, _ in requests]
        found = [""] * len(requests)
        for answer in dict.fromkeys(answers):
            alike = [index for index, own in enumerate(answers) if own == answer]
            room = self.max_length - answer.max_new_tokens
            for batch in batches(alike, lambda i: len(prompts[i]), self.batch_size):
                texts = self._answers([prompts[i][-room:] for i in batch], answer)
                for index, text in zip(batch, texts, strict=True):
                    found[index] = text
        return found

    def answer(self, settings: Mapping[str, Any]) -> Answer:
        """The harness' settings of a generation; without `do_sample` it is greedy, as there."""
        for name, value in settings.items():
            require(name in _SETTINGS, name, value, f"no such setting; there are {', '.join(sorted(_SETTINGS))}")
        lengths = [settings[name] for name in _ALIASES if settings.get(name) is not None]
        length = int(lengths[0]) if lengths else min(MAX_NEW_TOKENS, self.max_length // 2)
        allowed = f"must be above 0 and leave room for a prompt in {self.max_length} tokens"
        require(0 < length < self.max_length, "max_gen_toks", length, allowed)
        drawn = {name: settings[name] for name in ("top_k", "top_p", "min_p") if settings.get(name) is not None}
        temperature = settings.get("temperature")
        samples = settings.get("do_sample", temperature is not None and temperature > 0)
        sampling = Sampling(1.0 if temperature is None else temperature, **drawn) if samples else Sampling(0.0)
        until = settings.get("until") or ()
        return Answer(length, sampling, (until,) if isinstance(until, str) else tuple(until))

    def _answers(self, prompts: list[list[int]], answer: Answer) -> list[str]:
        # A batch that is not full is filled up, for another number of rows would be another program.
        rows = prompts + [prompts[-1][:1]] * (self.batch_size - len(prompts))
        generation = self.model.generate(
            rows, max_new_tokens=answer.max_new_tokens, sampling=answer.sampling, seed=self.seed
        )
        decoders = [self.model.tokenizer.stream_decoder(prompt) for prompt in prompts]
        texts, open_rows = [""] * len(prompts), set(range(len(prompts)))
        for new in generation:
            for row in list(open_rows):
                texts[row] += "".join(map(decoders[row].push, new[row]))
                if not new[row] or cut(texts[row], answer.until) != texts[row]:
                    open_rows.discard(row)
            if not open_rows:
                break
        return [cut(text + decoder.flush(), answer.until) for text, decoder in zip(texts, decoders, strict=True)]

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        for context, continuation in pairs:
            if len(continuation) > self.max_length or not context:
                tokens = len(continuation)
                raise UserError(f"a continuation of {tokens} tokens is longer than the model sees, {self.max_length}")
        found = [Likelihood(0.0, True)] * len(pairs)
        scored = [index for index, (_, continuation) in enumerate(pairs) if continuation]
        for batch in batches(scored, lambda i: len(pairs[i][0]) + len(pairs[i][1]), self.batch_size):
            for index, one in zip(batch, self._batch([pairs[i] for i in batch]), strict=True):
                found[index] = one
        return found

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        rows = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        longest = max(map(len, rows)) - 1
        length = min(self.max_length, 1 << max(longest - 1, 15).bit_length())
        tokens, targets, real = (np.zeros((self.batch_size, length), np.int32) for _ in range(3))
        for row, ids in enumerate(rows):
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1], real[row, : len(ids) - 1] = ids[:-1], ids[1:], 1
        log_p, greedy = map(np.asarray, self._score(self.model.engine.state, tokens, targets, real))
        found = []
        for row, (ids, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            own = slice(len(ids) - 1 - len(continuation), len(ids) - 1)
            total = float(log_p[row, own].sum(dtype=np.float64))
            if not np.isfinite(total):
                raise NumericsError(
                    f"{self.model.directory}: a log-likelihood is {total}: the run diverged, or was damaged"
                )
            found.append(Likelihood(total, bool(greedy[row, own].all())))
        return found


def token_scores(
    graphdef: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array, targets_BT: jax.Array, segment_ids_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability, float32 [B, T], of each target after the tokens up to its place; whether it is the likeliest.

    Pure, meant to be jitted. Segment ids are 0 for padding.
    """
    model = nnx.merge(graphdef, state)
    hidden_BTD = model(tokens_BT, segment_ids=segment_ids_BT, logits=False).hidden
    batch, length, width = hidden_BTD.shape
    chunk = max(size for size in range(1, _POSITIONS + 1) if length % size == 0)

    def of_chunk(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BCD, targets_BC = piece
        logits_BCV = model.logits_of(hidden_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1), jnp.argmax(logits_BCV, axis=-1) == targets_BC

    pieces = (hidden_BTD.reshape(batch, -1, chunk, width), targets_BT.reshape(batch, -1, chunk))
    found = jax.lax.map(of_chunk, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), pieces))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(batch, length), found)


def rolling_windows(ids: Sequence[int], prefix: int, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts and what is predicted after them, so that each of `ids` is predicted once from all that fits before it.

    The last window is full: what it does not predict is its context.
    """
    ids = [prefix, *ids]
    for start in range(1, len(ids), max_length):
        end = min(start + max_length, len(ids))
        yield ids[max(end - max_length - 1, 0) : start], ids[start:end]


def batches(indices: Sequence[int], length: Callable[[int], int], size: int) -> Iterator[list[int]]:
    """`indices` in batches of `size`, the longest first: what does not fit into memory is known at once."""
    ordered = sorted(indices, key=lambda index: (-length(index), index))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of `until`."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
