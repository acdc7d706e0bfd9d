"""The product of a mixture of experts, for weights of all experts of which most are 0."""

import torch


def mixed(x, weights, up, down, gate, activation):
    """`sum_e w_e W_down,e act(W_up,e x)`, gated: `act(W_gate,e x) * (W_up,e x)`, for x [B, T, D], weights [B, T, E].

    Maps are [E, D, W] and [E, W, D]. An expert sees the tokens that take it, and none of the others.
    """
    rows, weights = x.flatten(0, -2), weights.flatten(0, -2)
    y = torch.zeros_like(rows)
    for e in range(up.shape[0]):
        tokens = weights[:, e].nonzero()[:, 0]
        if tokens.numel() == 0:
            continue
        h = rows[tokens]
        hidden = activation(h @ up[e]) if gate is None else activation(h @ gate[e]) * (h @ up[e])
        y = y.index_add(0, tokens, weights[tokens, e, None].to(x.dtype) * (hidden @ down[e]))
    return y.view_as(x)


def normalised_best(probabilities, indices):
    """Weights [..., E] of the experts in `indices` [..., k]: their probabilities over these' sum; others have 0."""
    chosen = probabilities.gather(-1, indices)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, indices, chosen)
