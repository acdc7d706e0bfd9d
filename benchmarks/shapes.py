"""Shapes of the presets' operations, for the benchmarks and the tests that compile kernels for real targets."""

from __future__ import annotations

from typing import Any

from sparsezoo_jax.configs import blockffn, moe, moex, spark

#: (rows' length, k) of the Spark FFNs' scores, by preset.
FFN_SCORES = {
    name: (preset.model.ffn.d_ff, float(preset.model.ffn.top_k))  # pyright: ignore[reportAttributeAccessIssue]
    for name, preset in spark.PRESETS.items()
}
#: (query heads, key/value heads, head width, r, k) of the Spark attentions, by preset.
SPARK_ATTENTION = {
    name: (a.heads, a.kv_heads, a.head_dim, a.r, a.top_k)  # pyright: ignore[reportAttributeAccessIssue]
    for name, a in ((name, preset.model.attention) for name, preset in spark.PRESETS.items())
}
#: (model width, predictor's width, neurons, k) of the Spark FFNs by preset.
SPARK_FFN = {
    name: (preset.model.d_model, preset.model.ffn.r, preset.model.ffn.d_ff, float(preset.model.ffn.top_k))  # pyright: ignore
    for name, preset in spark.PRESETS.items()
}
#: (model width, experts, neurons of an expert) by BlockFFN preset.
BLOCK_FFN = {
    name: (preset.model.d_model, preset.model.ffn.experts, preset.model.ffn.expert_width)  # pyright: ignore
    for name, preset in blockffn.PRESETS.items()
}
_MIXTURES: dict[str, Any] = {
    "moex_chess": moex.PRESETS["chess"].model,
    "moe_xlarge": moe.PRESETS["xlarge"].model,
}
#: (model width, experts, neurons of an expert, experts of a token) of mixtures of experts.
MOE_FFN = {
    name: (model.d_model, model.ffn.experts, model.ffn.expert_width, model.ffn.k) for name, model in _MIXTURES.items()
}
#: One chip of each TPU generation that kernels are compiled for.
TPUS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
