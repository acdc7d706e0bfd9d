"""Convert checkpoints: `python -m sparsezoo_jax.convert from-hf SRC DIR`, `to-hf DIR DST`, or `merge DIR RUN`.

SRC and DST are directories in Hugging Face's layout (config.json, model.safetensors, tokenizer; SRC may hold
pytorch_model.bin instead), DIR and RUN are run directories. docs/huggingface.md lists the families that are read and
how transformers loads what is written; `to-hf DIR DST --push OWNER/NAME` uploads it.
`merge` makes a run of adapters and the parameters that they were trained for. `from-saelens SRC DIR` and
`to-saelens DIR DST` convert autoencoders from and to the layout of SAELens (docs/sae.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsezoo_jax import cli, storage
from sparsezoo_jax.autoencoders.config import Site
from sparsezoo_jax.data.tiktoken_files import TokenizerFamily
from sparsezoo_jax.errors import require
from sparsezoo_jax.path_flags import IN_RUN_STORES, Stores
from sparsezoo_jax.untrusted import printable


@dataclass(frozen=True, kw_only=True)
class FromHF:
    """Make a run directory of a Hugging Face checkpoint."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC"), Stores()]
    """Directory with config.json and model.safetensors or pytorch_model.bin."""
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directory to make; empty or absent."""
    not_finite: bool = False
    """Take weights that are NaN or infinite, too."""
    tokenizer_family: TokenizerFamily | None = None
    """How a tokenizer in a rank file of tiktoken cuts texts into pieces, and its special tokens, which it doesn't hold.
    Default: as the known file with as many ranks."""


@dataclass(frozen=True, kw_only=True)
class ToHF:
    """Write a run's newest checkpoint as a Hugging Face checkpoint that transformers loads."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directory."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST"), Stores()]
    """Directory to make; empty or absent."""
    released: bool = False
    """Write the layout of the family's released checkpoints, for their authors' code and other engines. Where
    transformers has no class for it, their Python modules must be put beside it."""
    push: Annotated[str | None, tyro.conf.arg(metavar="OWNER/NAME")] = None
    """Upload the result to the Hugging Face hub, with your own login (hf auth login). A new repository is private."""
    public: bool = False
    """Make a new repository public."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make a run of adapters and the parameters that they were trained for."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directory of the adapters; the newest checkpoint is taken."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN"), IN_RUN_STORES]
    """Run directory to make; empty or absent."""
    base: Annotated[Path | None, IN_RUN_STORES] = None
    """Run that the adapters were trained for. Default: where their configuration says."""


@dataclass(frozen=True, kw_only=True)
class FromSAELens:
    """Make an autoencoder directory of one in SAELens' layout."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC"), Stores()]
    """Directory with cfg.json and sae_weights.safetensors."""
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Directory to make; empty or absent."""
    layer: int | None = None
    """Layer, from 1, whose activations it reads. Default: as its hook_name says."""
    site: Site | None = None
    """What it reads there. Default: as its hook_name says."""


@dataclass(frozen=True, kw_only=True)
class ToSAELens:
    """Write an autoencoder in SAELens' layout."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Directory of an autoencoder."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST"), Stores()]
    """Directory to make; empty or absent."""


Convert: Any = (
    Annotated[FromHF, tyro.conf.subcommand("from-hf")]
    | Annotated[ToHF, tyro.conf.subcommand("to-hf")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[FromSAELens, tyro.conf.subcommand("from-saelens")]
    | Annotated[ToSAELens, tyro.conf.subcommand("to-saelens")]
)


def main(args: Sequence[str]) -> None:
    """Convert, and print what was made."""
    command = cli.parse(Convert, args, prog="convert", description=(__doc__ or "").strip())
    if isinstance(command, Merge):
        from sparsezoo_jax.config import read_config
        from sparsezoo_jax.run_dir import CONFIG, merge_adapters

        step = merge_adapters(command.directory, command.destination, command.base)
        width = read_config(command.destination / CONFIG).model.adapter.width
        if width is not None:
            reason = "a bottleneck has a non-linearity, which no matrix can take in"
            print(f"note: {reason}: the adapters of model.adapter.width={width} stay layers of their own")
        print(f"{command.destination}: adapters of step {step} merged into their base")
        return
    if isinstance(command, FromSAELens | ToSAELens):
        from sparsezoo_jax.huggingface.saelens import from_saelens, to_saelens

        if isinstance(command, FromSAELens):
            require(command.layer is None or command.layer >= 1, "--layer", command.layer, "must be at least 1")
            place = command.directory
            converted = from_saelens(command.source, place, layer=command.layer, site=command.site)
        else:
            place = command.destination
            converted = to_saelens(command.directory, place)
        print(f"{place}: {converted.kind}, {converted.features:,} features of width {converted.width:,}")
        return
    from sparsezoo_jax import huggingface
    from sparsezoo_jax.huggingface import hub

    if isinstance(command, FromHF):
        family, not_finite = command.tokenizer_family, command.not_finite
        made = huggingface.from_hf(command.source, command.directory, not_finite=not_finite, tokenizer_family=family)
        place = command.directory
    else:
        require(command.push is not None or not command.public, "--public", True, "is for --push OWNER/NAME only")
        if command.push is not None:
            require(not storage.is_object(command.destination), "DST", command.destination, "must be local with --push")
            hub.check(command.push)
        place = command.destination
        made = huggingface.to_hf(command.directory, place, released=command.released, name=command.push)
    for note in made.notes:
        print(f"note: {printable(note)}")
    tokenizer = "with its tokenizer" if made.tokenizer else "no tokenizer"
    print(f"{place}: {made.model_type}, {made.parameters:,} parameters in {made.dtype}, {tokenizer}")
    if isinstance(command, ToHF) and command.push is not None:
        print(f"uploaded to {printable(hub.push(place, command.push, public=command.public))}")


if __name__ == "__main__":
    cli.run(main)
