"""Mixtures of experts with the routers TopK, DeepSeekMoE, GRIN, ReMoE, DynamicMoE and Ling 2.0."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .common import ACTIVATIONS, best, kind
from .experts import mixed, normalised_best


@kind("ffn", "moe")
class MoEFFN(nn.Module):
    """`sum_e w_e W_down,e act(W_up,e x)` over a token's experts, and shared experts that every token takes."""

    def __init__(self, config, form, layer):
        super().__init__()
        self.form, d, width, gated = form, config.hidden_size, form["expert_width"], form["gated"]
        default = 2 if form["router"] == "deepseek" else 0
        shared = default if form["shared_experts"] is None else form["shared_experts"]
        self.k, e, fused = form["k"] - shared, form["experts"] - shared, shared * width
        self.router = nn.Linear(d, e, bias=False)
        self.gate = nn.Parameter(torch.empty(e, d, width)) if gated else None
        self.up = nn.Parameter(torch.empty(e, d, width))
        self.down = nn.Parameter(torch.empty(e, width, d))
        self.shared_gate_proj = nn.Linear(d, fused, bias=False) if fused and gated else None
        self.shared_up_proj = nn.Linear(d, fused, bias=False) if fused else None
        self.shared_down_proj = nn.Linear(fused, d, bias=False) if fused else None
        if form["router"] == "ling":
            self.register_buffer("router_bias", torch.zeros(e))

    def forward(self, x):
        """What the layer adds to the stream, [B, T, D]."""
        activation = ACTIVATIONS[self.form["activation"]]
        weights = self.route(F.linear(x.float(), self.router.weight.float()))
        y = mixed(x, weights, self.up, self.down, self.gate, activation)
        if self.shared_up_proj is None:
            return y
        up = self.shared_up_proj(x)
        hidden = activation(up) if self.shared_gate_proj is None else activation(self.shared_gate_proj(x)) * up
        return y + self.shared_down_proj(hidden)

    def route(self, scores):
        """Weights [B, T, E] of the routed experts for scores of that shape; 0 where an expert is not taken."""
        form, router = self.form, self.form["router"]
        if router == "remoe":  # arXiv 2412.14711, section 3.1
            return F.relu(scores)
        if router == "grin":
            return sparse_mixer(scores, self.k, form["competition"])
        if router == "ling":
            return self.biased_sigmoid(scores)
        probabilities = scores.softmax(-1)
        if router == "topp":  # arXiv 2403.07652: the fewest of the largest that sum to more than top_p
            order = best(probabilities, probabilities.shape[-1])
            ordered = probabilities.gather(-1, order)
            kept = ordered.cumsum(-1) - ordered <= form["top_p"]
            kept = torch.zeros_like(kept).scatter(-1, order, kept)
            weights = probabilities.masked_fill(~kept, 0)
            return weights / weights.sum(-1, keepdim=True)
        # Mixtral (arXiv 2401.04088, section 2.1), and DeepSeekMoE beside its shared experts.
        return normalised_best(probabilities, best(probabilities, self.k))

    def biased_sigmoid(self, scores):
        """Ling 2.0 (arXiv 2510.22115): sigmoids; the bias only takes part in the choice, best groups first."""
        form, affinity = self.form, scores.sigmoid()
        biased = affinity + self.router_bias
        if form["groups"] > 1:
            grouped = biased.unflatten(-1, (form["groups"], -1))
            kept = best(grouped.topk(2, dim=-1).values.sum(-1), form["kept_groups"])
            in_kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, kept, True)
            biased = grouped.masked_fill(~in_kept[..., None], float("-inf")).flatten(-2)
        return form["routed_scale"] * normalised_best(affinity, best(biased, self.k))


def sparse_mixer(scores, k, competition):
    """GRIN's SparseMixer-v2 outside of training (arXiv 2409.12136, section 2): k rounds, each takes the best one left.

    Its weight is that of a softmax over the experts left whose scores come close to the best one's.
    """
    weights = torch.zeros_like(scores)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(k):
        left = scores.masked_fill(taken, float("-inf"))
        top, expert = left.max(-1, keepdim=True)
        reach = torch.maximum(scores.abs(), top).clamp(min=torch.finfo(torch.float32).tiny)
        close = ~taken & (top - scores <= 2 * competition * reach)
        probability = scores.masked_fill(~close, float("-inf")).softmax(-1)
        weights = weights.scatter(-1, expert, probability.gather(-1, expert))
        taken = taken.scatter(-1, expert, True)
    return weights
