"""MoE-X (arXiv 2503.07639): wide ReLU experts behind a gate that predicts which of them stay sparsest."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .common import ACTIVATIONS, best, kind
from .experts import mixed, normalised_best


@kind("ffn", "moex")
class MoEXFFN(nn.Module):
    """`sum_j w_j W_dec,j relu(W_enc,j x)` over the k experts expected to be sparsest (equations 7 to 10)."""

    def __init__(self, config, form, layer):
        super().__init__()
        self.form, d, e, width = form, config.hidden_size, form["experts"], form["expert_width"]
        self.up = nn.Parameter(torch.empty(e, d, width))
        self.down = nn.Parameter(torch.empty(e, width, d))
        self.router = nn.Linear(d, e, bias=False) if form["gate"] == "switch" else None

    def scores(self, x):
        """The gate's scores of all experts, float32 [B, T, E]; the larger, the sparser.

        The sparsity gate has no parameters (equations 3 to 6): if an expert's weights from input i are drawn from
        N(mean_i, variance_i), its units before the ReLU are from N(mu, sigma^2) with mu = mean . x and
        sigma^2 = variance . x^2, and -erf(mu / (sqrt(2) sigma)) falls with the share of them that is positive.
        """
        if self.router is not None:
            return F.linear(x.float(), self.router.weight.float())
        up, x = self.up.float(), x.float()
        mu = x @ up.mean(-1).T
        variance = x.square() @ up.var(-1, correction=0).T + self.form["score_eps"]
        return -torch.erf(mu / (2**0.5 * (variance if self.form["literal"] else variance.sqrt())))

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        scores = self.scores(x)
        # The choice is by probabilities: scores that differ in their last digit alone may have equal ones.
        probabilities = scores.softmax(-1)
        weights = normalised_best(probabilities, best(probabilities, self.form["k"]))
        return mixed(x, weights, self.up, self.down, None, ACTIVATIONS[self.form["activation"]])
