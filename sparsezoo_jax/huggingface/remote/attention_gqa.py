"""Grouped-query attention (arXiv 2305.13245), over all earlier tokens or, in local layers, over a window of them."""

from torch import nn

from .common import Norm, kind, masked_softmax, rotate, softcapped


@kind("attention", "gqa")
class GroupedQueryAttention(nn.Module):
    """Queries of N heads, keys and values of K heads; N/K neighbouring query heads share those of one."""

    def __init__(self, config, layer, layer_type):
        super().__init__()
        self.layer, self.layer_type = layer, layer_type
        form = self.form = config.attention
        d, n, k, h = config.hidden_size, form["heads"], form["kv_heads"], form["head_dim"]
        bias, output_bias = form["bias"], form.get("output_bias")
        self.q_proj = nn.Linear(d, n * h, bias=bias)
        self.k_proj = nn.Linear(d, k * h, bias=bias)
        self.v_proj = nn.Linear(d, k * h, bias=bias)
        self.o_proj = nn.Linear(n * h, d, bias=bias if output_bias is None else output_bias)
        self.q_norm = self.k_norm = None
        if form["qk_norm"]:
            # Over each head, or over all heads together.
            self.whole = form.get("qk_norm_over") == "heads"
            norm = {
                "eps": form.get("qk_norm_eps", 1e-6),
                "zero_centered": form.get("qk_norm_zero_centered", False),
            }
            self.q_norm = Norm(n * h if self.whole else h, **norm)
            self.k_norm = Norm(k * h if self.whole else h, **norm)

    def forward(self, x, call):
        """What attention adds to the stream, [B, T, D]."""
        q = self._rotated(self._heads(self.q_proj(x), self.q_norm), call)
        k = self._rotated(self._heads(self.k_proj(x), self.k_norm), call)
        k, v = call.with_earlier(k, self._heads(self.v_proj(x), None), self.layer)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        weights = self.weights(q, k, call.visible[self.layer_type])
        return self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def weights(self, q, k, visible):
        """Weights [B, N, T, S] of the values, float32."""
        scale = self.form["query_scale"]
        scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
        return masked_softmax(softcapped(scores, self.form["softcap"]), visible)

    def _heads(self, y, norm):
        """[B, T, N * H] as normalised heads [B, N, T, H]."""
        if norm is not None and self.whole:
            y = norm(y)
        y = y.unflatten(-1, (-1, self.form["head_dim"])).transpose(1, 2)
        return y if norm is None or self.whole else norm(y)

    def _rotated(self, x, call):
        return rotate(x, call.position_ids, self.form["rope"], self.layer_type)
