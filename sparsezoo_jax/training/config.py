"""How a model is trained: length, optimizer, schedule, parameter groups, objectives and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, ConfigError, require
from sparsezoo_jax.training.objectives import ObjectiveConfig

MomentDType = Literal["float32", "bfloat16"]
DecayShape = Literal["linear", "1-sqrt", "exponential", "cosine"]


def steps_of(length: float, steps: int) -> int:
    """Number of steps that `length` stands for: itself from 1 on, a fraction of `steps` below 1."""
    return round(length * steps) if length < 1 else int(length)


def _check_length(name: str, length: float) -> None:
    require(
        length >= 0 and (length < 1 or length == int(length)),
        f"train.schedule.{name}",
        length,
        "must be a whole number of steps, or a fraction of train.steps between 0 and 1",
    )


def _check_rate(config: Cosine | WSD | WSDC | Constant) -> None:
    require(config.learning_rate > 0, "train.schedule.learning_rate", config.learning_rate, "must be above 0")
    _check_length("warmup_steps", config.warmup_steps)


def _check_ratio(ratio: float) -> None:
    require(0 <= ratio <= 1, "train.schedule.min_ratio", ratio, "must be between 0 and 1")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Cosine:
    """Linear warm-up, then half a cosine down to min_ratio * learning_rate at the last step."""

    kind: Literal["cosine"] = "cosine"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""
    min_ratio: float = 0.1
    """Final learning rate divided by the peak."""

    def __post_init__(self):
        _check_rate(self)
        _check_ratio(self.min_ratio)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WSD:
    """Warm-up, stable, decay: the decay ends at min_ratio * learning_rate at the last step (arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Learning rate of the stable phase."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""
    decay_steps: float = 0.2
    """Length of the decay: a number of steps, or a fraction of train.steps when below 1."""
    decay: DecayShape = "1-sqrt"
    """Shape of the decay."""
    min_ratio: float = 0.0
    """Final learning rate divided by the peak; above 0 for the exponential decay."""

    def __post_init__(self):
        _check_rate(self)
        _check_length("decay_steps", self.decay_steps)
        _check_ratio(self.min_ratio)
        if self.decay == "exponential":
            require(
                self.min_ratio > 0, "train.schedule.min_ratio", self.min_ratio, "must be above 0 to decay exponentially"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WSDC:
    """Warm-up, stable, decay, constant: after the decay the run goes on at min_ratio * learning_rate."""

    kind: Literal["wsdc"] = "wsdc"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Learning rate of the stable phase."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""
    stable_steps: float = 0.6
    """Length of the stable phase: a number of steps, or a fraction of train.steps when below 1."""
    decay_steps: float = 0.2
    """Length of the decay: a number of steps, or a fraction of train.steps when below 1."""
    decay: DecayShape = "1-sqrt"
    """Shape of the decay."""
    min_ratio: float = 0.1
    """Learning rate of the constant tail divided by the peak; above 0 for the exponential decay."""

    def __post_init__(self):
        _check_rate(self)
        _check_length("stable_steps", self.stable_steps)
        _check_length("decay_steps", self.decay_steps)
        _check_ratio(self.min_ratio)
        if self.decay == "exponential":
            require(
                self.min_ratio > 0, "train.schedule.min_ratio", self.min_ratio, "must be above 0 to decay exponentially"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Constant:
    """Linear warm-up, then a constant learning rate; merge the last checkpoints instead of decaying (merging.py)."""

    kind: Literal["constant"] = "constant"
    """Schedule kind."""
    learning_rate: float = 3e-4
    """Learning rate after the warm-up."""
    warmup_steps: float = 0.02
    """Length of the linear warm-up: a number of steps, or a fraction of train.steps when below 1."""

    def __post_init__(self):
        _check_rate(self)


def _check_adam(config: AdamW | Muon) -> None:
    for name in ("b1", "b2"):
        value = getattr(config, name)
        require(0 <= value < 1, f"train.optimizer.{name}", value, "must be at least 0 and below 1")
    require(config.eps > 0, "train.optimizer.eps", config.eps, "must be above 0")
    require(config.weight_decay >= 0, "train.optimizer.weight_decay", config.weight_decay, "must be at least 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101); the decay is multiplied by the learning rate."""

    kind: Literal["adamw"] = "adamw"
    """Optimizer kind."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors and scalars do not decay."""
    decay_embeddings: bool = False
    """Whether token embeddings and the output head decay, too."""
    first_moment_dtype: MomentDType = "float32"
    """Storage type of the first moment."""

    def __post_init__(self):
        _check_adam(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Muon:
    """Muon for matrices (arXiv 2502.16982), AdamW at the same learning rate for embeddings, output head and vectors."""

    kind: Literal["muon"] = "muon"
    """Optimizer kind."""
    momentum: float = 0.95
    """Decay rate of Muon's Nesterov momentum."""
    newton_schulz_steps: int = 5
    """Newton-Schulz iterations of the orthogonalisation."""
    update_rms: float = 0.2
    """Root mean square of an update in units of the learning rate; 0.2 matches AdamW's, so its rates can be reused."""
    b1: float = 0.9
    """AdamW: decay rate of the first moment."""
    b2: float = 0.95
    """AdamW: decay rate of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors and scalars do not decay."""
    decay_embeddings: bool = False
    """Whether token embeddings and the output head decay, too."""
    first_moment_dtype: MomentDType = "float32"
    """Storage type of both momenta."""

    def __post_init__(self):
        _check_adam(self)
        require(0 <= self.momentum < 1, "train.optimizer.momentum", self.momentum, "must be at least 0 and below 1")
        steps = self.newton_schulz_steps
        require(steps > 0, "train.optimizer.newton_schulz_steps", steps, "must be above 0")
        require(self.update_rms > 0, "train.optimizer.update_rms", self.update_rms, "must be above 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Adafactor:
    """Adafactor with factored second moments (arXiv 1804.04235) and an explicit learning rate."""

    kind: Literal["adafactor"] = "adafactor"
    """Optimizer kind."""
    momentum: float | None = None
    """Decay rate of the first moment; None keeps none."""
    decay_exponent: float = 0.8
    """The second moment decays at rate 1 - t^-decay_exponent."""
    clip_threshold: float = 1.0
    """Largest root mean square of a parameter's update, per layer."""
    scale_by_parameter: bool = False
    """Multiply each update by the root mean square of its parameter (then learning rates near 1e-2 are usual)."""
    min_factored_size: int = 128
    """Matrices with a side below this keep a full second moment."""
    weight_decay: float = 0.0
    """Decay of matrices; vectors and scalars do not decay."""
    decay_embeddings: bool = False
    """Whether token embeddings and the output head decay, too."""
    first_moment_dtype: MomentDType = "float32"
    """Storage type of the first moment."""

    def __post_init__(self):
        name = "train.optimizer"
        if self.momentum is not None:
            require(0 <= self.momentum < 1, f"{name}.momentum", self.momentum, "must be at least 0 and below 1")
        require(self.decay_exponent > 0, f"{name}.decay_exponent", self.decay_exponent, "must be above 0")
        require(self.clip_threshold > 0, f"{name}.clip_threshold", self.clip_threshold, "must be above 0")
        require(self.min_factored_size > 0, f"{name}.min_factored_size", self.min_factored_size, "must be above 0")
        require(self.weight_decay >= 0, f"{name}.weight_decay", self.weight_decay, "must be at least 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParameterGroup:
    """Parameters that train differently from the rest; the first group whose pattern matches a parameter gets it."""

    pattern: str
    """Regular expression searched in the parameter's path, such as 'ffn/router' in 'segments/0/0/ffn/router'."""
    lr_multiplier: float = 1.0
    """Factor on the learning rate; 0 freezes."""
    clip: float | None = None
    """Own gradient clip norm; the group then takes no part in the global one."""
    weight_decay: float | None = None
    """Own weight decay, whatever the parameter's rank; None keeps the optimizer's rule."""

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            allowed = f"is no regular expression ({error})"
            raise ConfigError("train.groups.pattern", self.pattern, allowed) from None
        require(self.lr_multiplier >= 0, "train.groups.lr_multiplier", self.lr_multiplier, "must be at least 0")
        require(self.clip is None or self.clip > 0, "train.groups.clip", self.clip, "must be above 0 or None")
        decay = self.weight_decay
        require(decay is None or decay >= 0, "train.groups.weight_decay", decay, "must be at least 0 or None")


OptimizerConfig = Annotated[AdamW | Muon | Adafactor, Field(discriminator="kind")]
ScheduleConfig = Annotated[Cosine | WSD | WSDC | Constant, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How a model is trained."""

    steps: int = 1000
    """Number of optimizer steps of the whole run; the schedules span it."""
    stop_at: int | None = None
    """Stop after this step as if interrupted: schedules are unchanged, and a run without it goes on from there."""
    log_every: int = 10
    """Steps between rows of metrics."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    """Number of newest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss, too (and evaluate whenever a checkpoint is saved)."""
    seed: int = 0
    """Seed of the initialisation and of every random stream of the model."""
    init_from: str | None = None
    """Run directory whose parameters this run starts from: of the same architecture, or of a dense one whose FFNs
    become experts (upcycling). Its tokenizer is taken too, unless data.tokenizer names one. None: random parameters."""
    init_step: int | None = None
    """Checkpoint of that run; None is the newest."""
    upcycle_noise: float = 0.02
    """Relative standard deviation of noise on the experts that are copies of a dense FFN; without it, all are equal."""
    accumulation: int = 1
    """Micro-batches per step; they divide data.batch_size, and change memory, not results."""
    loss_chunk: int | None = None
    """Positions of each sequence whose logits exist at one time; they divide data.seq_len. None: all. Saves memory."""
    grad_clip: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    z_loss: float = 0.0
    """Coefficient of the mean squared log-partition of the output softmax; 0 is off."""
    max_skipped_steps: int = 10
    """Number of consecutive steps with a non-finite loss or gradient after which the run stops."""
    profile_start: int | None = None
    """Start a jax.profiler trace before this step (counted from 1), into workdir/profile; None traces nothing."""
    profile_steps: int = 5
    """Number of steps in the trace."""
    optimizer: OptimizerConfig = AdamW()
    """Optimizer."""
    schedule: ScheduleConfig = Cosine()
    """Learning rate over the steps."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with their own learning rate, clip or decay."""
    objectives: tuple[ObjectiveConfig, ...] = ()
    """Weights of the model's auxiliary losses; a loss without an objective is logged, but does not train."""

    def __post_init__(self):
        for name in ("steps", "log_every", "keep_last", "accumulation", "max_skipped_steps", "profile_steps"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be above 0")
        for name in ("eval_every", "checkpoint_every", "seed", "z_loss", "upcycle_noise"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be at least 0")
        for name in ("stop_at", "grad_clip", "loss_chunk", "profile_start"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", value, "must be above 0 or None")
        require(
            self.init_from is None or bool(self.init_from.strip()), "train.init_from", "''", "must name a run directory"
        )
        require(
            self.init_step is None or (self.init_from is not None and self.init_step >= 0),
            "train.init_step",
            self.init_step,
            "must be at least 0, and train.init_from given",
        )
        losses = [objective.loss for objective in self.objectives]
        for loss in losses:
            require(losses.count(loss) == 1, "train.objectives.loss", loss, "has more than one objective")
        phases = [getattr(self.schedule, f"{phase}_steps", 0) for phase in ("warmup", "stable", "decay")]
        total = sum(steps_of(length, self.steps) for length in phases)
        allowed = f"the schedule's phases take {total} steps; shorten them, or give them as fractions of train.steps"
        require(total <= self.steps, "train.steps", self.steps, allowed)
