"""Fine-tuning on long sequences whose layers leave out blocks of tokens: capacities, predictors and their files.

`models.elimination` says what a layer computes. Here is what decides before the first step: how many blocks each layer
keeps, and networks that say the importance of blocks without the scores of all pairs of tokens.

Source: LeMo (arXiv 2501.09767; JENGA, USENIX ATC 2025).
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, StorageError, require
from sparsezoo_jax.models import DecoderConfig
from sparsezoo_jax.models.elimination import Elimination, Network
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.storage import write_atomic

FILE = "lemo.npz"
"""Name of the file in a run directory that has what was measured."""
SUBLAYERS: tuple[str, ...] = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PredictorConfig:
    """Networks that say the importance of blocks; they are fitted once, before the first step, and stay as they are."""

    rank: int | None = None
    """Columns of the first and of the last of their three matrices. None: an eighth of d_model."""
    epochs: int = 400
    """Steps of Adam on all sequences that they are fitted to."""
    rate: float = 1e-3
    """Its learning rate."""
    batches: int = 8
    """Training batches that are read for it, and for train.lemo.profile; recall is measured on the last of them."""
    prune: float = 0.3
    """Share of the networks' neurons that is removed while they are fitted: those that are 0 most often."""
    prunings: int = 3
    """Equal steps in which that is done, at equal distances."""

    def __post_init__(self):
        name = "train.lemo.predictor"
        require(self.rank is None or self.rank > 0, f"{name}.rank", self.rank, "must be above 0 or None")
        for field in ("epochs", "rate", "prunings"):
            require(getattr(self, field) > 0, f"{name}.{field}", getattr(self, field), "must be above 0")
        require(self.batches > 1, f"{name}.batches", self.batches, "must be at least 2")
        require(0 <= self.prune < 1, f"{name}.prune", self.prune, "must be in [0, 1)")
        allowed = f"must be at least {self.prunings + 1}, for train.lemo.predictor.prunings={self.prunings}"
        require(self.epochs > self.prunings, f"{name}.epochs", self.epochs, allowed)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AscentConfig:
    """The search for thresholds of importance that the profile begins with (LeMo, Algorithm 1).

    A threshold t is moved by `rate (a(t + probe) - a(t - probe)) / (2 probe)`, a the share of next tokens that the
    dense model gets right with what is below the thresholds left out; t is in units of the layer's mean importance.
    """

    rounds: int = 0
    """Moves of each layer's two thresholds; each takes four passes over the batches."""
    probe: float = 0.1
    """Distance at which accuracy is looked at."""
    rate: float = 1.0
    """Factor on the slope."""

    def __post_init__(self):
        require(self.rounds >= 0, "train.lemo.ascent.rounds", self.rounds, "must be at least 0")
        for field in ("probe", "rate"):
            require(getattr(self, field) > 0, f"train.lemo.ascent.{field}", getattr(self, field), "must be above 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LeMoConfig:
    """Blocks of tokens that layers leave out while adapters are trained (LeMo, arXiv 2501.09767).

    Their residual stream passes; evaluation and decoding compute all tokens.
    """

    capacity: tuple[float, ...] = ()
    """Share of a sequence's blocks that attention keeps, in (0, 1]: one for all layers, or one for each, which are
    unrolled then. None at all: nothing is left out, unless train.lemo.profile is on."""
    ffn_capacity: tuple[float, ...] = ()
    """The same for feed-forward networks. None at all: that of attention."""
    profile: bool = False
    """Take as each layer's capacity the share of blocks whose importance is above a threshold, measured before the
    first step: the layer's mean, or what train.lemo.ascent makes of it."""
    ascent: AscentConfig = AscentConfig()
    """Of train.lemo.profile."""
    block: int = 64
    """Tokens of a block; it divides data.seq_len."""
    pairs: Literal["visible", "all"] = "visible"
    """Scores of a key that count: those with queries that see it, or also with those before it in its document."""
    scores: Literal["exact", "predicted"] = "exact"
    """exact: importance is computed of all tokens in every step; predicted: by networks of the blocks' mean inputs."""
    predictor: PredictorConfig = PredictorConfig()
    """Of train.lemo.scores=predicted."""

    def __post_init__(self):
        for name in ("capacity", "ffn_capacity"):
            shares = getattr(self, name)
            require(all(0 < x <= 1 for x in shares), f"train.lemo.{name}", shares, "must be in (0, 1]")
        allowed = "works together with train.lemo.capacity or train.lemo.profile only"
        require(self.active or not self.ffn_capacity, "train.lemo.ffn_capacity", self.ffn_capacity, allowed)
        require(self.active or self.scores == "exact", "train.lemo.scores", self.scores, allowed)
        rounds = self.ascent.rounds
        allowed = "works together with train.lemo.profile only"
        require(self.profile or not rounds, "train.lemo.ascent.rounds", rounds, allowed)
        given = self.capacity + self.ffn_capacity
        require(not (self.profile and given), "train.lemo.profile", True, "can't be given with capacities")
        require(self.block > 0, "train.lemo.block", self.block, "must be above 0")

    @property
    def active(self) -> bool:
        """Whether anything may be left out."""
        return bool(self.capacity) or self.profile

    @property
    def fits(self) -> bool:
        """Whether something is measured before the first step."""
        return self.profile or self.scores == "predicted"

    def check(self, model: DecoderConfig, seq_len: int, *, context: int, prepared: bool, adapts: bool) -> None:
        """Raise `ConfigError` for a run that this can't be done in.

        Args:
          context: devices that split a sequence.
          prepared: the training split is prepared, so that batches of it can be read beforehand.
          adapts: adapters are trained.
        """
        if not self.active:
            return
        asked = ("train.lemo.profile", True) if self.profile else ("train.lemo.capacity", self.capacity)
        require(model.images.patch is None, *asked, "is for sequences of tokens, not for models of images")
        require(adapts, *asked, "needs adapters to train, by train.lora.rank")
        for name in ("capacity", "ffn_capacity"):
            shares = getattr(self, name)
            allowed = f"must be one number, or one for each of the {model.layers} layers"
            require(len(shares) in (0, 1, model.layers), f"train.lemo.{name}", shares, allowed)
        require(seq_len % self.block == 0, "train.lemo.block", self.block, f"must divide data.seq_len={seq_len}")
        require(context == 1, "mesh.context", context, f"must be 1 with {asked[0]}: blocks of all devices compete")
        allowed = f"must be prepared with {'train.lemo.profile' if self.profile else 'train.lemo.scores=predicted'}"
        require(prepared or not self.fits, "data.mode", "streaming", allowed)
        kind = model.attention.kind
        require(model.attention.scores_blocks, *asked, f"can't score blocks with model.attention.kind={kind}")
        for ffn in [model.ffn, *([] if model.first_ffn is None else [model.first_ffn])]:
            require(ffn.records_hidden, *asked, f"can't score blocks with an FFN of kind {ffn.kind}")
        kind = model.residual.kind
        plain = isinstance(model.residual, PreNormConfig)
        require(plain, *asked, f"can't be used with model.residual.kind={kind}")
        allowed = "can't be used with model.kv_shared_layers: layers would attend to keys of other blocks"
        require(model.kv_shared_layers == 0, *asked, allowed)

    def elimination(self, length: int, fitted: Fitted | None = None) -> Elimination | None:
        """What a train step of sequences of `length` tokens leaves out; None if nothing.

        `fitted`: what was measured, where `fits`; its networks are given with each step.
        """
        if not self.active:
            return None
        blocks = length // self.block
        shares = {"attention": self.capacity, "ffn": self.ffn_capacity or self.capacity}
        if self.profile:
            assert fitted is not None
            shares = fitted.capacity
        kept: dict[str, tuple[int, ...]] = {
            name: tuple(max(1, math.ceil(x * blocks - 1e-6)) for x in shares[name]) for name in SUBLAYERS
        }
        return Elimination(block=self.block, kept=kept, pairs=self.pairs)


class Fitted(NamedTuple):
    """What was measured before the first step."""

    capacity: dict[str, tuple[float, ...]]
    """Share of the blocks whose importance is above the mean, by sublayer and layer."""
    predictors: dict[str, Any] | None = None
    """For each sublayer networks [L, ...]; None where importance is exact."""
    recall: dict[str, tuple[float, ...]] = {}
    """Share of the most important blocks, as many as are kept, that networks find, by sublayer and layer."""

    def save(self, path: Path) -> None:
        """Write as NumPy's .npz: "capacity/attention" [L] and so on, "predictors/attention/query/inner" and so on.

        Raises:
          StorageError: it can't be written.
        """
        arrays = {
            f"{field}/{name}": np.asarray(x)
            for field in ("capacity", "recall")
            for name, x in getattr(self, field).items()
        }
        for path_of, x in _leaves(self.predictors or {}).items():
            arrays[f"predictors/{path_of}"] = np.asarray(x)
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        write_atomic(path, content.getvalue())


def read_fitted(path: Path) -> Fitted:
    """What `Fitted.save` wrote.

    Raises:
      StorageError: it is not there, or damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        groups = {
            field: {
                name: tuple(map(float, arrays[f"{field}/{name}"])) for name in SUBLAYERS if f"{field}/{name}" in arrays
            }
            for field in ("capacity", "recall")
        }
        predictors = None
        if any(name.startswith("predictors/") for name in arrays):

            def network(place: str) -> Network:
                return Network(*(jnp.asarray(arrays[f"predictors/{place}/{name}"]) for name in Network._fields))

            pair = {part: network(f"attention/{part}") for part in ("query", "key")}
            predictors = {"attention": pair, "ffn": network("ffn")}
        return Fitted(groups["capacity"], predictors, groups["recall"])
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{path}: can't be read ({error}); the run can't go on without it") from None


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Network):
        return {f"{prefix}{name}": x for name, x in tree._asdict().items()}
    return {path: x for name, part in tree.items() for path, x in _leaves(part, f"{prefix}{name}/").items()}
