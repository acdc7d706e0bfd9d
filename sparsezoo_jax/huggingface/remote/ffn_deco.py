"""DECO (arXiv 2605.10933): ReLU-routed experts of NormSiLU units beside a shared SwiGLU expert."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .common import kind


@kind("ffn", "deco")
class DECOFFN(nn.Module):
    """`sum_e A_e W_down,e NormSiLU(W_up,e x) + SwiGLU(x)` with scores `A = g * ReLU(W_router x)`.

    NormSiLU removes the mean of the units of all experts, divides those of each expert by their root mean square and
    takes SiLU. The experts lie side by side in one matrix each way. All are computed, and those of score 0 add nothing.
    """

    def __init__(self, config, form, layer):
        super().__init__()
        self.form, d, e, width, shared = (
            *(form, config.hidden_size),
            *(form[name] for name in ("experts", "expert_width", "shared_width")),
        )
        self.router = nn.Linear(d, e, bias=False)
        self.router_scale = nn.Parameter(torch.ones(e))
        self.expert_up_proj = nn.Linear(d, e * width, bias=False)
        self.expert_down_proj = nn.Linear(e * width, d, bias=False)
        normalises = form["expert_activation"] in ("norm_silu", "no_mean")
        self.expert_norm_scale = nn.Parameter(torch.ones(width)) if normalises else None
        self.shared_gate_proj = nn.Linear(d, shared, bias=False)
        self.shared_up_proj = nn.Linear(d, shared, bias=False)
        self.shared_down_proj = nn.Linear(shared, d, bias=False)

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        scores = F.relu(F.linear(x.float(), self.router.weight.float())) * self.router_scale.float()
        units = self.norm_silu(self.expert_up_proj(x).float()).to(x.dtype)
        routed = self.expert_down_proj((units * scores[..., None].to(x.dtype)).flatten(-2))
        shared = F.silu(self.shared_gate_proj(x)) * self.shared_up_proj(x)
        return routed + self.shared_down_proj(shared)

    def norm_silu(self, units):
        """Activated units [B, T, E, W] of units [B, T, F]; both float32."""
        if self.form["expert_activation"] in ("norm_silu", "no_rms"):
            units = units - units.mean(-1, keepdim=True)
        units = units.unflatten(-1, (self.form["experts"], -1))
        if self.expert_norm_scale is not None:
            units = units * torch.rsqrt(units.square().mean(-1, keepdim=True) + self.form["norm_eps"])
            units = units * self.expert_norm_scale.float()
        return F.silu(units)
