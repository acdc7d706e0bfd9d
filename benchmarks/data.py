"""Preparing a corpus, and training on it again: `python -m benchmarks.data [PART ...] [--megabytes N] [--kills N]`.

Parts: scaling (one core and two, and the memory that less text takes), restart (time to the first step), kills
(records bitwise as without), starters (several at once), reader (two billion records). The text is made of the embedded
corpus; that of kills and starters is a tenth. What a part printed is kept in --dir and not measured again there, so
that a command that was cut off goes on with the part that it was in, and kills with the next one. On a machine that
others use, look at CPU time rather than time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = 15e12
#: CPU time from the start of Python to the first batch.
OPEN = """
import sys, time
from sparsezoo_jax import data
config = data.DataConfig(dataset=sys.argv[1], tokenizer=sys.argv[2] or None, seq_len=1024, batch_size=1)
tokenizer = data.open_tokenizer(config)
data.prepare(config, "validation", tokenizer)
next(data.prepared_batches(data.prepare(config, "train", tokenizer), batch_size=1, seed=0))
print(time.process_time())
"""
PREPARE = (sys.executable, "-m", "sparsezoo_jax.prepare")
#: The command that takes no two files of half a megabyte together, so that a small text has many shards.
SMALL_PARTS = """
from sparsezoo_jax import cli, prepare
from sparsezoo_jax.data.local_files import documents
documents.PART_BYTES = 500_000
cli.run(prepare.main)
"""


def main() -> None:
    """Measure the parts that are asked for, and print each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--megabytes", type=int, default=1000, help="of text")
    parser.add_argument("--small-megabytes", type=int, default=100, help="of text to compare memory with")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--starters", type=int, default=4)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "sparsezoo-benchmark-data")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    os.environ["SPARSEZOO_CACHE"] = str(options.dir / "cache")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for part in options.parts or PARTS:
        shown = options.dir / f"{part}-{options.megabytes}.txt"
        if not shown.exists():
            lines = list(PARTS[part](options))
            shown.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"## {part}\n\n{shown.read_text(encoding='utf-8')}", flush=True)


# ---------------------------------------------------------------------------------------------------------- The corpus
def corpus(options: argparse.Namespace, megabytes: int, files: int = 10) -> Path:
    """A directory with JSON lines of so many megabytes in some files: paragraphs of the embedded corpus, drawn."""
    from sparsezoo_jax.data.sotu import corpus_directory

    folder = options.dir / (f"text-{megabytes}" if files == 10 else f"text-{megabytes}-{files}")
    if folder.exists():
        return folder
    speeches = sorted((corpus_directory() / "speeches").glob("*.txt"))
    paragraphs = [p for path in speeches for p in path.read_text(encoding="utf-8").split("\n") if len(p) > 40]
    draw = random.Random(megabytes)
    partial = options.dir / f".{folder.name}"
    partial.mkdir(exist_ok=True)
    for number in range(files):
        with open(partial / f"{number}.jsonl", "w", encoding="utf-8") as file:
            while file.tell() < megabytes * 1_000_000 / files:
                texts = ["\n".join(draw.choices(paragraphs, k=draw.randint(1, 12))) for _ in range(10)]
                file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    partial.rename(folder)
    return folder


def tokenizer(options: argparse.Namespace) -> Path:
    """A directory with a tokenizer of 32,768 tokens, trained on ten megabytes."""
    from sparsezoo_jax.data import DataConfig, build_tokenizer, open_documents

    folder = options.dir / "tokenizer"
    if not folder.exists():
        config = DataConfig(dataset=str(corpus(options, 10)), bpe_vocab_size=32768)
        build_tokenizer(config, open_documents(config, "train")).save(folder)
    return folder


def command(options: argparse.Namespace, text: Path, out: Path, *more: object) -> list[str]:
    """The command that prepares the training split of a text."""
    flags = {"--data.dataset": text, "--data.tokenizer": tokenizer(options), "--out": out, "--data.seq-len": 1024}
    flags |= {"--splits": "train", "--data.validation-fraction": 0.01}
    return [*PREPARE, *(str(word) for pair in flags.items() for word in pair), *map(str, more)]


def in_small_parts(options: argparse.Namespace, megabytes: int, out: Path, workers: int) -> list[str]:
    """The same with many shards of little text: a file and a shard for each half of a megabyte."""
    text = corpus(options, megabytes, 2 * megabytes)
    words = command(options, text, out, "--data.shard-bytes", 500_000, "--workers", workers)
    return [sys.executable, "-c", SMALL_PARTS, *words[len(PREPARE) :]]


# ----------------------------------------------------------------------------------------------------------- Measuring
def measured(words: list[str]) -> dict[str, float]:
    """Runs a command; seconds, CPU seconds, and the most memory that it and its processes had together (MB)."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.5):
            peak = max(peak, sum(map(memory, family(process.pid))))

    thread = threading.Thread(target=watch)
    thread.start()
    _, error = process.communicate()
    ended.set()
    thread.join()
    if process.returncode:
        raise RuntimeError(error)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.monotonic() - started, "cpu": cpu, "peak": peak / 1e6}


def family(pid: int) -> Iterator[int]:
    """A process and all those that it started."""
    yield pid
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from family(int(child))


def memory(pid: int) -> float:
    """Bytes of a process, what it shares with others divided among them."""
    with contextlib.suppress(OSError):
        return 1024.0 * int(re.findall(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[0])
    return 0.0


def records(out: Path) -> str:
    """A digest of all files of records."""
    digest = hashlib.sha256()
    for path in sorted((out / "train").glob("*.array_record")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def manifest(out: Path) -> dict[str, Any]:
    """That of the training split."""
    return json.loads((out / "train" / "manifest.json").read_text())


def prepared(options: argparse.Namespace, megabytes: int) -> Path:
    """A corpus, prepared."""
    out = options.dir / f"prepared-{megabytes}"
    subprocess.run(command(options, corpus(options, megabytes), out), check=True, capture_output=True)
    return out


# --------------------------------------------------------------------------------------------------------------- Parts
def scaling(options: argparse.Namespace) -> Iterator[str]:
    """One process against two, each with one thread."""
    whole, small = options.megabytes, options.small_megabytes
    figures, made = {}, {}
    for workers, megabytes in ((2, small), (1, whole), (2, whole)):
        out = options.dir / f"scaling-{workers}-{megabytes}"
        shutil.rmtree(out, ignore_errors=True)
        figures[workers, megabytes] = measured(command(options, corpus(options, megabytes), out, "--workers", workers))
        made[megabytes] = manifest(out)
    yield "| workers | text | tokens | shards | time | tokens/s | CPU time | tokens per CPU second | peak memory |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (workers, megabytes), one in figures.items():
        tokens, shards = made[megabytes]["num_tokens"], len(made[megabytes]["shards"])
        yield (
            f"| {workers} | {megabytes:,} MB | {tokens:,} | {shards} | {one['seconds']:.1f} s "
            f"| {tokens / one['seconds']:,.0f} | {one['cpu']:.1f} s | {tokens / one['cpu']:,.0f} "
            f"| {one['peak']:.0f} MB |"
        )
    yield ""
    same = records(options.dir / f"scaling-1-{whole}") == records(options.dir / f"scaling-2-{whole}")
    ratio = figures[1, whole]["seconds"] / figures[2, whole]["seconds"]
    yield f"two against one: {ratio:.2f} times; same records: {same}"
    size = sum(shard["bytes"] for shard in made[whole]["shards"]) / made[whole]["num_tokens"]
    yield f"stored: {size:.2f} bytes a token"
    yield from on_paper(made[whole]["num_tokens"] / figures[1, whole]["cpu"], size)


def on_paper(rate: float, size: float) -> Iterator[str]:
    """What these rates mean for a large run."""
    shards = TOKENS * size / 1e9
    yield ""
    days, size_tb = TOKENS / rate / 86400, TOKENS * size / 1e12
    yield f"on paper, {TOKENS / 1e12:.0f}T tokens: {days:,.0f} core-days, {size_tb:,.1f} TB"
    yield f"in {shards:,.0f} files of a gigabyte, whose manifest has {shards * 150 / 1e6:.1f} MB"


def restart(options: argparse.Namespace) -> Iterator[str]:
    """Time to the first step of a run that is started again."""
    text = corpus(options, options.megabytes)
    shared = ["--data.seq-len", "1024", "--data.batch-size", "1", "--model.max-seq-len", "1024"]
    corpora = {
        "embedded": ["--data.dataset", "sotu"],
        f"{options.megabytes:,} MB of text, prepared on the fly before": ["--data.dataset", str(text)],
        f"{options.megabytes:,} MB of text, its prepared directory": ["--data.dataset", str(options.dir / "both")],
    }
    words = [*PREPARE, "--data.dataset", str(text), "--out", str(options.dir / "both"), "--data.seq-len", "1024"]
    subprocess.run([*words, "--data.tokenizer", str(tokenizer(options))], check=True, capture_output=True)
    yield "| corpus | first step of a restarted run after | CPU time of opening the data |\n|---|---|---|"
    for name, flags in corpora.items():
        workdir = options.dir / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        train = [sys.executable, "-m", "sparsezoo_jax.train", "--arch", "dense", "--workdir", str(workdir), *shared]
        train += [*flags, "--train.steps", "4", "--train.schedule.warmup-steps", "1", "--eval.no-report"]
        train += ["--model.layers", "1", "--model.d-model", "64", "--model.vocab-size", "32768"]
        train += ["--eval.final-batches", "1", "--train.eval-every", "0", "--eval.meter-batches", "0"]
        if "both" not in flags[-1]:
            train += ["--data.tokenizer", str(tokenizer(options))]
        subprocess.run([*train, "--train.stop-at", "2"], check=True, capture_output=True)
        subprocess.run(train, check=True, capture_output=True)
        seconds = json.loads((workdir / "evaluation.json").read_text())["seconds_to_first_step"]
        names = [flags[1], str(tokenizer(options)) if "both" not in flags[-1] else ""]
        opened = subprocess.run([sys.executable, "-c", OPEN, *names], check=True, capture_output=True, text=True)
        yield f"| {name} | {seconds} s | {float(opened.stdout):.2f} s |"


def undisturbed(options: argparse.Namespace, megabytes: int) -> Path:
    """The small parts prepared without a fault; made once."""
    out = options.dir / f"whole-{megabytes}"
    subprocess.run(in_small_parts(options, megabytes, out, 2), check=True, capture_output=True)
    return out


def files_of_shards(out: Path) -> set[str]:
    """Names of the files of records, begun ones too, of what is known of them, and of their leases."""
    return {path.name for path in out.glob("train/*shard-*")}


def kills(options: argparse.Namespace) -> Iterator[str]:
    """SIGKILL at random moments, until it is done; then again from the beginning."""
    megabytes = max(options.megabytes // 10, 10)
    whole, out = undisturbed(options, megabytes), options.dir / f"killed-{megabytes}"
    kept = options.dir / f"killed-{megabytes}.json"
    if kept.exists():
        found = json.loads(kept.read_text())
    else:
        shutil.rmtree(out, ignore_errors=True)
        found = {"kills": 0, "working": 0, "rounds": 0, "same": 0, "most": 0}
    expected, shards = records(whole), len(manifest(whole)["shards"])
    words = in_small_parts(options, megabytes, out, 2)
    while found["kills"] < options.kills:
        before = files_of_shards(out)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Every fifth at any moment, the others when shards were taken: on a busy machine it takes a while to start.
        while found["kills"] % 5 and process.poll() is None and files_of_shards(out) <= before:
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random.Random(found["kills"]).uniform(0.0, 9.0))
        if process.poll() is None:
            process.kill()
            process.wait()
            found["kills"] += 1
            found["working"] += files_of_shards(out) != before
            found["most"] = max(found["most"], len(list(out.glob("train/.shard-*.array_record.*"))))
        else:
            found["rounds"] += 1
            found["same"] += records(out) == expected
            shutil.rmtree(out)
        kept.write_text(json.dumps(found))
    subprocess.run(words, check=True, capture_output=True)
    rounds = found["rounds"] + 1
    yield f"{megabytes:,} MB in {shards:,} shards, two workers: {found['kills']} kills in {rounds} preparations"
    yield f"records bitwise as without: {found['same'] + (records(out) == expected)} of {rounds}"
    yield f"kills when shards had been taken: {found['working']}; the others fell into the start of the command"
    yield (
        f"shards that lay begun after a kill: at most {found['most']}; each kill leaves one for each worker, "
        "and those of an earlier one are made again in their turn"
    )


def starters(options: argparse.Namespace) -> Iterator[str]:
    """Several commands at once share the work."""
    megabytes = max(options.megabytes // 10, 10)
    out, whole = options.dir / "together", undisturbed(options, megabytes)
    shutil.rmtree(out, ignore_errors=True)
    words = in_small_parts(options, megabytes, out, 1)
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) for _ in range(options.starters)]
    found = [process.communicate()[0] for process in processes]
    numbers = [re.findall(r"made now *│ *([\d,]+) documents", text) for text in found]
    counts = [int(number[0].replace(",", "")) if number else 0 for number in numbers]
    yield f"{options.starters} commands at once: exit statuses {[process.returncode for process in processes]}"
    yield f"documents made by each: {counts}, together {sum(counts):,} of {manifest(out)['num_documents']:,}"
    yield f"records bitwise those of one: {records(out) == records(whole)}"


def reader(options: argparse.Namespace) -> Iterator[str]:
    """A forged manifest of two billion records, of which files make up what is read."""
    del options
    import grain  # noqa: F401  # before memory is measured

    from sparsezoo_jax.data import pipeline
    from sparsezoo_jax.data.manifest import PreparedSplit, Shard, shard_name

    count, each, seq_len = 16_000, 125_000, 4096
    segments = np.ones(seq_len + 1, "<u4")

    class Forged:
        """Record i of the corpus holds i in its first token."""

        def __init__(self, path: Path):
            self.first = each * int(path.name.split("-")[1])

        def ok(self) -> bool:
            return True

        def num_records(self) -> int:
            return each

        def read(self, numbers: list[int]) -> list[bytes]:
            return [np.stack([np.full(seq_len + 1, self.first + i, "<u4"), segments]).tobytes() for i in numbers]

        def close(self) -> None:
            pass

    pipeline.open_reader = Forged
    before = resident()
    shards = tuple(Shard(name=shard_name(i, count), records=each, bytes=10**9, sha256="0" * 64) for i in range(count))
    counts = dict.fromkeys(("num_targets", "num_tokens", "num_bytes", "num_documents"), count * each * seq_len)
    corpus = PreparedSplit(
        path="/nowhere",
        split="train",
        fingerprint="forged",
        documents="",
        tokenizer="",
        recipe="",
        num_records=count * each,
        skipped={},
        seq_len=seq_len,
        vocab_size=2**17,
        pad_id=0,
        shards=shards,
        **counts,
    )
    yield f"{corpus.num_records:,} records of {seq_len:,} tokens in {count:,} files, batches of 1,024 sequences"
    yield ""
    yield "| hosts | first batch after | batch 1,000,000 after | its time | same order | resident memory more |"
    yield "|---|---|---|---|---|---|"
    expected = None
    for hosts in (1, 64, 256):
        started = time.perf_counter()
        parts = [
            pipeline.prepared_batches(corpus, batch_size=1024, seed=0, process_index=p, process_count=hosts, prefetch=0)
            for p in range(hosts)
        ]
        parts[0].batch_at(0)
        first = time.perf_counter() - started
        started = time.perf_counter()
        rows = parts[0].batch_at(10**6)["tokens"][:, 0]
        later = time.perf_counter() - started
        started = time.perf_counter()
        for n in range(1, 11):
            parts[0].batch_at(10**6 + n)
        steady = (time.perf_counter() - started) / 10
        more = (resident() - before) / 1e6
        order = np.concatenate([rows, *(part.batch_at(10**6)["tokens"][:, 0] for part in parts[1:])])
        expected = order if expected is None else expected
        same = np.array_equal(order, expected)
        yield f"| {hosts} | {first:.2f} s | {later:.3f} s | {steady * 1e3:.1f} ms | {same} | {more:.0f} MB |"
        for part in parts:
            part.close()
    yield ""
    with tempfile.TemporaryDirectory() as folder:
        yield opening(Path(folder) / "file", each)


def opening(path: Path, count: int) -> str:
    """What opening a real file of so many records costs (short ones: its index counts)."""
    from sparsezoo_jax.data.record_file import open_reader, open_writer

    writer = open_writer(path)
    for i in range(count):
        writer.write(i.to_bytes(8, "little") * 16)
    writer.close()
    before, started = resident(), time.perf_counter()
    opened = open_reader(path)
    opened.read([count // 2])
    seconds, more = time.perf_counter() - started, (resident() - before) / 1e6
    opened.close()
    return (
        f"a real file of {count:,} records: {seconds * 1e3:.1f} ms to open and read one, {more:.1f} MB while it is open"
    )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "scaling": scaling,
    "restart": restart,
    "kills": kills,
    "starters": starters,
    "reader": reader,
}


if __name__ == "__main__":
    main()
