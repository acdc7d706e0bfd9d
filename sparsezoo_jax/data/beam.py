"""Preparing on a cluster: Apache Beam (extra `[beam]`) hands out the shards, each made by the same step as anywhere.

Workers need this package, and must see the corpus and the directory of the records by the same paths. Runner, machines
and credentials are Beam's own flags. A pipeline that is started again makes what is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
from collections.abc import Sequence

from sparsezoo_jax.data.claims import make_free_shards
from sparsezoo_jax.data.preparation import Engine
from sparsezoo_jax.data.shards import Advance, Job, read_result
from sparsezoo_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer, find_tokenizer
from sparsezoo_jax.errors import StorageError, UserError


def beam_engine(flags: Sequence[str]) -> Engine:
    """An engine that runs a Beam pipeline with these flags of its runner.

    Raises `UserError` if Beam is not installed.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--engine=beam: needs Apache Beam: pip install 'sparsezoo-jax[beam]'") from None

    def run(job: Job, shards: Sequence[int], tokenizer: Tokenizer, advance: Advance) -> None:
        del tokenizer  # workers read the one beside the records
        modules = sorted({load.__module__ for load in TOKENIZER_FILES.values()})
        task = pickle.dumps((modules, job))
        with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
            numbers = pipeline | beam.Create(list(shards))
            _ = numbers | beam.Reshuffle() | beam.Map(make_here, task)  # a shard is a unit of work for any worker
        for shard in shards:
            with contextlib.suppress(FileNotFoundError):  # another command has written the manifest already
                made = read_result(job, shard)
                advance(made.documents, made.tokens, job.raw_bytes(shard))

    return run


def make_here(shard: int, task: bytes) -> None:
    """Makes a shard in a worker, unless somebody else makes it."""
    modules, job = pickle.loads(task)
    for module in modules:
        importlib.import_module(module)
    tokenizer = find_tokenizer(job.directory)
    if tokenizer is None:
        raise StorageError(f"{job.directory}: is not to be seen from here, or lacks the tokenizer")
    make_free_shards(job, [shard], tokenizer, lambda *_: None)
