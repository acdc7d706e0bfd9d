"""Lazy Neuron at tiny scale: `python -m benchmarks.lazy_neuron`.

Trains lazy tiny on a vocabulary of its own, and prints tables beside what the paper's abstract claims
(arXiv 2210.06313):

1. Emergence: the share of hidden units that are not 0, over training, by layer and on sequences kept out of training,
   in (a) text, (b) text whose targets are permuted, (c) text whose input tokens are replaced by random ones, and (d) a
   random Markov chain of which no batch comes twice. Of (b) and (c) there are few sequences, to be learnt by heart.
2. Robustness: text with all units and with a token's k largest, trained on its own targets and on targets of which a
   share is replaced by random tokens; loss, accuracy and calibration on validation text, as it is and with input tokens
   replaced.

Runs go through the library's `fit` with batches of `benchmarks.lazy_data`. Finished ones are kept in `--runs` and not
repeated; one that was cut off resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lazy_data import (
    BatchAt,
    Chain,
    NumberedBatches,
    endless,
    in_order,
    noisy,
    random_inputs,
    sample,
    shuffled_labels,
    unigram_entropy,
)
from sparsezoo_jax import data, run_dir
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.evaluation import evaluate_model, read_history
from sparsezoo_jax.evaluation.calibration import calibrate
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.training.loop import fit

#: Shares of the training at which the table of emergence looks, after the first step.
LOOKS = (0.1, 0.25, 0.5, 1.0)
FAR = 2**30
"""Number of the first batch of the chain that is evaluated on."""
Figures = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What all runs share: a tokenizer, text to train on, and text to evaluate on."""

    tokenizer: data.Tokenizer
    train: data.Batch
    validation: data.Batch


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is trained on in a row of the table of emergence."""

    label: str
    batches: BatchAt
    validation: list[data.Batch]
    entropy: float
    """Loss of the best model that learns nothing by heart, where that is known: of frequencies, or of the chain."""


def configured(options: argparse.Namespace, top_k: int | None, seed: int) -> RunConfig:
    """Lazy tiny as the flags shape it."""
    return with_values(
        preset("lazy", "tiny"),
        {
            "data.bpe_vocab_size": options.vocab,
            "model.vocab_size": options.vocab,
            "model.ffn.top_k": top_k,
            "data.batch_size": options.batch_size,
            "data.seq_len": options.seq_len,
            "data.seed": seed,
            "train.seed": seed,
            "train.steps": options.steps,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.checkpoint_every": 100,
            "train.keep_best": False,
        },
    )


def corpus(options: argparse.Namespace) -> Corpus:
    """The embedded corpus with a tokenizer of the size asked for."""
    config = configured(options, None, 0).data
    tokenizer = data.build_tokenizer(config, data.open_documents(config, "train"))
    train = sample(data.prepare_split(config, "train", tokenizer), options.records)
    return Corpus(
        tokenizer, train, sample(data.prepare_split(config, "validation", tokenizer), options.validation_records)
    )


def trained(
    options: argparse.Namespace,
    found: Corpus,
    name: str,
    batches: BatchAt,
    validation: Iterable[data.Batch],
    *,
    top_k: int | None = None,
    seed: int = 0,
    measure: Callable[[Decoder], Figures] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The directory and the figures of a run, made now as far as it has not been: "validation" and what is measured."""
    kept = "all" if top_k is None else f"k{top_k}"
    workdir = options.runs / f"{name}-{kept}-seed{seed}-steps{options.steps}"
    result = workdir / "figures.json"
    if result.exists():
        return workdir, json.loads(result.read_text())
    config = configured(options, top_k, seed)
    resumes = run_dir.open_for_training(workdir, config, fresh=False)

    def write() -> None:
        if not resumes:
            run_dir.write_config(workdir, config)
            found.tokenizer.save(workdir)

    def evaluate(model: Any, between: Callable[[], None]) -> dict[str, Any]:
        def shown() -> Iterable[data.Batch]:
            for batch in validation:
                between()
                yield batch

        return evaluate_model(model, shown()).as_arrays()

    end = fit(
        config.train,
        build=lambda rngs: Decoder(config.model, rngs=rngs),
        data=NumberedBatches(f"{name}, {options.records} records", batches),
        batch_shape=(config.data.batch_size, config.data.seq_len),
        workdir=workdir,
        evaluate=evaluate,
        before_writing=write,
    )
    if not end.finished:
        raise SystemExit(1)  # `fit` has said why
    model = run_dir.load(workdir).model
    figures: dict[str, Any] = {"validation": evaluate_model(model, validation).as_dict()}
    if measure is not None:
        figures["measured"] = measure(model)
    result.write_text(json.dumps(figures))
    return workdir, figures


def kinds(options: argparse.Namespace, found: Corpus, seed: int) -> dict[str, Kind]:
    """What the rows of the table of emergence are trained on, by the name of their run."""
    size, vocab = options.batch_size, options.vocab
    few = next(in_order(found.train, options.heart_records))
    shuffled, random = shuffled_labels(few, seed), random_inputs(few, vocab, seed)
    text = list(in_order(found.validation, size))
    noise = list(in_order(random_inputs(found.validation, vocab, seed + 1), size))
    chain = Chain(vocab)
    own, others = chain.batches(size, options.seq_len, seed), chain.batches(size, options.seq_len, seed + 1)
    heart = f"{options.heart_records} sequences"
    return {
        "text": Kind("(a) text", endless(found.train, size, seed), text, unigram_entropy(found.train, vocab)),
        "shuffled": Kind(
            f"(b) shuffled labels, {heart}", endless(shuffled, size, seed), text, unigram_entropy(shuffled, vocab)
        ),
        "random": Kind(
            f"(c) random inputs, {heart}", endless(random, size, seed), noise, unigram_entropy(random, vocab)
        ),
        "chain": Kind(
            "(d) unlimited data", own, [others(FAR + i) for i in range(len(text))], chain.entropy
        ),
    }  # fmt: skip


def emergence(options: argparse.Namespace, found: Corpus) -> None:
    """Train on each kind of data and print how many units are not 0."""
    seed = options.seeds[0]
    looks = " | ".join(f"step {max(1, round(share * options.steps))}" for share in LOOKS)
    print(
        "Units that are not 0, mean over layers: of training batches by step, and of sequences kept out of training\n"
    )
    print(f"| trained on | step 1 | {looks} | by layer, at the end | others | loss at the end | entropy |")
    print("|---" * (6 + len(LOOKS)) + "|")
    ends = {}
    for name, kind in kinds(options, found, seed).items():
        measure = robustness_of(options, found) if name == "text" else None
        run = trained(options, found, name, kind.batches, kind.validation, seed=seed, measure=measure)
        workdir, figures = run
        course = read_history(workdir).train
        layers = {step: row for step, row in zip(course.steps, course.layers["ffn_density"], strict=True) if row}
        steps = [1, *(max(1, round(share * options.steps)) for share in LOOKS)]
        shown = [statistics.fmean(x for x in layers[step] if x is not None) for step in steps]
        last = [layers[step] for step in course.steps[-10:]]
        by_layer = [statistics.fmean(x for x in column if x is not None) for column in zip(*last, strict=True)]
        others = statistics.fmean(figures["validation"]["ffn_density"])
        loss = statistics.fmean(x for x in course.loss[-10:] if x is not None)
        ends[kind.label] = (shown[0], shown[-1], min(by_layer), max(by_layer), others)
        print(
            f"| {kind.label} | {' | '.join(f'{x:.1%}' for x in shown)} | {', '.join(f'{x:.1%}' for x in by_layer)} | "
            f"{others:.1%} | {loss:.3f} | {kind.entropy:.3f} |",
            flush=True,
        )
    print(
        "\nBy layer and loss: mean over the last 10 steps. Entropy, nats: of the targets' frequencies, in (d) of the "
        "chain; a loss below it is learnt from context, in (b) and (c) by heart."
    )
    print("\n| the abstract | here |\n|---|---|")
    first, last, low, high, others = ends["(a) text"]
    print(f"| few units are not 0 (3.0 % in T5-Base) | {last:.1%}, from {first:.1%} at first |")
    print(f"| in layers at all depths | {low:.1%} to {high:.1%} |")
    print(f"| on training and evaluation data | {last:.1%} and {others:.1%} |")
    for label, (first, last, *_) in list(ends.items())[1:]:
        print(f"| also {label[4:]} | {last:.1%}, from {first:.1%} |")
    print()


def robustness_of(options: argparse.Namespace, found: Corpus) -> Callable[[Decoder], Figures]:
    """A function that measures loss, accuracy and calibration of a model on validation text, by the share of input
    tokens that are replaced.
    """

    def measure(model: Decoder) -> Figures:
        figures = {}
        for share in (0.0, *options.corruption):
            rows = noisy(found.validation, "tokens", share, options.vocab, seed=7)
            shown = list(in_order(rows, options.batch_size))
            scores = calibrate(model, shown)
            figures[f"{share:g}"] = {"loss": scores.loss, "accuracy": scores.accuracy, "ece": scores.ece}
        return figures

    return measure


def robustness(options: argparse.Namespace, found: Corpus) -> None:
    """Train with and without top-k on clean and on noisy labels, and print what validation text shows."""
    size = options.batch_size
    validation = list(in_order(found.validation, size))
    units: list[int | None] = [None, *options.top_k]
    runs: dict[tuple[int | None, float], list[dict[str, Any]]] = {}
    for noise in (0.0, options.label_noise):
        name = "text" if noise == 0 else f"noise{noise:g}"
        for top_k in units:
            for seed in options.seeds:
                rows = noisy(found.train, "targets", noise, options.vocab, seed)
                _, figures = trained(
                    options, found, name, endless(rows, size, seed), validation,
                    top_k=top_k, seed=seed, measure=robustness_of(options, found),
                )  # fmt: skip
                runs.setdefault((top_k, noise), []).append(figures)
    shares = [f"{share:g}" for share in options.corruption]
    print(
        f"Validation text, mean over seeds {', '.join(map(str, options.seeds))} (spread): loss in nats, accuracy, ECE\n"
    )
    header = " | ".join(f"loss, accuracy with {float(s):.0%} of inputs replaced" for s in shares)
    print(f"| units of a token | labels replaced | not 0 | loss | accuracy | ECE | {header} |")
    print("|---" * (6 + len(shares)) + "|")
    for (top_k, noise), rows in runs.items():
        active = statistics.fmean(statistics.fmean(row["validation"]["ffn_density"]) for row in rows)
        cells = [_shown(rows, "0", name) for name in ("loss", "accuracy", "ece")]
        cells += [f"{_shown(rows, share, 'loss')}, {_shown(rows, share, 'accuracy')}" for share in shares]
        print(f"| {_units(top_k)} | {noise:.0%} | {active:.1%} | {' | '.join(cells)} |")
    print("\n| the abstract, of a small k | all units | " + " | ".join(_units(k) for k in units[1:]) + " | seeds |")
    print("|---" * (len(units) + 2) + "|")
    noise = options.label_noise

    def lost(top_k: int | None, seed: int, name: str, share: str, noise: float) -> float:
        here, there = (runs[top_k, n][seed]["measured"] for n in (0.0, noise))
        return there[share][name] - here["0"][name]

    claims: list[tuple[str, str, Callable[[int | None, int], float]]] = [
        ("accuracy lost to noisy labels is less", ".2%", lambda k, i: -lost(k, i, "accuracy", "0", noise)),
        ("loss added by noisy labels is less", ".3f", lambda k, i: lost(k, i, "loss", "0", noise)),
    ]
    for share in shares:
        of = f"by {float(share):.0%} corrupted inputs"
        claims += [
            (f"accuracy lost {of} is less", ".2%", lambda k, i, s=share: -lost(k, i, "accuracy", s, 0.0)),
            (f"loss added {of} is less", ".3f", lambda k, i, s=share: lost(k, i, "loss", s, 0.0)),
        ]
    claims += [
        ("ECE is less", ".4f", lambda k, i: runs[k, 0.0][i]["measured"]["0"]["ece"]),
        ("ECE is less with noisy labels", ".4f", lambda k, i: runs[k, noise][i]["measured"]["0"]["ece"]),
    ]
    for claim, form, of in claims:
        values = {k: [of(k, i) for i in range(len(options.seeds))] for k in units}
        cells = " | ".join(format(statistics.fmean(values[k]), form) for k in units)
        print(f"| {claim} | {cells} | {', '.join(_verdict(values[k], values[None]) for k in units[1:])} |")


def _units(top_k: int | None) -> str:
    return "all" if top_k is None else f"{top_k} largest"


def _shown(rows: list[dict[str, Any]], share: str, name: str) -> str:
    values = [row["measured"][share][name] for row in rows]
    form: Mapping[str, str] = {"loss": ".3f", "accuracy": ".2%", "ece": ".4f"}
    return f"{statistics.fmean(values):{form[name]}} ({max(values) - min(values):{form[name]}})"


def _verdict(with_top_k: list[float], without: list[float]) -> str:
    """Of how many seeds the claim holds."""
    held = sum(a < b for a, b in zip(with_top_k, without, strict=True))
    return f"{held} of {len(without)}"


PARTS = {"emergence": emergence, "robustness": robustness}


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/lazy-neuron"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="emergence takes the first")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument(
        "--records", type=int, default=1024, help="sequences of text to train on, drawn from the corpus"
    )
    parser.add_argument("--heart-records", type=int, default=64, help="of them, those that are to be learnt by heart")
    parser.add_argument("--validation-records", type=int, default=256)
    parser.add_argument("--top-k", type=int, nargs="+", default=[32])
    parser.add_argument("--label-noise", type=float, default=0.4)
    parser.add_argument("--corruption", type=float, nargs="+", default=[0.1, 0.3])
    options = parser.parse_args()
    few = min(options.records, options.validation_records)
    if not options.batch_size <= few or not 0 < options.heart_records <= options.records:
        parser.error(
            "--batch-size must be at most --records and --validation-records, --heart-records at most --records"
        )
    if not all(0 < share <= 1 for share in (options.label_noise, *options.corruption)):
        parser.error("--label-noise and --corruption must be above 0 and at most 1")
    found = corpus(options)
    for part in options.parts:
        PARTS[part](options, found)


if __name__ == "__main__":
    main()
