"""What `sparsify` makes of a run, by the family of its method: a plan is checked, made, and says its figures.

A plan of channels left out by token, of weights that are 0, of neurons that are gone, or of experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax import data
from sparsezoo_jax.errors import ConfigError, require
from sparsezoo_jax.evaluation.sparsified import needed
from sparsezoo_jax.models import Decoder, DecoderConfig, activated_parameters
from sparsezoo_jax.sparsification import neurons as by_neurons
from sparsezoo_jax.sparsification import pruning, readme
from sparsezoo_jax.sparsification.allocation import greedy
from sparsezoo_jax.sparsification.calibration import Calibration, calibrate, threshold, thresholds
from sparsezoo_jax.sparsification.config import (
    AllocationConfig,
    CalibrationConfig,
    NeuronConfig,
    PruningConfig,
    ReadMEConfig,
    RSparseConfig,
)
from sparsezoo_jax.sparsification.conversion import check_no_experts, maps_taken, sparsified_config, with_cuts, wrapped
from sparsezoo_jax.sparsification.methods import METHODS, RELEASED, Method, Quantile, without_absent
from sparsezoo_jax.sparsification.progress import Progress
from sparsezoo_jax.sparsification.rotation import rotate
from sparsezoo_jax.sparsification.rsparse import rsparse

#: What keeps nothing.
NOTHING = Progress()


class Text:
    """The sequences that are calibrated on; reading them again gives the same batches."""

    def __init__(self, prepared: Any, batch_size: int, config: CalibrationConfig, rows: int = 1):
        """`rows`: of these the sequences of a batch are a multiple, `batch_size` among them; devices share them."""
        self._prepared, self._config, self._rows = prepared, config, rows
        self._size = min(batch_size, -(-config.sequences // rows) * rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of the sequences; further ones of the first and the last batch are padding."""
        skip, end, size = self._config.skip, self._config.skip + self._config.sequences, self._size
        for n, batch in enumerate(data.evaluation_batches(self._prepared, size, -(-end // size))):
            place_B1 = (n * size + np.arange(size))[:, None]
            if (n + 1) * size > skip:
                kept_B1 = (place_B1 >= skip) & (place_B1 < end)
                hidden = {name: np.where(kept_B1, batch[name], 0) for name in ("segment_ids", "mask")}
                yield {**batch, **hidden, "mask": hidden["mask"].astype(bool)}

    def first(self, sequences: int) -> list[dict[str, Any]]:
        """Batches with the first of the sequences, the whole ones of a batch; padding fills what devices share."""
        batches, left = [], sequences
        for batch in self:
            rows = np.flatnonzero(np.any(batch["segment_ids"] > 0, axis=1))[:left]
            if len(rows):
                lacking = -len(rows) % self._rows
                filled = {name: np.pad(x[rows], ((0, lacking), (0, 0))) for name, x in batch.items()}
                batches.append(filled)
            left -= len(rows)
            if left <= 0:
                break
        return batches

    def first_tokens(self) -> int:
        """Tokens of the first batch that has some of the sequences."""
        return next((int((batch["segment_ids"] > 0).sum()) for batch in self), 0)

    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(int((batch["segment_ids"] > 0).sum()) for batch in self)


class Domains:
    """The sequences of several corpora that are calibrated on, and batches to train on of all of them."""

    def __init__(self, prepared: data.PreparedMixture, batch_size: int, config: CalibrationConfig):
        self._prepared, self.batch_size = prepared, batch_size
        self.texts = {part.name: Text(part.split, batch_size, config) for part in prepared.components}

    def first_tokens(self) -> int:
        """Tokens of the first batch of the corpus that has fewest there."""
        return min(text.first_tokens() for text in self.texts.values())

    def tokens(self) -> int:
        """Tokens of all sequences that are calibrated on."""
        return sum(text.tokens() for text in self.texts.values())

    def batches(self, size: int, seed: int) -> Iterator[Mapping[str, Any]]:
        """Training batches without end."""
        found = data.prepared_batches(self._prepared, batch_size=size, seed=seed)
        try:
            yield from found
        finally:
            found.close()


class Made(NamedTuple):
    """A model that a plan made."""

    model: Decoder
    tokens: int
    """Of the text that was read for it."""
    record: dict[str, Any]
    """What `sparsify.json` says of it beside what all have."""
    calibration: Calibration | None = None


class ActivationPlan(NamedTuple):
    """Channels or neurons that are left out by token."""

    share: float
    method: Method
    dense_tokens: int
    exact: bool
    allocation: AllocationConfig
    rsparse: RSparseConfig | None
    """Of the method of that name."""

    @classmethod
    def of(
        cls,
        name: str,
        share: float,
        released: bool,
        maps: Sequence[str] | None,
        gate: Any,
        weighted: Sequence[str] | None,
        quantile: Quantile | None,
        dense_tokens: int,
        allocation: AllocationConfig,
        rsparse: RSparseConfig,
        rotated: bool = False,
    ) -> Self:
        """The method of that name with what is not None otherwise.

        Raises:
          ConfigError: choices that don't go together.
        """
        method = (RELEASED if released else METHODS)[name]
        own_maps = method.maps if maps is None else tuple(maps)
        if weighted is None:
            weighted = tuple(map for map in method.weighted if map in own_maps)
        gate = gate or method.gate
        require(gate == "threshold" or quantile is None, "--quantile", quantile, "is for --gate threshold")
        method = method._replace(
            maps=own_maps, gate=gate, weighted=tuple(weighted), quantile=quantile or method.quantile, rotate=rotated
        )
        method.sparsity(share, dense_tokens)
        return cls(share, method, dense_tokens, maps is not None, allocation, rsparse if name == "rsparse" else None)

    def target(self, config: DecoderConfig) -> DecoderConfig:
        """The decoder with masks."""
        return sparsified_config(config, self.method.sparsity(self.share, self.dense_tokens), exact=self.exact)

    def check(self, config: DecoderConfig) -> None:
        """Raise `UserError` for a decoder that this can't be done with."""
        self.target(config)
        if self.rsparse is not None:
            what = "can't have low-rank maps (--method rsparse; wina --gate threshold is the same without any)"
            check_no_experts(config, maps_taken(config, self.method.maps, exact=self.exact), what)

    def make(self, model: Decoder, text: Text, progress: Progress = NOTHING) -> Made:
        """The model with masks and their thresholds."""
        sparse = wrapped(model, self.target(model.config))
        if self.method.rotate:
            rotate(sparse)
        calibration = calibrate(sparse, text, self.dense_tokens, progress.stage("statistics"))
        shares = {name: np.full(model.config.layers, self.share) for name in calibration.maps}
        top_k = self.method.gate == "top_k"
        if self.allocation.kind == "greedy":
            of_share = None if top_k else partial(threshold, quantile=self.method.quantile)
            first, stage = text.first(self.allocation.sequences), progress.stage("allocation")
            shares = greedy(sparse, calibration, first, self.share, self.allocation, of_share, stage)
        if self.rsparse is not None:
            return self._with_low_rank(model, calibration, text, progress)
        cuts = shares if top_k else thresholds(calibration, shares, self.method.quantile)
        with_cuts(sparse, cuts)
        record = {
            "quantile": None if top_k else self.method.quantile,
            "allocation": self.allocation.kind,
            "rotated": self.method.rotate,
            "shares": {name: [float(x) for x in values] for name, values in shares.items()},
            "cuts": {name: [float(x) for x in values] for name, values in cuts.items()},
        }
        return Made(sparse, calibration.tokens, record, calibration)

    def _with_low_rank(self, model: Decoder, calibration: Calibration, text: Text, progress: Progress) -> Made:
        assert self.rsparse is not None
        batches = text.first(self.rsparse.sequences) if self.rsparse.alpha is None else []
        sparsity = self.method.sparsity(self.share, self.dense_tokens)
        sparsity = without_absent(sparsity, tuple(calibration.maps))
        found = rsparse(model, sparsity, calibration, batches, self.rsparse, progress)
        record = {
            "quantile": self.method.quantile,
            "alphas": {name: [float(x) for x in values] for name, values in found.alphas.items()},
            "ranks": {name: [int(x) for x in values] for name, values in found.ranks.items()},
            "cuts": {name: [float(x) for x in values] for name, values in found.cuts.items()},
        }
        return Made(found.model, calibration.tokens, record, calibration)

    def figures(self, made: Made, stats: Mapping[str, Any]) -> dict[str, Any]:
        """What is left out and what a token needs, by statistics of an evaluation."""
        return {**made.record, **needed(made.model.config, stats)}


class WeightPlan(NamedTuple):
    """Weights that are 0."""

    share: float
    method: str
    maps: tuple[str, ...]
    exact: bool
    pattern: str
    config: PruningConfig
    earlier: Callable[[], Decoder] | None = None
    """The model of an earlier step, where one is needed."""

    @classmethod
    def of(
        cls,
        name: str,
        share: float | None,
        maps: Sequence[str] | None,
        config: PruningConfig,
        pattern: str = "unstructured",
    ) -> Self:
        """The method of that name; a share of None is that of the pattern, or a half.

        Raises:
          ConfigError: choices that don't go together.
        """
        found = pruning.parse_pattern(pattern)
        if found is not None:
            allowed = f"must be {found.sparsity:g} with --pattern {pattern}"
            require(share is None or abs(share - found.sparsity) < 1e-6, "--sparsity", share, allowed)
            require(config.compare is None, "--pruning.compare", config.compare, "is for --pattern unstructured")
            share = found.sparsity
        require(found is None or not config.activate, "--pruning.activate", config.activate, "is for unstructured")
        half = 0.5 if share is None else share
        allowed = f"must be at most --sparsity {half:g}"
        require(config.activate <= half, "--pruning.activate", config.activate, allowed)
        for map in maps or ():
            require(map in pruning.PRUNED_MAPS, "--maps", map, f"must be one of {', '.join(pruning.PRUNED_MAPS)}")
        own = pruning.PRUNED_MAPS if maps is None else tuple(maps)
        return cls(half, name, own, maps is not None, pattern, config)

    def check(self, config: DecoderConfig) -> None:
        """Raise `UserError` for a decoder that this can't be done with."""
        taken = maps_taken(config, self.maps, exact=self.exact, weights=True)
        pruning.check_matrices(config, taken, pruning.parse_pattern(self.pattern))

    def make(self, model: Decoder, text: Text, progress: Progress = NOTHING) -> Made:
        """The model with weights that are 0."""
        gradients: dict[str, np.ndarray] = {}
        if self.method == "gblm":
            paths = pruning.matrix_paths(model, self.maps)
            gradients = pruning.gradient_norms(model, text, paths, self.config.gradient_norm, progress)

        def score(path: str, own_of: pruning.Own, weight_IO: np.ndarray, norms_I: np.ndarray | None) -> np.ndarray:
            found = gradients.get(path)
            own = None if found is None else own_of(found)
            return pruning.weight_scores(weight_IO, norms_I, own, self.config.gradient_weight)

        pattern = pruning.parse_pattern(self.pattern)
        earlier = None if self.earlier is None else self.earlier()
        again = None if earlier is None else pruning.Earlier(earlier, self.config.activate, self.config.rewind)
        compare = self.config.compare or pruning.PRUNING[self.method]
        read = None if self.method == "magnitude" else text
        stage = progress.stage("pruned")
        pruned = pruning.prune(model, self.maps, self.share, score, compare, pattern, read, again, stage)
        record = {"pattern": self.pattern, "compare": compare if pattern is None else None}
        if again is not None:
            record |= {"since": self.config.since, "activate": self.config.activate, "rewind": self.config.rewind}
        record |= {"zeros": {name: float(np.nanmean(shares)) for name, shares in pruned.zeros.items()}}
        record |= {"zeros_by_layer": pruned.zeros}
        if any(pruned.few.values()):
            record["too_few_tokens"] = {name: [list(one) for one in found] for name, found in pruned.few.items()}
        return Made(pruned.model, 0 if read is None else text.tokens(), record)

    def figures(self, made: Made, stats: Mapping[str, Any]) -> dict[str, Any]:
        """The share of zeros, by map and layer."""
        return made.record


class NeuronPlan(NamedTuple):
    """Neurons that are gone."""

    share: float
    method: Any
    config: NeuronConfig
    released: bool

    @classmethod
    def of(cls, name: str, share: float, config: NeuronConfig, released: bool) -> Self:
        """The method of that name."""
        return cls(share, name, config, released)

    @property
    def bias(self) -> bool:
        """Whether means of removed neurons become biases."""
        return self.method == "flap" if self.config.bias is None else self.config.bias

    def check(self, config: DecoderConfig) -> None:
        """Raise `UserError` for a decoder that this can't be done with."""
        ffn = by_neurons.check_neurons(config, bias=self.bias)
        top_k = getattr(ffn, "top_k", None)
        left = int(by_neurons.widths(np.array([1 - self.share]), ffn.d_ff, self.config.multiple)[0])
        if top_k is not None and top_k > left:
            raise ConfigError("--sparsity", self.share, f"leaves {left} neurons, fewer than model.ffn.top_k={top_k}")

    def make(self, model: Decoder, text: Text, progress: Progress = NOTHING) -> Made:
        """The smaller model."""
        found = by_neurons.shrink(
            model,
            self.method,
            self.share,
            text,
            per_layer=self.config.widths == "by-layer",
            multiple=self.config.multiple,
            bias=self.bias,
            spread=self.config.spread,
            released=self.released,
            progress=progress,
        )
        record = {"neurons": model.config.ffn.d_ff, "widths": found.widths, "bias": self.bias}
        if found.importance is not None:
            record["importance"] = found.importance
        record |= _compared(_costs(model.config, None), _costs(found.model.config, found.widths))
        return Made(found.model, text.tokens(), record)

    def figures(self, made: Made, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Widths, and weights of the layers' linear maps without what layers are filled up with."""
        return made.record


class ReadMEPlan(NamedTuple):
    """Experts by domain, and one router for all layers."""

    share: float
    config: ReadMEConfig
    multiple: int
    released: bool

    def check(self, config: DecoderConfig) -> None:
        """Raise `UserError` for a decoder that this can't be done with."""
        readme.check_decoder(config)

    def corpora(self, config: data.DataConfig) -> data.DataConfig:
        """The corpora of the domains as a mixture, for a run of this configuration.

        Raises:
          ConfigError: fewer than two.
        """
        parts = tuple(data.Component(dataset=name, weight=1.0) for name in self.config.domains)
        parts = parts or tuple(dataclasses.replace(part, epochs=None) for part in config.mixture or ())
        allowed = "must name two corpora or more: the run was not trained on a mixture of some"
        require(len(parts) > 1, "--readme.domains", ", ".join(self.config.domains) or "none", allowed)
        return dataclasses.replace(config, dataset=None, validation_dataset=None, mixture=parts)

    def make(self, model: Decoder, text: Domains, progress: Progress = NOTHING) -> Made:
        """The mixture; nothing of it is kept before it is finished."""
        neurons = readme.check_decoder(model.config).d_ff
        kept = int(by_neurons.widths(np.array([1 - self.share]), neurons, self.multiple)[0])
        units = readme.DenseUnits(model)
        found = [readme.mean_magnitudes(units, part) for part in text.texts.values()]
        experts = readme.choose_experts(np.stack(found, axis=1), kept, self.multiple)
        mixed = readme.converted(model, experts, self.config)
        size = self.config.batch_size or text.batch_size
        batches = partial(text.batches, size)
        trained = readme.train(mixed, units, experts, batches, self.config, released=self.released)
        ffn: Any = mixed.config.ffn
        record = {
            "domains": list(text.texts),
            "neurons": neurons,
            "shared": ffn.shared_width,
            "expert_width": ffn.expert_width,
            "common": [int(np.all(mask_EF, axis=0).sum()) for mask_EF in experts.masks_LEF],
            "router_losses": trained.router_losses,
            "agreement": trained.agreement,
            "expert_losses": trained.expert_losses,
            "routed": {name: readme.routed_shares(trained.model, part).tolist() for name, part in text.texts.items()},
        }
        counts = (activated_parameters(config).layers for config in (model.config, trained.model.config))
        size = jnp.dtype(model.config.dtype).itemsize
        record |= _compared(*(Costs(count, 2 * count, size * count) for count in counts))
        return Made(trained.model, text.tokens(), record)

    def figures(self, made: Made, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Of experts and router, and weights that a token needs of layers and router."""
        return made.record


class Costs(NamedTuple):
    """What a token needs of the layers' linear maps."""

    weights: float
    flops: float
    """A multiply-add counts 2."""
    bytes: float
    """Of the weights, in the activations' type."""


def _compared(dense: Costs, here: Costs) -> dict[str, float]:
    """Both by name, those of the dense run with "_dense"."""
    return {**{f"{name}_dense": value for name, value in dense._asdict().items()}, **here._asdict()}


def _costs(config: DecoderConfig, widths: Sequence[int] | None) -> Costs:
    """Those of a decoder; `widths`: neurons by layer, default those of the configuration."""
    weights = flops = 0.0
    for layer, spec in enumerate(config.layer_specs()):
        active = None if widths is None else widths[layer]
        lacking = 0 if active is None else spec.ffn.d_ff - active
        weights += spec.attention.projection_weights(config.d_model) + spec.ffn.weights(config.d_model)
        weights -= lacking * _of_neuron(spec.ffn, config.d_model)
        flops += spec.attention.projection_flops(config.d_model) + spec.ffn.flops(config.d_model)
        flops -= 2 * lacking * _of_neuron(spec.ffn, config.d_model, biases=False)
    return Costs(weights, flops, weights * jnp.dtype(config.dtype).itemsize)


def _of_neuron(ffn: Any, d_model: int, *, biases: bool = True) -> float:
    """Weights of one neuron."""
    matrices = len(ffn.linear_maps(d_model).keys() & {"gate", "up", "down"})
    return matrices * d_model + (matrices - 1 if ffn.bias and biases else 0)
