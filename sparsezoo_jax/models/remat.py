"""Rematerialisation: which arrays of a layer the backward pass finds again, and which it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from sparsezoo_jax.pallas_kernels.checkpoint_names import ATTENTION, PRODUCT, STATISTICS

Remat = Literal["none", "full", "attention", "dots", "offload"]

_KEPT = [ATTENTION, PRODUCT]


def rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`body`, a run of layers, with the backward pass that `DecoderConfig.remat` asks for.

    Whatever it is, the inputs of `body` are kept. Arrays are chosen by name (`pallas_kernels.checkpoint_names`).
    """
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "full": None,
        "attention": policies.save_only_these_names(ATTENTION),
        "dots": policies.save_only_these_names(*_KEPT, STATISTICS),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[STATISTICS],  # too small to be worth a transfer
            names_which_can_be_offloaded=_KEPT,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(body, policy=policy)
