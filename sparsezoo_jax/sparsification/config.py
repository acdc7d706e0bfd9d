"""Flags of the calibration, of pruning and of the conversion to experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsezoo_jax.data.dataset_names import require_corpus
from sparsezoo_jax.errors import require


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """The text that says what maps read."""

    dataset: str | None = None
    """Corpus, named as in --data.dataset of training; none is that of --dataset, or the run's."""
    split: Literal["train", "validation"] = "train"
    """Split of that corpus, read from its beginning."""
    sequences: int = 128
    """Sequences of the run's length; fewer if there are not so many."""
    skip: int = 0
    """Sequences at its beginning that are passed over, so that several calibrations can read unlike text."""

    def __post_init__(self):
        require_corpus("--calibration.dataset", self.dataset)
        require(self.sequences > 0, "--calibration.sequences", self.sequences, "must be above 0")
        require(self.skip >= 0, "--calibration.skip", self.skip, "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class AllocationConfig:
    """How the share of channels left out is spread over the maps of a layer; every layer has the same as a whole."""

    kind: Literal["uniform", "greedy"] = "uniform"
    """uniform: all maps leave out the same share; greedy: step by step, that map is sparsified further for which the
    layer's output changes least (TEAL)."""
    step: float = 0.05
    """Of greedy: share by which a map of d_model x d_model weights is sparsified further in one step; of larger maps
    proportionally less."""
    sequences: int = 10
    """Of greedy: sequences of the calibration that it looks at."""
    last: float = 0.25
    """Of greedy: share of each sequence, its end, on which outputs are compared."""

    def __post_init__(self):
        require(0 < self.step <= 1, "--allocation.step", self.step, "must be in (0, 1]")
        require(self.sequences > 0, "--allocation.sequences", self.sequences, "must be above 0")
        require(0 < self.last <= 1, "--allocation.last", self.last, "must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class RSparseConfig:
    """How rsparse shares what a token may read between exact channels and the low-rank map of the others."""

    alpha: float | None = None
    """Share for exact channels, of all maps: 1 is no low-rank map, 0 nothing else. None: searched for by map and layer.
    """
    population: int = 32
    """Of the search: settings that a generation tries."""
    generations: int = 5
    """Of the search; 0 takes the best of those it begins with."""
    sequences: int = 16
    """Of the search: sequences of the calibration whose loss is measured."""
    seed: int = 0
    """Of the search."""

    def __post_init__(self):
        require(self.alpha is None or 0 <= self.alpha <= 1, "--rsparse.alpha", self.alpha, "must be in [0, 1]")
        require(self.population >= 4, "--rsparse.population", self.population, "must be at least 4")
        require(self.generations >= 0, "--rsparse.generations", self.generations, "must be at least 0")
        require(self.sequences > 0, "--rsparse.sequences", self.sequences, "must be above 0")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Flags of the methods that set weights to 0."""

    compare: Literal["row", "matrix"] | None = None
    """Which weights compete: those of one output, or of a whole matrix. None: matrix for magnitude, row for others."""
    gradient_norm: Literal["l1", "l2"] = "l2"
    """Of gblm: over sequences, the sum of the gradients' magnitudes, or the root of the sum of their squares."""
    gradient_weight: float = 100.0
    """Of gblm: factor on the gradients (alpha)."""

    activate: float = 0.0
    """Share of the weights, of those that go, that is taken of negative weights which moved least since the step
    --pruning.since (Activate-while-Pruning: units are 0 for fewer tokens then)."""
    since: int | None = None
    """Earlier checkpoint of the run."""
    rewind: bool = False
    """Give the weights that stay, and all other parameters, their values of the step --pruning.since, to train again
    with --train.keep-zeros."""

    def __post_init__(self):
        require(0 <= self.activate < 1, "--pruning.activate", self.activate, "must be in [0, 1)")
        asked = self.activate > 0 or self.rewind
        for flag, value in (("activate", self.activate), ("rewind", self.rewind)):
            require(not value or self.since is not None, f"--pruning.{flag}", value, "needs --pruning.since")
        require(asked or self.since is None, "--pruning.since", self.since, "is for --pruning.activate or rewind")
        require(self.gradient_weight >= 0, "--pruning.gradient-weight", self.gradient_weight, "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """Flags of the methods that remove neurons."""

    widths: Literal["uniform", "by-layer"] = "uniform"
    """uniform: all layers keep as many; by-layer: cfsp and flap say how many, and layers are filled up with zeros to
    the largest."""
    multiple: int = 1
    """Neurons kept are a multiple of this; 128 suits matrix units."""
    bias: bool | None = None
    """Put what removed neurons give on average into a bias of the output. None: for flap."""
    spread: float = 1.0
    """Of cfsp by layer: how far importances of layers are apart."""

    def __post_init__(self):
        require(self.multiple > 0, "--neurons.multiple", self.multiple, "must be above 0")
        require(self.spread >= 0, "--neurons.spread", self.spread, "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ReadMEConfig:
    """How readme makes experts, and trains them and their router."""

    domains: tuple[str, ...] = ()
    """Corpora, each named as in --data.dataset of training; one expert is made of each. None: those of the mixture that
    the run was trained on."""
    rounds: int = 8
    """Turns of the router and of the experts; 0 makes experts and a router that has learnt nothing."""
    router_steps: int = 100
    """Steps of the router in a turn."""
    expert_steps: int = 200
    """Steps of all other parameters in a turn."""
    router_rate: float = 5e-4
    """Learning rate of the router at the beginning of the first turn; half a cosine wave to 0 in each turn."""
    expert_rate: float = 5e-5
    """The same of all other parameters."""
    rate_decay: float = 0.8
    """Factor on both rates from turn to turn."""
    weight_decay: float = 0.01
    """Of AdamW."""
    batch_size: int | None = None
    """Sequences in a batch of these steps. None: as the run's."""
    router_width: int = 512
    """Width of the router's stream."""
    router_heads: int = 4
    """Attention heads of the router."""
    router_d_ff: int = 512
    """Inner width of the router's feed-forward network."""
    seed: int = 0
    """Of the router's first parameters and of the order of the batches."""

    def __post_init__(self):
        for domain in self.domains:
            require_corpus("--readme.domains", domain)
        names = ", ".join(self.domains)
        require(len(self.domains) != 1, "--readme.domains", names, "must name two corpora or more")
        require(len(set(self.domains)) == len(self.domains), "--readme.domains", names, "must name each corpus once")
        for name in ("rounds", "router_steps", "expert_steps", "weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--readme.{flag(name)}", value, "must be at least 0, and finite")
        for name in ("router_rate", "expert_rate", "rate_decay", "router_width", "router_heads", "router_d_ff"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"--readme.{flag(name)}", value, "must be above 0, and finite")
        size = self.batch_size
        require(size is None or size > 0, "--readme.batch-size", size, "must be above 0 or None")
        require(0 <= self.seed < 2**31, "--readme.seed", self.seed, f"must be from 0 to {2**31 - 1}")
        allowed = f"must be a multiple of twice --readme.router-heads={self.router_heads}"
        fits = self.router_width % (2 * self.router_heads) == 0
        require(fits, "--readme.router-width", self.router_width, allowed)


def flag(name: str) -> str:
    """A field's name as flags have it."""
    return name.replace("_", "-")
