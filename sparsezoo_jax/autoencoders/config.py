"""Kinds of sparse autoencoders, and how they are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models.records import FFN_GATE, FFN_OUTPUT, RESIDUAL

Site = Literal["residual", "ffn_output", "ffn_gate", "transcoder"]
TRANSCODER = "transcoder"
SITES: tuple[str, ...] = (RESIDUAL, FFN_OUTPUT, FFN_GATE, TRANSCODER)
Normalisation = Literal["mean", "token", "none"]


def _check_width(features: int) -> None:
    require(features > 0, "sae.features", features, "must be above 0")


def _check_penalty(config: StandardSAE | GatedSAE) -> None:
    require(config.penalty >= 0, "sae.penalty", config.penalty, "must be at least 0")
    start = config.anneal_start
    require(start is None or start >= 0, "sae.anneal_start", start, "must be at least 0 or None")
    require(0 < config.anneal_end <= 1, "sae.anneal_end", config.anneal_end, "must be above 0 and at most 1")


def _check_k(config: TopKSAE | BatchTopKSAE | FeatureChoiceSAE) -> None:
    _check_width(config.features)
    require(0 < config.k <= config.features, "sae.k", config.k, f"must be from 1 to {config.features} features")
    require(config.aux_weight >= 0, "sae.aux_weight", config.aux_weight, "must be at least 0")
    aux_k = config.aux_k
    require(aux_k is None or 0 < aux_k <= config.features, "sae.aux_k", aux_k, "must be from 1 to the features or None")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StandardSAE:
    """ReLU codes with an L1 penalty, or one that is annealed to L_p (Karvonen et al., arXiv 2408.00113, section 2)."""

    kind: Literal["standard"] = "standard"
    features: int = 4096
    """Features."""
    penalty: float = 0.05
    """Weight of the penalty (lambda)."""
    anneal_start: int | None = None
    """Step from which p falls from 1 to `anneal_end` in ten values over the rest of training. None: p stays 1."""
    anneal_end: float = 0.2
    """Last p."""
    normalisation: Normalisation = "mean"
    """Inputs are divided by the root of their mean square (mean), each by its own norm (token), or left alone."""

    def __post_init__(self):
        _check_width(self.features)
        _check_penalty(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GatedSAE:
    """A gate says which features fire, a magnitude how much (Rajamanoharan et al., arXiv 2404.16014).

    The penalty is on the gate alone, so that it shrinks no code. Gate and magnitude share the encoder's directions:
    `W_mag = exp(r) W_gate`, with a bias each.
    """

    kind: Literal["gated"] = "gated"
    features: int = 4096
    """Features."""
    penalty: float = 0.5
    """Weight of the penalty on the gate's ReLU'd pre-activations (lambda)."""
    anneal_start: int | None = None
    """Step from which the penalty's p falls from 1 to `anneal_end` in ten values over the rest of training. None: p
    stays 1."""
    anneal_end: float = 0.2
    """Last p."""
    normalisation: Normalisation = "mean"
    """Inputs are divided by the root of their mean square (mean), each by its own norm (token), or left alone."""

    def __post_init__(self):
        _check_width(self.features)
        _check_penalty(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JumpReLUSAE:
    """Each feature has a trained threshold, and the penalty counts features (Rajamanoharan et al., arXiv 2407.14435).

    Thresholds learn by pseudo-derivatives: those of a step that is smoothed over `bandwidth`.
    """

    kind: Literal["jump_relu"] = "jump_relu"
    features: int = 4096
    """Features."""
    penalty: float = 0.1
    """Weight of the penalty (lambda): on the number of features that fire, or on `(that / target_l0 - 1)^2`."""
    target_l0: float | None = None
    """Features of a token, on average over a batch, that the penalty aims at. None: as few as it can get."""
    bandwidth: float = 0.05
    """Width of the kernel of the pseudo-derivatives (epsilon), for inputs whose entries have a mean square of 1. The
    paper's 0.001 is for inputs of norm 1, so sqrt(D) times that here."""
    threshold: float = 0.05
    """Thresholds at the start, in the same units. Training keeps them at 0 or above."""
    normalisation: Normalisation = "mean"
    """Inputs are divided by the root of their mean square (mean), each by its own norm (token), or left alone."""

    def __post_init__(self):
        _check_width(self.features)
        require(self.penalty >= 0, "sae.penalty", self.penalty, "must be at least 0")
        target, allowed = self.target_l0, f"must be above 0 and at most {self.features} features, or None"
        require(target is None or 0 < target <= self.features, "sae.target_l0", target, allowed)
        require(self.bandwidth > 0, "sae.bandwidth", self.bandwidth, "must be above 0")
        require(self.threshold >= 0, "sae.threshold", self.threshold, "must be at least 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopKSAE:
    """The k largest codes of each token (Gao et al., arXiv 2406.04093)."""

    kind: Literal["topk"] = "topk"
    features: int = 4096
    """Features."""
    k: int = 32
    """Features of a token."""
    aux_k: int | None = None
    """Dead features that explain the residual in the auxiliary loss. None: half the input's width."""
    aux_weight: float = 1 / 32
    """Weight of that loss."""
    tied: bool = False
    """The encoder is the decoder's transpose, without a bias (arXiv 2506.14002, as `gba`), not a matrix of its own."""
    output_scale: float = 1.0
    """What codes are multiplied by in the reconstruction. With a tied encoder and far below 1 no feature sees what the
    others explain, and each turns towards what its own tokens share: a study of which features exist, not a fit."""
    normalisation: Normalisation = "mean"
    """Inputs are divided by the root of their mean square (mean), each by its own norm (token), or left alone."""

    def __post_init__(self):
        _check_k(self)
        require(self.output_scale > 0, "sae.output_scale", self.output_scale, "must be above 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchTopKSAE:
    """The k N largest codes of a batch of N tokens (arXiv 2412.06410); the same as Mutual Choice (arXiv 2411.02124).

    In use a feature fires above one threshold, the running mean of the smallest code kept in training.
    """

    kind: Literal["batch_topk"] = "batch_topk"
    features: int = 4096
    """Features."""
    k: int = 32
    """Features of a token, on average."""
    aux_k: int | None = None
    """Dead features that explain the residual in the auxiliary loss. None: half the input's width."""
    aux_weight: float = 1 / 32
    """Weight of that loss."""
    normalisation: Normalisation = "mean"
    """Inputs are divided by the root of their mean square (mean), each by its own norm (token), or left alone."""

    def __post_init__(self):
        _check_k(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FeatureChoiceSAE:
    """Each feature takes the tokens of a batch that have its largest codes (Ayonrinde, arXiv 2411.02124).

    Training begins as `batch_topk`. In use each feature has a threshold of its own.
    """

    kind: Literal["feature_choice"] = "feature_choice"
    features: int = 4096
    """Features."""
    k: int = 32
    """Features of a token, on average: a batch of N tokens has a budget of k N."""
    budget: Literal["zipf", "uniform"] = "zipf"
    """How that is shared out: by a Zipf law over the features' ranks of density, or equally."""
    zipf_exponent: float = 1.0
    """Exponent of the law (r + offset)^-exponent; the paper's fitted values are not published."""
    zipf_offset: float = 0.0
    """Its offset."""
    mutual_choice: float = 0.3
    """Share of the steps trained as batch_topk before features choose."""
    aux: Literal["dead", "zipf_proposed"] = "zipf_proposed"
    """Features of the auxiliary loss: dead ones, or all below the density that the law expects at their rank. The
    paper's own formula is not published; this one reduces to the other where it should."""
    aux_k: int | None = None
    """Such features that explain the residual. None: half the input's width."""
    aux_weight: float = 1 / 32
    """Weight of that loss."""
    normalisation: Normalisation = "mean"
    """Inputs are divided by the root of their mean square (mean), each by its own norm (token), or left alone."""

    def __post_init__(self):
        _check_k(self)
        require(self.zipf_exponent >= 0, "sae.zipf_exponent", self.zipf_exponent, "must be at least 0")
        require(self.zipf_offset > -1, "sae.zipf_offset", self.zipf_offset, "must be above -1")
        require(0 <= self.mutual_choice <= 1, "sae.mutual_choice", self.mutual_choice, "must be from 0 to 1")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GBASAE:
    """No penalty: biases move until each group of features fires as often as aimed at (arXiv 2506.14002)."""

    kind: Literal["gba"] = "gba"
    features: int = 4096
    """Features."""
    groups: int = 10
    """Groups of (nearly) equal size, each with its own target frequency. 1 is plain bias adaptation."""
    highest: float = 0.5
    """Target frequency of the first group (HTF)."""
    lowest: float = 1e-3
    """Target frequency of the last one (LTF); those between are in geometric progression."""
    interval: int = 50
    """Steps between adaptations."""
    decrease: float = 0.01
    """Fraction of its largest pre-activation by which the bias of a feature that fires too often falls (gamma-)."""
    increase: float = 0.01
    """Fraction of its group's mean of those by which the bias of a feature that never fires rises (gamma+)."""
    silent: float = 1e-6
    """Frequency below which a feature never fires (epsilon)."""
    activation: Literal["jump_relu", "relu"] = "jump_relu"
    """jump_relu: the code of a feature that fires leaves the bias out, so that thresholds don't shrink codes."""
    normalisation: Normalisation = "token"
    """Inputs are divided by the root of their mean square (mean), each by its own norm (token), or left alone."""

    def __post_init__(self):
        _check_width(self.features)
        allowed = f"must be from 1 to {self.features} features"
        require(0 < self.groups <= self.features, "sae.groups", self.groups, allowed)
        require(0 < self.lowest <= self.highest <= 1, "sae.lowest", self.lowest, "must be in (0, sae.highest]")
        require(self.highest <= 1, "sae.highest", self.highest, "must be at most 1")
        require(self.interval > 0, "sae.interval", self.interval, "must be above 0")
        for name in ("decrease", "increase", "silent"):
            require(getattr(self, name) > 0, f"sae.{name}", getattr(self, name), "must be above 0")


SAEConfig = Annotated[
    StandardSAE | GatedSAE | JumpReLUSAE | TopKSAE | BatchTopKSAE | FeatureChoiceSAE | GBASAE,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAETrainConfig:
    """Where a dictionary reads, and how it is trained."""

    layer: int | None = None
    """Layer, from 1; none is the one at three quarters of the depth."""
    site: Site = "residual"
    """residual: the stream after the layer. ffn_output: what its FFN adds. ffn_gate: the FFN's hidden units.
    transcoder: from what the FFN reads to what it returns (Dunefsky et al., arXiv 2406.11944)."""
    skip: bool = False
    """With site=transcoder: the output also has a linear map of the input (Paulo et al., arXiv 2501.18823)."""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 1024
    """Activations (tokens) in a step."""
    learning_rate: float = 3e-4
    """Learning rate of Adam, after a linear warm-up."""
    warmup_steps: int = 100
    """Length of the warm-up; also of the penalty's."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient."""
    dead_after: int = 10_000_000
    """Tokens without firing after which a feature is dead."""
    seed: int = 42
    """Seed of initial dictionary, groups and order of activations."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "learning_rate", "grad_clip", "dead_after"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be above 0")
        for name in ("warmup_steps", "seed"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be at least 0")
        require(self.layer is None or self.layer >= 1, "train.layer", self.layer, "must be at least 1")
        require(not self.skip or self.site == TRANSCODER, "train.skip", True, "is for train.site=transcoder only")


def check_pair(sae: SAEConfig, train: SAETrainConfig) -> None:
    """Check that a kind can be trained where it is to be.

    Raises:
      ConfigError: a transcoder whose encoder is its decoder, or whose outputs have no scale of their own.
    """
    if train.site != TRANSCODER:
        return
    tied = isinstance(sae, GBASAE) or (isinstance(sae, TopKSAE) and sae.tied)
    allowed = "of a transcoder must have an encoder and a decoder of its own; choose another --kind or no sae.tied"
    require(not tied, "sae.kind", sae.kind, allowed)
    allowed = "must be mean or none with train.site=transcoder: the norm of an output is not known before it is made"
    require(sae.normalisation != "token", "sae.normalisation", sae.normalisation, allowed)
