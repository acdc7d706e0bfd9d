"""Token-by-token generation with a key/value cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsezoo_jax.errors import NumericsError, UserError, require
from sparsezoo_jax.inference.placement import cache_shardings, state_shardings
from sparsezoo_jax.inference.prompt_lookup import PromptLookup
from sparsezoo_jax.inference.sampling import NO_TOKEN, Sampling, likeliest, sample
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.cache import DecoderCache
from sparsezoo_jax.sharding import use_mesh


class Step(NamedTuple):
    """What one call of the model leaves."""

    tokens: jax.Array
    """int32 [B]: the token after the last one of each row; of a verification [B, T]: that after each one."""
    cache: DecoderCache
    stats: dict[str, jax.Array]
    """Statistics per layer, float32 [L] each; see `Output.stats`."""


@dataclasses.dataclass
class GenerationStats:
    """What a generation took; complete when it has ended."""

    prompt_tokens: int
    """Of all rows, padding not counted."""
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    """From the first generated token to the last one."""
    decoded: int = 0
    """Tokens in that time: those of all rows but the first of each."""
    steps: int = 0
    """Calls of the model in that time."""
    drafted: int = 0
    """Tokens that were proposed for verification."""
    accepted: int = 0
    """Those of them that the model agreed with."""
    contexts: list[int] = dataclasses.field(default_factory=list)
    """Tokens in the longest row's cache at each of these calls, the new ones counted."""
    layers: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)
    """Statistics of each of these calls."""

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second."""
        return self.decoded / self.decode_seconds if self.decode_seconds else 0.0

    def layer_means(self) -> dict[str, np.ndarray]:
        """Each statistic's mean over the calls, float [L]; NaN in layers without it."""
        if not self.layers:
            return {}
        return {name: np.mean([np.asarray(stats[name]) for stats in self.layers], axis=0) for name in self.layers[0]}


class Engine:
    """A model that generates: layers unstacked once, each program compiled once.

    Tokens loop in Python, a donated cache goes from call to call, and a step is sent before the token of the one
    before is looked at. Programs are compiled for caches rounded up to powers of two, and for prompts rounded up (see
    `padded_length`), so prompts of similar length share them, and so do all temperatures and probabilities of a
    sampling (not its top k).

    On a `mesh` its devices share the weights, the cache and, where they divide them, the rows of a call.
    """

    def __init__(self, model: Decoder, mesh: Mesh | None = None):
        self.model = model.unstacked()
        self.graphdef, self.state = nnx.split(self.model)
        self.mesh = None if mesh is None or mesh.size == 1 else mesh
        if self.mesh is not None:
            self.state = jax.device_put(self.state, state_shardings(self.state, self.mesh))
            self.model = nnx.merge(self.graphdef, self.state)
        self._programs: dict[Any, Any] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[int] = (),
        drafts: int = 0,
    ) -> Generation:
        """Continue each of `prompts`, up to `max_new_tokens` more or the first of `stop`; see `Generation`.

        A row's tokens don't depend on the other rows, apart from rounding; its draws do on its place.

        Args:
          prompts: token ids of each row.
          seed: of the draws.
          stop: tokens that end a row; they are not part of it.
          drafts: propose up to this many tokens a step by looking the last ones up in the text (see `PromptLookup`)
            and have the model check them all at once. What comes out is that of greedy decoding, which it needs, and
            of one prompt; it takes fewer calls where the text repeats itself.

        Raises:
          NumericsError: logits that are not finite, when the tokens are asked for.
          UserError: an empty prompt, prompts that with the new tokens exceed the model's `max_seq_len`, or drafts with
            more than one prompt or with sampling.
        """
        sampling = sampling or Sampling()
        limit = self.model.config.max_seq_len
        require(max_new_tokens > 0, "--max-new-tokens", max_new_tokens, "must be above 0")
        require(drafts >= 0, "--drafts", drafts, "must be 0 (off) or above")
        longest = max((len(prompt) for prompt in prompts), default=0)
        if not prompts or min(len(prompt) for prompt in prompts) == 0:
            raise UserError("--prompt: is empty; this model has no start-of-text token to begin with")
        if longest + max_new_tokens > limit:
            raise UserError(
                f"--max-new-tokens={max_new_tokens}: {longest} prompt tokens and these exceed model.max_seq_len={limit}"
            )
        if drafts and (len(prompts) > 1 or sampling.temperature > 0):
            raise UserError(f"--drafts={drafts}: needs one prompt and --temperature 0, for it checks greedy choices")
        return Generation(self, prompts, max_new_tokens, sampling, seed, frozenset(stop), drafts)

    def program(self, function: Any, *arguments: Any) -> tuple[Any, float]:
        """`function(graphdef, ...)` compiled for these arguments, its cache donated; and the seconds that took."""
        shapes = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), arguments)
        leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2)
        # A partial is a new object every time: what it binds tells one from another.
        name = (function.func, function.args) if isinstance(function, partial) else (function, ())
        key = (name, tuple(leaves), structure)
        if key in self._programs:
            return self._programs[key], 0.0
        started = time.perf_counter()
        out: Any = None
        if self.mesh is not None:
            # What one call returns is what the next one takes, so the compiler must not choose where it lies.
            everywhere: Any = NamedSharding(self.mesh, PartitionSpec())
            out = Step(everywhere, cache_shardings(arguments[0], self.mesh), everywhere)
        jitted = jax.jit(partial(function, self.graphdef), donate_argnums=1, out_shardings=out)
        with use_mesh(self.mesh):
            self._programs[key] = jitted.lower(self.state, *arguments).compile()
        return self._programs[key], time.perf_counter() - started

    def empty_cache(self, rows: int, length: int) -> DecoderCache:
        """The model's cache of so many rows and slots, with nothing in it."""
        if self.mesh is None:
            return self.model.init_cache(rows, length)
        abstract = jax.eval_shape(lambda: self.model.init_cache(rows, length))
        made = jax.jit(lambda: self.model.init_cache(rows, length), out_shardings=cache_shardings(abstract, self.mesh))
        return made()


class Generation:
    """A running generation: iterate over it for one list a step, with each row's new tokens.

    That is one token a row, none once the row has ended, and several where drafts were accepted. `stats` fills up
    meanwhile; `rows` holds what each row has so far.
    """

    def __init__(self, engine: Engine, prompts, max_new_tokens: int, sampling: Sampling, seed: int, stop, drafts: int):
        self.engine, self.prompts, self.sampling, self.stop = engine, prompts, sampling, stop
        self.max_new_tokens, self.seed, self.drafts = max_new_tokens, seed, drafts
        self.rows: list[list[int]] = [[] for _ in prompts]
        self.stats = GenerationStats(sum(len(prompt) for prompt in prompts))

    def __iter__(self) -> Iterator[list[list[int]]]:
        started = None
        for new in self._verified() if self.drafts else self._stepwise():
            if started is None:
                started = time.perf_counter()
            else:
                self.stats.decoded += sum(map(len, new))
                self.stats.decode_seconds = time.perf_counter() - started
            for row, tokens in zip(self.rows, new, strict=True):
                row.extend(tokens)
            if any(new):
                yield new

    def _prefill(self) -> tuple[Step, int]:
        """The call that reads the prompts, and the slots of the cache that they take."""
        limit = self.engine.model.config.max_seq_len
        rows, longest = len(self.prompts), max(map(len, self.prompts))
        padded = min(limit, padded_length(longest, jax.default_backend()))
        # A chunk of drafts may reach over the last token; its slots are taken back, but must be there.
        spare = self.max_new_tokens + self.drafts
        if padded + spare > limit:
            padded = longest
        cache_length = min(limit + self.drafts, _power_of_two(padded + spare))
        # Padding goes in front, so that the cache's next free slot follows every prompt directly.
        tokens, real = np.zeros((rows, padded), np.int32), np.zeros((rows, padded), np.int32)
        for i, prompt in enumerate(self.prompts):
            tokens[i, padded - len(prompt) :] = prompt
            real[i, padded - len(prompt) :] = 1
        cache = self.engine.empty_cache(rows, cache_length)
        arguments = (cache, tokens, real, jnp.int32(padded - 1), self._key(0), self.sampling.numbers())
        program, seconds = self.engine.program(partial(first_token, self.sampling.form()), *arguments)
        self.stats.compile_seconds += seconds
        started = time.perf_counter()
        step = jax.block_until_ready(program(self.engine.state, *arguments))
        self.stats.prefill_seconds = time.perf_counter() - started
        return step, padded

    def _key(self, index: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), index)

    def _count(self, step: Step, context: int) -> None:
        self.stats.steps += 1
        self.stats.contexts.append(context)
        self.stats.layers.append(step.stats)

    def _stepwise(self) -> Iterator[list[list[int]]]:
        step, _ = self._prefill()
        longest = max(map(len, self.prompts))
        running = np.ones((len(self.prompts), 1), np.int32)
        last, program = jnp.int32(0), None
        keys = [self._key(index) for index in range(1, self.max_new_tokens)]
        numbers = jnp.asarray(self.sampling.numbers())
        for index in range(self.max_new_tokens):
            current = step
            if index + 1 < self.max_new_tokens:
                arguments = (step.cache, step.tokens[:, None], running, last, keys[index], numbers)
                if program is None:
                    program, seconds = self.engine.program(partial(next_token, self.sampling.form()), *arguments)
                    self.stats.compile_seconds += seconds
                # Sent before this token is looked at, so that decoding it to text overlaps with computing.
                step = program(self.engine.state, *arguments)
            values = _checked(np.asarray(current.tokens))
            ended = np.isin(values, list(self.stop)) if self.stop else np.zeros(values.shape, bool)
            running = running * ~ended[:, None]
            if index:
                self._count(current, longest + index)
            yield [[int(value)] if on else [] for value, on in zip(values, running[:, 0], strict=True)]
            if not running.any():
                return

    def _verified(self) -> Iterator[list[list[int]]]:
        """Greedy decoding that checks drafts: a call sees the last token and its drafts, and says what follows each."""
        step, end = self._prefill()
        cache, token, longest = step.cache, int(_checked(np.asarray(step.tokens))[0]), len(self.prompts[0])
        lookup = PromptLookup(self.prompts[0], drafts=self.drafts)
        left, new = self.max_new_tokens, [token]
        # Two shapes only: one token, or as many as fit.
        programs: dict[int, Any] = {}
        for length in (1, 1 + self.drafts):
            chunk = np.zeros((1, length), np.int32)
            programs[length], seconds = self.engine.program(verified_tokens, cache, chunk, chunk, jnp.int32(end))
            self.stats.compile_seconds += seconds
        while True:
            if self.stop & set(new):
                new = new[: min(new.index(token) for token in self.stop & set(new))]
                left = len(new)
            left -= len(new)
            yield [new]
            if left < 1:
                return
            for token in new:
                lookup.push(token)
            proposed = lookup.propose()[: left - 1]
            length = 1 + self.drafts if proposed else 1
            chunk = np.zeros((1, length), np.int32)
            chunk[0, : 1 + len(proposed)] = [lookup.tokens[-1], *proposed]
            real = (np.arange(length) <= len(proposed)).astype(np.int32)[None]
            step = programs[length](self.engine.state, cache, chunk, real, jnp.int32(end))
            predicted, cache = _checked(np.asarray(step.tokens)[:, : len(proposed) + 1])[0].tolist(), step.cache
            agreed = next((i for i, token in enumerate(proposed) if token != predicted[i]), len(proposed))
            new = predicted[: agreed + 1]
            end += agreed + 1
            longest += agreed + 1
            self.stats.drafted += len(proposed)
            self.stats.accepted += agreed
            self._count(step, longest)


def generate_tokens(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> Iterator[int]:
    """Continue `prompt` token by token: a generator of token ids; arguments and errors as in `Engine.generate`."""
    generation = Engine(model).generate(
        [prompt], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop
    )
    return (token for new in generation for token in new[0])


def next_token(
    sampling: Sampling,
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: DecoderCache,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    last: jax.Array | int,
    key: jax.Array,
    numbers: jax.Array | None = None,
) -> Step:
    """Put tokens [B, T] into the cache and sample the one after position `last` of them (see `sample`).

    Pure, meant to be jitted with the cache donated. Segment ids are 0 for padding.
    """
    model = nnx.merge(graphdef, state)
    out = model(tokens_BT, segment_ids=segment_ids_BT, cache=cache, logits=False)
    # Logits of the one position that is sampled: those of a whole prompt would take more memory than the model.
    logits_BV = model.logits_of(out.hidden[:, last][:, None])[:, 0]
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(tokens_BT)))
    return Step(sample(logits_BV, keys_B, sampling, numbers), out.cache, out.stats)


def first_token(
    sampling: Sampling,
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: DecoderCache,
    tokens_BT: jax.Array,
    *arguments: Any,
) -> Step:
    """`next_token` for an empty cache: attention sees the slots of these tokens only, however many there are.

    Pure, meant to be jitted with the cache donated.
    """
    model = nnx.merge(graphdef, state)
    own = jax.eval_shape(lambda: model.init_cache(*tokens_BT.shape))
    start = jax.tree.map(lambda whole, part: jax.lax.slice(whole, (0,) * whole.ndim, part.shape), cache, own)
    step = next_token(sampling, graphdef, state, start, tokens_BT, *arguments)
    filled = jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim), cache, step.cache
    )
    return step._replace(cache=filled)


def verified_tokens(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    cache: DecoderCache,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    end: jax.Array,
) -> Step:
    """Forget all but the first `end` slots of the cache, put tokens [B, T] there; the likeliest one after each.

    Pure, meant to be jitted with the cache donated.
    """
    model = nnx.merge(graphdef, state)
    out = model(tokens_BT, segment_ids=segment_ids_BT, cache=cache.truncated(end))
    return Step(likeliest(out.logits), out.cache, out.stats)


def _checked(tokens: np.ndarray) -> np.ndarray:
    if np.any(tokens == NO_TOKEN):
        raise NumericsError("the model's logits are not finite: a weight that is no number, or a run that diverged")
    return tokens


def padded_length(length: int, platform: str) -> int:
    """The length that a prompt is padded to, for one program serves all prompts of a length.

    On a CPU every token takes its time: the next multiple of an eighth of the power of two below, so that padding is
    at most a ninth, and 8 programs serve the lengths from one power of two to the next; at least 16. Elsewhere the next
    power of two.
    """
    whole = _power_of_two(length)
    if platform != "cpu":
        return whole
    step = max(whole // 16, 16)
    return -(-length // step) * step


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 1).bit_length()
