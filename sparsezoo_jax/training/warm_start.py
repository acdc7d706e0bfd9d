"""Starting from the parameters of another run instead of random ones.

Parameters of the same architecture are taken one to one, and with them what no gradient moves. Where the FFN is of
another kind, its `upcycled` makes them of the other run's FFN: experts as copies of a dense layer, for example. A
classifier of images takes the encoder of a masked autoencoder, and makes its head of classes anew.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.models import DecoderConfig, FFNKind, build_model
from sparsezoo_jax.models.encoder import sines
from sparsezoo_jax.training.parameters import restore_params, saved_metadata, saved_steps
from sparsezoo_jax.training.state import (
    ModelTemplate,
    Placement,
    PureDict,
    first_device,
    flatten,
    map_with_path,
    nested,
)

_FIELD = "train.init_from"
_FFN = re.compile(r"(?P<layer>.*/ffn)/(?P<name>.+)")
_ADAPTER = re.compile(r"/(attention|ffn)_adapter/")
#: Finds the parameters of a classifier that a masked autoencoder has no like for.
NEW_HEAD = "^classes/"
_NEW_HEAD, _RECONSTRUCTION = re.compile(NEW_HEAD), re.compile("^reconstruction/")


@dataclass(frozen=True)
class WarmStart:
    """The parameters of one step of another run, checked to fit; nothing but their shapes has been read yet."""

    checkpoints: Path
    """Checkpoint directory of the other run."""
    step: int
    """Step whose parameters are taken."""
    source: DecoderConfig
    """The other run's decoder."""
    target: DecoderConfig
    """The decoder to start."""
    noise: float
    """Relative standard deviation of the noise on experts' copies."""
    seed: int
    """Seed of that noise."""

    def __call__(
        self, own: tuple[PureDict, PureDict], shardings: tuple[PureDict, PureDict], place: Placement
    ) -> tuple[PureDict, PureDict]:
        """`own`, parameters and other variables of a new run, with what the other run gives replaced, on `shardings`.

        Of the other variables (biases of routers, say) those are taken that both runs have in one shape and that
        belong to no random stream.

        Raises:
          StorageError: the other run's checkpoint is damaged.
        """
        streams, found = _template(self.target).streams, self._restored(place)

        def converted(own: tuple[PureDict, PureDict], found: tuple[PureDict, PureDict], key: jax.Array):
            params = _converted(self.source, self.target, self.noise, own[0], found[0], key)
            given = {path: x for path, x in flatten(found[1]).items() if path not in streams}

            def taken(path: str, x: jax.Array) -> jax.Array:
                fits = path in given and given[path].shape == x.shape
                return given[path].astype(x.dtype) if fits else x

            return params, map_with_path(taken, own[1])

        return jax.jit(converted, out_shardings=shardings)(own, found, jax.random.key(self.seed))

    def read(self, place: Placement = first_device) -> tuple[PureDict, PureDict]:
        """All parameters of the decoder to start that the other run has its like for, and its other variables.

        Raises:
          StorageError: the other run's checkpoint is damaged.
        """
        template, wanted = _template(self.target), _abstract(self.target)
        found, model_state = self._restored(place)

        # What is new has no like there; what the run trained takes its place.
        new = _new(self.source, self.target, flatten(wanted))
        kept = {path: x for path, x in flatten(wanted).items() if path not in new}

        def converted(found: PureDict) -> PureDict:
            made = _converted(self.source, self.target, self.noise, wanted, found, jax.random.key(self.seed))
            return nested({path: x for path, x in flatten(made).items() if path in kept})

        shardings = nested({path: place(template.parameters[path].full_axes, x.shape) for path, x in kept.items()})
        return jax.jit(converted, out_shardings=shardings)(found), model_state

    def identity(self) -> dict[str, Any]:
        """The step, and a fingerprint of all parameters of the other run.

        Raises:
          StorageError: the other run's checkpoint is damaged.
        """
        arrays = saved_metadata(self.checkpoints, self.step)["arrays"]
        params = {path: entry for path, entry in arrays.items() if path.startswith("model/params/")}
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
        return {"step": self.step, "fingerprint": digest}

    def _restored(self, place: Placement) -> tuple[PureDict, PureDict]:
        if jax.process_index() == 0:
            print(f"parameters of {self.checkpoints.parent}, step {self.step}", file=sys.stderr)
        template = _template(self.source)
        axes = {f"params/{name}": variable.full_axes for name, variable in template.parameters.items()}
        axes |= {f"model_state/{name}": variable.full_axes for name, variable in template.variables.items()}

        def sharding_of(name: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
            return place(axes.get(name, (None,) * len(shape)), shape)

        return restore_params(self.checkpoints, self.step, sharding_of=sharding_of)


def open_warm_start(
    checkpoints: Path,
    source: DecoderConfig,
    target: DecoderConfig,
    *,
    step: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> WarmStart:
    """Check that a step (None: the newest) of another run can start a decoder.

    Raises:
      UserError: there is no such step.
      ConfigError: parameters of another shape or name, or FFNs that can't be made of each other.
    """
    steps = saved_steps(checkpoints)
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        wanted = "checkpoint" if step is None else f"step {step}"
        raise UserError(
            f"{_FIELD}={checkpoints.parent}: has no {wanted}; steps there are: {', '.join(map(str, steps)) or 'none'}"
        )
    jax.eval_shape(
        partial(_converted, source, target, noise), _abstract(target), _abstract(source), jax.random.key(seed)
    )
    return WarmStart(checkpoints, step, source, target, noise, seed)


def _template(config: DecoderConfig) -> ModelTemplate:
    return ModelTemplate(lambda rngs: build_model(config, rngs))


def _abstract(config: DecoderConfig) -> PureDict:
    template = _template(config)
    return jax.eval_shape(lambda: template.split(build_model(config, nnx.Rngs(0)))[0])


def gets_head(source: DecoderConfig, target: DecoderConfig) -> bool:
    """Whether a masked autoencoder starts a classifier, whose head is new."""
    images = target.images
    return source.images.reconstructs and images.patch is not None and not images.reconstructs


def _new(source: DecoderConfig, target: DecoderConfig, own: Iterable[str]) -> set[str]:
    """Paths, of those of the target, that the source has no like for and that start as a new run's."""
    patterns = [_ADAPTER] if source.adapter.width is None else []
    patterns += [_NEW_HEAD] if gets_head(source, target) else []
    return {path for path in own if any(pattern.search(path) for pattern in patterns)}


def _encoder_of(source: DecoderConfig, target: DecoderConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a masked autoencoder's encoder, as a classifier of the same patches has them.

    Learned positions start as the sines that the autoencoder added.
    """
    for name in ("size", "patch", "channels"):
        there, here = getattr(source.images, name), getattr(target.images, name)
        if here != there:
            raise ConfigError(_FIELD, f"model.images.{name}", f"is {there} there and {here} here")
    found = {path: x for path, x in given.items() if not _RECONSTRUCTION.search(path)}
    if (source.images.positions, target.images.positions) == ("sine", "learned"):
        found["positions_TD"] = jnp.asarray(sines(source.images.patches, source.d_model))
    return found


def _converted(
    source: DecoderConfig, target: DecoderConfig, noise: float, params: PureDict, found: PureDict, key: jax.Array
) -> PureDict:
    """`params` of a target decoder with what `found` of a source decoder gives in their place."""
    own, given = flatten(params), flatten(found)
    if source.vocab_size == target.vocab_size:
        for path, axis in (("embedding_VD", 0), ("output_DV", 1)):
            if path in given:
                words = jax.lax.slice_in_dim(given[path], 0, source.vocab_size, axis=axis)
                padding = (0, target.vocab_rows - source.vocab_size)
                given[path] = jnp.pad(words, [padding if i == axis else (0, 0) for i in range(2)])
    if gets_head(source, target):
        given = _encoder_of(source, target, given)
    optional = _new(source, target, own)
    if source.ffn.kind != target.ffn.kind:
        given, unmade = _with_upcycled(source.ffn, target.ffn, noise, own, given, key)
        optional |= unmade
    for path in sorted((own.keys() | given.keys()) - optional):
        here, there = (tuple(x.shape) if x is not None else "absent" for x in (own.get(path), given.get(path)))
        if here != there:
            raise ConfigError(_FIELD, path, f"is {there} there and {here} here")
    return map_with_path(lambda path, x: given[path].astype(x.dtype) if path in given else x, params)


def _with_upcycled(
    source: FFNKind, target: FFNKind, noise: float, own: Mapping[str, Any], given: Mapping[str, Any], key: jax.Array
) -> tuple[dict[str, Any], set[str]]:
    """`given` with every FFN of the source made into one of the target, and what of the target's is not made so."""
    layers: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    for path, x in given.items():
        match = _FFN.fullmatch(path)
        if match is None:
            result[path] = x
        else:
            layers.setdefault(match["layer"], {})[match["name"]] = x
    for i, (layer, weights) in enumerate(sorted(layers.items())):
        made = target.upcycled(source, weights, noise, jax.random.fold_in(key, i))
        result |= {f"{layer}/{name}": x for name, x in made.items()}
    return result, {path for path in own if _FFN.fullmatch(path)} - result.keys()
