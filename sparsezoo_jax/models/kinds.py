"""The unions of layer kinds that a decoder can be composed of: a new kind is added here and nowhere else.

A kind is a configuration dataclass with a `kind` literal. Attention and residual kinds have `build`; FFN kinds also
have `for_layer(layer, layers)`, which gives one layer's own configuration, and may have `samples`, true if training
needs random numbers, `shared`, the number of experts that every token takes, and `upcycled(source, weights, noise,
key)`, which makes parameters of those of another kind; attention kinds have `window`, `score_heads` and `cache_shapes`.
Attention and FFN kinds whose maps from and to the residual stream are those of `CallContext.width` have
`partial_width = True`; a residual kind that routes the width asks for it in `check`. Residual kinds have `build_head`
and `fan_in`, too. A module that returns something as `LayerAux.observed` has a method `after_step`, an FFN that derives
something from its weights alone may have a method `prepare`.

For accounting, FFN kinds have `target_active`, `flops`, `weights` and `dense_twin` (and `idle_parameters`, if a token
leaves some out), attention kinds `target_keys`, `projection_flops`, `mixing_flops`, `projection_weights`, `cache_reads`
and `dense_twin`, residual kinds `active_width`, `weights` and `dense_twin`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig, PlainFFNConfig
from sparsezoo_jax.models.mla import MLAConfig
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.mohd import MoHDConfig
from sparsezoo_jax.models.residual import PreNormConfig
from sparsezoo_jax.models.spark import SparkAttentionConfig, SparkFFNConfig

AttentionConfig = Annotated[GQAConfig | MLAConfig | SparkAttentionConfig, Field(discriminator="kind")]
FFNConfig = Annotated[
    GatedFFNConfig | PlainFFNConfig | SparkFFNConfig | BlockFFNConfig | MoEFFNConfig | MoEXFFNConfig,
    Field(discriminator="kind"),
]
ResidualConfig = Annotated[PreNormConfig | MoHDConfig, Field(discriminator="kind")]
