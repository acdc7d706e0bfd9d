"""An autoencoder's directory: sae.json, checkpoints/ and the figures of its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sparsezoo_jax.autoencoders.config import SAEConfig, SAETrainConfig
from sparsezoo_jax.autoencoders.model import SparseAutoencoder
from sparsezoo_jax.errors import STRICT, StorageError, UserError
from sparsezoo_jax.overrides import as_python, faults
from sparsezoo_jax.storage import RUN_STORES, path, require_place, write_atomic
from sparsezoo_jax.training.parameters import restore_params, save_params
from sparsezoo_jax.untrusted import read_json

CONFIG, CHECKPOINTS = "sae.json", "checkpoints"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SAERun:
    """What an autoencoder was trained on and how: the contents of sae.json."""

    source: str
    """Run directory of the model."""
    step: int | None
    """Its checkpoint; None was the newest."""
    sae: SAEConfig
    """Kind and size."""
    train: SAETrainConfig
    """Layer, site and training."""


class LoadedSAE(NamedTuple):
    """Unpacks as `autoencoder, run`."""

    autoencoder: SparseAutoencoder
    run: SAERun


def save_sae(directory: Path, run: SAERun, autoencoder: SparseAutoencoder) -> None:
    """Write an autoencoder.

    Raises:
      ConfigError: a store that checkpoints can't be in. StorageError: it can't be written.
    """
    require_place("directory", directory, schemes=RUN_STORES)
    arrays = {f"params/{name}": x for name, x in autoencoder.params.items()}
    arrays |= {f"state/{name}": x for name, x in autoencoder.state.items()}
    write_atomic(directory / CONFIG, TypeAdapter(SAERun).dump_json(run, indent=2) + b"\n")
    save_params(directory / CHECKPOINTS, arrays, step=run.train.steps)


def load_sae(directory: Path | str) -> LoadedSAE:
    """The autoencoder in a directory that `save_sae` wrote.

    Raises:
      UserError: there is none, or its sae.json is no valid configuration.
      StorageError: its arrays are damaged.
    """
    directory = path(directory)
    require_place("directory", directory, schemes=RUN_STORES)
    try:
        run = TypeAdapter(SAERun).validate_python(as_python(read_json(directory / CONFIG, finite=True)))
    except FileNotFoundError:
        raise UserError(f"{directory}: no autoencoder here ({CONFIG} is missing)") from None
    except OSError as error:
        raise StorageError(f"{directory / CONFIG}: {error.strerror}") from None
    except ValidationError as error:  # a ValueError, too
        raise UserError(f"{directory / CONFIG}: {faults(error)}") from None
    except ValueError as error:
        raise UserError(f"{directory / CONFIG}: not a configuration ({error})") from None
    found, _ = restore_params(directory / CHECKPOINTS)
    arrays: dict[str, Any] = {name: {k: jnp.asarray(v) for k, v in part.items()} for name, part in found.items()}
    return LoadedSAE(SparseAutoencoder(run.sae, arrays["params"], arrays["state"]), run)


def as_row(run: SAERun) -> dict[str, Any]:
    """Kind, size and place of an autoencoder, for JSON."""
    place = {"layer": run.train.layer, "site": run.train.site, "steps": run.train.steps}
    return {**dataclasses.asdict(run.sae), **place}
