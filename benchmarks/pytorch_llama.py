"""A Llama in PyTorch, for `benchmarks.peers`: its own products and `scaled_dot_product_attention`, random weights.

Importing this needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]


class Llama:
    """Weights, and one pass over tokens."""

    def __init__(self, shape: Any, kind: Any):
        self.shape, self.kind = shape, kind
        s, queries, keys = shape, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

        def weight(*size: int) -> Any:
            return (0.02 * torch.randn(size)).to(kind)

        sizes = {
            "qkv": (queries + 2 * keys, s.d_model),
            "out": (s.d_model, queries),
            "gate": (s.d_ff, s.d_model),
            "up": (s.d_ff, s.d_model),
            "down": (s.d_model, s.d_ff),
        }
        self.layers = [{name: weight(*size) for name, size in sizes.items()} for _ in range(s.layers)]
        for layer in self.layers:
            layer |= {name: torch.ones(s.d_model, dtype=kind) for name in ("attention_norm", "ffn_norm")}
        self.embedding, self.head = weight(s.vocab, s.d_model), weight(s.vocab, s.d_model)
        self.norm = torch.ones(s.d_model, dtype=kind)
        self.frequencies = 10_000.0 ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)

    @property
    def weights(self) -> list[Any]:
        """All of them."""
        return [self.embedding, self.head, self.norm, *(w for layer in self.layers for w in layer.values())]

    def __call__(self, ids: Any, angles: Any, caches: Any = None, first: int = 0) -> Any:
        """The last norm's outputs [rows, tokens, d_model]; its keys and values go into `caches` from `first` on."""
        s, (rows, tokens), (cos, sin) = self.shape, ids.shape, (angles.cos(), angles.sin())
        end = first + tokens

        def rotated(x: Any) -> Any:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(self.kind)

        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        x = F.embedding(ids, self.embedding)
        for i, layer in enumerate(self.layers):
            qkv = F.linear(F.rms_norm(x, (s.d_model,), layer["attention_norm"]), layer["qkv"])
            q, k, v = (
                part.reshape(rows, tokens, -1, s.head_dim).transpose(1, 2)
                for part in qkv.split([queries, keys, keys], -1)
            )
            q, k = rotated(q), rotated(k)
            if caches is not None:
                caches[i][0][:, :, first:end], caches[i][1][:, :, first:end] = k, v
                k, v = (kept[:, :, :end] for kept in caches[i])
            y = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).reshape(rows, tokens, -1), layer["out"])
            y = F.rms_norm(x, (s.d_model,), layer["ffn_norm"])
            x = x + F.linear(F.silu(F.linear(y, layer["gate"])) * F.linear(y, layer["up"]), layer["down"])
        return F.rms_norm(x, (s.d_model,), self.norm)


def inference(shape: Any, dtype: str, threads: int, context: int) -> Callable[[int, int, int], Callable[[], None]]:
    """From rows, tokens of a prompt (0: `context` tokens are in the caches) and new ones to a call that computes it."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    model = Llama(shape, kind)

    def case(rows: int, prompt: int, new: int) -> Callable[[], None]:
        # With a prompt in the call its last token makes the first new one, else the token before that is decoded.
        start = 0 if prompt else context
        size = (rows, shape.kv_heads, start + prompt + new, shape.head_dim)
        caches = [[torch.zeros(size, dtype=kind) for _ in "kv"] for _ in range(shape.layers)]
        angles = torch.arange(size[2])[:, None] * model.frequencies

        def run() -> None:
            ids, first = torch.ones(rows, prompt or 1, dtype=torch.long), start
            with torch.inference_mode():
                for _ in range(new):
                    end = first + ids.shape[1]
                    last = model(ids, angles[first:end], caches, first)[:, -1]
                    ids, first = F.linear(last, model.head).argmax(-1)[:, None], end

        return run

    return case


def training(shape: Any, rows: int, tokens: int, threads: int, compiled: bool) -> Callable[[], None]:
    """A call that makes one step in float32: loss, gradients, their norm clipped to 1, AdamW."""
    torch.set_num_threads(threads)
    model = Llama(shape, torch.float32)
    weights = [w.requires_grad_() for w in model.weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids, targets = (torch.randint(0, shape.vocab, (rows, tokens)) for _ in range(2))
    angles = torch.arange(tokens)[:, None] * model.frequencies

    def loss_of(ids: Any, targets: Any) -> Any:
        return F.cross_entropy(F.linear(model(ids, angles), model.head).flatten(0, 1), targets.flatten())

    loss_function = torch.compile(loss_of) if compiled else loss_of

    def run() -> None:
        optimizer.zero_grad()
        loss_function(ids, targets).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return run
