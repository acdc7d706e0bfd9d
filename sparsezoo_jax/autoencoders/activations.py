"""Activations of a decoder: a shuffled stream of them, and what an autoencoder in their place costs the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.autoencoders.config import TRANSCODER, Site
from sparsezoo_jax.autoencoders.model import SparseAutoencoder
from sparsezoo_jax.errors import DataError
from sparsezoo_jax.evaluation.cross_entropy import token_loss
from sparsezoo_jax.evaluation.zipf import ZipfFit, zipf_fit
from sparsezoo_jax.models.common import positions_within_segments
from sparsezoo_jax.models.records import FFN_GATE, FFN_OUTPUT, SUBLAYER_INPUT

Batch = Mapping[str, Any]
_POOL = 8
"""Training batches in the pool from which rows are drawn."""


@partial(jax.jit, static_argnums=(0, 1, 2))
def _activations(graphdef: nnx.GraphDef, site: str, layer: int, state: Any, batch: Batch) -> jax.Array:
    """Activations [B, T, D] of a site; of a transcoder [B, T, 2 D], the FFN's inputs and outputs."""
    transcodes = site == TRANSCODER
    # Unrolled, as an edit asks for, the compiler drops the other layers' records.
    out = nnx.merge(graphdef, state)(
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        logits=False,
        record=(SUBLAYER_INPUT, FFN_OUTPUT) if transcodes else (site,),
        edit=lambda name, layer, x: x,
    )
    if transcodes:
        return jnp.concatenate([out.records[SUBLAYER_INPUT][layer][1], out.records[FFN_OUTPUT][layer]], axis=-1)
    return out.records[site][layer]


def reader(model: nnx.Module, layer: int, site: Site) -> Callable[[Batch], jax.Array]:
    """The function from a batch of tokens to the activations [B, T, D] of `site` in `layer`, from 1.

    For a transcoder they are [B, T, 2 D]: what the layer's FFN reads and, behind it, what it returns.
    """
    graphdef, state = nnx.split(model)

    def read(batch: Batch) -> jax.Array:
        arrays = {name: jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions")}
        return _activations(graphdef, site, layer - 1, state, arrays)

    return read


def sae_features(sae: SparseAutoencoder, model: nnx.Module, layer: int, site: Site) -> Callable[[Any, Any], jax.Array]:
    """The autoencoder's features [B, T, F] of tokens and segment ids [B, T], for evaluations of features."""
    read = reader(model, layer, site)

    def features(tokens_BT: Any, segment_ids_BT: Any) -> jax.Array:
        positions_BT = positions_within_segments(jnp.asarray(segment_ids_BT))
        read_BTD = read({"tokens": tokens_BT, "segment_ids": segment_ids_BT, "positions": positions_BT})
        return sae.encode(_inputs(site, read_BTD))

    return features


def _inputs(site: str, read_BTD: jax.Array) -> jax.Array:
    return jnp.split(read_BTD, 2, axis=-1)[0] if site == TRANSCODER else read_BTD


def stream(read: Callable[[Batch], jax.Array], batches: Iterable[Batch], size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches [size, D] of real tokens' activations, drawn at random from a pool of the latest ones."""
    rng = np.random.default_rng(seed)
    pool: list[np.ndarray] = []
    held = 0
    for batch in batches:
        rows = np.asarray(read(batch), np.float32)[np.asarray(batch["segment_ids"]) > 0]
        pool.append(rows)
        held += len(rows)
        if held < _POOL * size:
            continue
        mixed = rng.permutation(np.concatenate(pool))
        # Half of the pool stays, to be mixed with what comes.
        for _ in range(_POOL // 2):
            given, mixed = mixed[:size], mixed[size:]
            yield given
        pool, held = [mixed], len(mixed)
    mixed = rng.permutation(np.concatenate(pool)) if pool else np.zeros((0, 1))
    while len(mixed) >= size:
        given, mixed = mixed[:size], mixed[size:]
        yield given


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What an autoencoder keeps of activations and of the model that uses them."""

    tokens: int
    l0: float
    """Features of a token, mean."""
    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the mean."""
    dead: int
    """Features that fired for none of these tokens."""
    loss: float | None
    """Cross-entropy of the model as it is, nats/token."""
    loss_reconstructed: float | None
    """With reconstructions in the activations' place."""
    loss_ablated: float | None
    """With zeros in their place."""
    zipf: ZipfFit | None = None
    """The law of the features' densities; None for too few features that fire."""

    @property
    def explained_variance(self) -> float:
        return 1 - self.fvu

    @property
    def loss_recovered(self) -> float | None:
        """Share of what ablation costs that reconstruction saves; None where nothing can be put in place."""
        if self.loss is None or self.loss_ablated is None or self.loss_reconstructed is None:
            return None
        return (self.loss_ablated - self.loss_reconstructed) / (self.loss_ablated - self.loss)

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        derived = {"explained_variance": self.explained_variance, "loss_recovered": self.loss_recovered}
        return {**dataclasses.asdict(self), **derived}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compare(graphdef: nnx.GraphDef, site: str, layer: int, state: Any, sae: SparseAutoencoder, batch: Batch):
    place = FFN_OUTPUT if site == TRANSCODER else site

    def loss(change: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def edit(name: str, index: int, x: jax.Array) -> jax.Array:
            return change(x) if (name, index) == (place, layer) else x

        out = nnx.merge(graphdef, state)(
            batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], edit=edit
        )
        sums = token_loss(out.logits, batch["targets"], batch["mask"])
        return jnp.stack([sums.cross_entropy_sum, sums.count])

    read_BTD = _activations(graphdef, site, layer, state, batch).astype(jnp.float32)
    inputs_BTD = _inputs(site, read_BTD)
    made_BTD = sae.reconstruct(inputs_BTD)
    wanted_BTD = read_BTD[..., -made_BTD.shape[-1] :]
    codes_BTF = sae.encode(inputs_BTD)
    real_BT1 = (batch["segment_ids"] > 0)[..., None]
    fires_BTF = (codes_BTF != 0) & real_BT1
    sums = {
        "tokens": jnp.sum(real_BT1),
        "fires_F": jnp.sum(fires_BTF, axis=(0, 1), dtype=jnp.int32),
        "error": jnp.sum(jnp.where(real_BT1, jnp.square(wanted_BTD - made_BTD), 0)),
        "sum_D": jnp.sum(jnp.where(real_BT1, wanted_BTD, 0), axis=(0, 1)),
        "square": jnp.sum(jnp.where(real_BT1, jnp.square(wanted_BTD), 0)),
    }
    if site != FFN_GATE:
        # Nothing below the place changes, so what was read there is what the edited call reads.
        sums |= {
            "loss": loss(lambda x: x),
            "reconstructed": loss(lambda x: made_BTD.astype(x.dtype)),
            "ablated": loss(jnp.zeros_like),
        }
    return sums


def fidelity(sae: SparseAutoencoder, model: nnx.Module, batches: Iterable[Batch], layer: int, site: Site) -> Fidelity:
    """Measure an autoencoder of a layer (from 1) on the tokens of `batches`.

    For ffn_gate, whose units are no output of a part that could be exchanged, losses are None.

    Raises:
      DataError: the batches hold no token.
    """
    graphdef, state = nnx.split(model)
    totals: dict[str, Any] = {}
    for batch in batches:
        arrays = {name: jnp.asarray(x) for name, x in batch.items()}
        for name, value in jax.device_get(_compare(graphdef, site, layer - 1, state, sae, arrays)).items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
    if not totals or totals["tokens"] == 0:
        raise DataError("the split to measure on has no token")
    n = totals["tokens"]
    variance = totals["square"] - np.sum(np.square(totals["sum_D"])) / n
    losses = [float(totals[k][0] / totals[k][1]) if k in totals else None for k in ("loss", "reconstructed", "ablated")]
    return Fidelity(
        int(n),
        float(np.sum(totals["fires_F"]) / n),
        float(totals["error"] / max(variance, 1e-20)),
        int(np.sum(totals["fires_F"] == 0)),
        *losses,
        zipf=zipf_fit(totals["fires_F"] / n),
    )
