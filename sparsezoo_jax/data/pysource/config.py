"""Which packages the corpus `pysource` is made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, ConfigError, require
from sparsezoo_jax.untrusted import Local

#: What everybody has who installed this package, with no extra, under licences that let their texts be passed on.
TRAINING = (
    *("absl-py", "attrs", "etils", "filelock", "flax", "grain", "huggingface-hub", "jax", "markdown-it-py"),
    *("numpy", "opt-einsum", "orbax-checkpoint", "packaging", "pandas", "protobuf", "psutil", "pyarrow", "pydantic"),
    *("pydantic-core", "pygments", "python-dateutil", "pyyaml", "requests", "scipy", "tensorboardx"),
    *("tensorflow-datasets", "treescope", "typing-extensions", "urllib3", "wrapt", "zstandard"),
)
#: An optimiser library, a terminal, file systems, a command line and templates: of each kind one, and no more.
VALIDATION = ("fsspec", "jinja2", "optax", "rich", "tyro")

_NAMED = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.+!_-]+))?")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PySourceConfig:
    """The packages of the corpus `pysource`, as `name` or, to take no other version, as `name==version`.

    Raises `ConfigError` that names the field for a value that is not allowed.
    """

    packages: Annotated[tuple[str, ...] | None, Local()] = None
    """Packages to train on; none takes those that this package needs itself."""
    validation: Annotated[tuple[str, ...] | None, Local()] = None
    """Packages to validate on, none of whose files are trained on; none takes fsspec, jinja2, optax, rich and tyro."""
    fingerprint: str | None = None
    """Refuse any other texts than those with this fingerprint (32 hex digits, as the error says it)."""

    def __post_init__(self):
        for field in ("packages", "validation"):
            value = getattr(self, field)
            require(value is None or bool(value), f"data.pysource.{field}", value, "must name a package")
        names = [name for name, _ in (*self.training_packages, *self.validation_packages)]
        twice = sorted({name for name in names if names.count(name) > 1})
        allowed = "is named twice; a package is either trained on or validated on"
        require(not twice, "data.pysource.packages", ", ".join(twice), allowed)
        good = self.fingerprint is None or re.fullmatch(r"[0-9a-f]{32}", self.fingerprint) is not None
        require(good, "data.pysource.fingerprint", self.fingerprint, "must be 32 hex digits")

    @property
    def training_packages(self) -> list[tuple[str, str | None]]:
        """Normalised names and required versions, sorted."""
        return _parsed("packages", TRAINING if self.packages is None else self.packages)

    @property
    def validation_packages(self) -> list[tuple[str, str | None]]:
        """Normalised names and required versions, sorted."""
        return _parsed("validation", VALIDATION if self.validation is None else self.validation)


def _parsed(field: str, packages: tuple[str, ...]) -> list[tuple[str, str | None]]:
    found = []
    for package in packages:
        match = _NAMED.fullmatch(package)
        if match is None:
            raise ConfigError(f"data.pysource.{field}", repr(package), "must be NAME or NAME==VERSION")
        found.append((re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]))
    return sorted(found)
