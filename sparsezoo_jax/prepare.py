"""Prepare a corpus for training: `python -m sparsezoo_jax.prepare --data.dataset 'texts/*.jsonl.zst' --out DIR`.

Tokenises and packs it into files of records and a manifest. Training then takes --data.dataset DIR and needs no text.
All cores of this machine work; more machines help if they are given the same command (or --shard I/N each) and see the
same DIR. However a command was ended, the same one goes on with the file that it was in. Without --out the records go
to the cache, where training with the same flags finds them. Of a mixture (--data.mixture) every corpus is prepared.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic.dataclasses import dataclass

from sparsezoo_jax import cli, plugins
from sparsezoo_jax.configs import preset
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.path_flags import Stores

if TYPE_CHECKING:
    from sparsezoo_jax.data import PreparedSplit
    from sparsezoo_jax.data.preparation import Engine, Preparation


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Prepare:
    """Flags of the command."""

    data: DataConfig = DataConfig()
    """Corpus, tokenizer, length of sequences; the other fields change no record."""
    arch: str | None = None
    """Take the data fields that are not given from a preset of this architecture; none: from their own defaults."""
    size: str = "tiny"
    """Preset of that architecture."""
    splits: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    """What to prepare."""
    out: Annotated[Path | None, Stores()] = None
    """Directory for the records, here or in a bucket (gs:// or s3://), with a folder for each split; of a mixture with
    one for each corpus. Default: the cache."""
    workers: int | None = None
    """Processes of this machine that work. Default: one for each core."""
    shard: str | None = None
    """I/N makes only every Nth file, from number I (0 to N - 1), and does not wait for the others: for arrays of jobs,
    each with its own I. The job that finds all files done writes the manifest."""
    engine: Literal["local", "beam"] = "local"
    """local: processes of this machine. beam: a pipeline of Apache Beam (pip install 'sparsezoo-jax[beam]')."""
    beam: str = ""
    """Flags of Beam's runner, as one text: --beam='--runner=DataflowRunner --project=...'."""

    def __post_init__(self):
        require(self.workers is None or 1 <= self.workers <= 4096, "--workers", self.workers, "must be from 1 to 4096")
        require(not self.beam or self.engine == "beam", "--beam", self.beam, "goes with --engine beam")
        require(bool(self.splits), "--splits", self.splits, "must name a split")
        self.share()

    def share(self) -> tuple[int, int]:
        """I and N of `shard`."""
        if self.shard is None:
            return 0, 1
        first, slash, count = self.shard.partition("/")
        good = bool(slash) and first.isdecimal() and count.isdecimal() and 0 <= int(first) < int(count)
        require(good, "--shard", self.shard, "must be I/N with 0 <= I < N")
        return int(first), int(count)


def main(args: Sequence[str]) -> None:
    """Prepare the splits, and print what they came to."""
    plugins.load_installed()
    arch = cli.value_of(args, "--arch")
    default = Prepare() if arch is None else Prepare(data=preset(arch, cli.value_of(args, "--size") or "tiny").data)
    default, args = cli.with_lists(default, args)
    command = cli.parse(Prepare, args, prog="prepare", description=(__doc__ or "").strip(), default=default)
    prepare(command)


def prepare(command: Prepare) -> list[PreparedSplit]:
    """Prepare the splits that the command names; returns those that are finished.

    Raises:
      UserError: a corpus that can't be read or has no text, or a directory that holds something else.
      StorageError: reading or writing failed; finished files are kept.
    """
    from sparsezoo_jax import data
    from sparsezoo_jax.data.preparation import Preparation, prepared_directory

    require(bool(command.data.names), "--data.dataset", None, "must be named")
    configs, folders = [command.data], [command.out]
    if command.data.mixture is not None:
        configs = [command.data.of(part) for part in command.data.mixture]
        folders = [None if command.out is None else command.out / part.label for part in command.data.mixture]
    for config in configs:
        for split in command.splits:
            given = prepared_directory(config, split)
            require(given is None, "--data.dataset", config.dataset, "is prepared already")
    tokenizer = data.open_tokenizer(command.data)
    finished = []
    for config, folder in zip(configs, folders, strict=True):
        for split in command.splits:
            directory = None if folder is None else folder / split
            documents = data.open_documents(config, split)
            preparation = Preparation(config, split, documents, tokenizer, directory)
            made = run(preparation, command)
            finished += [] if made is None else [made]
    if command.out is not None and len(finished) == len(command.splits) * len(configs):
        print(f"\nTrain on it with {flags_for(command.data, command.out)} --data.seq-len {command.data.seq_len}")
    return finished


def flags_for(config: DataConfig, out: Path) -> str:
    """The flags that name what was prepared in a directory."""
    if config.mixture is None:
        return f"--data.dataset {out}"
    parts = [
        {"dataset": str(out / part.label), "name": part.label, "weight": part.weight}
        | ({} if part.epochs is None else {"epochs": part.epochs})
        for part in config.mixture
    ]
    return f"--data.mixture {shlex.quote(json.dumps(parts))}"


def run(preparation: Preparation, command: Prepare) -> PreparedSplit | None:
    """Prepare one split and print its table; None if other jobs have not done their shards yet."""
    from sparsezoo_jax.data.manifest import MANIFEST_FILE

    started = time.monotonic()
    documents = tokens = 0
    if not (preparation.directory / MANIFEST_FILE).exists():
        job = preparation.open()
        first, step = command.share()
        own = range(first, job.count, step)
        progress = preparation.make(job, own, workers=command.workers, engine=engine_of(command))
        documents, tokens = progress.documents, progress.tokens
        if command.shard is not None and not preparation.is_complete(job):
            print(f"{preparation.directory}: shards {command.shard} are done; others are not yet")
            return None
        preparation.finish(job)
    made = preparation.finished()
    _print_summary(made, documents, tokens, time.monotonic() - started)
    return made


def engine_of(command: Prepare) -> Engine | None:
    """What makes the shards; None for this machine."""
    if command.engine == "local":
        return None
    from sparsezoo_jax.data.beam import beam_engine

    return beam_engine(command.beam.split())


def _print_summary(made: PreparedSplit, documents: int, tokens: int, seconds: float) -> None:
    now = f"{documents:,} documents, {tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
    rows = [
        ("documents", f"{made.num_documents:,}"),
        *((f"skipped: {reason}", f"{count:,}") for reason, count in sorted(made.skipped.items())),
        ("text", f"{made.num_bytes:,} bytes"),
        ("tokens", f"{made.num_tokens:,}"),
        ("records", f"{made.num_records:,} of {made.seq_len + 1} tokens"),
        ("shards", f"{len(made.shards):,}"),
        ("size", f"{made.file_bytes:,} bytes ({made.file_bytes / max(made.num_tokens, 1):.2f} a token)"),
        ("made now", now if tokens else "nothing, all was there"),
        ("time", f"{seconds:.1f} s"),
    ]
    cli.print_table(f"{made.split}: {made.path}", ("what", "how much"), rows)


if __name__ == "__main__":
    cli.run(main)
