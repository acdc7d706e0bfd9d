"""Names of the arrays that rematerialisation may keep for the backward pass (`jax.ad_checkpoint.checkpoint_name`).

A checkpoint policy sees no matrix product inside a `jax.custom_vjp` or a kernel, so results carry names, given to them
after the call or among the residuals of its forward rule. `DecoderConfig.remat` chooses among these.
"""

from __future__ import annotations

ATTENTION = "attention"
"""What attention mixed for each query, before the output projection, and statistics of its rows that the backward pass
needs: without both the forward kernel runs again."""
PROJECTION = "projection"
"""Products of attention's linear maps: queries, keys, values, latents, and the map back to the residual stream."""
FFN = "ffn"
"""Products of a feed-forward network's linear maps, routers included."""
