"""How a network learns one task after another.

Fields say where their choice comes from: [code] of SHARP's authors, or [ours], where that was not to be seen.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ContinualConfig:
    """SHARP by its defaults; other values make its ablations, plain replay and fine-tuning."""

    channels: tuple[int, ...] = Field(default=(16, 32), min_length=1)
    """Channels of the early layers: convolutions of 3 x 3 with a ReLU, each before a maximum over 2 x 2 [ours]."""
    widths: tuple[int, ...] = Field(default=(256, 128), min_length=1)
    """Units of the later layers; the last one's are what tells classes apart [ours]."""
    density: float = 0.4
    """Share of the connections that a layer has, drawn at random at the start [code: 60 % are pruned]."""
    phases: int = 15
    """Phases of a task, after each of which units are chosen and connections rewired [code]."""
    epochs: int = 3
    """Epochs of a phase [code: 3 to 5]."""
    batch_size: int = 64
    """Examples of a step [ours]."""
    learning_rate: float = 1e-3
    """Of Adam, whose moments start anew with every task [ours]."""
    loss: Literal["contrastive", "cross_entropy"] = "contrastive"
    """The supervised contrastive loss, with classes told apart by the nearest of what is kept [code]; or cross-entropy,
    with an output for every class."""
    temperature: float = 0.05
    """Of the contrastive loss [code]."""
    neighbours: int = 5
    """Nearest of the kept examples that vote [code]."""
    rewiring: bool = True
    """Whether units have ages: chosen ones are shielded from those that are free, and the free ones start anew after
    each task [code]."""
    least_covered: float = 0.5
    """Share of a layer's activation that chosen units cover at least [code: 0.4 to 0.7]; it begins at all of it and
    falls along a cosine."""
    cosine_phases: int = 30
    """Phases after which that cosine would come to 0 [code]."""
    freezing: bool = True
    """Whether the connections into units that are old enough stay as they are, once replay has left their task [code];
    needs `rewiring`."""
    replay: Literal["hidden", "images", "none"] = "hidden"
    """What is kept of earlier tasks and shown again: what the early layers make of images, in 8 bits, for which these
    layers stay as the first task made them [code]; the images; or nothing."""
    kept: int = 25
    """Examples of each class that are kept [code: 25 to 100]."""
    replayed_tasks: int | None = 1
    """Replay examples of so many tasks before [code: the last one or few]. Examples of others are kept for the vote of
    the nearest alone [ours]. None: of all."""
    replayed_share: float = 0.5
    """Share of a batch that is replayed, once there is something [ours]."""

    def __post_init__(self):
        for name in ("phases", "epochs", "batch_size", "neighbours", "kept", "cosine_phases"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        for name in ("channels", "widths"):
            require(min(getattr(self, name)) > 0, name, getattr(self, name), "must all be above 0")
        require(0 < self.density <= 1, "density", self.density, "must be above 0 and at most 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be above 0")
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        require(0 < self.least_covered <= 1, "least_covered", self.least_covered, "must be above 0 and at most 1")
        require(0 < self.replayed_share < 1, "replayed_share", self.replayed_share, "must be above 0 and below 1")
        tasks = self.replayed_tasks
        require(tasks is None or tasks > 0, "replayed_tasks", tasks, "must be above 0, or None")
        allowed = "must be on for freezing: what is old enough is known by ages"
        require(self.rewiring or not self.freezing, "rewiring", self.rewiring, allowed)
        allowed = "must be hidden or images with loss=contrastive, which tells classes apart by what is kept"
        require(self.loss != "contrastive" or self.replay != "none", "replay", self.replay, allowed)


#: What both are compared with: dense layers, an output for each class, and the images of all earlier tasks, or nothing.
REPLAY = ContinualConfig(
    density=1.0, loss="cross_entropy", rewiring=False, freezing=False, replay="images", replayed_tasks=None
)
FINE_TUNING = ContinualConfig(density=1.0, loss="cross_entropy", rewiring=False, freezing=False, replay="none")
