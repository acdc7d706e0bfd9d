"""Gated feed-forward networks: SwiGLU, GeGLU, ReGLU, dReLU; Gemma 3n's sparse gates and ProSparse's threshold."""

from torch import nn

from .common import ACTIVATIONS, kind
from .statistical_topk import select_neurons


@kind("ffn", "gated")
class GatedFFN(nn.Module):
    """`W_down (act(W_gate x) * (W_up x))`.

    Outside of training, gates of a ReLU below `threshold` are 0 (FATReLU: ProSparse, arXiv 2402.13516). Layers with an
    entry above 0 in `activation_sparsity_pattern` thin out their gates by statistical top-k.
    """

    def __init__(self, config, form, layer):
        super().__init__()
        self.form, d, f, bias = form, config.hidden_size, form["d_ff"], form["bias"]
        pattern = form["activation_sparsity_pattern"] or [0.0]
        self.sparsity = pattern[layer if len(pattern) > 1 else 0]
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        form, gate, up = self.form, self.gate_proj(x), self.up_proj(x)
        if self.sparsity > 0:
            gate = select_neurons(gate, (1 - self.sparsity) * form["d_ff"], form["selection"], form["ddof"])
        gate = ACTIVATIONS[form["activation"]](gate)
        if form["threshold"] > 0 and not self.training:
            gate = gate.masked_fill(gate < form["threshold"], 0)
        if form["up_activation"] is not None:
            up = ACTIVATIONS[form["up_activation"]](up)
        return self.down_proj(gate * up)
