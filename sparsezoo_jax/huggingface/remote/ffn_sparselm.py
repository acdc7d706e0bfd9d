"""SparseLM's feed-forward network (arXiv 2603.23198): a ReLU whose units an L1 loss made few."""

from torch import nn
from torch.nn import functional as F  # noqa: N812

from .common import kind


@kind("ffn", "sparselm")
class SparseLMFFN(nn.Module):
    """`W_down (relu(W_gate x) * (W_up x))`, or without a gate `W_down relu(W_up x)`; all neurons are computed."""

    def __init__(self, config, form, layer):
        super().__init__()
        d, f = config.hidden_size, form["d_ff"]
        self.gate_proj = nn.Linear(d, f, bias=False) if form["gated"] else None
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        up = self.up_proj(x)
        return self.down_proj(F.relu(up) if self.gate_proj is None else F.relu(self.gate_proj(x)) * up)
