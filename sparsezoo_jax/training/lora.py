"""Low-rank adapters (LoRA, arXiv 2106.09685) for any model: another form of its tree of parameters.

A matrix W that a pattern names becomes W + (alpha / rank) A B before the model is called. W stays as another run left
it; A and B are what is trained. No layer knows of it, so that every architecture, kernel, mesh and remat policy takes
adapters as it is, at the price of the whole gradient of W, from which those of A and B are made.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, ConfigError, require
from sparsezoo_jax.training.optimizers import matrix_roles
from sparsezoo_jax.training.state import PureDict, Variable, flatten, nested

T = TypeVar("T")
_A, _B = "lora_a", "lora_b"
_LAYER = re.compile(r"segments/(?P<segment>\d+)/blocks/(?P<place>\d+)/")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRAConfig:
    """Training small matrices beside those of another run, which stay as they are, or some of its parameters alone."""

    rank: int | None = None
    """Columns of A and rows of B (r); at most the smaller side of every adapted matrix. None: no such matrices, and all
    parameters train unless `whole` names some."""
    ranks: Literal["uniform", "importance"] = "uniform"
    """uniform: all layers have adapters of that rank. importance: the rank is their mean, and that of a layer
    proportional to its importance, as `sparsify --method cfsp` found it of the run that is adapted (IG-LoRA, CFSP)."""
    layer_ranks: tuple[int, ...] = ()
    """The rank of each layer's adapters; for train.lora.ranks=importance it is filled in when the run begins."""
    alpha: float = 16.0
    """The product A B is multiplied by alpha / rank, the same for all layers."""
    targets: tuple[str, ...] = (r"/(attention|ffn)/(?!.*router)",)
    """Regular expressions searched in the paths of parameters: matrices that they find get adapters, each of a stack of
    layers or experts its own; vectors that they find stay as they are. Default: attention and FFNs without routers."""
    whole: tuple[str, ...] = ()
    """Regular expressions for parameters that train themselves, such as '/scale$' or 'bias$', or '_adapter/' for the
    bottleneck adapters of model.adapter; all others stay as they are, with or without a rank."""

    @property
    def active(self) -> bool:
        """Whether a run holds what it trains beside another run's parameters."""
        return self.rank is not None or bool(self.whole)

    @property
    def asked(self) -> tuple[str, object]:
        """The field that makes this active, and its value."""
        return ("train.lora.whole", self.whole) if self.rank is None else ("train.lora.rank", self.rank)

    def __post_init__(self):
        for name in ("targets", "whole"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"train.lora.{name}", pattern, f"is no regular expression ({error})") from None
        used = self.rank is not None or self.targets == type(self).__dataclass_fields__["targets"].default
        require(used, "train.lora.targets", self.targets, "works together with train.lora.rank only")
        require(self.rank is None or self.rank > 0, "train.lora.rank", self.rank, "must be at least 1 or None")
        allowed = "works together with train.lora.rank only"
        require(self.rank is not None or self.ranks == "uniform", "train.lora.ranks", self.ranks, allowed)
        require(self.rank is not None or not self.layer_ranks, "train.lora.layer_ranks", self.layer_ranks, allowed)
        allowed = "must all be at least 1"
        require(all(rank > 0 for rank in self.layer_ranks), "train.lora.layer_ranks", self.layer_ranks, allowed)
        require(self.alpha > 0, "train.lora.alpha", self.alpha, "must be above 0")
        require(bool(self.targets), "train.lora.targets", self.targets, "needs at least one pattern")


def proportional_ranks(importance: Sequence[float], mean: int) -> tuple[int, ...]:
    """A rank for each layer, at least 1, in proportion to positive importance; together `mean` times the layers.

    Fractions are rounded so that the largest ones are rounded up.

    Source: CFSP (arXiv 2409.13199), IG-LoRA.
    """
    total, whole_sum = mean * len(importance), math.fsum(importance)
    exact = [total * x / whole_sum for x in importance]
    ranks = [max(1, math.floor(x)) for x in exact]
    while (left := total - sum(ranks)) != 0:
        step = 1 if left > 0 else -1
        open_to = [i for i, rank in enumerate(ranks) if rank + step >= 1]
        nearest = max(open_to, key=lambda i: step * (exact[i] - ranks[i]))
        ranks[nearest] += step
    return tuple(ranks)


def layers_of_parameters(paths: Iterable[str], repeats: Callable[[str], int]) -> dict[str, tuple[int, ...]]:
    """For each parameter of a layer the numbers of the layers that are stacked in it, counted from 0.

    `repeats` says how many are stacked in a parameter of the decoder's segments.
    """
    found: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        if (match := _LAYER.match(path)) is not None:
            found.setdefault((int(match["segment"]), int(match["place"])), []).append(path)
    numbers: dict[str, tuple[int, ...]] = {}
    first = 0
    for segment in sorted({segment for segment, _ in found}):
        period = 1 + max(place for own, place in found if own == segment)
        count = repeats(found[segment, 0][0])
        for place in range(period):
            own = tuple(first + repeat * period + place for repeat in range(count))
            numbers |= dict.fromkeys(found[segment, place], own)
        first += count * period
    return numbers


class _Split(NamedTuple):
    """The dimensions of a parameter: those of the stack come first, then inputs, then outputs."""

    stack: int
    inputs: int

    def sides(self, dimensions: tuple[T, ...], rank: T) -> tuple[tuple[T, ...], tuple[T, ...]]:
        """The dimensions of A and of B, for those of the parameter."""
        middle = self.stack + self.inputs
        stack, inputs, outputs = dimensions[: self.stack], dimensions[self.stack : middle], dimensions[middle:]
        return (*stack, *inputs, rank), (*stack, rank, *outputs)


class Adapters:
    """What of a model's parameters is trained beside a frozen base, and how both make the parameters.

    `trained` is a tree with 'PATH/lora_a' [stack, inputs, r] and 'PATH/lora_b' [stack, r, outputs], float32, for each
    adapted parameter PATH, and with the parameters that train whole under their own paths; `frozen` is one of all other
    parameters. Dimensions keep the logical axes that they have in the parameter.
    """

    def __init__(self, config: LoRAConfig, parameters: Mapping[str, Variable]):
        """Find what the patterns name among `parameters`.

        Raises:
          ConfigError: a pattern that finds nothing, a rank beyond a matrix, a parameter that both lists name.
        """
        self._scale = config.alpha / (config.rank or 1)
        roles = {path: matrix_roles(variable) for path, variable in parameters.items()}
        # A router of all layers has attention and an FFN of its own, which are no layer's.
        matrices = [path for path in parameters if len(roles[path]) >= 2 and not path.startswith("pre_gate/")]
        adapted = [] if config.rank is None else _found("train.lora.targets", config.targets, matrices, "matrix")
        self._whole = frozenset(_found("train.lora.whole", config.whole, list(parameters), "parameter"))
        self._splits: dict[str, _Split] = {}
        self._ranks: dict[str, tuple[int, ...]] = {}
        """Of adapted parameters whose layers differ: that of each layer stacked in them."""
        numbers = self._layers(config, parameters)
        self.parameters: dict[str, Variable] = {path: parameters[path] for path in sorted(self._whole)}
        """The trained parameters by path."""
        for path in adapted:
            require(path not in self._whole, "train.lora.whole", path, "has adapters by train.lora.targets, too")
            variable, (inputs, outputs) = parameters[path], roles[path][-2:]
            sides = [math.prod(variable.shape[i] for i in role) for role in (inputs, outputs)]
            rank, field = config.rank or 0, "train.lora.rank"
            if path in numbers:
                self._ranks[path] = tuple(config.layer_ranks[layer] for layer in numbers[path])
                rank, field = max(self._ranks[path]), "train.lora.layer_ranks"
            allowed = f"must be at most {min(sides)}, the smaller side of {path}"
            require(rank <= min(sides), field, rank, allowed)
            split = _Split(len(variable.shape) - len(inputs) - len(outputs), len(inputs))
            self._splits[path] = split
            axes = variable.full_axes if variable.axes is None else variable.axes
            layers = len(variable.shape) - len(axes)  # which `Variable.axes` does not name
            a, b = split.sides(variable.shape, rank)
            a_axes, b_axes = split._replace(stack=split.stack - layers).sides(axes, None)
            self.parameters[f"{path}/{_A}"] = Variable(a, a_axes)
            self.parameters[f"{path}/{_B}"] = Variable(b, b_axes)

    def _layers(self, config: LoRAConfig, parameters: Mapping[str, Variable]) -> dict[str, tuple[int, ...]]:
        """`layers_of_parameters` where layers have ranks of their own, else nothing."""
        allowed = "is known when a run begins that train.init_from gives the importance of layers; give layer_ranks"
        require(config.ranks == "uniform" or bool(config.layer_ranks), "train.lora.ranks", config.ranks, allowed)
        if not config.layer_ranks:
            return {}
        numbers = layers_of_parameters(parameters, lambda path: parameters[path].shape[0])
        layers = len({number for own in numbers.values() for number in own})
        allowed = f"must be one for each of the {layers} layers"
        require(len(config.layer_ranks) == layers, "train.lora.layer_ranks", config.layer_ranks, allowed)
        return numbers

    def create(self, key: jax.Array) -> PureDict:
        """New adapters, whose product is 0: A normal with variance 1 / inputs, B zero.

        Layers of a lower rank than others in one stack have columns of A that are 0, too: with the rows of B that
        belong to them they have no gradient, and stay 0.
        """
        made = {}
        for path, split in self._splits.items():
            a, b = (self.parameters[f"{path}/{name}"].shape for name in (_A, _B))
            deviation = math.prod(a[split.stack : -1]) ** -0.5
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            drawn = deviation * jax.random.normal(own, a, jnp.float32)
            if path in self._ranks:
                has_Lr = jnp.arange(a[-1]) < jnp.asarray(self._ranks[path])[:, None]
                drawn = jnp.where(has_Lr.reshape(len(has_Lr), *[1] * (len(a) - 2), a[-1]), drawn, 0)
            made[f"{path}/{_A}"] = drawn
            made[f"{path}/{_B}"] = jnp.zeros(b, jnp.float32)
        return nested(made)

    def divided(self, params: PureDict, adapters: PureDict) -> tuple[PureDict, PureDict]:
        """`trained` and `frozen` of all parameters of a model; of `adapters` only those count.

        What trains whole and is not among the parameters (bottlenecks, for a base without any) is taken of `adapters`.
        """
        base, beside = flatten(params), flatten(adapters)
        given = self._whole & base.keys()
        trained = {path: base[path] if path in given else beside[path] for path in self.parameters}
        return nested(trained), nested({path: x for path, x in base.items() if path not in self._whole})

    def undivided(self, trained: PureDict, frozen: PureDict) -> PureDict:
        """All parameters of a model without what adapters add to them; leaves may be anything."""
        return nested({**flatten(frozen), **{path: x for path, x in flatten(trained).items() if path in self._whole}})

    def merged(self, trained: PureDict, frozen: PureDict) -> PureDict:
        """All parameters of the model, in the types of the base; the sums are float32."""
        base, beside = flatten(self.undivided(trained, frozen)), flatten(trained)
        for path, split in self._splits.items():
            a, b = beside[f"{path}/{_A}"], beside[f"{path}/{_B}"]
            batch = tuple(range(split.stack))
            product = jax.lax.dot_general(
                a, b, (((a.ndim - 1,), (split.stack,)), (batch, batch)), precision=jax.lax.Precision.HIGHEST
            )
            base[path] = (base[path].astype(jnp.float32) + self._scale * product).astype(base[path].dtype)
        return nested(base)


def adapters_of(config: LoRAConfig, parameters: Mapping[str, Variable]) -> Adapters | None:
    """The adapters that a configuration asks for, None without any."""
    return Adapters(config, parameters) if config.active else None


def _found(field: str, patterns: tuple[str, ...], paths: list[str], noun: str) -> list[str]:
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise ConfigError(field, pattern, f"finds no {noun}; paths are {', '.join(sorted(paths))}")
    return [path for path in paths if any(re.search(pattern, path) for pattern in patterns)]
