"""Other forms of the dense decoder's attention, put in its place: cuDNN's, and Spark's kernels with all keys selected.

A form holds for what is traced within `using(form)`, in its thread, so that others can be compiled meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from sparsezoo_jax.models.attention import GQA
from sparsezoo_jax.pallas_kernels import spark_attention
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility

AS_TRAINED, CUDNN, KERNELS = "as trained", "cuDNN", "all keys by spark_attention"

#: A part of the keys of jax's caches: functions are traced again when it changes.
_FORM: Any = jax.make_user_context(default_value=AS_TRAINED)


def forms(platform: str, interpret: bool) -> tuple[str, ...]:
    """Those that the platform has; cuDNN can't be interpreted."""
    return (AS_TRAINED, CUDNN, KERNELS) if platform == "gpu" and not interpret else (AS_TRAINED, KERNELS)


@contextlib.contextmanager
def using(form: str) -> Iterator[None]:
    """Trace with a form within, where `installed`."""
    with _FORM(form):
        yield


@contextlib.contextmanager
def installed(kernel: str) -> Iterator[None]:
    """Let `using` choose; `kernel` is the implementation of spark_attention."""
    plain = GQA.attend

    def attend(self: GQA, q: jax.Array, keys_values: Any, mask_BTS: jax.Array) -> jax.Array:
        form = _FORM.value
        if form == CUDNN:
            k, v = keys_values
            return _cudnn(self, q, k, v, mask_BTS)
        if form == KERNELS:
            k, v = keys_values
            return _kernels(self, q, k, v, kernel)
        return plain(self, q, keys_values, mask_BTS)

    with mock.patch.object(GQA, "attend", attend):
        yield


def _window(layer: GQA) -> int | None:
    return layer.config.window if layer.layer_type == "local" else None


def _cudnn(layer: GQA, q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Causal attention of sequences that are not packed, or one query over a cache by its mask."""
    if layer.config.softcap is not None:
        raise ValueError("cuDNN has no soft cap")
    options: dict[str, Any] = {"scale": layer.scale, "implementation": "cudnn"}
    if q.shape[1] == 1:
        return jax.nn.dot_product_attention(q, k, v, mask=mask_BTS[:, None], **options)
    if (window := _window(layer)) is not None:
        options["local_window_size"] = (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, **options)


def _kernels(layer: GQA, q: jax.Array, k: jax.Array, v: jax.Array, kernel: str) -> jax.Array:
    """Causal attention of sequences that are not packed."""
    visible = Visibility.of_tokens(jnp.ones(q.shape[:2], jnp.int32), _window(layer))
    options: dict[str, Any] = {"selection": "none", "weighting": "none", "softcap": layer.config.softcap}
    options |= {"predictor_scale": layer.scale, "implementation": kernel}
    return spark_attention(q, k, v, visible, r=q.shape[-1], top_k=1, **options)[0]
