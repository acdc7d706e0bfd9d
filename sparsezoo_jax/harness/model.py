"""The model `sparsezoo` of lm-evaluation-harness; importing this registers it there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from sparsezoo_jax import plugins as kinds
from sparsezoo_jax import run_dir, storage
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.harness.scorer import Scorer
from sparsezoo_jax.text_model import TextModel


@register_model("sparsezoo")
class SparsezooLM(LM):
    """A run directory: `--model sparsezoo --model_args pretrained=DIR`.

    Args:
      pretrained: run directory.
      step: checkpoint to load; None is the newest.
      batch_size: texts at a time; "auto" is 8.
      max_length: tokens that the model sees at most; None: its `max_seq_len`.
      add_bos_token: put the start-of-text token before every text; None: if the tokenizer has one.
      seed: of the draws of answers that are sampled.
      plugins: modules to import first, with colons between them (docs/kinds.md).

    Raises:
      UserError: no run or step there, a run without a tokenizer, or an impossible value.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        step: int | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        plugins: str = "",
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        directory = storage.path(pretrained)
        kinds.load_named(filter(None, plugins.split(":")))
        model, config, tokenizer = run_dir.load(directory, step=step)
        if tokenizer is None:
            raise UserError(f"{directory}: has no tokenizer, so no text can be read")
        size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        # `device` and `max_batch_size` are what the harness gives every model; jax has its own devices.
        self.scorer = Scorer(
            TextModel(directory, model, config, tokenizer),
            batch_size=size,
            max_length=max_length,
            add_bos=add_bos_token,
            seed=seed,
        )

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `Scorer.loglikelihood`."""
        found = self.scorer.loglikelihood([_texts(request) for request in requests])
        return self._noted("loglikelihood", requests, [tuple(one) for one in found])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `Scorer.loglikelihood_rolling`."""
        found = self.scorer.loglikelihood_rolling([request.args[0] for request in requests])
        return self._noted("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `Scorer.generate_until`."""
        found = self.scorer.generate_until([_texts(request) for request in requests])
        return self._noted("generate_until", requests, found)

    def _noted(self, kind: str, requests: Sequence[Instance], found: list[Any]) -> list[Any]:
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, one)
        return found


def _texts(request: Instance) -> tuple[Any, Any]:
    arguments: tuple[Any, ...] = request.args
    return arguments[0], arguments[1]
