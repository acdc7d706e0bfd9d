"""Delta activations on clips: `python -m benchmarks.delta_video`.

A small network reads generated clips of a moving shape, frame by frame, and says where it moves: two convolutions and a
dense layer, each followed by a delta activation layer (arXiv 2107.07305), and an output over all frames. It is trained
with plain ReLUs, with rounded ones, and with a loss on what changes, for some rates, also longer. Printed are accuracy,
the share of activations that are 0 and that don't change, the multiply-adds of a frame that these leave, and how far
products that are made by changes are from whole ones. Results are kept in `--results` and not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsezoo_jax.data.images import open_images
from sparsezoo_jax.models.delta import DeltaActivation, DeltaConfig, Spikes, change, spike_loss, spikes

#: Rate of the loss (None: plain ReLUs, nothing is rounded), and how many times as many steps as `--steps`.
VARIANTS: dict[str, tuple[float | None, int]] = {
    "ReLU": (None, 1),
    "rounded, rate 0": (0.0, 1),
    "rate 0.001": (1e-3, 1),
    "rate 0.01": (1e-2, 1),
    "rate 0.03": (3e-2, 1),
    "rate 0.03, twice as long": (3e-2, 2),
    "rate 0.1": (1e-1, 1),
}


#: What enters the maps.
INPUTS = ("pixels", "first", "second", "third")


class Seen(NamedTuple):
    """What enters a linear map."""

    x: jax.Array
    """[B, T, ...]."""
    spikes: Spikes


class ClipNetwork(nnx.Module):
    """Clips [B, T, S, S, C] to scores of the classes."""

    def __init__(self, size: int, frames: int, channels: int, classes: int, *, rounds: bool, rngs: nnx.Rngs):
        widths, units = (8, 16), 64
        self.conv1 = nnx.Conv(channels, widths[0], (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(widths[0], widths[1], (3, 3), rngs=rngs)
        self.dense = nnx.Linear((size // 4) ** 2 * widths[1], units, rngs=rngs)
        self.out = nnx.Linear(frames * units, classes, rngs=rngs)
        self.rounds = rounds
        # Multiply-adds that an entry takes part in (of convolutions, away from the border).
        self.fan_outs = (9 * widths[0], 9 * widths[1], units, classes)
        shapes = ((size, size, widths[0]), (size // 2, size // 2, widths[1]), (units,))
        self.activations = nnx.List(
            DeltaActivation(shape, DeltaConfig(pool=2 if len(shape) == 3 else None)) for shape in shapes
        )

    def __call__(self, clips: jax.Array) -> tuple[jax.Array, list[Seen]]:
        """Scores [B, classes], and what enters the maps."""
        x = clips.astype(jnp.float32) / 255
        seen = [Seen(x, spikes(x))]
        for i, layer in enumerate((self.conv1, self.conv2, self.dense)):
            x = self._activated(i, layer(x if i < 2 else x.reshape(*x.shape[:2], -1)))
            seen.append(Seen(x, spikes(x)))
        return self.out(x.reshape(len(x), -1)), seen

    def _activated(self, i: int, x: jax.Array) -> jax.Array:
        if self.rounds:
            return self.activations[i](x).x
        x = jax.nn.relu(x)
        return nnx.max_pool(x, (2, 2), strides=(2, 2)) if i < 2 else x


def trained(options: argparse.Namespace, rate: float | None, times: int, train: Any) -> ClipNetwork:
    """The network after its training."""
    clips, labels, classes = train
    network = ClipNetwork(
        options.size,
        options.frames,
        clips.shape[-1],
        len(classes),
        rounds=rate is not None,
        rngs=nnx.Rngs(options.seed),
    )
    steps = options.steps * times
    optimizer = nnx.Optimizer(network, optax.adam(optax.cosine_decay_schedule(3e-3, steps)), wrt=nnx.Param)

    @nnx.jit
    def step(network: ClipNetwork, optimizer: nnx.Optimizer, clips: jax.Array, labels: jax.Array) -> None:
        def loss_of(network: ClipNetwork) -> jax.Array:
            scores, seen = network(clips)
            loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))
            spiking = zip(seen[1:], network.fan_outs[1:], strict=True)
            return loss + (rate or 0.0) * sum(spike_loss(each.spikes, fan_out) for each, fan_out in spiking)

        optimizer.update(network, nnx.grad(loss_of)(network))

    draw = np.random.default_rng(options.seed)
    for _ in range(steps):
        chosen = draw.integers(0, len(labels), options.batch_size)
        step(network, optimizer, clips[chosen], labels[chosen])
    return network


def figures_of(network: ClipNetwork, test: Any) -> dict[str, Any]:
    """Accuracy, and of what enters each map the shares that are 0 and that don't change."""
    clips, labels, _ = test
    call = nnx.jit(lambda network, clips: network(clips))
    correct, seen = [], []
    zeros, same = ({name: [] for name in INPUTS} for _ in range(2))
    for start in range(0, len(labels) // 64 * 64, 64):
        scores, seen = call(network, clips[start : start + 64])
        correct.append(np.mean(np.argmax(scores, axis=1) == labels[start : start + 64]))
        for name, each in zip(INPUTS, seen, strict=True):
            zeros[name].append(float(jnp.mean(each.x == 0)))
            same[name].append(1 - float(each.spikes.density))
    costs = (fan_out * int(np.prod(each.x.shape[2:])) for fan_out, each in zip(network.fan_outs, seen, strict=True))
    maps = list(zip(INPUTS, costs, strict=True))
    fields = {name: (statistics.fmean(zeros[name]), statistics.fmean(same[name])) for name in INPUTS}
    whole = sum(cost for _, cost in maps)
    return {
        "accuracy": float(np.mean(correct)),
        "maps": fields,
        "by_zeros": sum(cost * (1 - fields[name][0]) for name, cost in maps) / whole,
        "by_changes": sum(cost * (1 - fields[name][1]) for name, cost in maps) / whole,
        "steps": [float(jnp.mean(jnp.abs(layer.step[...]))) for layer in network.activations],
        "apart": apart(network, seen[1].x),
    }


def apart(network: ClipNetwork, x: jax.Array) -> float:
    """Largest difference of a convolution's products by changes from whole ones, relative to the largest product."""
    of_zeros = network.conv2(jnp.zeros_like(x[:1, :1]))  # the bias
    whole = network.conv2(x) - of_zeros
    of_changes = network.conv2(jnp.concatenate([x[:, :1], change(x)[:, 1:]], axis=1)) - of_zeros
    return float(jnp.max(jnp.abs(jnp.cumsum(of_changes, axis=1) - whole)) / jnp.max(jnp.abs(whole)))


def percent(values: Sequence[float]) -> str:
    """Shares for a table."""
    return ", ".join(f"{value:.1%}" for value in values)


def main() -> None:
    """Make what results are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/delta_video"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    form = {"size": options.size, "frames": options.frames}
    sets: list[Any] = []
    print("| trained with | accuracy | zeros | unchanged | multiply-adds by zeros | by changes | steps | apart |")
    print("|---" * 8 + "|")
    for variant in options.variants:
        path = options.results / f"{variant.replace(', ', '-').replace(' ', '-')}-seed{options.seed}.json"
        if not path.exists():
            sets = sets or [
                open_images("moving_shapes", "train", count=options.clips, **form),
                open_images("moving_shapes", "validation", count=512, **form),
            ]
            rate, times = VARIANTS[variant]
            started = time.perf_counter()
            found = figures_of(trained(options, rate, times, sets[0]), sets[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
            print(f"{variant}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        found = json.loads(path.read_text())
        zeros, same = zip(*found["maps"].values(), strict=True)
        row = [variant, f"{found['accuracy']:.1%}", percent(zeros), percent(same)]
        row += [f"{found['by_zeros']:.1%}", f"{found['by_changes']:.1%}"]
        row += [", ".join(f"{s:.2f}" for s in found["steps"]) if variant != "ReLU" else "", f"{found['apart']:.1e}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
