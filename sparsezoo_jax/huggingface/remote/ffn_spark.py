"""The Spark FFN (Spark Transformer, arXiv 2506.06644, section 2): the first r input dimensions select the neurons."""

from torch import nn
from torch.nn import functional as F  # noqa: N812

from .common import kind
from .statistical_topk import select_neurons


@kind("ffn", "spark")
class SparkFFN(nn.Module):
    """`V [GELU(StatTop_k(K1^T x[:r])) * (K2^T x[r:])]`.

    All neurons are computed, and those that are not selected have a gate of 0: the same numbers without the saving.
    """

    def __init__(self, config, form, layer):
        super().__init__()
        self.form, d, f, r = form, config.hidden_size, form["d_ff"], form["r"]
        self.k1 = nn.Linear(r, f, bias=False)
        self.k2 = nn.Linear(d - r, f, bias=False)
        self.v = nn.Linear(f, d, bias=False)

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        form, r = self.form, self.form["r"]
        scores = self.k1(x[..., :r])
        gate = select_neurons(scores, form["top_k"], form["selection"], form["ddof"], form["huber_delta"])
        return self.v(F.gelu(gate, approximate="tanh") * self.k2(x[..., r:]))
