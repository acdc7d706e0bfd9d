"""Presets: one module per architecture, one literal per preset."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import (
    blockffn,
    deco,
    delta,
    dense,
    lazy,
    ling,
    mixer,
    moe,
    moex,
    mohd,
    plm,
    prosparse,
    spark,
    sparselm,
    vit,
    vit_mae,
)
from sparsezoo_jax.errors import ConfigError

PRESETS: dict[str, dict[str, RunConfig]] = {
    "blockffn": blockffn.PRESETS,
    "deco": deco.PRESETS,
    "delta": delta.PRESETS,
    "dense": dense.PRESETS,
    "lazy": lazy.PRESETS,
    "ling": ling.PRESETS,
    "mixer": mixer.PRESETS,
    "moe": moe.PRESETS,
    "moex": moex.PRESETS,
    "mohd": mohd.PRESETS,
    "plm": plm.PRESETS,
    "prosparse": prosparse.PRESETS,
    "spark": spark.PRESETS,
    "sparselm": sparselm.PRESETS,
    "vit": vit.PRESETS,
    "vit_mae": vit_mae.PRESETS,
}
OWN_ARCHS = frozenset(PRESETS)


def register_arch(arch: str, presets: Mapping[str, RunConfig]) -> None:
    """Make presets of your own known as `--arch ARCH --size NAME`; one of them should be called "tiny".

    Raises:
      ConfigError: the package has an architecture of that name.
    """
    if arch in OWN_ARCHS:
        raise ConfigError("--arch", arch, "is one of the package's own; choose another name")
    PRESETS[arch] = dict(presets)


def preset(arch: str, size: str = "tiny") -> RunConfig:
    """The preset of an architecture and size.

    Raises:
      ConfigError: no such architecture, or it has no such size.
    """
    if arch not in PRESETS:
        raise ConfigError("--arch", arch, _choices(arch, list(PRESETS)))
    if size not in PRESETS[arch]:
        raise ConfigError("--size", size, f"for --arch {arch} it {_choices(size, list(PRESETS[arch]))}")
    return PRESETS[arch][size]


def archs() -> dict[str, str]:
    """The architectures, with a line on each."""
    lines = {}
    for arch in PRESETS:
        module = sys.modules.get(f"{__name__}.{arch}")
        lines[arch] = (module.__doc__ or "").splitlines()[0].rstrip(".") if module and arch in OWN_ARCHS else ""
    return lines


def sizes(arch: str) -> dict[str, str]:
    """The sizes of an architecture, with a line on each."""

    def reads(config: RunConfig) -> str:
        if config.model.images.patch is not None:
            images = config.model.images
            return f"{images.size} pixels in {images.patches} patches, {config.train.steps:,} steps of " + (
                f"{config.data.batch_size:,} images"
            )
        tokens = config.data.batch_size * config.data.seq_len
        return f"{config.model.vocab_size:,} tokens, {config.train.steps:,} steps of {tokens:,}"

    return {
        size: f"{config.model.layers} layers, width {config.model.d_model:,}, {reads(config)}"
        for size, config in PRESETS[arch].items()
    }


def _choices(value: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(value, allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"must be one of {', '.join(allowed)}{hint}"
