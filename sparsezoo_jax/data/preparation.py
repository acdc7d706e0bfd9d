"""Tokenise and pack a corpus once, into files of records that later runs read by index.

`prepare_split` gives the prepared split of one corpus: from a directory that holds one, from the cache, or made now.
The work is a list of shards (`data.shards`), each made by whoever takes it first (`data.claims`); when all are there,
whoever sees that writes the manifest (`data.manifest`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparsezoo_jax import storage
from sparsezoo_jax.data import sources
from sparsezoo_jax.data.claims import Patience, is_done, make_free_shards, shard_lease, wait_for_shards
from sparsezoo_jax.data.config import DataConfig, cache_directory
from sparsezoo_jax.data.corpora import corpus_name, open_documents
from sparsezoo_jax.data.documents import PART_BYTES, Documents, Split, digest, files_of
from sparsezoo_jax.data.manifest import (
    MANIFEST_FILE,
    PreparedSplit,
    is_manifest,
    load_prepared,
    read_sources,
    write_manifest,
)
from sparsezoo_jax.data.progress import PreparationProgress
from sparsezoo_jax.data.shards import Advance, Job, part_bytes, plan, read_result
from sparsezoo_jax.data.skipping import Skips
from sparsezoo_jax.data.special_tokens import HF_CONFIG_FILE
from sparsezoo_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from sparsezoo_jax.errors import ConfigError, DataError, StorageError
from sparsezoo_jax.lease import Lease
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.untrusted import MAX_CONFIG_BYTES, read_json

#: Changes whenever other records would be made of the same corpus and tokenizer.
RECIPE, BLOCK_RECIPE = "pack-2", "blocks-2"
PLAN_FILE, FINISHING_FILE = "plan.json", ".manifest.lease"

Engine = Callable[[Job, Sequence[int], Tokenizer, Advance], None]
"""Makes those of some shards that nobody else makes, and returns."""


def prepare_split(
    config: DataConfig, split: Split, tokenizer: Tokenizer, *, expected: str | None = None
) -> PreparedSplit:
    """The prepared split that `config` names: found where it says, found in the cache, or made there now.

    Processes that prepare the same split at once share the work; a killed one loses the shard that it was in.

    Args:
      expected: the fingerprint that a run to be resumed was trained on.

    Raises `DataError` for a corpus without text, too many documents that can't be read, or one that is not what
    `expected` says; `ConfigError` for a prepared split of another tokenizer or length; `StorageError` if files can't
    be read or written.
    """
    directory = prepared_directory(config, split)
    if directory is not None:
        prepared = _fitting(load_prepared(directory), config, tokenizer)
        if expected not in (None, prepared.fingerprint):
            raise DataError(f"data.dataset={config.dataset}: is not the prepared corpus that this run was trained on")
        return _verified(prepared, config)
    documents = open_documents(config, split)
    preparation = Preparation(config, split, documents, tokenizer)
    if expected not in (None, preparation.fingerprint):
        before = read_sources(prepared_root(config) / str(expected))
        raise DataError(sources.changed(config.dataset, before, files_of(documents)))
    return preparation.run()


def prepared_root(config: DataConfig) -> Path:
    """Where splits lie that were prepared on the fly, each in a directory named by its fingerprint."""
    return cache_directory(config) / "prepared"


def prepared_directory(config: DataConfig, split: Split) -> Path | None:
    """Where the split lies if the corpus is a prepared one: a directory with a manifest for the split, or one with
    directories for both.
    """
    name = corpus_name(config, split)
    path = storage.path(name or "").expanduser()
    path = path.parent if path.name == MANIFEST_FILE else path
    for directory in (path / split, path):
        if is_manifest(directory / MANIFEST_FILE):
            # One that is given for validation alone may be any split.
            if directory == path and config.validation_dataset is None and load_prepared(path).split != split:
                raise DataError(f"data.dataset={name}: holds no {split} split; name its directory, or the one above it")
            return directory
    return None


def _fitting(prepared: PreparedSplit, config: DataConfig, tokenizer: Tokenizer) -> PreparedSplit:
    if prepared.seq_len != config.seq_len:
        allowed = f"must be {prepared.seq_len}, that of the prepared corpus {prepared.path}"
        raise ConfigError("data.seq_len", config.seq_len, allowed)
    if prepared.tokenizer != tokenizer.fingerprint:
        given = config.tokenizer or "that of the run"
        raise ConfigError("data.tokenizer", given, f"is not the one that {prepared.path} was prepared with")
    return prepared


def _verified(prepared: PreparedSplit, config: DataConfig) -> PreparedSplit:
    if config.verify == "full":
        prepared.verify()
    return prepared


def _recipe(config: DataConfig) -> str:
    return BLOCK_RECIPE if config.in_blocks else RECIPE


class Preparation:
    """A split that is prepared, or will be.

    Args:
      directory: gets the files; may hold some already. Default: one in the cache.

    Attributes:
      fingerprint: what is prepared.
      skips: the documents that were left out, when it is finished.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        documents: Documents,
        tokenizer: Tokenizer,
        directory: Path | None = None,
    ):
        self.config, self.documents, self.tokenizer = config, documents, tokenizer
        self.split: Split = split
        sizes = (config.seq_len, config.shard_bytes)
        self.fingerprint = digest(documents.fingerprint, tokenizer.fingerprint, *sizes, split, _recipe(config))
        self.directory = prepared_root(config) / self.fingerprint if directory is None else directory
        self.skips = Skips.of(config)
        self._versions = [sources.version(file.path) for file in files_of(documents)]

    def run(self) -> PreparedSplit:
        """The finished split: what is missing is made, on all cores of this machine."""
        if (self.directory / MANIFEST_FILE).is_file():
            return _verified(self.finished(), self.config)
        job = self.open()
        self.make(job, range(job.count))
        return self.finish(job)

    def finished(self) -> PreparedSplit:
        """The split that is there already."""
        prepared = load_prepared(self.directory)
        if prepared.fingerprint != self.fingerprint:
            raise DataError(f"{self.directory}: holds another prepared corpus; name another directory")
        return prepared

    def open(self) -> Job:
        """Writes what is planned into the directory, or checks that it is what is planned there.

        Raises `DataError` if the directory is another corpus's, `StorageError` if it can't be written.
        """
        parts = self.documents.parts()
        groups, sizes = plan(parts, self.config.shard_bytes), [part_bytes(part) for part in parts]
        job = Job(self.directory, self.documents, self.config, self.split, groups, sizes)
        planned = {"fingerprint": self.fingerprint}
        path = self.directory / PLAN_FILE
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                # Whoever is first: what others write is the same.
                self.tokenizer.save(self.directory)
                write_atomic(path, json.dumps(planned).encode())
            found = read_json(path, max_bytes=MAX_CONFIG_BYTES)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise StorageError(f"{self.directory}: could not write the prepared corpus: {why}") from error
        if found != planned:
            raise DataError(
                f"{self.directory}: was begun for another corpus, tokenizer or configuration, or a file of the corpus "
                "changed since; name another directory, or delete it"
            )
        return job

    def make(
        self,
        job: Job,
        shards: Sequence[int],
        *,
        workers: int | None = None,
        engine: Engine | None = None,
    ) -> PreparationProgress:
        """Makes some shards, and waits for those of them that others make."""
        missing = [shard for shard in shards if not is_done(job, shard)]
        raw = {shard: job.raw_bytes(shard) for shard in shards}
        done = sum(raw[shard] for shard in shards if shard not in missing)
        progress = PreparationProgress(f"preparing {self.split}", sum(raw.values()), done)
        try:
            with progress:
                if missing:
                    (engine or _local(workers))(job, missing, self.tokenizer, progress.advance)
                minutes = self.config.wait_minutes
                wait_for_shards(job, missing, self.tokenizer, progress.advance, minutes=minutes)
        except DataError:
            self._leave_nothing()
            raise
        self._check_unchanged(job, missing)
        return progress

    def _leave_nothing(self) -> None:
        """Removes the directory if it has no finished shard, nor anything of somebody else."""
        own = {PLAN_FILE, HF_CONFIG_FILE, *TOKENIZER_FILES}
        with contextlib.suppress(OSError):
            if all(entry.name in own or entry.name.startswith(".") for entry in self.directory.iterdir()):
                storage.remove_tree(self.directory)

    def _check_unchanged(self, job: Job, made: Sequence[int]) -> None:
        """Unmakes `made` if a file changed meanwhile, for they may hold something else than the fingerprint says."""
        changed = [old.path for old in self._versions if sources.version(storage.path(old.path)) != old]
        if changed:
            for shard in made:
                job.result_path(shard).unlink(missing_ok=True)
            raise DataError(f"{changed[0]}: was changed while it was prepared; run the command again when it stays")

    def is_complete(self, job: Job) -> bool:
        """Whether all shards are done, also those of other jobs."""
        return all(is_done(job, shard) for shard in range(job.count))

    def finish(self, job: Job) -> PreparedSplit:
        """Writes the manifest when all shards are done, unless another process does; returns the finished split.

        Raises `DataError` for a corpus without text, with too many documents that can't be read, or that changed
        meanwhile.
        """
        lease, patience = Lease(self.directory / FINISHING_FILE), Patience(self.directory, self.config.wait_minutes)
        while not (self.directory / MANIFEST_FILE).exists():
            owner = lease.try_acquire()
            if owner is not None:
                patience.wait(owner, "the manifest")
                continue
            try:
                if not (self.directory / MANIFEST_FILE).exists():
                    self._write_manifest(job)
            finally:
                lease.release()
        return self.finished()

    def _write_manifest(self, job: Job) -> None:
        counts = dict.fromkeys(("num_records", "num_targets", "num_tokens", "num_bytes", "num_documents"), 0)
        unigrams = np.zeros(self.tokenizer.vocab_size, np.int64)
        shards = []
        for number in range(job.count):
            result = read_result(job, number)
            shards.append(result.shard)
            unigrams += result.unigrams
            numbers = (result.shard.records, result.targets, result.tokens, result.text_bytes, result.documents)
            counts = {name: total + more for (name, total), more in zip(counts.items(), numbers, strict=True)}
            self.skips.add(result.skips)
        if counts["num_targets"] == 0:
            seen = self.skips.summary() or f"{self.skips.documents:,} documents"
            for number in range(job.count):
                job.result_path(number).unlink(missing_ok=True)
                job.path(number).unlink(missing_ok=True)
            self._leave_nothing()
            raise DataError(f"data.dataset: the {self.split} split has no text to predict ({seen})")
        prepared = PreparedSplit(
            path=str(self.directory),
            split=self.split,
            fingerprint=self.fingerprint,
            documents=self.documents.fingerprint,
            tokenizer=self.tokenizer.fingerprint,
            recipe=_recipe(self.config),
            skipped=dict(self.skips.reasons),
            seq_len=self.config.seq_len,
            vocab_size=self.tokenizer.vocab_size,
            pad_id=self.tokenizer.pad_id,
            shards=tuple(shards),
            **counts,
        )
        write_manifest(prepared, unigrams, sources.describe(files_of(self.documents), PART_BYTES))
        self.skips.warn(f"data.dataset={self.config.dataset}, {self.split} split")
        # The manifest says it all now.
        for number in range(job.count):
            for path in (job.result_path(number), shard_lease(job, number).path):
                path.unlink(missing_ok=True)
        (self.directory / PLAN_FILE).unlink(missing_ok=True)


def _local(workers: int | None) -> Engine:
    """Makes shards on this machine: in this process if there is one, else in several."""

    def make(job: Job, shards: Sequence[int], tokenizer: Tokenizer, advance: Advance) -> None:
        # Not above: run as a program, that module may not be imported with its package.
        from sparsezoo_jax.data.workers import can_be_sent, cores, run_workers

        # The tokenizer uses all cores by itself, so processes are worth their start only for several shards.
        if (len(shards) == 1 and workers is None) or not can_be_sent(job):
            make_free_shards(job, shards, tokenizer, advance)
        else:
            run_workers(job, shards, cores() if workers is None else workers, advance)

    return make
