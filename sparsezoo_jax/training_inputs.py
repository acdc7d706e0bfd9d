"""What a run reads, in the form that training, evaluation and reports take it: batches of text, or of images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from sparsezoo_jax import data
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.data.documents import Split
from sparsezoo_jax.data.images.batches import Patching, ReadImages, image_batches, images_once
from sparsezoo_jax.errors import ConfigError, StorageError, require
from sparsezoo_jax.evaluation import Evaluation, calibrate, corpora, evaluate_corpora, evaluate_model
from sparsezoo_jax.training_tables import print_figures, print_image_figures, print_mixture, print_sample, show_text

Between = Callable[[], None]
ToDevice = Callable[[Mapping[str, Any]], Any]


class Inputs(Protocol):
    """Batches to train on, and a split to validate on."""

    batches: Any
    """A `BatchIterator` of training batches."""
    tokens_by_corpus: Callable[[], Mapping[str, int]] | None
    """As of `training.loop.fit`."""

    def training_sample(self, batches: int) -> Iterator[data.Batch]:
        """The first batches of the training split, in the order that it is stored in."""
        ...

    def shown(self, max_batches: int | None) -> Iterator[data.Batch]:
        """Batches of the validation split."""
        ...

    def evaluate(
        self, model: Any, max_batches: int | None, between: Between, to_device: ToDevice
    ) -> tuple[Evaluation, dict[str, Any]]:
        """Averages over the validation split, and further metrics; `between` is called after each batch."""
        ...

    def save(self, workdir: Path) -> None:
        """Write what the run directory holds beside configuration and checkpoints."""
        ...

    def final_figures(self, further: Mapping[str, Any]) -> dict[str, Any]:
        """What `evaluation.json` says beside the averages: of `further`, as the last `evaluate` gave it."""
        ...

    def show(self, figures: dict[str, Any], workdir: Path) -> None:
        """Print the final figures."""
        ...

    def show_sample(self, model: Any, step: int, workdir: Path) -> None:
        """Print what the model makes, where it makes something to read."""
        ...


def open_inputs(config: RunConfig, workdir: Path, rows: range, *, resumes: bool, trained_on: str | None) -> Inputs:
    """What `config` reads.

    Args:
      rows: of a batch, those that this process feeds.
      resumes: whether there is a run in `workdir`.
      trained_on: fingerprint of the split that its checkpoint was trained on.

    Raises:
      UserError: a corpus, image set or tokenizer that can't be used; nothing has been written to `workdir` then.
      StorageError: reading or writing failed.
    """
    if config.model.images.patch is not None:
        return ImageInputs(config, rows)
    return TextInputs(config, workdir, rows, resumes=resumes, trained_on=trained_on)


class TextInputs:
    """A tokenizer, and the sequences of a corpus or a mixture."""

    def __init__(self, config: RunConfig, workdir: Path, rows: range, *, resumes: bool, trained_on: str | None):
        self._config = config
        tokenizer = data.find_tokenizer(workdir) if resumes else None
        self._template_of = None
        if tokenizer is None and config.train.init_from is not None and config.data.tokenizer is None:
            self._template_of = config.train.init_from
            tokenizer = data.find_tokenizer(self._template_of)  # what embeddings mean is the other run's
        if tokenizer is None:
            tokenizer = data.open_tokenizer(config.data)
        require(
            tokenizer.vocab_size <= config.model.vocab_size,
            "model.vocab_size",
            config.model.vocab_size,
            f"must be at least the tokenizer's {tokenizer.vocab_size}",
        )
        self._tokenizer = tokenizer
        # First of all, for a run whose corpus changed is refused here, before anything is prepared.
        self._prepared, self.batches = training_batches(config, tokenizer, rows, trained_on)
        mixes = config.data.mixture is not None
        self.tokens_by_corpus: Callable[[], Mapping[str, int]] | None = self.batches.tokens_by_corpus if mixes else None
        if mixes and jax.process_index() == 0:
            print_mixture(config, self._prepared)
        self._validation = data.prepare(config.data, "validation", tokenizer)

    def training_sample(self, batches: int) -> Iterator[data.Batch]:
        """As `Inputs`; of a prepared corpus only."""
        assert self._prepared is not None
        return data.evaluation_batches(self._prepared, self._config.data.batch_size, batches)

    def shown(self, max_batches: int | None) -> Iterator[data.Batch]:
        """Batches of the validation split, of a mixture in the shares of its corpora."""
        return data.evaluation_batches(self._validation, self._config.data.batch_size, max_batches)

    def evaluate(
        self, model: Any, max_batches: int | None, between: Between, to_device: ToDevice
    ) -> tuple[Evaluation, dict[str, Any]]:
        """As `Inputs`; further are the evaluations of each corpus of a mixture by name."""

        def shown(split: data.PreparedSplit) -> Iterator[data.Batch]:
            for batch in data.evaluation_batches(split, self._config.data.batch_size, max_batches):
                yield batch
                between()

        loss_chunk = self._config.train.loss_chunk
        found, self._each = evaluate_corpora(model, self._validation, shown, loss_chunk=loss_chunk, to_device=to_device)
        return found, corpora.by_name(self._each)

    def save(self, workdir: Path) -> None:
        """The tokenizer, and the chat template of the run that it is from."""
        try:
            self._tokenizer.save(workdir)
            if self._template_of is not None:
                data.copy_template(self._template_of, workdir)
        except OSError as error:
            raise StorageError(f"{workdir}: the tokenizer can't be saved: {error.strerror}") from None

    def final_figures(self, further: Mapping[str, Any]) -> dict[str, Any]:
        """Corpora of a mixture, and the entropies of simpler predictors."""
        figures: dict[str, Any] = {}
        if self._each:
            figures["corpora"] = corpora.as_figures(self._validation, self._each)
        size = self._tokenizer.vocab_size
        figures["bigram_entropy"] = data.weighted(
            self._validation, lambda split: data.bigram_entropy(split, size).entropy
        )
        if self._prepared is not None:
            pairs = zip(data.components_of(self._prepared), data.components_of(self._validation), strict=True)
            entropies = ((held.weight, data.unigram_entropy(read.split, held.split, size)) for read, held in pairs)
            figures["unigram_entropy"] = sum(weight * found.entropy for weight, found in entropies)
        return figures

    def show(self, figures: dict[str, Any], workdir: Path) -> None:
        """Print the final figures."""
        print_figures(figures, workdir)
        if jax.process_count() > 1:
            commands = [f"generate {workdir} --prompt ...", f"report {workdir}"]
            print("\nFor a sample and the report: python -m sparsezoo_jax." + " and ".join(commands))

    def show_sample(self, model: Any, step: int, workdir: Path) -> None:
        """Print a continuation of a prompt."""
        sample = print_sample(model, self._tokenizer, data.stop_ids(workdir, self._tokenizer))
        if sample is not None and "tensorboard" in self._config.train.writers:
            show_text(workdir, step, "sample", sample)


class ImageInputs:
    """The images of a set."""

    def __init__(self, config: RunConfig, rows: range):
        self._config = config
        # One of several equal parts of a batch.
        part, parts = rows.start // len(rows), config.data.batch_size // len(rows)
        patching = patching_of(config)
        self._validation = ReadImages(config.data, "validation", patching)
        self._train = train = ReadImages(config.data, "train", patching)
        self.batches = image_batches(train, config.data, part, parts)
        self.tokens_by_corpus: Callable[[], Mapping[str, int]] | None = None
        print(
            f"{config.data.dataset}: {len(train):,} images to train on, {len(self._validation):,} to validate on",
            file=sys.stderr,
        )

    def training_sample(self, batches: int) -> Iterator[data.Batch]:
        """As `Inputs`."""
        return images_once(self._train, self._config.data.batch_size, batches)

    def shown(self, max_batches: int | None) -> Iterator[data.Batch]:
        """Batches of the validation split."""
        return images_once(self._validation, self._config.data.batch_size, max_batches)

    def evaluate(
        self, model: Any, max_batches: int | None, between: Between, to_device: ToDevice
    ) -> tuple[Evaluation, dict[str, Any]]:
        """As `Inputs`; of a classifier further are "accuracy" and "ece"."""
        return evaluate_images(model, self._config, lambda: self.shown(max_batches), between, to_device)

    def save(self, workdir: Path) -> None:
        """Nothing."""

    def final_figures(self, further: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracy and calibration error of a classifier."""
        return dict(further)

    def show(self, figures: dict[str, Any], workdir: Path) -> None:
        """Print the final figures."""
        print_image_figures(figures, workdir)

    def show_sample(self, model: Any, step: int, workdir: Path) -> None:
        """Nothing."""


def evaluation_images(config: RunConfig, split: Split) -> ReadImages:
    """The images of a split, to evaluate a run on."""
    return ReadImages(config.data, split, patching_of(config))


def patching_of(config: RunConfig) -> Patching:
    """How the model of a run reads images."""
    images = config.model.images
    assert images.patch is not None
    return Patching(images.size, images.channels, images.patch, images.visible, config.model.vocab_size)


def evaluate_images(
    model: Any,
    config: RunConfig,
    shown: Callable[[], Iterator[data.Batch]],
    between: Between = lambda: None,
    to_device: ToDevice = dict,
) -> tuple[Evaluation, dict[str, Any]]:
    """Averages over batches of images; of a classifier also "accuracy" and "ece" (see `evaluation.Calibration`)."""

    def watched() -> Iterator[data.Batch]:
        for batch in shown():
            yield batch
            between()

    found = evaluate_model(model, watched(), to_device=to_device)
    if config.model.images.reconstructs or jax.process_count() > 1:
        return found, {}
    scores = calibrate(model, watched(), to_device=to_device)
    return found, {"accuracy": scores.accuracy, "ece": scores.ece}


def training_batches(config: RunConfig, tokenizer: Any, rows: range, trained_on: str | None = None) -> tuple[Any, Any]:
    """The prepared training split (None when streaming), and batches: the rows of each that this process feeds.

    `trained_on` is the fingerprint of the split that a run was trained on (of a mixture: those of all corpora): another
    one is refused before it is prepared.

    Raises:
      ConfigError: all corpora of a mixture end before the run.
    """
    # One of several equal parts of a batch.
    part, parts = rows.start // len(rows), config.data.batch_size // len(rows)
    if config.data.mode == "prepared":
        prepared = data.prepare(config.data, "train", tokenizer, expected=trained_on)
        batches = data.prepared_batches(
            prepared, batch_size=config.data.batch_size, seed=config.data.seed, process_index=part, process_count=parts
        )
        if config.train.steps > batches.num_batches:
            batches.close()
            allowed = f"all corpora of data.mixture have ended after {batches.num_batches} batches, by their epochs"
            raise ConfigError("train.steps", config.train.steps, allowed)
        return prepared, batches
    return None, data.streaming_batches(config.data, "train", tokenizer, process_index=part, process_count=parts)
