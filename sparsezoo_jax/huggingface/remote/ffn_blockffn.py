"""BlockFFN (arXiv 2507.08771, section 3.1): experts chosen by a ReLU router whose scores are normalised."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .common import kind


@kind("ffn", "blockffn")
class BlockFFN(nn.Module):
    """`sum_e A_e W_down,e SiLU(W_up,e x)` with scores `A = RMSNorm(ReLU(W_router x))`.

    The experts lie side by side in one matrix each way. All are computed, and those of score 0 add nothing.
    """

    def __init__(self, config, form, layer):
        super().__init__()
        self.form, d, e = form, config.hidden_size, form["experts"]
        f = e * form["expert_width"]
        self.router = nn.Linear(d, e, bias=False)
        self.router_scale = nn.Parameter(torch.ones(e)) if form["norm_after_router"] == "rms" else None
        self.gate_proj = nn.Linear(d, f, bias=False) if form["gated"] else None
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def scores(self, x):
        """Scores of the experts [B, T, E], in the router's type; 0 for those that a token does not take."""
        form, dtype = self.form, getattr(torch, self.form["router_dtype"])
        scores = F.relu(F.linear(x.to(dtype), self.router.weight.to(dtype))).float()
        if form["norm_after_router"] == "sum":
            scores = scores / (scores.sum(-1, keepdim=True) * form["norm_scale"] + 1e-5)
        if self.router_scale is not None:
            scores = scores * torch.rsqrt(scores.square().mean(-1, keepdim=True) + form["norm_eps"])
            scores = scores.to(dtype) * self.router_scale.to(dtype)
        return scores.to(dtype)

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        up = self.up_proj(x)
        hidden = F.silu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        per_expert = hidden.unflatten(-1, (self.form["experts"], -1)) * self.scores(x)[..., None].to(x.dtype)
        return self.down_proj(per_expert.flatten(-2))
