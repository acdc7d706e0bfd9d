"""Decoding with looked-up drafts against plain greedy decoding: `python -m benchmarks.drafts RUN_DIR`.

The same prompts, from the run's validation text, are continued by both in every round; compiling is not timed. Ends
with an error where the texts differ. The union is that of the experts which a call's tokens take, as a share of all;
CLS_8 is the share that no token of a chunk of 8 takes, over the validation text.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np

from benchmarks.run_text import chunk_sparsity, expert_choices, validation_text
from sparsezoo_jax.inference import Engine, Formats, GenerationStats, Sampling, packed

#: Tokens of a call whose union of experts the statistics of a layer tell.
CHUNK = 8


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="RUN_DIR")
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 7], help=f"below {CHUNK}")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--weights", default="model", help="number format")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if max(options.drafts) >= CHUNK:
        parser.error(f"--drafts={max(options.drafts)}: must be below {CHUNK}")

    model, tokens, segments = validation_text(options.directory, 4 * options.prompts)
    beginnings = segments[:, : options.prompt_tokens]
    of_one = np.flatnonzero((beginnings == beginnings[:, :1]).all(axis=1) & (beginnings[:, 0] > 0))[: options.prompts]
    prompts = [tokens[row, : options.prompt_tokens].tolist() for row in of_one]
    sparsity = chunk_sparsity(expert_choices(model, tokens, segments, CHUNK))
    engine = Engine(packed(model, Formats(options.weights)))

    runs: dict[int, list[list[GenerationStats]]] = {drafts: [] for drafts in (0, *options.drafts)}
    for turn in range(1 + options.rounds):  # the first one compiles
        expected: list[list[int]] = []
        for drafts, rounds in runs.items():
            made = [continued(engine, prompt, options.new_tokens, drafts) for prompt in prompts]
            texts = [text for text, _ in made]
            expected = expected or texts
            if texts != expected:
                raise SystemExit(f"--drafts={drafts}: the text differs from that of greedy decoding")
            if turn:
                rounds.append([stats for _, stats in made])

    print(f"{len(prompts)} prompts, {options.new_tokens} tokens each, {options.rounds} rounds; CLS_8 {sparsity:.3f}\n")
    print("| drafts | tokens/s | quartiles | x plain | quartiles | accepted | tokens a call | union of experts |")
    print("|---|---|---|---|---|---|---|---|")
    plain = [rate(stats) for stats in runs[0]]
    for drafts, rounds in runs.items():
        rates = [rate(stats) for stats in rounds]
        ratios = [own / base for own, base in zip(rates, plain, strict=True)]
        one = rounds[0]  # what is counted is the same in every round
        drafted, steps = sum(s.drafted for s in one), sum(s.steps for s in one)
        accepted = f"{sum(s.accepted for s in one) / drafted:.1%} of {drafted:,}" if drafted else ""
        union = np.mean([np.mean(layers[f"chunk_density_{CHUNK}"]) for s in one for layers in s.layers])
        print(
            f"| {drafts} | {statistics.median(rates):.1f} | {quartiles(rates, 1)} | {statistics.median(ratios):.2f} "
            f"| {quartiles(ratios, 2)} | {accepted} | {sum(s.decoded for s in one) / steps:.2f} | {union:.3f} |"
        )


def continued(engine: Engine, prompt: list[int], new: int, drafts: int) -> tuple[list[int], GenerationStats]:
    """The greedy continuation of a prompt, and what it took."""
    generation = engine.generate([prompt], max_new_tokens=new, sampling=Sampling(temperature=0), drafts=drafts)
    for _ in generation:
        pass
    return generation.rows[0], generation.stats


def rate(round_: list[GenerationStats]) -> float:
    """Tokens a second over a round's prompts, the prompts themselves left out."""
    return sum(stats.decoded for stats in round_) / sum(stats.decode_seconds for stats in round_)


def quartiles(values: list[float], digits: int) -> str:
    """The first and third quartile."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.{digits}f} .. {high:.{digits}f}"


if __name__ == "__main__":
    main()
