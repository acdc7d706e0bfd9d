"""Transformers of images, made of the decoder's layers: classification (ViT, MLP-Mixer) and masked autoencoding (MAE).

Shape letters beside those of `models.common`: P numbers of a patch, E width of the autoencoder's decoder, U patches
that the encoder sees; T is all patches of an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax.errors import require
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.models.config import DecoderConfig
from sparsezoo_jax.models.contract import Head, Observed
from sparsezoo_jax.models.decoder import Edit, Keep, Output, Summarise, collected, records_of
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.images import ImagesConfig
from sparsezoo_jax.models.layers import STREAM, Passed, Segment, run_segments, update_segments
from sparsezoo_jax.models.records import checked
from sparsezoo_jax.models.topk import top_k_mask
from sparsezoo_jax.pallas_kernels.matmul import matmul
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility
from sparsezoo_jax.sharding import constrain

_FLOAT = jnp.dtype(jnp.float32)
#: Added to the variance of a patch's pixels (MAE).
_EPS = 1e-6


class Encoder(nnx.Module):
    """A transformer that sees all patches of an image at once; see `ImagesConfig`.

    It is called, trained and measured as a `Decoder` is: `tokens` are patches, uint8 [B, T, P]. Its logits are those of
    the classes, float32 [B, T, V], the same at all patches; those of a masked autoencoder are pixels [B, T, P].
    """

    token_dtype = jnp.uint8

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.deterministic = True
        images, ctx = config.images, config.build_context()
        d, pixels = config.d_model, images.pixels
        self.patches_PD = ctx.weight(rngs, (pixels, d), (None, "embed"), pixels)
        self.patches_bias = ctx.constant(0.0, (d,), ("embed",))
        learned = images.positions == "learned"
        shape = (images.patches, d)
        self.positions_TD = ctx.weight(rngs, shape, ("positions", "embed"), d, std=0.02) if learned else None
        self.segments = nnx.List([Segment.build(config, segment, rngs) for segment in config.segments()])
        self.final_norm = config.norm.build(ctx)
        self.head = config.residual.build_head(ctx, rngs)
        self.reconstruction = Reconstruction(config, rngs) if images.reconstructs else None
        self.classes = None if images.reconstructs else Classes(config, rngs)
        samples = any(spec.ffn.samples for spec in config.layer_specs())
        self.noise = nnx.RngStream(rngs.params(), tag="noise") if samples else None

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Numbers of a token: those of a patch."""
        return (self.config.images.pixels,)

    def __call__(
        self,
        tokens_BTP: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        logits: bool = True,
        record: Collection[str] = (),
        summarise: Summarise | None = None,
        edit: Edit | None = None,
        keep: Keep | None = None,
        density_eps: jax.Array | None = None,
    ) -> Output:
        """Classes of images, or their hidden patches.

        Args:
          tokens_BTP: uint8 [B, T, P], patches in the order of rows; the numbers of one are those of its rows.
          segment_ids: int [B, T]; 0 marks patches that the encoder does not see: hidden ones, and images that fill up a
            batch. Default: all are seen, which a masked autoencoder can't use.
          positions: int [B, T], places of the patches. Default: 0, 1, ...
          logits: make the logits; off, they are empty.
          record, summarise, edit, keep, density_eps: as of `Decoder.__call__`.
        """
        config, images = self.config, self.config.images
        batch, length = tokens_BTP.shape[:2]
        require(length == images.patches, "tokens", f"<{length} patches>", f"must be {images.patches} of an image")
        if segment_ids is None:
            require(not images.reconstructs, "segment_ids", None, "must say which patches are hidden")
            segment_ids = jnp.ones((batch, length), jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))

        x_BTD = self._embedded(tokens_BTP, positions)
        order_BU = None
        if images.reconstructs:
            # Stable: seen patches first, both kinds in the order of the image.
            order_BU = jnp.argsort(segment_ids == 0, axis=1, stable=True)[:, : images.visible]
            x_BTD = jnp.take_along_axis(x_BTD, order_BU[..., None], axis=1)
            ctx = image_context(*(jnp.take_along_axis(x, order_BU, axis=1) for x in (segment_ids, positions)))
        else:
            ctx = image_context(segment_ids, positions)
        ctx.record, ctx.summarise, ctx.keep = checked(record), summarise, keep
        ctx.edit, ctx.density_eps = self._edit(edit, ctx), density_eps
        ctx.rng = None if self.deterministic or self.noise is None else self.noise()

        scan = config.scan_layers and ctx.edit is None and keep is None
        x_BTD = constrain(x_BTD, STREAM)
        passed, auxes, _ = run_segments(self.segments, Passed(x_BTD), ctx, scan=scan, remat=config.remat)
        hidden_BTD, head_aux = self.head(passed.x, self.final_norm, ctx)
        losses, stats = collected(auxes, [head_aux])
        made = jnp.zeros((batch, length, 0), jnp.float32)
        if logits and self.reconstruction is not None:
            made = self.reconstruction(hidden_BTD, order_BU, length)
        elif logits and self.classes is not None:
            logits_B1V = self.classes(hidden_BTD, ctx, self.head)
            made = jnp.broadcast_to(logits_B1V, (batch, length, config.vocab_size))
        observed = (*(aux.observed for aux in auxes), *([head_aux.observed] if head_aux.observed else []))
        return Output(made, hidden_BTD, losses, stats, None, records_of(auxes), observed)

    def _embedded(self, tokens_BTP: jax.Array, positions_BT: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        scaled_BTP = (tokens_BTP.astype(jnp.float32) / 127.5 - 1).astype(dtype)
        x_BTD = matmul(scaled_BTP, self.patches_PD[...].astype(dtype)) + self.patches_bias[...].astype(dtype)
        if self.positions_TD is not None:
            table_TD = self.positions_TD[...]
        else:
            table_TD = jnp.asarray(sines(self.config.images.patches, self.config.d_model))
        return x_BTD + constrain(table_TD.astype(dtype), (None, None))[positions_BT]

    def _edit(self, edit: Edit | None, ctx: CallContext) -> Edit | None:
        images = self.config.images
        if images.map_top_k is None or (images.map_top_k_in == "evaluation" and not self.deterministic):
            return edit
        share = images.map_top_k

        def largest(name: str, layer: int, x_BTD: jax.Array) -> jax.Array:
            if name == images.map_top_k_of:
                x_BTD = largest_of_maps(x_BTD, share, ctx.valid_BT)
            return x_BTD if edit is None else edit(name, layer, x_BTD)

        return largest

    def loss_sums(self, out: Output, batch: Any) -> tuple[jax.Array, jax.Array] | None:
        """Of a masked autoencoder, the sum over hidden patches of the mean squared error of their pixels, and how many
        there are, float32 scalars: what is trained in place of the cross-entropy. None: that is trained.

        Source: MAE (arXiv 2111.06377), section 3, "Reconstruction target".
        """
        if self.reconstruction is None:
            return None
        targets_BTP = pixel_targets(batch["tokens"], normalised=self.config.images.mae.normalised)
        errors_BT = jnp.mean(jnp.square(out.logits - targets_BTP), axis=-1)
        mask_BT = batch["mask"]
        return jnp.sum(jnp.where(mask_BT, errors_BT, 0)), jnp.sum(mask_BT, dtype=jnp.float32)

    def after_step(self, observed: tuple[Observed, ...], key: jax.Array) -> None:
        """As `Decoder.after_step`."""
        rest = update_segments(self.segments, list(observed), key)
        if rest:
            self.head.after_step(rest[0], jax.random.fold_in(key, len(self.segments)))


def read_as(model: Encoder, images: ImagesConfig) -> Encoder:
    """A model of the same parameters that reads images as `images` says: with another top-k of its maps, or as one that
    sees all patches. An autoencoder that does has no decoder, hence no logits.

    Raises:
      ConfigError: its patches are others than those of the parameters, or it would need a decoder that `model` lacks.
    """
    own = model.config.images
    for name in ("patch", "size", "channels", "positions"):
        value, there = getattr(images, name), getattr(own, name)
        require(value == there, f"model.images.{name}", value, f"must be {there}, as the model was trained")
    share = images.mae.hidden_share
    kept = not images.reconstructs or images.mae == own.mae
    require(kept, "model.images.mae.hidden_share", share, f"must be none or {own.mae.hidden_share}, as it was trained")
    graphdef, state = nnx.split(model)
    twin = nnx.merge(graphdef, state)
    twin.config = dataclasses.replace(model.config, images=images)
    if not images.reconstructs:
        twin.reconstruction = None
    return twin


class Classes(nnx.Module):
    """From the states of an image's patches to its classes."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        ctx, d, vocab = config.build_context(), config.d_model, config.vocab_size
        self.output_DV = ctx.weight(rngs, (d, vocab), ("embed", "vocab"), d, std=config.init.output_std)
        self.output_bias = ctx.constant(0.0, (vocab,), ("vocab",))

    def __call__(self, hidden_BTD: jax.Array, ctx: CallContext, head: Head) -> jax.Array:
        """Logits [B, 1, V], float32, of the mean over the patches; `head` reads it."""
        weights_BT = ctx.valid_BT.astype(jnp.float32)
        total_BD = jnp.einsum("btd,bt->bd", hidden_BTD.astype(jnp.float32), weights_BT)
        pooled_BD = total_BD / jnp.maximum(jnp.sum(weights_BT, axis=1, keepdims=True), 1)
        weight_DV = self.output_DV[...].astype(hidden_BTD.dtype)
        logits_B1V = head.project(pooled_BD[:, None].astype(hidden_BTD.dtype), weight_DV, _FLOAT)
        return logits_B1V + self.output_bias[...].astype(jnp.float32)


class Reconstruction(nnx.Module):
    """MAE's decoder: from the states of seen patches to the pixels of all."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = reconstruction_config(config)
        width, ctx = self.config.d_model, self.config.build_context()
        self.enter_DE = ctx.weight(rngs, (config.d_model, width), ("embed", None), config.d_model)
        self.hidden_E = ctx.weight(rngs, (width,), (None,), width, std=0.02)
        self.segments = nnx.List([Segment.build(self.config, segment, rngs) for segment in self.config.segments()])
        self.final_norm = self.config.norm.build(ctx)
        self.pixels_EP = ctx.weight(rngs, (width, config.images.pixels), ("embed", None), width)
        self.pixels_bias = ctx.constant(0.0, (config.images.pixels,), (None,))

    def __call__(self, seen_BUD: jax.Array, order_BU: jax.Array | None, length: int) -> jax.Array:
        """Pixels [B, T, P], float32, of all patches; `order` are the places of those that were seen."""
        assert order_BU is not None
        dtype, batch = seen_BUD.dtype, seen_BUD.shape[0]
        seen_BUE = matmul(seen_BUD, self.enter_DE[...].astype(dtype))
        x_BTE = jnp.broadcast_to(self.hidden_E[...].astype(dtype), (batch, length, seen_BUE.shape[-1]))
        x_BTE = x_BTE.at[jnp.arange(batch)[:, None], order_BU].set(seen_BUE)
        x_BTE = constrain(x_BTE + jnp.asarray(sines(length, x_BTE.shape[-1]), dtype), STREAM)
        everything = jnp.ones((batch, length), jnp.int32)
        ctx = image_context(everything, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)))
        form = {"scan": self.config.scan_layers, "remat": self.config.remat}
        passed, _, _ = run_segments(self.segments, Passed(x_BTE), ctx, **form)
        made = matmul(self.final_norm(passed.x), self.pixels_EP[...].astype(dtype), _FLOAT)
        return made + self.pixels_bias[...].astype(jnp.float32)


def reconstruction_config(config: DecoderConfig) -> DecoderConfig:
    """The layers of MAE's decoder for an encoder of `config`."""
    mae, width = config.images.mae, config.images.mae.width
    return DecoderConfig(
        vocab_size=1,
        d_model=width,
        layers=mae.layers,
        max_seq_len=config.max_seq_len,
        attention=GQAConfig(heads=mae.heads, kv_heads=mae.heads, head_dim=width // mae.heads, rope=None),
        ffn=PlainFFNConfig(d_ff=4 * width, bias=True),
        norm=config.norm,
        init=config.init,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        scan_layers=config.scan_layers,
        remat=config.remat,
    )


def image_context(segments_BT: jax.Array, positions_BT: jax.Array) -> CallContext:
    """What layers are called with for patches that all see each other, those of segment 0 excepted."""
    # Visibility is by order: everything stands at one place.
    nowhere_BT = jnp.zeros_like(positions_BT)
    visible = Visibility(
        query_positions_BT=nowhere_BT,
        key_positions_BS=nowhere_BT,
        query_segments_BT=segments_BT,
        key_segments_BS=segments_BT,
    )
    ctx = CallContext(positions_BT, segments_BT, {"global": visible})
    ctx.keys_seen = {"global": ctx.mean_over_tokens(visible.keys_seen)}
    return ctx


def largest_of_maps(x_BTD: jax.Array, share: float, valid_BT: jax.Array) -> jax.Array:
    """Each channel's map over the patches of an image, with 0 where it is not among the largest in magnitude.

    A share of the T patches is kept, at least one; of those that are not valid none. The others have no gradient.

    Source: the Top-K activation sparsity of arXiv 2506.00718, whose abstract alone is known here: that it is over
    space, by magnitude, and where in a layer it stands are choices of this package.
    """
    kept = max(1, round(share * x_BTD.shape[1]))
    magnitude_BDT = jnp.where(valid_BT[..., None], jnp.abs(x_BTD), 0).swapaxes(1, 2)
    return jnp.where(top_k_mask(magnitude_BDT, kept).swapaxes(1, 2), x_BTD, 0)


def pixel_targets(tokens_BTP: jax.Array, *, normalised: bool) -> jax.Array:
    """What a masked autoencoder predicts of patches, float32 [B, T, P]: pixels from -1 to 1, or those of each patch
    less their mean and divided by their standard deviation (divisor P - 1).
    """
    pixels_BTP = tokens_BTP.astype(jnp.float32) / 127.5 - 1
    if not normalised:
        return pixels_BTP
    mean_BT1 = jnp.mean(pixels_BTP, axis=-1, keepdims=True)
    variance_BT1 = jnp.var(pixels_BTP, axis=-1, keepdims=True, ddof=1)
    return (pixels_BTP - mean_BT1) / jnp.sqrt(variance_BT1 + _EPS)


def sines(patches: int, width: int) -> np.ndarray:
    """Position embeddings float32 [T, D] of a square of patches: a quarter of the width each are sines and cosines of a
    patch's row, and of its column, with wavelengths from 2 pi to 20,000 pi.

    Source: MoCo v3 (arXiv 2104.02057), section 4 ("sine-cosine variant in 2-D").
    """
    side, quarter = round(patches**0.5), width // 4
    angles = np.arange(side)[:, None] / 10_000 ** (np.arange(quarter) / quarter)
    along = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = (np.broadcast_to(x, (side, side, 2 * quarter)) for x in (along[:, None], along[None]))
    return np.concatenate([rows, columns], axis=-1).reshape(patches, width).astype(np.float32)
