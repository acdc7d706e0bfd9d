"""A decoder's layers called one after another over some text, each changed before the next one reads its output.

The streams of all sequences are kept, and the weights of one layer are worked on at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import DataError
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.models.decoder import call_context
from sparsezoo_jax.models.layers import Block, Passed
from sparsezoo_jax.models.width import Weight, WholeWidth
from sparsezoo_jax.sparsification.placement import batch_on_devices, placed, stream_on_devices
from sparsezoo_jax.sparsification.progress import Arrays, Stage

#: Tokens of the text that an expert must get for the norms of what it reads to count [ours].
FEWEST = 32


class Place(NamedTuple):
    """Where a layer's parameters are."""

    layer: int
    """The layer, counted from 0."""
    path: str
    """Of its block, as `training.state.flatten` has it: its parameters' paths begin with this and '/'."""
    index: int
    """Of the layer along the first axis of these parameters."""


class MapInputs(NamedTuple):
    """Sums over tokens of what one map reads."""

    sums: np.ndarray
    """float64 [I]: of each channel."""
    squares: np.ndarray
    """float64 [I]: of the squares of each channel."""
    tokens: np.ndarray | None = None
    """Of a map of experts, whose sums are [E, I]: the tokens that each of them gets, [E]."""


class LayerInputs(NamedTuple):
    """What a layer reads and makes of the calibration text."""

    tokens: int
    sequences: int
    maps: dict[str, MapInputs]
    angle: float
    """Mean over tokens of the angle between the stream before and after the layer, as a share of pi (CFSP)."""

    def norms(self, name: str) -> np.ndarray:
        """Of each channel of a map the root of the mean over sequences of its squared norm over tokens, float64 [I].

        Of a map of experts [E, I], over the tokens that an expert gets.
        """
        return np.sqrt(self.maps[name].squares / self.sequences)

    def too_few(self, name: str) -> np.ndarray:
        """The experts of a map that get less than `FEWEST` tokens, whose norms say little; none of other maps."""
        tokens_E = self.maps[name].tokens
        return np.zeros(0, int) if tokens_E is None else np.flatnonzero(tokens_E < FEWEST)


class _Watch(WholeWidth):
    """Maps that read all channels and remember what they read."""

    def __init__(self):
        self.seen: dict[str, jax.Array] = {}
        self.sums: dict[str, dict[str, jax.Array]] = {}

    def experts(
        self,
        name: str,
        read: Callable[[jax.Array], jax.Array],
        taken_BTE: jax.Array,
        norms_EI: jax.Array | None = None,
    ) -> None:
        def of_expert(expert: jax.Array) -> dict[str, jax.Array]:
            return {**_sums(read(expert), taken_BTE[..., expert]), "tokens": jnp.sum(taken_BTE[..., expert])}

        self.sums[name] = jax.lax.map(of_expert, jnp.arange(taken_BTE.shape[-1]))

    def channels(self, name: str, x: jax.Array, weight: Weight | None = None) -> jax.Array:
        self.seen[name] = x.reshape(*x.shape[:2], -1)
        return x


def _sums(seen_BTI: jax.Array, counted_BT: jax.Array) -> dict[str, jax.Array]:
    """Of each channel over the tokens that count, and of its squares, float32 [I]."""
    x_BTI = jnp.where(counted_BT[..., None], seen_BTI.astype(jnp.float32), 0)
    return {"sums": jnp.sum(x_BTI, axis=(0, 1)), "squares": jnp.sum(jnp.square(x_BTI), axis=(0, 1))}


def places_of(model: Decoder) -> list[Place]:
    """Where the parameters of each layer are, in order."""
    found = []
    for i, segment in enumerate(model.segments):
        for repeat in range(segment.spec.repeats):
            for block in range(len(segment.blocks)):
                found.append(Place(len(found), f"segments/{i}/blocks/{block}", repeat))
    return found


def layers_of(model: Decoder, first: int = 0) -> Iterator[tuple[Place, Block]]:
    """The layers in order, from the one numbered `first` on, each as a block with a copy of its parameters."""
    for place in places_of(model)[first:]:
        _, number, _, block = place.path.split("/")
        segment = model.segments[int(number)]
        graphdef, state = nnx.split(segment.blocks[int(block)])
        if segment.stacked:
            state = jax.tree.map(lambda leaf, r=place.index: leaf[r], state)
        single = nnx.merge(graphdef, state)
        yield place, placed(single)


@partial(jax.jit, static_argnums=0)
def _embedded(graphdef: Any, state: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    model = nnx.merge(graphdef, state)
    ctx = call_context(model.config, batch["tokens"], batch["segment_ids"], batch["positions"])
    return model.embedded(batch["tokens"], ctx, None)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _called(
    config: DecoderConfig, graphdef: Any, state: Any, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, Any]]:
    watch = _Watch()
    ctx = call_context(config, batch["tokens"], batch["segment_ids"], batch["positions"])
    passed, _, _ = nnx.merge(graphdef, state)(Passed(x_BTD), replace(ctx, width=watch), None)
    y_BTD = passed.x
    sums = watch.sums | {name: _sums(seen_BTI, ctx.valid_BT) for name, seen_BTI in watch.seen.items()}
    before_BTD, after_BTD = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    norms_BT = jnp.linalg.norm(before_BTD, axis=-1) * jnp.linalg.norm(after_BTD, axis=-1)
    # A stream of zeros has no direction: its angle counts as a right one.
    cosine_BT = jnp.sum(before_BTD * after_BTD, axis=-1) / jnp.where(norms_BT > 0, norms_BT, 1)
    angle_BT = jnp.arccos(jnp.clip(cosine_BT, -1, 1)) / jnp.pi
    return y_BTD, {"maps": sums, "angle": jnp.sum(jnp.where(ctx.valid_BT, angle_BT, 0))}


def streams_below(
    model: Decoder, batches: Iterable[Mapping[str, Any]]
) -> tuple[list[dict[str, jax.Array]], list[jax.Array]]:
    """What layers are called with of each batch, and the streams below the first of them."""
    held, streams = _held(batches), []
    graphdef, state = nnx.split(model)
    for batch in held:
        # One after another: the devices of a CPU wait for each other for ever where several programs are under way.
        streams.append(jax.block_until_ready(_embedded(graphdef, state, batch)))
    return held, streams


def _held(batches: Iterable[Mapping[str, Any]]) -> list[dict[str, jax.Array]]:
    fields = ("tokens", "segment_ids", "positions")
    return [batch_on_devices({name: batch[name] for name in fields}) for batch in batches]


def layer_by_layer(
    model: Decoder,
    batches: Iterable[Mapping[str, Any]],
    visit: Callable[[Place, Block, list[jax.Array], list[dict[str, jax.Array]]], tuple[list[jax.Array], Arrays]],
    stage: Stage | None = None,
) -> list[Arrays]:
    """What `visit` finds of each layer, called in order with the layer's place, the layer, its streams and the batches.

    Args:
      model: a decoder whose layers are called with a stream of the whole width.
      batches: dicts of [B, T] arrays tokens, segment_ids, positions; padding has segment id 0.
      visit: returns the streams after the layer, which is a copy that it may change, and what it found.
      stage: what was kept of the same pass, to go on with it, and where it is kept further. None: nowhere.
    """
    stage = Stage() if stage is None else stage
    finished, layers = stage.finished(), model.config.layers
    if len(finished) == layers:
        return finished
    kept = stage.streams()
    held, streams = streams_below(model, batches) if kept is None else (_held(batches), [])
    streams = streams if kept is None else [stream_on_devices(x_BTD) for x_BTD in kept]
    for place, block in layers_of(model, len(finished)):
        streams, found = visit(place, block, streams, held)
        stage.keep(place.layer, found, streams if place.layer + 1 < layers else ())
        finished.append(found)
    return finished


def walk(
    model: Decoder,
    batches: Iterable[Mapping[str, Any]],
    visit: Callable[[Place, Block, LayerInputs], tuple[bool, Arrays]],
    stage: Stage | None = None,
) -> list[Arrays]:
    """Call `visit` for each layer in order, with what it reads of the text; returns what it found of each.

    Args:
      model: as for `layer_by_layer`, and so are `batches` and `stage`.
      visit: gets the layer's place, the layer and what it reads and makes. It may change the layer, which is a copy,
        and then returns True: the next layer reads what the changed one makes of the same stream.

    Raises:
      DataError: the batches hold no token.
    """
    batches = list(batches)
    tokens = sum(int(np.sum(batch["segment_ids"] > 0)) for batch in batches)
    if tokens == 0:
        raise DataError("the text to calibrate on has no token")
    sequences = sum(int(np.sum(np.any(batch["segment_ids"] > 0, axis=-1))) for batch in batches)

    def called(
        place: Place, block: Block, streams: list[jax.Array], held: list[dict[str, jax.Array]]
    ) -> tuple[list[jax.Array], Arrays]:
        after, total = _over(model.config, block, streams, held)
        maps = {name: MapInputs(**sums) for name, sums in total["maps"].items()}
        changed, found = visit(place, block, LayerInputs(tokens, sequences, maps, float(total["angle"]) / tokens))
        return (_over(model.config, block, streams, held)[0] if changed else after), found

    return layer_by_layer(model, batches, called, stage)


def _over(
    config: DecoderConfig, block: Block, streams: list[jax.Array], held: list[dict[str, jax.Array]]
) -> tuple[list[jax.Array], Any]:
    """The streams after a layer, and the sums over all batches, float64."""
    graphdef, state = nnx.split(block)
    after, total = [], None
    for stream_BTD, batch in zip(streams, held, strict=True):
        made_BTD, found = _called(config, graphdef, state, stream_BTD, batch)
        after.append(made_BTD)
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        total = wide if total is None else jax.tree.map(np.add, total, wide)
    return after, total
