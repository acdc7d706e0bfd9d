"""MoHD, mixture of hidden dimensions (arXiv 2412.05644): sublayers read and write a routed part of the stream."""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .common import Norm, best, kind
from .residual_pre_norm import PreNorm


class BlockRouter(nn.Module):
    """For each token: which of the blocks that the width is cut into are active, and their gates."""

    def __init__(self, config):
        super().__init__()
        form = self.form = config.residual
        self.routed = form["active"] - form["shared"]
        has_router = self.routed > 0 or form["shared_gate"] == "soft"
        self.centroids = nn.Linear(config.hidden_size, form["blocks"], bias=False) if has_router else None
        balances = form["balance"] == "bias" and self.routed > 0
        self.register_buffer("bias", torch.zeros(form["blocks"] - form["shared"]) if balances else None)

    def forward(self, h):
        """Gates [B, T, blocks] in float32, 0 where a block is not active, and booleans of the active ones."""
        form, shared, blocks = self.form, self.form["shared"], self.form["blocks"]
        if self.centroids is None:
            active = (torch.arange(blocks, device=h.device) < shared).expand(*h.shape[:-1], blocks)
            return active * self._factor(), active
        affinity = F.linear(h.float(), self.centroids.weight.float()).softmax(-1)
        routable = affinity[..., shared:]
        taken = best(routable if self.bias is None else routable + self.bias, self.routed)
        active = torch.cat(
            [
                torch.ones_like(affinity[..., :shared], dtype=torch.bool),
                torch.zeros_like(routable, dtype=torch.bool).scatter(-1, taken, True),
            ],
            dim=-1,
        )
        first = shared if form["shared_gate"] == "hard" else 0
        soft = (affinity * active)[..., first:]
        total = soft.sum(-1, keepdim=True)
        if form["scale_mode"] in ("rms", "mean"):  # gates of mean 1
            soft = (form["active"] - first) * soft / total.clamp(min=torch.finfo(torch.float32).tiny)
        elif form["scale_mode"] == "y_literal":
            soft = blocks * total * soft
        hard = torch.ones_like(affinity[..., :first])
        return self._factor() * torch.cat([hard, soft], dim=-1), active

    def _factor(self):
        """delta^-1/2 keeps the energy of the input, delta^-1 sums; delta is the active share."""
        form, delta = self.form, self.form["active"] / self.form["blocks"]
        if form["norm_after_mask"] or form["scale_mode"] not in ("rms", "mean"):
            return 1.0
        return 1 / (delta if form["scale_mode"] == "mean" else math.sqrt(delta))


class Fusion(nn.Module):
    """`y + M y` with a Monarch matrix M (arXiv 2204.00595, section 3): within groups, then across them."""

    def __init__(self, config):
        super().__init__()
        form, d = config.residual, config.hidden_size
        groups = form["blocks"]
        if form["fusion"] == "square":
            groups = next(b for b in range(math.isqrt(d), 0, -1) if d % b == 0)
        size = d // groups
        self.within = nn.Parameter(torch.zeros(groups, size, size))
        crosses = form["fusion"] != "block_diagonal"
        self.across = nn.Parameter(torch.zeros(size, groups, groups)) if crosses else None

    def forward(self, y):
        mixed = torch.einsum("btpq,pjq->btpj", y.unflatten(-1, (self.within.shape[0], -1)), self.within)
        if self.across is not None:
            mixed = torch.einsum("btpj,jip->btij", mixed, self.across)
        return y + mixed.flatten(-2)


def over_blocks(x, values):
    """`x` with each block of its last axis multiplied by its value."""
    return (x.unflatten(-1, (values.shape[-1], -1)) * values[..., None].to(x.dtype)).flatten(-2)


def of_dimensions(active, width):
    """Booleans of blocks as booleans of dimensions."""
    return active.repeat_interleave(width // active.shape[-1], dim=-1)


class RoutedConnection(nn.Module):
    """`x + Fuse(mask * sublayer(gates * norm(x)))`: the whole width between masks."""

    def __init__(self, config, routes):
        super().__init__()
        form = self.form = config.residual
        self.norm = Norm(config.hidden_size, **config.norm)
        self.post_norm = Norm(config.hidden_size, **config.norm) if form["post_norm"] else None
        self.router = BlockRouter(config) if routes else None
        self.output_router = BlockRouter(config) if routes and form["output_blocks"] == "routed" else None
        self.fusion = None if form["fusion"] == "none" else Fusion(config)

    def forward(self, x, sublayer, routing):
        """The stream after the sublayer, and the blocks that it read and wrote, with their gates."""
        h = self.norm(x)
        if self.router is not None:
            read = self.router(h)
            routing = read, read if self.output_router is None else self.output_router(h)
        (gates, active), (output_gates, written) = routing
        if self.form["norm_after_mask"]:
            h = self.norm(x, where=of_dimensions(active, x.shape[-1]))
        mask = of_dimensions(written, x.shape[-1])
        y = sublayer(over_blocks(h, gates)).masked_fill(~mask, 0)
        if self.post_norm is not None:
            y = self.post_norm(y, where=mask)
        if self.form["output_blocks"] == "routed":
            y = over_blocks(y, output_gates)
        return x + (y if self.fusion is None else self.fusion(y)), routing


@kind("residual", "mohd")
def connection(config, sublayer):
    """The connection of one sublayer: routed, or plain where `sublayers` names the other one alone."""
    if config.residual["sublayers"] in ("both", sublayer):
        return RoutedConnection(config, routes=not (sublayer == "ffn" and config.residual["routers"] == "layer"))
    return PlainConnection(config, sublayer)


class PlainConnection(PreNorm):
    """A connection of a sublayer that sees the whole width."""

    def __init__(self, config, sublayer):
        nn.Module.__init__(self)
        self.scale = 1.0
        self.norm = Norm(config.hidden_size, **config.norm)
        self.post_norm = Norm(config.hidden_size, **config.norm) if config.residual["post_norm"] else None


@kind("head", "mohd")
class RoutedHead(nn.Module):
    """The part of the final state that the output projection reads, chosen by a router of its own."""

    def __init__(self, config):
        super().__init__()
        self.after_mask = config.residual["norm_after_mask"]
        self.router = BlockRouter(config)

    def forward(self, x, norm):
        """The normalised state [B, T, D], gated; 0 outside each token's blocks."""
        h = norm(x)
        gates, active = self.router(h)
        if self.after_mask:
            h = norm(x, where=of_dimensions(active, x.shape[-1]))
        return over_blocks(h, gates)
