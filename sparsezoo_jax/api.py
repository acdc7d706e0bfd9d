"""The package from Python: presets, runs, and their metrics.

    config = sparsezoo_jax.preset("spark", "tiny", {"train.steps": 100})
    run = sparsezoo_jax.Run("runs/mine")
    run.train(config).figures["loss"]
    run.generate("The state of the Union")

What a run does are methods of `Run`. They can't be functions of the package: `train`, `evaluate` and `generate` are its
modules, for `python -m sparsezoo_jax.train` and for imports, and whichever is imported last takes the name.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from sparsezoo_jax import configs, platforms, storage
from sparsezoo_jax.config import RunConfig, with_changes
from sparsezoo_jax.errors import ConfigError, UserError, require
from sparsezoo_jax.evaluation import read_rows

if TYPE_CHECKING:
    from sparsezoo_jax.run_dir import Loaded
    from sparsezoo_jax.text_model import TextModel
    from sparsezoo_jax.training.writers import MetricWriter


def preset(arch: str, size: str = "tiny", changes: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration of an architecture and size, with changes.

    Args:
      arch: as `--arch` of `train`.
      size: as `--size`.
      changes: other values of fields, by the dotted names that flags have: `{"train.steps": 100, "model.ffn.k": 64}`.
        `{"train.optimizer.kind": "muon"}` exchanges a part, before the others apply.

    Raises:
      ConfigError: no such architecture, size or field, or an impossible value or combination of values.
    """
    return with_changes(configs.preset(arch, size), changes or {})


def metrics(workdir: str | os.PathLike[str], *, frame: bool | None = None) -> Any:
    """The rows of a run's `metrics.jsonl`: of training steps, and of evaluations, which have a `split`.

    Args:
      workdir: run directory; one without the file, such as a converted checkpoint, has no rows.
      frame: whether to make a `pandas.DataFrame`; None makes one where pandas is installed.

    Returns:
      A frame, or a list of dicts. What was not finite is None there and NaN in a column of numbers.

    Raises:
      UserError: no directory there, or a frame asked for without pandas.
      StorageError: the file can't be read.
    """
    directory = storage.path(workdir)
    if not directory.is_dir():
        raise UserError(f"{directory}: no run here")
    rows = read_rows(directory)
    if frame is False:
        return rows
    try:
        import pandas
    except ImportError:
        require(frame is None, "frame", True, "needs pandas")
        return rows
    return pandas.DataFrame(rows)


@dataclasses.dataclass(frozen=True)
class Trained:
    """How training ended."""

    workdir: Path
    """The run directory."""
    finished: bool
    """False if the run stopped before its last step, by `train.stop_at` or a signal; training it again goes on."""
    figures: dict[str, Any]
    """Of a finished run: what `evaluation.json` has, `loss` (nats/token), `perplexity`, `bits_per_byte`, `step`, ..."""


class Run:
    """A run directory, there already or to be made by `train`.

    The model is loaded when it is first needed, and kept until the run is trained further.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self.workdir = storage.path(workdir)
        storage.require_place("workdir", self.workdir, schemes=storage.RUN_STORES)
        self._text: tuple[int | None, TextModel] | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.workdir)!r})"

    def train(self, config: RunConfig, *, fresh: bool = False, writers: Sequence[MetricWriter] = ()) -> Trained:
        """Train, or go on where a checkpoint is; as the command `train`, which it prints like, in one process.

        Args:
          config: see `preset`. To go on it must be the one the run began with, but for what may change.
          fresh: refuse a directory that is not empty.
          writers: of metrics, beside those that `config.train.writers` names; they never end a run.

        Raises:
          UserError: an impossible configuration, corpus or directory; nothing has been written then.
          StorageError: reading or writing failed.
          TrainingDiverged: too many steps without a finite loss.
        """
        from sparsezoo_jax.train import train
        from sparsezoo_jax.training.writers import MetricWriter

        for writer in writers:
            allowed = "must be made of a subclass of sparsezoo_jax.MetricWriter"
            require(isinstance(writer, MetricWriter), "writers", writer, allowed)
        self._text = None
        platforms.keep_freed_memory()
        figures = train(config, self.workdir, fresh=fresh, writers=writers)
        return Trained(self.workdir, bool(figures), figures)

    def load(self, *, step: int | None = None) -> Loaded:
        """Model, configuration and tokenizer; see `sparsezoo_jax.load`."""
        from sparsezoo_jax.run_dir import load

        return load(self.workdir, step=step)

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """The figures that `evaluate --json` prints: `loss`, `perplexity`, `bits_per_byte`, ..., by name.

        Args:
          options: the flags of `evaluate`, such as `split="train"`, `step=100`, `batches=4`, `batch_size=8`,
            `dataset="texts/*.jsonl"`, `calibration=True`, `tasks="hellaswag"`. Meters take longest: only `meters=True`
            has them.

        Raises:
          ConfigError: no such option, or an impossible value.
          UserError: no run or step there, an unknown corpus, or a run without a tokenizer.
          StorageError: files that can't be read.
        """
        from sparsezoo_jax.evaluate import Evaluate, figures_of

        known = sorted({field.name for field in dataclasses.fields(Evaluate)} - {"directory"})
        for name, value in options.items():
            require(name in known, name, value, f"no such option; there are {', '.join(known)}")
        return figures_of(Evaluate(directory=self.workdir, **{"meters": False, **options}))

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        seed: int = ...,
        chat: bool = ...,
        system: str | None = ...,
        step: int | None = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        seed: int = ...,
        chat: bool = ...,
        system: str | None = ...,
        step: int | None = ...,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        chat: bool = False,
        system: str | None = None,
        step: int | None = None,
    ) -> str | list[str]:
        """What the model adds to a text, or to each of several, which are continued together.

        Args:
          prompt: text; with `chat` a user's message.
          max_new_tokens: the most to add; the end-of-text token ends a text before.
          temperature: divides the logits; 0 takes the likeliest token always.
          top_k: draw from this many likeliest tokens; 0 is off.
          top_p: draw from the fewest likeliest tokens with this much probability; 1 is off.
          min_p: draw from tokens with at least this share of the likeliest one's probability; 0 is off.
          seed: of the draws.
          chat: put the message into the chat template of the run's tokenizer; the text is the answer.
          system: with `chat`, the system message before it.
          step: the checkpoint's; None is the newest.

        Raises:
          UserError: no run or step there, an impossible value, or a text that is too long.
          NumericsError: logits that are not finite.
        """
        from sparsezoo_jax.inference import Sampling
        from sparsezoo_jax.text_model import TextModel

        if system is not None and not chat:
            raise ConfigError("system", system, "needs chat=True")
        sampling = Sampling(temperature, top_k, top_p, min_p)
        if self._text is None or self._text[0] != step:
            self._text = (step, TextModel.load(self.workdir, step=step))
        model = self._text[1]
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [model.encode_message(text, system) if chat else model.encode(text) for text in texts]
        found = model.texts(model.generate(ids, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed))
        return found[0] if isinstance(prompt, str) else found

    def metrics(self, *, frame: bool | None = None) -> Any:
        """The rows of the run's log; see `sparsezoo_jax.metrics`."""
        return metrics(self.workdir, frame=frame)
