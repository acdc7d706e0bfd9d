"""Other forms of the dense decoder's attention in its place: with the scores of all pairs, and cuDNN's.

A form holds for what is traced within `using(form)`, in its thread, so that others can be compiled meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

from sparsezoo_jax.models import attention
from sparsezoo_jax.pallas_kernels import flash_attention
from sparsezoo_jax.pallas_kernels.spark_attention import Visibility

AS_TRAINED, ALL_PAIRS, CUDNN = "as trained", "scores of all pairs", "cuDNN"

#: A part of the keys of jax's caches: functions are traced again when it changes.
_FORM: Any = jax.make_user_context(default_value=AS_TRAINED)


def forms(platform: str, interpret: bool) -> tuple[str, ...]:
    """Those that the platform has; cuDNN can't be interpreted."""
    return (AS_TRAINED, ALL_PAIRS, CUDNN) if platform == "gpu" and not interpret else (AS_TRAINED, ALL_PAIRS)


@contextlib.contextmanager
def using(form: str) -> Iterator[None]:
    """Trace with a form within, where `installed`."""
    with _FORM(form):
        yield


@contextlib.contextmanager
def installed(kernel: str) -> Iterator[None]:
    """Let `using` choose; `kernel` is the implementation of `flash_attention` that models are trained with."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility, **options: Any) -> jax.Array:
        form, long = _FORM.value, q.shape[1] > 1
        if form == CUDNN:
            return _cudnn(q, k, v, visible, **options)
        implementation = kernel if form == AS_TRAINED and long else "xla"
        options["implementation"] = implementation
        return flash_attention(q, k, v, visible, **options)

    with mock.patch.object(attention, "flash_attention", attend):
        yield


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: Visibility,
    *,
    scale: float,
    softcap: float | None,
    implementation: str | None,
) -> jax.Array:
    """Causal attention of sequences that are not packed, or one query over a cache by its mask."""
    del implementation
    if softcap is not None:
        raise ValueError("cuDNN has no soft cap")
    options: dict[str, Any] = {"scale": scale, "implementation": "cudnn"}
    if q.shape[1] == 1:
        return jax.nn.dot_product_attention(q, k, v, mask=visible.mask[:, None], **options)
    if visible.window is not None:
        options["local_window_size"] = (visible.window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, **options)
