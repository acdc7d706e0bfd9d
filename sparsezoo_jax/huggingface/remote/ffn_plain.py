"""Feed-forward networks of two matrices; with `top_k` the Top-k Transformer (Lazy Neuron, arXiv 2210.06313)."""

import torch
from torch import nn

from .common import ACTIVATIONS, best, kind


@kind("ffn", "plain")
class PlainFFN(nn.Module):
    """`W_down act(W_up x)`; with `top_k` a token keeps only its k largest activated units.

    All neurons are computed, and what is not kept is masked.
    """

    def __init__(self, config, form, layer):
        super().__init__()
        self.form = form
        self.up_proj = nn.Linear(config.hidden_size, form["d_ff"], bias=form["bias"])
        self.down_proj = nn.Linear(form["d_ff"], config.hidden_size, bias=form["bias"])

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        hidden = ACTIVATIONS[self.form["activation"]](self.up_proj(x))
        if self.form["top_k"] is not None:
            kept = torch.zeros_like(hidden, dtype=torch.bool).scatter(-1, best(hidden, self.form["top_k"]), True)
            hidden = hidden.masked_fill(~kept, 0)
        return self.down_proj(hidden)
