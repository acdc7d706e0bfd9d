"""What attacks tell of the image classifier that they were made against: `python -m benchmarks.parsing`.

Trains small classifiers of scikit-learn's digits that differ in kernel size, activation and weight sparsity, several of
each, attacks them, and asks a parser to tell the three from the perturbations alone: of images and of classifiers that
it was not trained on. Finished parts are kept in `--runs` and not made again. `benchmarks.gradients` asks decoders.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsezoo_jax.data.images import open_images
from sparsezoo_jax.parsing.attacks import ATTACKS, perturbations
from sparsezoo_jax.parsing.intervals import Share, share_of
from sparsezoo_jax.parsing.parser import train_parser
from sparsezoo_jax.parsing.victims import ACTIVATIONS, KERNEL_SIZES, SPARSITIES, train_victims, weight_sparsities

#: Kernel sizes with activations: victims that are trained together.
FAMILIES = list(itertools.product(KERNEL_SIZES, ACTIVATIONS))
ATTRIBUTES = ("kernel size", "activation", "weight sparsity")
SIZE = 16


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits of 16 x 16 pixels from 0.25 to 0.75, so that no perturbation is cut off by the range of pixels."""
    found = open_images("digits", split, size=SIZE)
    return (0.25 + found.images / 510).astype(np.float32), found.labels


def made(options: argparse.Namespace, kernel_size: int, activation: str) -> dict[str, np.ndarray]:
    """Of a family: its weights' shares of zeros, accuracies [S, P], and perturbations of each attack [S, P, N, ...]."""
    seeds = options.seeds + options.new_seeds
    counts = f"seeds{seeds}-steps{options.steps}+{options.tuning_steps}-images{options.images}+{options.new_images}"
    path = options.runs / f"{kernel_size}-{activation}-{counts}.npz"
    if path.exists():
        with np.load(path) as kept:
            return dict(kept)
    started = time.process_time()
    victims = train_victims(
        kernel_size,
        activation,
        SPARSITIES,
        range(seeds),
        *digits("train"),
        steps=options.steps,
        tuning_steps=options.tuning_steps,
    )
    images, labels = (jnp.asarray(values) for values in digits("validation"))
    count = options.images + options.new_images
    found: dict[str, np.ndarray] = {"zeros": weight_sparsities(victims)}

    def of_all(function: Any) -> Any:
        return jax.tree.map(
            np.asarray, jax.jit(lambda all_of: jax.lax.map(lambda p: jax.lax.map(function, p), all_of))(victims.params)
        )

    found["accuracy"] = of_all(lambda params: jnp.mean(jnp.argmax(victims.scores(params, images), 1) == labels))
    x, y = images[:count], labels[:count]
    for name, config in ATTACKS.items():

        def attacked(params: Any, config: Any = config) -> tuple[jax.Array, jax.Array]:
            changes = perturbations(lambda x: victims.scores(params, x), x, y, config)
            return changes, jnp.mean(jnp.argmax(victims.scores(params, x + changes), 1) == y)

        found[name], found[f"accuracy, {name}"] = of_all(attacked)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **found)  # pyright: ignore[reportArgumentType]
    os.replace(part, path)
    print(f"{kernel_size} {activation}: {time.process_time() - started:.0f} s of CPU", flush=True)
    return found


def examples(
    families: list[dict[str, np.ndarray]], attacks: tuple[str, ...], seeds: slice, images: slice
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Perturbations [N, H, W, C], their classes by attribute, and the dense network that each one's victim is of."""
    parts = [np.stack([family[name][seeds, :, images] for name in attacks]) for family in families]
    changes = np.stack(parts)  # [families, attacks, S, P, N, H, W, C]
    numbers = np.indices(changes.shape[:5]).reshape(5, -1)
    labels = {
        "kernel size": numbers[0] // len(ACTIVATIONS),
        "activation": numbers[0] % len(ACTIVATIONS),
        "weight sparsity": numbers[3],
    }
    if len(attacks) > 1:
        labels["which attack"] = numbers[1]
    return changes.reshape(-1, *changes.shape[5:]), labels, numbers[0] * changes.shape[2] + numbers[2]


def parsed(options: argparse.Namespace, families: list[dict[str, np.ndarray]], name: str) -> list[dict[str, Any]]:
    """A row an attribute: accuracies on what the parser was trained on, on new images, and on new victims."""
    counts = f"seeds{options.seeds}+{options.new_seeds}-steps{options.steps}+{options.tuning_steps}"
    counts += f"-images{options.images}+{options.new_images}-parser{options.parser_steps}"
    path = options.runs / f"parser-{name}-{counts}.json"
    if path.exists():
        return json.loads(path.read_text())
    started = time.process_time()
    attacks = tuple(ATTACKS) if name == "all three" else (name,)
    known, new = slice(0, options.seeds), slice(options.seeds, None)
    old_images, new_images = slice(0, options.images), slice(options.images, None)
    asked = {
        "trained on": examples(families, attacks, known, old_images),
        "new images": examples(families, attacks, known, new_images),
        "new victims": examples(families, attacks, new, new_images),
    }
    changes, labels, _ = asked["trained on"]
    parser = train_parser(changes, labels, steps=options.parser_steps)
    shares: dict[str, dict[str, Share]] = {}
    for where, (changes, labels, groups) in asked.items():
        told = parser.tell(changes)
        shares[where] = {attribute: share_of(told[attribute] == labels[attribute], groups) for attribute in labels}
    rows = [
        {"attack": name, "attribute": attribute, **{where: share[attribute] for where, share in shares.items()}}
        for attribute in labels
    ]
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rows))
    os.replace(part, path)
    print(f"parser of {name}: {time.process_time() - started:.0f} s of CPU", flush=True)
    return rows


def run(options: argparse.Namespace) -> None:
    """Make what is missing and print the tables."""
    families = [made(options, *family) for family in FAMILIES]
    parsers = [(name, parsed(options, families, name)) for name in (*ATTACKS, "all three")]
    print("\nAccuracy of victims on digits kept out of training, mean over victims\n")
    print(f"| weight sparsity | weights that are 0 | as they are | {' | '.join(ATTACKS)} |")
    print("|---" * (3 + len(ATTACKS)) + "|")
    for place, sparsity in enumerate(SPARSITIES):
        names = ("zeros", "accuracy", *(f"accuracy, {name}" for name in ATTACKS))
        cells = (np.mean([family[name][:, place] for family in families]) for name in names)
        print(f"| {sparsity:g} | {' | '.join(f'{value:.1%}' for value in cells)} |")
    print("\n| attack | question | chance | trained on | known victims, new images | new victims, new images |")
    print("|---" * 6 + "|")
    for name, rows in parsers:
        for row in rows:
            seen, images, new = (Share(*row[where]) for where in ("trained on", "new images", "new victims"))
            cells = (f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})" for share in (images, new))
            print(f"| {name} | {row['attribute']} | {1 / 3:.1%} | {seen.value:.1%} | {' | '.join(cells)} |")
    print(f"\n{time.process_time():.0f} s of CPU")


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/parsing"))
    parser.add_argument("--seeds", type=int, default=4, help="dense networks of each family that the parser knows")
    parser.add_argument("--new-seeds", type=int, default=2, help="further ones, to test on")
    parser.add_argument("--steps", type=int, default=200, help="of dense networks")
    parser.add_argument("--tuning-steps", type=int, default=60, help="of victims after pruning")
    parser.add_argument("--images", type=int, default=64, help="attacked ones that the parser is trained on")
    parser.add_argument("--new-images", type=int, default=32, help="further ones, to test on")
    parser.add_argument("--parser-steps", type=int, default=600)
    options = parser.parse_args()
    for name, value in vars(options).items():
        if name != "runs" and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value}: must be at least 1")
    if options.images + options.new_images > 300:
        parser.error("--images and --new-images: must be at most 300 together, for there are so many digits")
    run(options)


if __name__ == "__main__":
    main()
