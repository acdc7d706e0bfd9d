"""Configuration of transformers that read images: patches, positions, masked autoencoding, sparsity of maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require

if TYPE_CHECKING:
    from sparsezoo_jax.models.config import DecoderConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MAEConfig:
    """Masked autoencoding (arXiv 2111.06377): the encoder sees some patches of an image, a decoder makes the others."""

    hidden_share: float | None = None
    """Share of the patches that is hidden and predicted (0.75 in the paper). None: images are classified."""
    width: int = 64
    """Width of the decoder's stream; its feed-forward networks are four times as wide, with GELU."""
    layers: int = 1
    """Layers of the decoder."""
    heads: int = 4
    """Heads of the decoder's attention; must divide `width`."""
    normalised: bool = True
    """Predict pixels less the mean of their patch, divided by its standard deviation."""

    def __post_init__(self):
        share, field = self.hidden_share, "model.images.mae"
        require(share is None or 0 < share < 1, f"{field}.hidden_share", share, "must be above 0 and below 1, or none")
        for name in ("width", "layers", "heads"):
            require(getattr(self, name) > 0, f"{field}.{name}", getattr(self, name), "must be above 0")
        require(self.width % 4 == 0, f"{field}.width", self.width, "must be a multiple of 4")
        require(self.width % self.heads == 0, f"{field}.heads", self.heads, f"must divide {field}.width={self.width}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImagesConfig:
    """What makes a transformer one of images: it reads patches in place of words, and sees all of them at once.

    `vocab_size` is then the number of classes, and `max_seq_len` that of patches.
    """

    patch: int | None = None
    """Pixels of a patch's side. None: the model is one of words."""
    size: int = 32
    """Pixels of an image's side; a multiple of `patch`."""
    channels: int = 3
    """Channels of an image."""
    positions: Literal["learned", "sine"] = "learned"
    """What is added to the embedding of a patch: a learned vector, or sines of row and column (arXiv 2104.02057)."""
    mae: MAEConfig = MAEConfig()
    """Masked autoencoding in place of classification."""
    map_top_k: float | None = None
    """Share of an image's patches at which each channel of a layer's map stays, where it is largest in magnitude; at
    the others it is 0. None: everywhere. See `models.encoder.largest_of_maps`."""
    map_top_k_of: Literal["ffn_output", "residual"] = "ffn_output"
    """The maps: what feed-forward networks add to the stream, or the stream after each layer."""
    map_top_k_in: Literal["always", "evaluation"] = "always"
    """When: in training too, or in evaluation alone."""

    def __post_init__(self):
        field, patch = "model.images", self.patch
        require(patch is None or patch > 0, f"{field}.patch", patch, "must be above 0, or none")
        for name in ("size", "channels"):
            require(getattr(self, name) > 0, f"{field}.{name}", getattr(self, name), "must be above 0")
        share = self.map_top_k
        require(share is None or 0 < share <= 1, f"{field}.map_top_k", share, "must be above 0 and at most 1, or none")
        if patch is None:
            require(self.mae.hidden_share is None, f"{field}.mae.hidden_share", self.mae.hidden_share, "needs a patch")
            require(share is None, f"{field}.map_top_k", share, "needs a patch")
            return
        require(self.size % patch == 0, f"{field}.patch", patch, f"must divide {field}.size={self.size}")
        require(self.visible > 0, f"{field}.mae.hidden_share", self.mae.hidden_share, "must leave a patch to see")
        require(self.visible < self.patches or not self.reconstructs, f"{field}.mae.hidden_share",
                self.mae.hidden_share, f"must hide one of {self.patches} patches")  # fmt: skip

    @property
    def patches(self) -> int:
        """Patches of an image, 0 for a model of words."""
        return 0 if self.patch is None else (self.size // self.patch) ** 2

    @property
    def pixels(self) -> int:
        """Numbers of a patch."""
        return 0 if self.patch is None else self.patch**2 * self.channels

    @property
    def reconstructs(self) -> bool:
        """Whether hidden patches are predicted, not classes."""
        return self.mae.hidden_share is not None

    @property
    def visible(self) -> int:
        """Patches of an image that the encoder sees."""
        return self.patches - round((self.mae.hidden_share or 0) * self.patches)

    def check(self, config: DecoderConfig) -> None:
        """Raise `ConfigError` for a transformer that can't be one of images, or needs to be one and is not."""
        fixed = config.attention.fixed_length
        if self.patch is None:
            allowed = "mixes a fixed number of patches: it is for models with a model.images.patch"
            require(fixed is None, "model.attention.kind", config.attention.kind, allowed)
            return
        count = f"must be {self.patches}, the patches of an image"
        require(config.max_seq_len == self.patches, "model.max_seq_len", config.max_seq_len, count)
        allowed = f"must be {self.visible}, the patches that are seen at once"
        require(fixed in (None, self.visible), "model.attention.tokens", fixed, allowed)
        allowed = "mixes patches by their places, and can't be used with hidden ones"
        require(fixed is None or not self.reconstructs, "model.attention.kind", config.attention.kind, allowed)
        width = config.d_model
        require(self.positions == "learned" or width % 4 == 0, "model.d_model", width, "must be a multiple of 4")
        only_words: dict[str, tuple[object, object]] = {
            "layer_pattern": (set(config.layer_pattern), {"global"}),
            "kv_shared_layers": (config.kv_shared_layers, 0),
            "mtp_layers": (config.mtp_layers, 0),
            "altup.streams": (config.altup.streams, 1),
            "per_layer.width": (config.per_layer.width, None),
            "learned_positions": (config.learned_positions, False),
            "embedding_scale": (config.embedding_scale, 1.0),
            "vocab_multiple": (config.vocab_multiple, 1),
            "tie_embeddings": (config.tie_embeddings, False),
            "final_softcap": (config.final_softcap, None),
            "logit_divisor": (config.logit_divisor, 1.0),
        }
        for name, (value, wanted) in only_words.items():
            require(value == wanted, f"model.{name}", value, f"must be {wanted} in a model of images")
        routed = config.ffn.pre_gate(config) is None
        require(routed, "model.ffn.kind", config.ffn.kind, "routes by words, and can't be used in a model of images")
