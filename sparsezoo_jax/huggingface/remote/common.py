"""What all kinds share: the table of kinds, a layer's call, norms, non-linearities and rotary embeddings.

Shapes: B batch, T query position, S key position, D model width, F neurons, N query heads, K key/value heads, H head
width, E experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

#: Classes by part ("attention", "ffn", "residual", "head") and kind, as `config.json` names them.
KINDS = {}


def kind(part, name):
    """Class decorator: the class of a part that `config.json` calls `name`."""

    def add(cls):
        KINDS[part, name] = cls
        return cls

    return add


@dataclass
class Call:
    """What the layers of one forward pass share."""

    position_ids: torch.Tensor
    """Position of each token within its text, [B, T]."""
    visible: dict[str, torch.Tensor]
    """For each type of layer, the keys that a query may see: booleans [B, 1, T, S]."""
    cache: Any = None
    """Keys and values of earlier tokens (transformers' `Cache`), or None."""

    def with_earlier(self, keys, values, layer):
        """Keys and values with those of earlier tokens before them, which the cache then keeps, too."""
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer)


ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Norm(nn.Module):
    """`x / rms(x) * weight` over the last axis, in float32; kind "layer" removes the mean first.

    `zero_centered` weights are offsets from 1.
    """

    def __init__(self, width, kind="rms", eps=1e-6, zero_centered=False, bias=False):
        super().__init__()
        self.kind, self.eps, self.zero_centered = kind, eps, zero_centered
        self.weight = nn.Parameter(torch.zeros(width) if zero_centered else torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x, where=None):
        """Normalise `x`; with booleans `where` of its shape, over those entries only: the others become 0."""
        wide = x.float()
        count = wide.shape[-1] if where is None else where.sum(-1, keepdim=True).clamp(min=1)
        kept = wide if where is None else wide.masked_fill(~where, 0)
        if self.kind == "layer":
            wide = wide - kept.sum(-1, keepdim=True) / count
            kept = wide if where is None else wide.masked_fill(~where, 0)
        wide = wide * torch.rsqrt(kept.square().sum(-1, keepdim=True) / count + self.eps)
        weight = self.weight.float()
        wide = wide * (1 + weight if self.zero_centered else weight)
        if self.bias is not None:
            wide = wide + self.bias.float()
        return (wide if where is None else wide.masked_fill(~where, 0)).to(x.dtype)


def rotate(x, position_ids, rope, layer_type):
    """Rotary position embeddings (arXiv 2104.09864) of heads [B, N, T, H]: pairs are entries i and i + R/2.

    Frequencies are base^(-2i/R) over the first R = fraction * H dimensions; the others pass through.
    """
    if rope is None:
        return x
    local = layer_type == "local"
    base = rope["local_base"] if local and rope["local_base"] is not None else rope["base"]
    scaling = None if local else rope["scaling"]
    rotated = round(x.shape[-1] * rope["fraction"])
    frequencies, amplitude = _frequencies(base, rotated, x.device), 1.0
    if scaling is not None:
        frequencies, amplitude = _scaled(scaling, base, rotated, position_ids)
    angles = position_ids[:, None, :, None].float() * frequencies
    sin, cos = angles.sin() * amplitude, angles.cos() * amplitude
    first, second = x[..., :rotated].float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., rotated:]], dim=-1)


def _frequencies(base, rotated, device):
    return base ** (-torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated)


def _scaled(scaling, base, rotated, position_ids):
    """Slower frequencies for longer texts, and what queries and keys are multiplied by."""
    factor, length = scaling["factor"], scaling["original_length"]
    plain = _frequencies(base, rotated, position_ids.device)
    if scaling["kind"] == "linear":  # position interpolation, arXiv 2306.15595
        return plain / factor, 1.0
    if scaling["kind"] == "dynamic":  # a base that grows with the longest position of the call
        longest = max(int(position_ids.max()) + 1, length)
        grown = (factor * longest / length - (factor - 1)) ** (rotated / (rotated - 2))
        return _frequencies(base * grown, rotated, position_ids.device), 1.0
    if scaling["kind"] == "llama3":  # arXiv 2407.21783: fast rotations are kept, slow ones divided by the factor
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept, amplitude = (length * plain / (2 * math.pi) - low) / (high - low), 1.0
    else:  # yarn, arXiv 2309.00071: the same with a ramp over dimensions
        given = scaling["attention_factor"]
        amplitude = 0.1 * math.log(factor) + 1 if given is None else given
        turns = [scaling["beta_fast"], scaling["beta_slow"]]
        ends = [rotated * math.log(length / (turn * 2 * math.pi)) / (2 * math.log(base)) for turn in turns]
        if scaling["truncate"]:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], rotated - 1)
        places = torch.arange(rotated // 2, dtype=torch.float32, device=position_ids.device)
        kept = 1 - (places - low) / (high - low if high != low else 0.001)
    kept = kept.clamp(0, 1)
    return plain * (kept + (1 - kept) / factor), amplitude


def softcapped(scores, cap):
    """`cap * tanh(scores / cap)`; None: the scores as they are."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def masked_softmax(scores, chosen):
    """Softmax over the chosen entries of the last axis; all weights of a row without any are 0."""
    return scores.masked_fill(~chosen, -1e30).softmax(dim=-1).masked_fill(~chosen, 0)


def best(scores, k):
    """Indices of the k largest entries of the last axis; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
