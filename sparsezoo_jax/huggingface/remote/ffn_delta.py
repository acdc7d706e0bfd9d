"""A feed-forward network whose activations come in learned steps (arXiv 2107.07305), all of it computed."""

import torch
from torch import nn

from .common import ACTIVATIONS, kind


@kind("ffn", "delta")
class DeltaFFN(nn.Module):
    """`W_down round(act(W_up x))`, or with a gate `W_down round(act(W_gate x) * (W_up x))`; x may be rounded, too."""

    def __init__(self, config, form, layer):
        super().__init__()
        d, f = config.hidden_size, form["d_ff"]
        each = form["step_per"] == "channel"
        self.gate_proj = nn.Linear(d, f, bias=False) if form["gated"] else None
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.activation = ACTIVATIONS[form["activation"]]
        self.input_step = nn.Parameter(torch.ones(d if each else 1)) if form["rounded"] != "hidden" else None
        self.hidden_step = nn.Parameter(torch.ones(f if each else 1)) if form["rounded"] != "input" else None

    def rounded(self, x, step):
        """`x` in whole steps, in float32."""
        if step is None:
            return x
        step = step.float().abs().clamp(min=1e-6)
        return (torch.round(x.float() / step) * step).to(x.dtype)

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        x = self.rounded(x, self.input_step)
        up = self.up_proj(x)
        hidden = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        return self.down_proj(self.rounded(hidden, self.hidden_step))
