"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import torch
from torch import nn

from .common import Norm, kind, masked_softmax, rotate


@kind("attention", "mla")
class LatentAttention(nn.Module):
    """Keys and values of all heads come from one latent, which the cache keeps beside the shared rotated key."""

    def __init__(self, config, layer, layer_type):
        super().__init__()
        self.layer, self.layer_type = layer, layer_type
        form = self.form = config.attention
        d, heads, latent, eps = config.hidden_size, form["heads"], form["kv_lora_rank"], form["latent_norm_eps"]
        self.nope, self.rotated, rank = form["qk_nope_head_dim"], form["qk_rope_head_dim"], form["q_lora_rank"]
        wide = heads * (self.nope + self.rotated)
        self.q_proj = nn.Linear(d, wide, bias=False) if rank is None else None
        self.q_a_proj = None if rank is None else nn.Linear(d, rank, bias=False)
        self.q_a_norm = None if rank is None else Norm(rank, eps=eps)
        self.q_b_proj = None if rank is None else nn.Linear(rank, wide, bias=False)
        self.kv_a_proj = nn.Linear(d, latent + self.rotated, bias=False)
        self.kv_a_norm = Norm(latent, eps=eps)
        self.kv_b_proj = nn.Linear(latent, heads * (self.nope + form["v_head_dim"]), bias=False)
        self.o_proj = nn.Linear(heads * form["v_head_dim"], d, bias=False)

    def forward(self, x, call):
        """What attention adds to the stream, [B, T, D]."""
        q = self.q_proj(x) if self.q_proj is not None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q_nope, q_rope = self._heads(q).split([self.nope, self.rotated], dim=-1)
        latent, k_rope = self.kv_a_proj(x).split([self.form["kv_lora_rank"], self.rotated], dim=-1)
        k_rope = self._rotated(k_rope[:, None], call)  # one for all heads
        latent, k_rope = call.with_earlier(self.kv_a_norm(latent)[:, None], k_rope, self.layer)
        k_nope, v = self._heads(self.kv_b_proj(latent[:, 0])).split([self.nope, self.form["v_head_dim"]], dim=-1)
        q = torch.cat([q_nope, self._rotated(q_rope, call)], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weights = masked_softmax(scores, call.visible[self.layer_type])
        return self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def _heads(self, y):
        """[B, T, N * H] as [B, N, T, H]."""
        return y.unflatten(-1, (self.form["heads"], -1)).transpose(1, 2)

    def _rotated(self, x, call):
        return rotate(x, call.position_ids, self.form["rope"], self.layer_type)
