"""Read-ME: experts by domain and one router for all layers, made of a dense decoder (arXiv 2410.19123).

The neurons that a domain's text activates most are its expert; those of all domains are shared. The router, which
reads tokens alone, learns which expert has most of the neurons that the dense decoder activates for a token, and the
decoder is trained on with what it chooses, in turns.

Shape letters: L layers, E experts, F neurons of the dense decoder, S shared neurons, W neurons of one expert; B, T, D
as in `models.common`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsezoo_jax.errors import ConfigError, NumericsError, require
from sparsezoo_jax.evaluation.cross_entropy import model_loss
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.decoder import PreGate, call_context
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.layers import Passed
from sparsezoo_jax.models.readme import ReadMEFFNConfig
from sparsezoo_jax.models.records import FFN_HIDDEN
from sparsezoo_jax.models.topk import top_k_mask
from sparsezoo_jax.sparsification.config import ReadMEConfig
from sparsezoo_jax.sparsification.conversion import check_layers
from sparsezoo_jax.sparsification.layers import layers_of
from sparsezoo_jax.training.optimizers import is_matrix
from sparsezoo_jax.training.state import ModelTemplate, flatten, nested

Batch = Mapping[str, Any]
Flat = dict[str, jax.Array]
#: The router's parameters begin with this.
_ROUTER = "pre_gate/"


def check_decoder(config: DecoderConfig) -> GatedFFNConfig:
    """The feed-forward networks whose neurons become experts, all layers' alike.

    Raises:
      ConfigError: others, or a decoder that has further ones.
    """
    ffn = config.ffn
    if not isinstance(ffn, GatedFFNConfig):
        raise ConfigError("model.ffn.kind", ffn.kind, "can't be made into experts of neurons; gated can")
    check_layers(config)
    for name, off in (("bias", False), ("up_activation", None), ("threshold", 0.0), ("l1", False)):
        value = getattr(ffn, name)
        require(value == off, f"model.ffn.{name}", value, f"must be {off}: experts have no such thing")
    pattern = ffn.activation_sparsity_pattern
    allowed = "selects neurons by the distribution over all of them; they can't be experts"
    require(not any(pattern), "model.ffn.activation_sparsity_pattern", pattern, allowed)
    return ffn


class DenseUnits:
    """The hidden units of a dense decoder, layer by layer."""

    def __init__(self, model: Decoder):
        self.model = nnx.split(model)
        self.config = model.config
        self.blocks = [nnx.split(segment.blocks[0]) for segment in model.unstacked().segments]

    def __call__(self, batch: Batch) -> Iterator[jax.Array]:
        """Of each layer in order what it makes of a batch before the output map, [B, T, F]."""
        fields = {name: jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions")}
        x_BTD = _embedded(*self.model, fields)
        for block in self.blocks:
            x_BTD, hidden_BTF = _called(self.config, *block, x_BTD, fields)
            yield hidden_BTF


@partial(jax.jit, static_argnums=0)
def _embedded(graphdef: Any, state: Any, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, state)
    ctx = call_context(model.config, batch["tokens"], batch["segment_ids"], batch["positions"])
    return model.embedded(batch["tokens"], ctx, None)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _called(
    config: DecoderConfig, graphdef: Any, state: Any, x_BTD: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    ctx = call_context(config, batch["tokens"], batch["segment_ids"], batch["positions"])
    ctx.record = frozenset({FFN_HIDDEN})
    passed, aux, _ = nnx.merge(graphdef, state)(Passed(x_BTD), ctx, None)
    return passed.x, aux.records[FFN_HIDDEN]


@jax.jit
def _magnitudes(hidden_BTF: jax.Array, segments_BT: jax.Array) -> jax.Array:
    real_BT1 = (segments_BT > 0)[..., None]
    return jnp.sum(jnp.where(real_BT1, jnp.abs(hidden_BTF.astype(jnp.float32)), 0), axis=(0, 1))


def mean_magnitudes(units: DenseUnits, batches: Sequence[Batch] | Any) -> np.ndarray:
    """The mean over real tokens of each hidden unit's magnitude, float64 [L, F]."""
    total, tokens = None, 0
    for batch in batches:
        found = [np.asarray(_magnitudes(x, batch["segment_ids"]), np.float64) for x in units(batch)]
        total = np.stack(found) if total is None else total + np.stack(found)
        tokens += int(np.sum(np.asarray(batch["segment_ids"]) > 0))
    assert total is not None
    return total / tokens


class Experts(NamedTuple):
    """Which neurons of each layer are whose."""

    masks_LEF: np.ndarray
    """bool: those of each expert, the ones that all have included."""
    shared_LS: np.ndarray
    """int: those that every token takes."""
    own_LEW: np.ndarray
    """int: the others of each expert; one that several experts have is copied."""


def choose_experts(magnitudes_LEF: np.ndarray, kept: int, multiple: int = 1) -> Experts:
    """Each domain's expert: the `kept` neurons of the largest mean magnitude on its text.

    Neurons of all experts are shared. Layers have as many of these as the one with the fewest, so that layers are alike
    and a token needs exactly `kept` neurons: of more, those of the largest magnitude over all domains are shared, and
    every expert has a copy of the others [ours; in the paper layers have all of theirs].

    Args:
      magnitudes_LEF: of `mean_magnitudes` for the text of each domain.
      kept: neurons of an expert, shared ones included.
      multiple: of which the shared neurons are; `multiple` of each expert's are its own at least.
    """
    layers, experts, neurons = magnitudes_LEF.shape
    order_LEF = np.argsort(-magnitudes_LEF, axis=-1, kind="stable")
    masks_LEF = np.zeros(magnitudes_LEF.shape, bool)
    np.put_along_axis(masks_LEF, order_LEF[..., :kept], values=True, axis=-1)
    common_LF = np.all(masks_LEF, axis=1)
    fewest = int(common_LF.sum(-1).min()) // multiple * multiple
    shared = max(0, min(fewest, kept - multiple))
    means_LF = np.where(common_LF, magnitudes_LEF.mean(axis=1), -1)
    shared_LS = np.sort(np.argsort(-means_LF, axis=-1, kind="stable")[:, :shared], axis=-1)
    taken_LF = np.zeros((layers, neurons), bool)
    np.put_along_axis(taken_LF, shared_LS, values=True, axis=-1)
    own_LEF = masks_LEF & ~taken_LF[:, None]
    own_LEW = np.stack([[np.flatnonzero(mask_F) for mask_F in layer] for layer in own_LEF])
    return Experts(masks_LEF, shared_LS, own_LEW.reshape(layers, experts, kept - shared))


def target_config(config: DecoderConfig, experts: int, width: int, shared: int, flags: ReadMEConfig) -> DecoderConfig:
    """The decoder with experts of `width` neurons and `shared` ones in place of its networks."""
    ffn = ReadMEFFNConfig(
        experts=experts,
        expert_width=width,
        shared_width=shared,
        activation=check_decoder(config).activation,
        router_width=flags.router_width,
        router_heads=flags.router_heads,
        router_d_ff=flags.router_d_ff,
    )
    return dataclasses.replace(config, ffn=ffn)


def converted(model: Decoder, experts: Experts, flags: ReadMEConfig) -> Decoder:
    """The decoder whose layers have these experts, of the weights of `model`, and a new router."""
    _, count, width = experts.own_LEW.shape
    target = target_config(model.config, count, width, experts.shared_LS.shape[1], flags)
    template = ModelTemplate(lambda rngs: Decoder(target, rngs=rngs))
    params, variables = ModelTemplate(lambda rngs: Decoder(model.config, rngs=rngs)).split(model)
    kept = {path: x for path, x in flatten(params).items() if "/ffn/" not in path}
    made = {
        path: np.zeros(v.shape, jnp.dtype(target.param_dtype))
        for path, v in template.parameters.items()
        if path not in kept and not path.startswith(_ROUTER)
    }
    for place, block in layers_of(model):
        source: Any = block.ffn
        matrices = {name: np.asarray(getattr(source, name)[...]) for name in ("gate_DF", "up_DF", "down_FD")}
        for name, matrix in matrices.items():
            axis = 1 if name.endswith("_DF") else 0
            own = np.stack([np.take(matrix, own_W, axis=axis) for own_W in experts.own_LEW[place.layer]])
            routed = name.replace("_DF", "_EDW").replace("_FD", "_EWD")
            made[f"{place.path}/ffn/{routed}"][place.index] = own
            if experts.shared_LS.shape[1]:
                shared = np.take(matrix, experts.shared_LS[place.layer], axis=axis)
                made[f"{place.path}/ffn/shared/{name}"][place.index] = shared
    gate = target.ffn.pre_gate(target)
    assert gate is not None
    build = partial(PreGate, gate)
    router, _ = ModelTemplate(build).split(build(nnx.Rngs(flags.seed)))
    new = {_ROUTER + path: x for path, x in flatten(router).items()}
    return template.merge(nested({**kept, **made, **new}), variables)


def overlaps(hidden_BTF: jax.Array, mask_EF: jax.Array, kept: int) -> jax.Array:
    """How many of the `kept` neurons that are largest for a token each expert has, float32 [B, T, E]."""
    largest_BTF = top_k_mask(jnp.abs(hidden_BTF.astype(jnp.float32)), kept)
    return jnp.einsum("btf,ef->bte", largest_BTF.astype(jnp.float32), mask_EF.astype(jnp.float32))


def released_overlaps(hidden_BTF: jax.Array, mask_EF: jax.Array) -> jax.Array:
    """The same as the authors' code has it: `10 sum_n |M_n & M_e| / (3 N)`, float32 [B, T, E].

    M_n are the n largest units with their signs, n = N - 1, 4 N / 5, 3 N / 5, 2 N / 5 and N / 5; M_e neurons of the
    expert that not all have, N of them.
    """
    hidden_BTF = hidden_BTF.astype(jnp.float32)
    own_EF = mask_EF & ~jnp.all(mask_EF, axis=0)
    count = jnp.sum(own_EF[0])
    sorted_BTF = -jnp.sort(-hidden_BTF, axis=-1)
    weight_BTF = jnp.zeros_like(hidden_BTF)
    for n in (count - 1, *(count * fifths // 5 for fifths in (4, 3, 2, 1))):
        weight_BTF += hidden_BTF > jnp.take(sorted_BTF, jnp.maximum(n, 0), axis=-1)[..., None]
    found_BTE = jnp.einsum("btf,ef->bte", weight_BTF, own_EF.astype(jnp.float32))
    return 10 * found_BTE / (3 * jnp.maximum(count, 1))


_overlaps = jax.jit(overlaps, static_argnums=2)
_released_overlaps = jax.jit(released_overlaps)


def routing_loss(scores_BTE: jax.Array, overlaps_LBTE: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """`sum over layers of KL(softmax(scores) || softmax(overlaps))`, the mean over real tokens (section 3.2)."""
    p_BTE = jax.nn.softmax(scores_BTE, axis=-1)
    logs = jax.nn.log_softmax(scores_BTE, axis=-1) - jax.nn.log_softmax(overlaps_LBTE, axis=-1)
    return _mean(jnp.sum(p_BTE * logs, axis=(0, -1)), valid_BT)


def released_routing_loss(scores_BTE: jax.Array, overlaps_LBTE: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """As the authors' code has it: 3/4 of the cross-entropy with the best expert, its target smoothed by 1/2, and 1/4
    of that with `softmax(overlaps)`; the sum over layers, the mean over real tokens.
    """
    logs_BTE = jax.nn.log_softmax(scores_BTE, axis=-1)
    best_LBTE = jax.nn.one_hot(jnp.argmax(overlaps_LBTE, axis=-1), scores_BTE.shape[-1])
    target_LBTE = 0.75 * (0.5 * best_LBTE + 0.5 / scores_BTE.shape[-1]) + 0.25 * jax.nn.softmax(overlaps_LBTE, axis=-1)
    return _mean(-jnp.sum(target_LBTE * logs_BTE, axis=(0, -1)), valid_BT)


def agreement(scores_BTE: jax.Array, overlaps_LBTE: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Share of real tokens whose expert has as many of the dense decoder's neurons, over all layers, as any."""
    total_BTE = jnp.sum(overlaps_LBTE, axis=0)
    chosen_BT1 = jnp.argmax(scores_BTE, axis=-1, keepdims=True)
    found_BT = jnp.take_along_axis(total_BTE, chosen_BT1, axis=-1)[..., 0] >= jnp.max(total_BTE, axis=-1)
    return _mean(found_BT.astype(jnp.float32), valid_BT)


def _mean(x_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid_BT, x_BT, 0)) / jnp.maximum(jnp.sum(valid_BT), 1)


def learning_rate(rate: float, decay: float, turn: int, step: int, steps: int) -> float:
    """Of one step of a turn: half a cosine wave from `rate decay^turn` to 0."""
    return rate * decay**turn * 0.5 * (1 + math.cos(math.pi * step / steps))


class Trainer:
    """AdamW over some parameters, by path; its moments begin anew with each turn."""

    def __init__(self, loss: Callable[..., tuple[jax.Array, Any]], matrices: Mapping[str, bool], weight_decay: float):
        """`loss` (parameters, ...) returns two scalars, itself and another figure; matrices alone decay."""

        def decaying(params: Any) -> dict[str, bool]:
            return {path: matrices[path] for path in params}

        decay = optax.add_decayed_weights(weight_decay, mask=decaying)
        self.optimizer = optax.chain(optax.scale_by_adam(), decay)
        gradient = jax.value_and_grad(loss, has_aux=True)

        def step(params: Flat, state: Any, rate: jax.Array, *arguments: Any) -> Any:
            (value, aux), grads = gradient(params, *arguments)
            updates, state = self.optimizer.update(grads, state, params)
            moved: Any = jax.tree.map(lambda x, u: (x - rate * u).astype(x.dtype), params, updates)
            return moved, state, value, aux

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def turn(
        self, params: Flat, steps: int, rate: Callable[[int], float], arguments: Callable[[], tuple[Any, ...]]
    ) -> tuple[Flat, float, float]:
        """The parameters after so many steps, and the means over these of the loss and of the other figure.

        Raises:
          NumericsError: a loss that is not finite.
        """
        params = jax.tree.map(jnp.array, params)  # the step may overwrite them
        state, seen = self.optimizer.init(params), []
        for step in range(steps):
            params, state, value, aux = self._step(params, state, jnp.float32(rate(step)), *arguments())
            seen.append((value, aux))
        values = np.array(jax.device_get(seen), np.float64)
        if not np.isfinite(values).all():
            raise NumericsError("--method readme: a loss is not finite; lower --readme.router-rate or expert-rate")
        return params, float(values[:, 0].mean()), float(values[:, 1].mean())


class Trained(NamedTuple):
    """A decoder after its turns."""

    model: Decoder
    router_losses: list[float]
    """Mean of each turn of the router."""
    agreement: list[float]
    """Mean of `agreement` in each turn of the router."""
    expert_losses: list[float]
    """Mean cross-entropy of each turn of the experts, nats a target token."""


def train(
    model: Decoder,
    units: DenseUnits,
    experts: Experts,
    batches: Callable[[int], Iterator[Batch]],
    flags: ReadMEConfig,
    *,
    released: bool = False,
) -> Trained:
    """Turns of the router, by the routing loss, and of all other parameters, by the cross-entropy.

    Args:
      model: of `converted`.
      units: of the dense decoder.
      batches: endless ones of a size, dicts of [B, T] arrays with targets and mask.
      released: the loss of the authors' code.
    """
    template = ModelTemplate(lambda rngs: Decoder(model.config, rngs=rngs))
    params, variables = template.split(model)
    flat = flatten(params)
    # Steps of these sizes would vanish in parameters of 16 bits.
    wide = {path: jnp.asarray(x, jnp.float32) for path, x in flat.items()}
    router = {path: x for path, x in wide.items() if path.startswith(_ROUTER)}
    others = {path: x for path, x in wide.items() if path not in router}
    matrices = {path: is_matrix(variable) for path, variable in template.parameters.items()}
    gate, kept = model.config.ffn.pre_gate(model.config), int(experts.masks_LEF[0, 0].sum())
    assert gate is not None
    gate_template = ModelTemplate(partial(PreGate, gate))
    masks = [jnp.asarray(mask_EF) for mask_EF in experts.masks_LEF]
    form = released_routing_loss if released else routing_loss

    def distilled(params: Flat, batch: Batch, overlaps_LBTE: jax.Array) -> tuple[jax.Array, jax.Array]:
        module = gate_template.merge(nested({path.removeprefix(_ROUTER): x for path, x in params.items()}), {})
        scores_BTE, _ = module.scores(batch["tokens"], batch["segment_ids"], batch["positions"])
        valid_BT = batch["segment_ids"] > 0
        return form(scores_BTE, overlaps_LBTE, valid_BT), agreement(scores_BTE, overlaps_LBTE, valid_BT)

    def cross_entropy(params: Flat, batch: Batch, router: Flat) -> tuple[jax.Array, jax.Array]:
        total, sums, _ = model_loss(template.merge(nested({**params, **router}), variables), dict(batch))
        return total / jnp.maximum(sums.count, 1), sums.count

    def targets(batch: Batch) -> jax.Array:
        found = zip(units(batch), masks, strict=True)
        return jnp.stack([_released_overlaps(x, m) if released else _overlaps(x, m, kept) for x, m in found])

    by_router = Trainer(distilled, matrices, flags.weight_decay)
    by_experts = Trainer(cross_entropy, matrices, flags.weight_decay)
    for_router, for_experts = (batches(flags.seed + i) for i in range(2))
    trained = Trained(model, [], [], [])
    for turn in range(flags.rounds):
        if flags.router_steps:
            rate = partial(learning_rate, flags.router_rate, flags.rate_decay, turn, steps=flags.router_steps)
            next_batch = partial(_with_targets, for_router, targets)
            router, loss, agreed = by_router.turn(router, flags.router_steps, rate, next_batch)
            trained.router_losses.append(loss)
            trained.agreement.append(agreed)
        if flags.expert_steps:
            rate = partial(learning_rate, flags.expert_rate, flags.rate_decay, turn, steps=flags.expert_steps)
            others, loss, _ = by_experts.turn(
                others, flags.expert_steps, rate, lambda router=router: (_arrays(next(for_experts)), router)
            )
            trained.expert_losses.append(loss)
        shown = (("router", trained.router_losses), ("experts", trained.expert_losses))
        losses = ", ".join(f"loss of the {name} {seen[-1]:.4f}" for name, seen in shown if seen)
        print(f"round {turn + 1} of {flags.rounds}: {losses or 'no steps'}", file=sys.stderr)
    narrow = {path: x.astype(flat[path].dtype) for path, x in {**others, **router}.items()}
    return trained._replace(model=template.merge(nested(narrow), variables))


def _arrays(batch: Batch) -> dict[str, Any]:
    return {name: batch[name] for name in ("tokens", "targets", "segment_ids", "positions", "mask")}


def _with_targets(batches: Iterator[Batch], targets: Callable[[Batch], jax.Array]) -> tuple[Any, ...]:
    batch = _arrays(next(batches))
    return batch, targets(batch)


def routed_shares(model: Decoder, batches: Sequence[Batch] | Any) -> np.ndarray:
    """Share of the real tokens of some text that takes each expert, float64 [E]."""
    graphdef, state = nnx.split(model.pre_gate)
    total, tokens = None, 0
    for batch in batches:
        counts_E = _counts(graphdef, state, {name: batch[name] for name in ("tokens", "segment_ids", "positions")})
        total = np.asarray(counts_E, np.float64) + (0 if total is None else total)
        tokens += int(np.sum(np.asarray(batch["segment_ids"]) > 0))
    assert total is not None
    return total / tokens


@partial(jax.jit, static_argnums=0)
def _counts(graphdef: Any, state: Any, batch: Batch) -> jax.Array:
    routing, _ = nnx.merge(graphdef, state)(batch["tokens"], batch["segment_ids"], batch["positions"])
    return jnp.sum(routing.active_BTE & (batch["segment_ids"] > 0)[..., None], axis=(0, 1))
