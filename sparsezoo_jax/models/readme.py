"""Read-ME: experts of one routing decision for all layers, made by a small decoder that reads the tokens alone.

What a token's experts are is known before the first layer is, for a whole prompt at once; tokens are sorted by expert
once, whatever the number of layers. `sparsify --method readme` makes such a decoder of a dense one.

Source: Read-ME (arXiv 2410.19123), section 3. Shape letters beside those of `models.common`: S shared neurons, W
neurons of one expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require
from sparsezoo_jax.models import routers
from sparsezoo_jax.models.attention import GQAConfig
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import ActivationName, BuildContext, CallContext, LayerAux, activation_fn
from sparsezoo_jax.models.contract import FFN, FFNKind, PreGateConfig, register_ffn
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES
from sparsezoo_jax.models.routers import Routing
from sparsezoo_jax.pallas_kernels.grouped_ffn import Dispatch, Moved, grouped_ffn, move_and_why

if TYPE_CHECKING:
    from sparsezoo_jax.models.config import DecoderConfig


@register_ffn
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReadMEFFNConfig(FFNKind):
    """`f_shared(x) + f_e(x)` of gated networks, e the one expert that the decoder's router chose for the token.

    The router is a decoder of one layer with an embedding of its own. It is the same for all layers, and float32.
    """

    kind: Literal["readme"] = "readme"
    experts: int
    """Experts, of which a token takes one (Read-ME: 7, one for each domain of its text)."""
    expert_width: int
    """Neurons of one expert."""
    shared_width: int = 0
    """Neurons that every token takes beside its expert's."""
    activation: ActivationName = "silu"
    """Non-linearity of the gates."""
    router_width: int = 512
    """Width of the router's stream."""
    router_heads: int = 4
    """Attention heads of the router."""
    router_d_ff: int = 512
    """Inner width of the router's feed-forward network."""
    implementation: Dispatch | None = None
    """Form of the experts' product. None picks by platform."""
    moved: Moved | None = None
    """What devices of mesh.expert send each other; as in mixtures (docs/moe.md)."""

    def __post_init__(self):
        name = "model.ffn"
        for field in ("experts", "expert_width", "router_width", "router_heads", "router_d_ff"):
            require(getattr(self, field) > 0, f"{name}.{field}", getattr(self, field), "must be above 0")
        require(self.shared_width >= 0, f"{name}.shared_width", self.shared_width, "must be at least 0")
        allowed = (
            f"must be a multiple of twice {name}.router_heads={self.router_heads}, whose width is halved to rotate"
        )
        fits = self.router_width % (2 * self.router_heads) == 0
        require(fits, f"{name}.router_width", self.router_width, allowed)

    @property
    def d_ff(self) -> int:
        """Neurons of all experts, and shared ones."""
        return self.shared_width + self.experts * self.expert_width

    @property
    def target_active(self) -> float:
        """Neurons of a token."""
        return self.shared_width + self.expert_width

    def pre_gate(self, config: DecoderConfig) -> PreGateConfig:
        """The router of all layers."""
        decoder = type(config)(
            vocab_size=config.vocab_size,
            vocab_multiple=config.vocab_multiple,
            d_model=self.router_width,
            layers=1,
            max_seq_len=config.max_seq_len,
            attention=GQAConfig(
                heads=self.router_heads, kv_heads=self.router_heads, head_dim=self.router_width // self.router_heads
            ),
            ffn=GatedFFNConfig(d_ff=self.router_d_ff, activation="silu"),
            param_dtype=config.param_dtype,
            scan_layers=config.scan_layers,
            remat=config.remat,
        )
        return PreGateConfig(decoder, self.experts)

    def weights(self, d_model: int, active: float | None = None) -> float:
        """Weights that one token needs with `active` neurons (None: its own); the router, of all layers, is no part."""
        return 3 * d_model * (self.target_active if active is None else active)

    def idle_parameters(self, d_model: int) -> int:
        """Parameters of the experts that a token does not take."""
        return 3 * d_model * (self.experts - 1) * self.expert_width

    def dense_twin(self) -> GatedFFNConfig:
        """The gated layer of equal parameters."""
        return GatedFFNConfig(d_ff=self.d_ff, activation=self.activation)

    def on_mesh(self, shape: tuple[int, int, int]) -> str | None:
        """What devices that split the experts send each other."""
        if self.implementation == "dense":
            return None
        return move_and_why(self.moved, shape, 1, (self.experts, shape[-1], self.expert_width), maps=3)

    def build(self, ctx: BuildContext, rngs: nnx.Rngs) -> ReadMEFFN:
        return ReadMEFFN(self, ctx, rngs)


class ReadMEFFN(FFN):
    """One layer's experts; see `ReadMEFFNConfig`."""

    def __init__(self, config: ReadMEFFNConfig, ctx: BuildContext, rngs: nnx.Rngs):
        self.config, self.dtype = config, ctx.dtype
        d, e, w = ctx.d_model, config.experts, config.expert_width
        columns = ("experts", "embed", "ffn")
        self.gate_EDW = ctx.weight(rngs, (e, d, w), columns, ctx.fan_in)
        self.up_EDW = ctx.weight(rngs, (e, d, w), columns, ctx.fan_in)
        # A token adds up the outputs of its shared neurons and of its expert's.
        inputs = config.shared_width + w
        self.down_EWD = ctx.weight(rngs, (e, w, d), ("experts", "ffn", "embed"), inputs, output=True)
        shared = GatedFFNConfig(d_ff=config.shared_width or 1, activation=config.activation)
        self.shared = shared.build(ctx, rngs) if config.shared_width else None

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        routing: Routing = ctx.experts
        y_BTD = self.mixed(x_BTD, routing)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, ctx)[0]
        load_E = routers.loads(routing.active_BTE, ctx)
        stats = activation_stats(routing.active_BTE, ctx)
        # By neurons: shared ones are not as many as an expert has.
        stats["ffn_density"] = jnp.float32(self.config.target_active / self.config.d_ff)
        stats["max_load"] = jnp.max(load_E) / jnp.maximum(jnp.mean(load_E), 1e-20)
        stats |= routers.device_load(load_E)
        return y_BTD, LayerAux(stats=stats, records=ctx.recorded({EXPERT_SCORES: lambda: routing.weights_BTE}))

    def mixed(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """What each token's expert makes of it, [B, T, D]."""
        maps = (weight[...].astype(self.dtype) for weight in (self.up_EDW, self.down_EWD, self.gate_EDW))
        return self.product(x_BTD, routing, *maps)

    def product(
        self, x_BTD: jax.Array, routing: Routing, up_EDW: jax.Array, down_EWD: jax.Array, gate_EDW: jax.Array
    ) -> jax.Array:
        """The same with these maps of the experts."""
        assert routing.experts_BTK is not None
        assert routing.weights_BTK is not None
        y_BTD: Any = grouped_ffn(
            x_BTD,
            routing.experts_BTK,
            routing.weights_BTK,
            up_EDW,
            down_EWD,
            gate_EDW,
            activation=activation_fn(self.config.activation),
            implementation=self.config.implementation,
            moved=self.config.moved,
        )
        return y_BTD
