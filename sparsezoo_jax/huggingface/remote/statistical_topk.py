"""Statistical top-k (Spark Transformer, arXiv 2506.06644, section 3) and the rules that it is compared with."""

from statistics import NormalDist

import torch
from torch.nn import functional as F  # noqa: N812


def select_neurons(scores, k, rule, ddof, huber_delta=0.0):
    """Scores [..., F] thinned out to about k positive entries: `max(scores - theta, 0)`.

    "statistical" takes a row as Gaussian: theta = mean + std * Q(1 - k/F), with Q the standard normal quantile.
    "exact" and "approximate" take theta from a sort; "relu" keeps what is positive, "none" everything.
    """
    width = scores.shape[-1]
    if rule == "none" or (rule == "statistical" and k >= width):
        return scores
    if rule == "relu":
        return F.relu(scores)
    if rule in ("exact", "approximate"):
        return F.relu(scores - scores.topk(round(k) + 1, dim=-1).values[..., -1:])
    wide = scores.float()
    mean = wide.mean(-1, keepdim=True)
    std = ((wide - mean).square().sum(-1, keepdim=True) / max(width - ddof, 1)).sqrt()
    over = F.relu(wide - (mean + std * NormalDist().inv_cdf(1 - k / width)))
    if huber_delta > 0:
        over = torch.where(over <= huber_delta, over.square() / (2 * huber_delta), over - huber_delta / 2)
    return over.to(scores.dtype)


def select_keys(scores, visible, k, rule, ddof):
    """Booleans [..., S]: of the visible keys about the k best of each query, by statistics of these keys alone.

    A query that sees at most k keys keeps all; the best key always stays.
    """
    if rule == "none":
        return visible.expand_as(scores)
    lowest = scores.masked_fill(~visible, -1e30)
    if rule == "exact":
        keep = lowest >= lowest.topk(min(k, scores.shape[-1]), dim=-1).values[..., -1:]
    else:
        count = visible.sum(-1, keepdim=True).float()
        mean = scores.masked_fill(~visible, 0).sum(-1, keepdim=True) / count.clamp(min=1)
        squares = (scores - mean).square().masked_fill(~visible, 0).sum(-1, keepdim=True)
        std = (squares / (count - ddof).clamp(min=1)).sqrt()
        # -Q(k/n) is Q(1 - k/n) with the digits that 1 - k/n would lose.
        quantile = -torch.special.ndtri((k / count.clamp(min=1)).clamp(1e-6, 1 - 1e-6))
        keep = (scores >= mean + std * quantile) | (count <= k)
    return visible & (keep | (lowest >= lowest.amax(-1, keepdim=True)))
