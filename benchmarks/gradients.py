"""What gradients tell of the decoder that they are of: `python -m benchmarks.gradients`.

Trains small decoders that differ in their FFN alone, several of each, on bytes of the embedded corpus, and asks a
softmax regression to tell from statistics of the gradients of a sequence's loss which FFN it was, and how many of its
neurons were active. The FFN's own gradients are left out, and the decoders and sequences that it is tested on are new.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparsezoo_jax import data
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.contract import FFNKind
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.spark import SparkFFNConfig
from sparsezoo_jax.parsing import share_of
from sparsezoo_jax.parsing.gradients import STATISTICS, gradient_statistics, probe, shared_paths, train_decoders

#: Equal parameters: a gated FFN has three maps, a plain one two, a Spark FFN as many as 1.5 of its width.
FFNS: dict[str, FFNKind] = {
    "gated": GatedFFNConfig(d_ff=128),
    "relu": PlainFFNConfig(d_ff=192, activation="relu"),
    "relu, 32 largest": PlainFFNConfig(d_ff=192, activation="relu", top_k=32),
    "relu, 8 largest": PlainFFNConfig(d_ff=192, activation="relu", top_k=8),
    "spark, 8": SparkFFNConfig(d_ff=192, top_k=8, r=16),
}
QUESTIONS = {
    "which FFN": ("gated", "relu", "relu, 8 largest", "spark, 8"),
    "how many neurons of a ReLU FFN": ("relu", "relu, 32 largest", "relu, 8 largest"),
}


def sequences(split: Any, count: int, length: int, seed: int) -> np.ndarray:
    """Windows of the bytes of a split's documents, int32 [count, length]."""
    documents = data.open_documents(data.DataConfig(), split)
    text = b"".join(documents[number].text.encode() for number in range(min(len(documents), 40)))
    content = np.frombuffer(text, np.uint8).astype(np.int32)
    starts = np.random.default_rng(seed).integers(0, len(content) - length, count)
    return content[starts[:, None] + np.arange(length)]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    started = time.monotonic()
    seeds, held_out = range(options.seeds), range(options.seeds, options.seeds + options.new_seeds)
    text_NT = sequences("train", 4096, options.length + 1, 0)
    known_NT, new_NT = (sequences("validation", options.sequences, options.length + 1, seed) for seed in (1, 2))
    found, losses, paths = {}, {}, ()
    for name, ffn in FFNS.items():
        config = DecoderConfig(
            vocab_size=256,
            d_model=32,
            layers=2,
            max_seq_len=options.length,
            attention=GQAConfig(heads=2, kv_heads=2, head_dim=16),
            ffn=ffn,
            scan_layers=False,
        )
        trained = train_decoders(
            config, [*seeds, *held_out], text_NT, steps=options.steps, batch_size=16, learning_rate=5e-3
        )
        paths = shared_paths(trained.template)
        losses[name] = float(np.mean(trained.losses))
        found[name] = [gradient_statistics(trained, tokens) for tokens in (known_NT, new_NT)]
        print(f"{name}: loss {losses[name]:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    columns = np.array([place for place in range(len(paths)) for _ in STATISTICS])
    parts = {
        "all but the FFN's": np.arange(len(columns)),
        "embedding alone": np.flatnonzero(["embed" in paths[place] for place in columns]),
        "all but their size": np.flatnonzero(np.arange(len(columns)) % len(STATISTICS) != 0),
    }
    print("\n| question | gradients | chance | right |\n|---|---|---|---|")
    rows = []
    for question, names in QUESTIONS.items():
        for part, chosen in parts.items():
            x = np.concatenate([found[name][0][: len(seeds)].reshape(-1, len(columns)) for name in names])
            test_SMF = np.concatenate([found[name][1][len(seeds) :] for name in names])
            labels = np.repeat(np.arange(len(names)), len(seeds) * options.sequences)
            truth_S = np.repeat(np.arange(len(names)), len(held_out))
            told = probe(x[:, chosen], labels, test_SMF.reshape(-1, len(columns))[:, chosen])
            models = np.repeat(np.arange(len(truth_S)), options.sequences)
            share = share_of(told == truth_S[models], models)
            rows.append({"question": question, "part": part, "classes": len(names), **share._asdict()})
            right = f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
            print(f"| {question} | {part} | {1 / len(names):.1%} | {right} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s, {time.process_time():.0f} s of CPU")
    return {"losses": losses, "rows": rows}


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="decoders of each FFN that the regression is fitted to")
    parser.add_argument("--new-seeds", type=int, default=3, help="further ones, to test on")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=48, help="whose gradients are taken, of each decoder")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    figures = run(options)
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
