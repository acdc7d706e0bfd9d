"""Spark attention (Spark Transformer, arXiv 2506.06644, section 2): the first r head dimensions select the keys."""

import torch
from torch.nn import functional as F  # noqa: N812

from .attention_gqa import GroupedQueryAttention
from .common import kind, masked_softmax, rotate, softcapped
from .statistical_topk import select_keys


@kind("attention", "spark")
class SparkAttention(GroupedQueryAttention):
    """`V [softmax(StatTop_k^-inf(K1^T q[:r])) * softplus(K2^T q[r:])]` for each head.

    All keys are computed, and what is not selected is masked: the same numbers without the saving.
    """

    def weights(self, q, k, visible):
        """Weights [B, N, T, S] of the values, float32; 0 where a key is not selected."""
        form, r, width = self.form, self.form["r"], q.shape[-1]
        scale, value_scale = form["predictor_scale"], form["value_scale"]
        scores = (q[..., :r] @ k[..., :r].transpose(-1, -2)).float() * (r**-0.5 if scale is None else scale)
        scores = softcapped(scores, form["softcap"])
        selected = select_keys(scores, visible, form["top_k"], form["selection"], form["ddof"])
        weights = masked_softmax(scores, selected)
        if form["weighting"] == "none":
            return weights
        values = (q[..., r:] @ k[..., r:].transpose(-1, -2)).float()
        values = values * (max(width - r, 1) ** -0.5 if value_scale is None else value_scale)
        return weights * F.softplus(softcapped(values, form["softcap_values"]))

    def _rotated(self, x, call):
        """Both parts of the head rotate within themselves, so that each depends on relative position only."""
        parts = (part for part in x.split([self.form["r"], x.shape[-1] - self.form["r"]], dim=-1) if part.shape[-1])
        return torch.cat([rotate(p, call.position_ids, self.form["rope"], self.layer_type) for p in parts], dim=-1)
