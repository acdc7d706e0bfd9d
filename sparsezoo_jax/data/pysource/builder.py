"""The corpus `pysource` as a TFDS dataset. Importing this module registers it.

Split: by packages, as `PySourceConfig` says. A text that is in both splits is validated on, and not trained on.
Beside its records lies `packages/` with a description of each package: version, licence, files, bytes, sha256.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from sparsezoo_jax import storage
from sparsezoo_jax.data.documents import SourceFile, Split, digest
from sparsezoo_jax.data.pysource.config import PySourceConfig
from sparsezoo_jax.data.pysource.selection import Package, Source, find_package, sources
from sparsezoo_jax.errors import StorageError, require
from sparsezoo_jax.storage import write_atomic
from sparsezoo_jax.untrusted import read_json

PACKAGES = "packages"


@dataclasses.dataclass(kw_only=True)
class PackagesConfig(tfds.core.BuilderConfig):
    """Installed packages, those of each split."""

    training: tuple[Package, ...]
    validation: tuple[Package, ...]


def packages_config(config: PySourceConfig) -> PackagesConfig:
    """The builder's configuration for what is installed; its name tells apart what differs in any file.

    Raises:
      DataError: a package is not installed, or in another version than the configuration names.
    """
    training = tuple(find_package(*package) for package in config.training_packages)
    validation = tuple(find_package(*package) for package in config.validation_packages)
    name = f"{len(training) + len(validation)}-packages-{digest(training, validation)[:16]}"
    return PackagesConfig(name=name, training=training, validation=validation)


class Pysource(tfds.core.GeneratorBasedBuilder):
    """Python files with their package, its version and licence; a document's id is `name==version/path`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Without tests, generated files, tables and what is there twice."}
    builder_config: PackagesConfig

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"text": text, "id": text, "package": text, "version": text, "license": text}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python source of installed packages.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keep the order of packages and paths
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        config = self.builder_config
        texts: dict[Package, list[Source]] = {package: [] for package in (*config.validation, *config.training)}
        for source in sources(list(texts)):
            texts[source.package].append(source)
        splits: dict[Split, tuple[Package, ...]] = {"train": config.training, "validation": config.validation}
        for split, packages in splits.items():
            for package in packages:
                description = json.dumps(_description(package, split, texts[package]), indent=1)
                write_atomic(Path(self.data_dir) / PACKAGES / f"{package.label}.json", description.encode())
        return {
            split: self._generate_examples([source for package in packages for source in texts[package]])
            for split, packages in splits.items()
        }

    def _generate_examples(self, texts: list[Source]) -> Iterator[tuple[int, dict[str, object]]]:
        for key, source in enumerate(texts):
            package = source.package
            names = {"package": package.name, "version": package.version, "license": package.license}
            yield key, {"text": source.text, "id": source.id, **names}


def _description(package: Package, split: Split, texts: list[Source]) -> dict[str, Any]:
    content = hashlib.sha256()
    for source in texts:
        content.update(f"{source.path}\0{hashlib.sha256(source.text.encode()).hexdigest()}\n".encode())
    return {
        "name": package.name,
        "version": package.version,
        "split": split,
        "license": package.license,
        "license_files": package.license_files,
        "files": len(texts),
        "bytes": sum(len(source.text.encode()) for source in texts),
        "sha256": content.hexdigest(),
    }


def descriptions(directory: Path, config: PackagesConfig) -> list[dict[str, Any]]:
    """What lies beside the records about each package; raises `StorageError` if it is missing or damaged."""
    found = []
    for package in (*config.training, *config.validation):
        try:
            row = read_json(_place(directory, package))
            found.append({name: row[name] for name in ("name", "version", "split", "files", "bytes", "sha256")})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"{directory}: damaged corpus ({error}); delete the directory to make it again"
            ) from None
    return found


def fingerprint(rows: list[dict[str, Any]], config: PySourceConfig) -> str:
    """Of all texts of both splits, byte by byte, and the versions of their packages.

    Raises:
      ConfigError: the configuration names another.
    """
    found = digest(*(tuple(row.values()) for row in rows))
    expected = config.fingerprint
    allowed = f"is not what the installed packages hold, which is {found}; install the versions it was made of"
    require(expected in (None, found), "data.pysource.fingerprint", expected, allowed)
    return found


def files(directory: Path, config: PackagesConfig) -> list[SourceFile]:
    """The descriptions of packages as files of the corpus, by which a run that is resumed tells what changed."""
    return [
        SourceFile(f"{package.label} ({package.license})", _place(directory, package))
        for package in (*config.training, *config.validation)
    ]


def _place(directory: Path, package: Package) -> Path:
    return storage.path(directory) / PACKAGES / f"{package.label}.json"
