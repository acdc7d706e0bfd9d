"""PyTorch's causal attention, forward and backward, in a process of its own: `benchmarks.cpu_attention` runs this file.

It imports nothing of this project, so any Python with torch can run it. The first line of its input is `batch length
heads kv_heads width`; every other line asks for one run, which it answers with its processor time in seconds.
"""

import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as functional  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Answer until the input ends."""
    batch, length, heads, kv_heads, width = map(int, sys.stdin.readline().split())
    torch.manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        # Stored by token, as a model's projections give them.
        return torch.randn(batch, length, count, width)

    q, k, v = (drawn(count).requires_grad_() for count in (heads, kv_heads, kv_heads))
    dy = drawn(heads).transpose(1, 2)
    for _ in sys.stdin:
        begun = time.process_time()
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        y = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        torch.autograd.grad(y, (q, k, v), dy)
        print(time.process_time() - begun, flush=True)


if __name__ == "__main__":
    main()
