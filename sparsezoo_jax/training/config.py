"""How a model is trained: length, optimizer, schedule, parameter groups, objectives and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, ConfigError, require
from sparsezoo_jax.storage import RUN_STORES, require_place
from sparsezoo_jax.training.lemo import LeMoConfig
from sparsezoo_jax.training.lora import LoRAConfig
from sparsezoo_jax.training.objectives import ObjectiveConfig
from sparsezoo_jax.training.optimizers import AdamW, OptimizerConfig
from sparsezoo_jax.training.schedules import Cosine, MergeDecay, ScheduleConfig, steps_of
from sparsezoo_jax.untrusted import Local


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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpikeConfig:
    """What is done about a step whose loss is far above those before it."""

    mode: Literal["off", "skip", "rewind"] = "off"
    """off: nothing. skip: the step changes no parameters. rewind: go back to the newest checkpoint and pass over the
    batches from there to the spike."""
    window: int = 128
    """Good steps before a step that its loss is compared with."""
    threshold: float = 8.0
    """Spikes are losses above the window's median by more than this many robust standard deviations (1.4826 MAD)."""
    max_rewinds: int = 10
    """Number of rewinds after which the run stops instead."""

    def __post_init__(self):
        require(self.window >= 8, "train.spike.window", self.window, "must be at least 8")
        require(self.threshold > 0, "train.spike.threshold", self.threshold, "must be above 0")
        require(self.max_rewinds > 0, "train.spike.max_rewinds", self.max_rewinds, "must be above 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How a model is trained."""

    steps: int = 1000
    """Number of optimizer steps of the whole run; the schedules span it."""
    stop_at: int | None = None
    """Stop after this step as if interrupted: schedules are unchanged, and a run without it goes on from there."""
    log_every: int = 10
    """Steps between rows of metrics."""
    writers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl; `wandb` and `trackio` are extras of the package."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    checkpoint_every_minutes: float = 0.0
    """Minutes after which a checkpoint is saved, besides those by steps; 0 is never."""
    local_checkpoints: Annotated[str | None, Local()] = None
    """Directory on a disk of each machine for further checkpoints, which a failure of the machine takes along; a start
    goes on from the newest step, here or in the run directory. None: none."""
    local_checkpoint_every: Annotated[int | None, Local()] = None
    """Steps between those; None: a tenth of train.checkpoint_every."""
    keep_last: int = 2
    """Number of newest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss, too (and evaluate whenever a checkpoint is saved)."""
    merge_last: int = 1
    """Newest checkpoints by train.checkpoint_every, the last step's among them, whose average is what the run ends as,
    in place of a decay of the learning rate (WSM, arXiv 2507.17634); fewer if the run saves fewer. 1 takes the last
    step as it is. They are kept, whatever train.keep_last says."""
    merge_decay: MergeDecay = "1-sqrt"
    """Decay of the updates between these that their weights imitate: linear weighs all alike."""
    seed: int = 0
    """Seed of the initialisation and of every random stream of the model."""
    init_from: Annotated[str | None, Local()] = None
    """Run directory whose parameters this run starts from: of the same architecture, or of a dense one whose FFNs
    become experts (upcycling). Its tokenizer is taken too, unless data.tokenizer names one. None: random parameters."""
    init_step: Annotated[int | None, Local()] = None
    """Checkpoint of that run; None is the newest."""
    keep_zeros: bool = False
    """Weights of matrices that are 0 stay 0, embeddings aside: those of a pruned run keep their pattern. Matrices that
    start as zeros would never move."""
    upcycle_noise: float = 0.02
    """Relative standard deviation of noise on the experts that are copies of a dense FFN; without it, all are equal."""
    lora: LoRAConfig = LoRAConfig()
    """Train adapters, or some parameters, of the run that init_from names, whose others stay as they are."""
    lemo: LeMoConfig = LeMoConfig()
    """Leave out blocks of tokens while adapters are trained (LeMo), to save memory on long sequences."""
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
    hang_timeout: float | None = 1800.0
    """Seconds without progress, compilation not counted, after which the process ends with status 1 and the stacks of
    its threads; the run goes on when it is started again. None or 0 waits for ever."""
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
    spike: SpikeConfig = SpikeConfig()
    """Guard against spikes of the loss."""
    objectives: tuple[ObjectiveConfig, ...] = ()
    """Weights of the model's auxiliary losses; a loss without an objective is logged, but does not train."""

    def __post_init__(self):
        allowed = "can't be given with train.lora: adapters fill zeros when they are merged"
        require(not (self.keep_zeros and self.lora.active), "train.keep_zeros", self.keep_zeros, allowed)
        for name in (
            "steps",
            "log_every",
            "keep_last",
            "merge_last",
            "accumulation",
            "max_skipped_steps",
            "profile_steps",
        ):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be above 0")
        for name in (
            "eval_every",
            "checkpoint_every",
            "checkpoint_every_minutes",
            "seed",
            "z_loss",
            "upcycle_noise",
        ):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be at least 0")
        for name in ("stop_at", "grad_clip", "loss_chunk", "profile_start"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", value, "must be above 0 or None")
        hang = self.hang_timeout
        require(hang is None or hang >= 0, "train.hang_timeout", hang, "must be at least 0 or None")
        place, every = self.local_checkpoints, self.local_checkpoint_every
        require(place is None or bool(place.strip()), "train.local_checkpoints", "''", "must name a directory")
        allowed = "must be above 0, and train.local_checkpoints given"
        require(every is None or (every > 0 and place is not None), "train.local_checkpoint_every", every, allowed)
        require(
            self.init_from is None or bool(self.init_from.strip()), "train.init_from", "''", "must name a run directory"
        )
        require_place("train.local_checkpoints", self.local_checkpoints)
        require_place("train.init_from", self.init_from, schemes=RUN_STORES)
        require(
            self.init_step is None or (self.init_from is not None and self.init_step >= 0),
            "train.init_step",
            self.init_step,
            "must be at least 0, and train.init_from given",
        )
        merges, every = self.merge_last > 1, self.checkpoint_every
        require(not merges or every > 0, "train.checkpoint_every", every, "must be above 0 with train.merge_last")
        allowed = f"must be 1 with {self.lora.asked[0]}: an average of adapters is not that of the models"
        require(not merges or not self.lora.active, "train.merge_last", self.merge_last, allowed)
        losses = [objective.loss for objective in self.objectives]
        for loss in losses:
            require(losses.count(loss) == 1, "train.objectives.loss", loss, "has more than one objective")
        total = sum(steps_of(length, self.steps) for length in self.schedule.phases())
        allowed = f"the schedule's phases take {total} steps; shorten them, or give them as fractions of train.steps"
        require(total <= self.steps, "train.steps", self.steps, allowed)

    def local_every(self) -> int:
        """Steps between local checkpoints."""
        return self.local_checkpoint_every or max(self.checkpoint_every // 10, 1)

    def merged_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints are averaged at the end of the run, oldest first; empty if none are."""
        if self.merge_last == 1:
            return ()
        before = range(self.checkpoint_every, self.steps, self.checkpoint_every)[1 - self.merge_last :]
        return (*before, self.steps) if before else ()
