"""Mixtures whose experts leave out channels, laid out for decoding: a few tokens read the rows that are left of theirs.

The maps of an expert lie by their input channels, as they are trained, so that a product is the sum of the rows of
channels that are not 0. Where the gate leaves neurons out, the map that it multiplies lies by neurons. Elsewhere than
on a CPU, and for many tokens, products are those that are trained, with whole experts.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.inference.experts import EXPERTS, PackedDECOFFN
from sparsezoo_jax.inference.layouts import Formats
from sparsezoo_jax.inference.matrices import Rows, WeightFormat, assign, few_tokens, flat
from sparsezoo_jax.models.blockffn import BlockFFN
from sparsezoo_jax.models.chunks import activation_stats
from sparsezoo_jax.models.common import CallContext, LayerAux, activation_fn
from sparsezoo_jax.models.contract import FFN
from sparsezoo_jax.models.deco import DECOFFN, statistics
from sparsezoo_jax.models.experts import SHARED, Named, expert_channels, show_experts
from sparsezoo_jax.models.masks import NEURONS, OfExpert
from sparsezoo_jax.models.matrices import find
from sparsezoo_jax.models.moe import Maps, MoEFFN
from sparsezoo_jax.models.moex import MoEXFFN
from sparsezoo_jax.models.routers import Routing
from sparsezoo_jax.models.width import Width
from sparsezoo_jax.pallas_kernels.active_rows import active_rows
from sparsezoo_jax.pallas_kernels.deco_ffn import hidden_units
from sparsezoo_jax.pallas_kernels.deco_ffn.activation import REMOVE_MEAN, norm_silu
from sparsezoo_jax.pallas_kernels.dispatch import dispatch, native_cpu, plain
from sparsezoo_jax.pallas_kernels.expert_rows import expert_products, expert_rows
from sparsezoo_jax.pallas_kernels.grouped_ffn import Channels, Reads, unmasked, weighted_ffn
from sparsezoo_jax.pallas_kernels.grouped_ffn.channels import count_nonzero
from sparsezoo_jax.pallas_kernels.linear import linear
from sparsezoo_jax.pallas_kernels.matmul import to_stream
from sparsezoo_jax.pallas_kernels.rows import native_refusal

Sums = tuple[jax.Array, dict[str, jax.Array]]
"""What a token's experts add up to, and by map how many channels of theirs were read, [B, T, K] or [B, T, E]."""
Left = Callable[[str], float]
"""By map, the share of its channels that are read."""
COLUMNS = ("experts", "embed", "ffn")
"""Logical axes of experts' weights, rows of inputs."""


def of_few(rows: Callable[..., Sums], whole: Callable[..., Sums], experts: int, x_BTD: jax.Array, *arrays: Any) -> Sums:
    """`rows(x, *arrays)` for a few tokens natively, `whole(x, *arrays)` else; both return arrays of the same shapes."""
    if few_tokens(x_BTD, experts) is None:
        return whole(x_BTD, *arrays)
    return dispatch("experts", None, [plain(whole), native_cpu(rows, native_refusal(x=x_BTD))])(x_BTD, *arrays)


def reads_of(channels: Channels, experts_BTK: jax.Array | None) -> Reads:
    """What the maps of these experts (None: of all) read; of [B, T, 1, I] as many, unless each scores its channels."""
    whole = None if channels.whole is None else channels.whole[..., None, None]

    def own(of_map: OfExpert) -> OfExpert:
        # The cut is that of all experts: without norms of their own they read the same.
        if of_map.norms_EI is None:
            return of_map._replace(cut_E1=of_map.cut_E1[:1])
        return of_map if experts_BTK is None else jax.tree.map(lambda array: array[experts_BTK], of_map)

    def masked(x: jax.Array, own: OfExpert) -> jax.Array:
        left = channels.masked(x, own)
        return left if whole is None else jnp.where(whole, x, left)

    return Reads(masked, {name: own(of_map) for name, of_map in channels.of_maps.items()})


def expert_matrices(source: FFN, config: Any) -> dict[str, jax.Array]:
    """The matrices of a mixture by map: those of experts [E, I, O], of what all tokens take [I, O]."""
    found = {}
    for name, path in source.matrices.items():
        param = find(source, path)
        if param is None:
            continue
        weight = found[name] = param[...]
        if name in config.expert_maps and weight.ndim == 2:
            axis, experts = config.expert_axis(name)
            shape = (*weight.shape[:axis], experts, weight.shape[axis] // experts, *weight.shape[axis + 1 :])
            found[name] = jnp.moveaxis(weight.reshape(shape), axis, 0)
    return found


def restore_matrices(source: FFN, config: Any, maps: Mapping[str, jax.Array | None]) -> None:
    """Put the matrices of maps, of the shapes that `expert_matrices` gives them, back into `source`."""
    for name, value in maps.items():
        if value is not None:
            value = jnp.moveaxis(value, 0, config.expert_axis(name)[0]) if name in config.expert_maps else value
            assign(find(source, source.matrices[name]), value)


class ExpertMaps(nnx.Module):
    """The maps of experts: rows of their inputs' channels, but where neurons are left out of the one that is gated.

    `masked` are the maps with masks. Those of experts that all tokens take are the maps of one.
    """

    def __init__(
        self,
        maps: Mapping[str, jax.Array],
        masked: Collection[str],
        activation: str,
        form: WeightFormat,
        dtype: jnp.dtype,
    ):
        """`maps`: up and, if there is one, gate [E, D, W] or [D, W], down [E, W, D] or [W, D]."""
        self.masked, self.activation = frozenset(masked), activation
        self.by_neurons = NEURONS in self.masked

        def laid_out(name: str, by_outputs: bool = False) -> Rows:
            weight = maps[name] if maps[name].ndim == 3 else maps[name][None]
            weight = weight.swapaxes(1, 2) if by_outputs else weight
            return Rows(weight, form, dtype, EXPERTS if by_outputs or name == "down" else COLUMNS)

        self.gate = laid_out("gate") if "gate" in maps else None
        self.up, self.down = laid_out("up", self.by_neurons), laid_out("down")

    def weights(self) -> Maps:
        """The maps up [E, D, W], down [E, W, D] and, if there are some, gates [E, D, W], in the activations' dtype."""
        up = self.up.restored()
        gate = None if self.gate is None else self.gate.restored()
        return up.swapaxes(1, 2) if self.by_neurons else up, self.down.restored(), gate

    def by_name(self, prefix: str = "") -> dict[str, jax.Array | None]:
        """The same by map, the one expert's of a prefix without its axis."""
        up, down, gate = self.weights()
        maps = {"up": up, "down": down, "gate": gate}
        if not prefix:
            return maps
        return {prefix + name: None if weight is None else weight[0] for name, weight in maps.items()}

    def channels(self, width: Width) -> Channels:
        """Which channels these maps leave out."""
        found = expert_channels(width, *self.weights())
        return Channels(unmasked, {}) if found is None else found

    def bytes_read(self, left: Left) -> float:
        """Bytes that a token reads which takes all experts, and of what maps with masks read the share `left(map)`."""

        def share(name: str) -> float:
            name = NEURONS if self.by_neurons and name != "gate" else name
            return left(name) if name in self.masked else 1

        maps = {"gate": self.gate, "up": self.up, "down": self.down}
        return sum(share(name) * rows.nbytes for name, rows in maps.items() if rows is not None)

    def whole(self, x_BTD: jax.Array, weights_BTE: jax.Array, channels: Channels) -> Sums:
        """The weighted sum of all experts by whole products."""
        return weighted_ffn(
            x_BTD, weights_BTE, *self.weights(), activation=activation_fn(self.activation), channels=channels
        )

    def of_rows(
        self, x_BTD: jax.Array, weights_BTK: jax.Array, channels: Channels, experts_BTK: jax.Array | None = None
    ) -> Sums:
        """The weighted sum of each token's experts, natively by the rows that are left.

        `experts_BTK`: int32, -1 for none; None: all that have a weight which is not 0, of which `weights_BTK` then has
        one for each expert.
        """
        taken_BTK, activation = experts_BTK, activation_fn(self.activation)
        if taken_BTK is None:
            taken_BTK = taken(weights_BTK)
        reads, numbers = reads_of(channels, experts_BTK), taken_BTK.reshape(-1)

        def product(read_BTKI: jax.Array, rows: Rows) -> jax.Array:
            y = expert_rows(flat(read_BTKI), numbers, *rows.arrays, implementation="native")
            return y.reshape(*taken_BTK.shape, -1)

        x_BT1D = x_BTD[..., None, :]
        if self.gate is None:
            hidden_BTKW = activation(product(reads("up", x_BT1D), self.up))
        else:
            gates_BTKW = reads(NEURONS, activation(product(reads("gate", x_BT1D), self.gate)))
            if self.by_neurons:
                up = expert_products(flat(x_BTD), numbers, flat(gates_BTKW), *self.up.arrays, implementation="native")
                hidden_BTKW = gates_BTKW * up.reshape(gates_BTKW.shape)
            else:
                hidden_BTKW = gates_BTKW * product(reads("up", x_BT1D), self.up)
        counts = {"hidden": count_nonzero(hidden_BTKW)}
        hidden_BTKW, wide_BTK = reads("down", hidden_BTKW), weights_BTK.astype(jnp.float32)
        if experts_BTK is None:
            y_BTD = summed_rows(hidden_BTKW, wide_BTK, self.down)
        else:
            y_BTD = jnp.einsum("btk,btkd->btd", wide_BTK, product(hidden_BTKW, self.down).astype(jnp.float32))
        counts |= {name: jnp.broadcast_to(count, taken_BTK.shape) for name, count in reads.counts.items()}
        return y_BTD.astype(x_BTD.dtype), counts


def taken(weights_BTE: jax.Array) -> jax.Array:
    """The numbers of experts that have a weight, and -1 in place of others, int32 [B, T, E]."""
    return jnp.where(weights_BTE != 0, jnp.arange(weights_BTE.shape[-1], dtype=jnp.int32), -1)


def summed_rows(hidden_BTEW: jax.Array, weights_BTE: jax.Array, down: Rows) -> jax.Array:
    """`sum_e w_e h_e W_e`, [B, T, D], natively: all experts' rows are those of one matrix, read where h is not 0."""
    w_EWD, scale_EW = down.arrays
    wide = (hidden_BTEW.astype(jnp.float32) * weights_BTE[..., None]).astype(hidden_BTEW.dtype)
    rows_FD = w_EWD.reshape(-1, w_EWD.shape[-1])
    scale_F = None if scale_EW is None else scale_EW.reshape(-1)
    y = active_rows(flat(wide.reshape(*wide.shape[:2], -1)), rows_FD, scale_F, implementation="native")
    return y.reshape(*wide.shape[:2], -1)


def with_shared(y_BTD: jax.Array, x_BTD: jax.Array, maps: ExpertMaps, width: Width) -> jax.Array:
    """`y_BTD` and what the experts make of x [B, T, D] that all tokens take; `width` is told what they read."""
    named = Named(SHARED, width)
    channels, ones_BT1 = maps.channels(named), jnp.ones((*x_BTD.shape[:2], 1), jnp.float32)
    rows, whole = partial(maps.of_rows, channels=channels), partial(maps.whole, channels=channels)
    found_BTD, counts = of_few(rows, whole, 0, x_BTD, ones_BT1)
    neurons = maps.down.rows.shape[1]
    for name in channels.of_maps:
        size = neurons if name in ("down", NEURONS) else x_BTD.shape[-1]
        named.experts_read(name, counts[name] / size, ones_BT1 > 0)
    return y_BTD + found_BTD


def of_shared(maps: Any) -> dict[str, Any]:
    """Those of the maps, or of a mapping by map, that are the shared experts', by their names without the prefix."""
    values = maps if isinstance(maps, Mapping) else dict.fromkeys(maps)
    return {name.removeprefix(SHARED): value for name, value in values.items() if name.startswith(SHARED)}


class MaskedLayout(abc.ABC):
    """What a network with masks, whose bytes depend on what they leave, offers beside its call."""

    @abc.abstractmethod
    def restore(self, source: Any) -> None:
        """Put the weights back into `source`."""

    @abc.abstractmethod
    def read(self, density: float, left: Left) -> float:
        """Bytes of weights that one token reads with this share of the experts (or neurons) active, if a map with a
        mask reads the share `left(map)` of the channels of those.
        """


class MaskedMoEFFN(MoEFFN, MaskedLayout):
    """`MoEFFN` with its experts' maps by the rows that masks leave; the router stays as it is."""

    def __init__(self, source: MoEFFN, masked: Collection[str], form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        self.router_DE, self.bias_E = source.router_DE, source.bias_E
        maps, routed = expert_matrices(source, source.config), source.config.expert_maps
        how: Any = (source.config.activation, form, source.dtype)
        self.routed = ExpertMaps(maps, routed.intersection(masked), *how)
        fused = of_shared(maps)
        self.fused = ExpertMaps(fused, of_shared(masked), *how) if fused else None

    def restore(self, source: MoEFFN) -> None:
        """Put the weights back into `source`."""
        fused = {} if self.fused is None else self.fused.by_name(SHARED)
        restore_matrices(source, self.config, self.routed.by_name() | fused)

    def read(self, density: float, left: Left) -> float:
        """Bytes of weights that one token reads with this share of the experts active."""
        routed = max(density * self.config.experts - self.config.shared, 0) / self.config.routed
        shared = 0 if self.fused is None else self.fused.bytes_read(lambda name: left(SHARED + name))
        return self.router_DE[...].nbytes + routed * self.routed.bytes_read(left) + shared

    def mixed(self, x_BTD: jax.Array, routing: Routing, ctx: CallContext) -> jax.Array:
        """The weighted sum of each token's experts, shared ones included."""
        channels, experts_BTK, weights = self.routed.channels(ctx.width), routing.experts_BTK, routing.weights_BTK
        if experts_BTK is None or weights is None:
            experts_BTK, weights = None, jnp.where(ctx.valid_BT[..., None], routing.weights_BTE, 0)
        else:
            experts_BTK = jnp.where(ctx.valid_BT[..., None], experts_BTK, -1)

        def rows(x_BTD: jax.Array, weights: jax.Array, experts_BTK: jax.Array | None) -> Sums:
            return self.routed.of_rows(x_BTD, weights, channels, experts_BTK)

        def whole(x_BTD: jax.Array, weights: jax.Array, experts_BTK: jax.Array | None) -> Sums:
            del weights, experts_BTK  # `routing` has them
            return self.routed_experts(x_BTD, routing, self.routed.weights(), channels)

        y_BTD, counts = of_few(rows, whole, self.config.experts, x_BTD, weights, experts_BTK)
        (up_EDW, _, gate_EDW), activation = self.routed.weights(), activation_fn(self.config.activation)
        show_experts(x_BTD, up_EDW, gate_EDW, activation, routing.active_BTE, channels, counts, ctx)
        return y_BTD if self.fused is None else with_shared(y_BTD, x_BTD, self.fused, ctx.width)


class MaskedBlockFFN(BlockFFN, MaskedLayout):
    """`BlockFFN` with its experts' maps by the rows that masks leave, without losses."""

    def __init__(self, source: BlockFFN, masked: Collection[str], form: WeightFormat):
        self.config, self.dtype = source.config, source.dtype
        self.router_DE, self.router_norm = source.router_DE, source.router_norm
        self.maps = ExpertMaps(expert_matrices(source, source.config), masked, "silu", form, source.dtype)

    def restore(self, source: BlockFFN) -> None:
        """Put the weights back into `source`."""
        restore_matrices(source, self.config, self.maps.by_name())

    def read(self, density: float, left: Left) -> float:
        """Bytes of weights that one token reads with this share of the experts active."""
        scale = 0 if self.router_norm is None else self.router_norm.scale[...].nbytes
        return self.router_DE[...].nbytes + scale + density * self.maps.bytes_read(left)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        _, _, scores_BTE = self.route(x_BTD)
        aux, channels = LayerAux(stats=activation_stats(scores_BTE != 0, ctx)), self.maps.channels(ctx.width)
        scores_BTE = jnp.where(ctx.valid_BT[..., None], scores_BTE, 0)
        rows, whole = partial(self.maps.of_rows, channels=channels), partial(self.maps.whole, channels=channels)
        y_BTD, counts = of_few(rows, whole, self.config.experts, x_BTD, scores_BTE)
        up_EDW, _, gate_EDW = self.maps.weights()
        show_experts(x_BTD, up_EDW, gate_EDW, jax.nn.silu, scores_BTE != 0, channels, counts, ctx)
        return y_BTD, aux


class MaskedMoEXFFN(MoEXFFN, MaskedLayout):
    """`MoEXFFN` with its experts' maps by the rows that masks leave, the gate's statistics kept."""

    def __init__(self, source: MoEXFFN, masked: Collection[str], form: WeightFormat):
        self.config, self.dtype, self.router_DE = source.config, source.dtype, source.router_DE
        self.mean_ED, self.variance_ED = source.mean_ED, source.variance_ED
        self.maps = ExpertMaps(
            expert_matrices(source, source.config), masked, source.config.activation, form, source.dtype
        )

    def channels(self, width: Width) -> Channels | None:
        """Which channels the experts' maps leave out."""
        return self.maps.channels(width)

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Both maps of all experts, [E, D, W] and [E, W, D], in the activations' dtype."""
        up_EDW, down_EWD, _ = self.maps.weights()
        return up_EDW, down_EWD

    def restore(self, source: MoEXFFN) -> None:
        """Put the weights back into `source`."""
        restore_matrices(source, self.config, self.maps.by_name())

    def read(self, density: float, left: Left) -> float:
        """Bytes of weights that one token reads with this share of all neurons active before masks."""
        gate = (self.router_DE, self.mean_ED, self.variance_ED)
        chosen, maps = self.config.k / self.config.experts, self.maps
        up, down = (left(name) if name in maps.masked else 1 for name in ("up", "down"))
        experts = chosen * up * maps.up.nbytes + min(density, chosen * down) * maps.down.nbytes
        return sum(w[...].nbytes for w in gate if w is not None) + experts

    def product(
        self, x_BTD: jax.Array, routing: Routing, channels: Channels | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted sum of each token's experts, and counts by name."""
        assert routing.experts_BTK is not None
        assert routing.weights_BTK is not None
        masks = Channels(unmasked, {}) if channels is None else channels

        def rows(x_BTD: jax.Array, weights_BTK: jax.Array, experts_BTK: jax.Array) -> Sums:
            return self.maps.of_rows(x_BTD, weights_BTK, masks, experts_BTK)

        def whole(x_BTD: jax.Array, weights_BTK: jax.Array, experts_BTK: jax.Array) -> Sums:
            del weights_BTK, experts_BTK  # `routing` has them
            return MoEXFFN.product(self, x_BTD, routing, masks)

        return of_few(rows, whole, self.config.experts, x_BTD, routing.weights_BTK, routing.experts_BTK)


class MaskedDECOFFN(PackedDECOFFN, MaskedLayout):
    """`PackedDECOFFN` with masks: of the units of a token's experts those that are left are read back.

    Its first map reads all channels of the active experts.
    """

    def __init__(self, source: DECOFFN, masked: Collection[str], formats: Formats):
        super().__init__(source, formats)
        maps = {
            name.removeprefix(SHARED): w for name, w in expert_matrices(source, source.config).items() if SHARED in name
        }
        self.masked = frozenset(masked)
        self.shared: Any = ExpertMaps(maps, of_shared(masked), "silu", formats.weights, source.dtype)

    def restore(self, source: DECOFFN) -> None:
        """Put the weights back into `source`."""
        self.restore_routed(source)
        restore_matrices(source, self.config, self.shared.by_name(SHARED))

    def read(self, density: float, left: Left) -> float:
        """Bytes of weights that one token reads with this share of the routed experts active."""
        every = self.router.nbytes + self.router_scale_E[...].nbytes
        down = left("down") if "down" in self.masked else 1
        routed = density * (self.up.nbytes + down * self.down.nbytes)
        return every + routed + self.shared.bytes_read(lambda name: left(SHARED + name))

    def by_expert(self, rows: Rows) -> tuple[jax.Array, jax.Array | None]:
        """The neurons of all experts, [E, W, D], and their factors [E, W]."""
        w_FD, scale_F = rows.arrays
        shape = (self.config.experts, self.config.expert_width)
        return w_FD.reshape(*shape, -1), None if scale_F is None else scale_F.reshape(shape)

    def __call__(self, x_BTD: jax.Array, ctx: CallContext) -> tuple[jax.Array, LayerAux]:
        config, form = self.config, self.form()
        positive_BTE, scores_BTE = self.route(x_BTD)
        scores_BTE = jnp.where(ctx.valid_BT[..., None], scores_BTE, 0)
        found = ctx.width.of_experts(config.experts, {"down": lambda: self.by_expert(self.down)[0]})
        channels = Channels(unmasked, {}) if found is None else found

        def rows(x_BTD: jax.Array, scores_BTE: jax.Array) -> Sums:
            numbers = taken(scores_BTE).reshape(-1)
            needed = jnp.ones((len(numbers), config.expert_width), x_BTD.dtype)
            up = self.by_expert(self.up)
            units = expert_products(flat(x_BTD), numbers, needed, *up, implementation="native").astype(jnp.float32)
            units_BTEW = units.reshape(*scores_BTE.shape, -1)
            if config.expert_activation in REMOVE_MEAN:
                mean_M1 = linear(flat(x_BTD), self.mean_row_D[...][None], dtype=jnp.dtype(jnp.float32))
                units_BTEW -= mean_M1.reshape(*x_BTD.shape[:2], 1, 1)
            own_BTEW = norm_silu(units_BTEW, form["scale"], config.norm_eps, config.expert_activation)
            reads = reads_of(channels, None)
            read_BTEW = reads("down", own_BTEW.astype(x_BTD.dtype))
            return summed_rows(read_BTEW, scores_BTE, self.down), reads.counts

        def whole(x_BTD: jax.Array, scores_BTE: jax.Array) -> Sums:
            own_BTEW = hidden_units(x_BTD, self.up.restored().T, **form)
            reads = reads_of(channels, None)
            hidden_BTEW = reads("down", own_BTEW) * scores_BTE[..., None].astype(x_BTD.dtype)
            return to_stream(hidden_BTEW.reshape(*x_BTD.shape[:2], -1), self.down.restored()), reads.counts

        y_BTD, counts = of_few(rows, whole, 0, x_BTD, scores_BTE)
        if "down" in counts:
            ctx.width.experts_read("down", counts["down"] / config.expert_width, scores_BTE != 0)
        return with_shared(y_BTD, x_BTD, self.shared, ctx.width), LayerAux(stats=statistics(positive_BTE, ctx))


def masked_mixture(source: FFN, masked: Collection[str], formats: Formats) -> Any:
    """The mixture's layout, whose maps `masked` leave channels out; None: `source` is none of those that have one."""
    if type(source) is DECOFFN:
        return MaskedDECOFFN(source, masked, formats)
    kinds = {MoEFFN: MaskedMoEFFN, BlockFFN: MaskedBlockFFN, MoEXFFN: MaskedMoEXFFN}
    layout: Any = kinds.get(type(source))  # pyright: ignore[reportArgumentType]
    return None if layout is None else layout(source, masked, formats.weights)
