"""A loaded run that reads and writes text: model, tokenizer, and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsezoo_jax import data, run_dir
from sparsezoo_jax.config import RunConfig, read_config, require_text
from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.inference import Engine, Formats, Generation, Sampling, packed

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from sparsezoo_jax.data import Tokenizer
    from sparsezoo_jax.models import Decoder


class TextModel:
    """Continues texts with a run's model; its programs are compiled once for all calls."""

    def __init__(
        self,
        directory: Path,
        model: Decoder,
        config: RunConfig,
        tokenizer: Tokenizer,
        *,
        stop_ids: Sequence[int] = (),
        mesh: Mesh | None = None,
    ):
        self.directory, self.config, self.tokenizer = directory, config, tokenizer
        vocab = model.config.vocab_size
        for token in stop_ids:
            require(0 <= token < vocab, "--stop-ids", token, f"must be a token, from 0 to {vocab - 1}")
        self.stop: tuple[int, ...] = (*stop_ids, *data.stop_ids(directory, tokenizer))
        """Tokens that end a text."""
        self.engine = Engine(model, mesh)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        step: int | None = None,
        base: str | Path | None = None,
        formats: Formats | None = None,
        stop_ids: Sequence[int] = (),
        mesh: Mesh | None = None,
    ) -> TextModel:
        """Open a run, packed for decoding in these number formats; see `run_dir.load` for the other arguments.

        Devices of a `mesh` share it.

        Raises:
          UserError: as `run_dir.load`; a run without a tokenizer.
          StorageError: files that can't be read.
        """
        require_text(read_config(directory / run_dir.CONFIG), directory)
        model, config, tokenizer = run_dir.load(directory, step=step, base=base, mesh=mesh)
        if tokenizer is None:
            raise UserError(f"{directory}: has no tokenizer, so no text can be read")
        laid_out = packed(model, formats or Formats())
        return cls(directory, laid_out, config, tokenizer, stop_ids=stop_ids, mesh=mesh)

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest text, prompt and answer together."""
        return self.engine.model.config.max_seq_len

    def encode(self, prompt: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt; see `Tokenizer.encode_prompt`."""
        return self.tokenizer.encode_prompt(prompt, special_tokens=special_tokens)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the run's chat template; see `data.chat_prompt`."""
        return data.chat_prompt(self.directory, self.tokenizer, messages)

    def encode_message(self, message: str, system: str | None = None) -> list[int]:
        """Token ids of a user's one message by the chat template, after that of the system."""
        first = [] if system is None else [{"role": "system", "content": system}]
        return self.encode_chat([*first, {"role": "user", "content": message}])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        drafts: int = 0,
    ) -> Generation:
        """Continue prompts until `stop` or the most tokens; see `Engine.generate`."""
        return self.engine.generate(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=self.stop, drafts=drafts
        )

    def texts(self, generation: Generation) -> list[str]:
        """What a generation adds to each of its prompts."""
        for _ in generation:
            pass
        rows = zip(generation.prompts, generation.rows, strict=True)
        return [data.continuation(self.tokenizer, ids, row) for ids, row in rows]
