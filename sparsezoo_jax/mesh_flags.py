"""The flags by which a command that reads a run spreads its model over the devices of this machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsezoo_jax.sharding import MeshConfig, build_mesh

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True, kw_only=True)
class MeshFlags:
    """How devices share a model that does not train: one device alone, unless a flag says otherwise."""

    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices that share the model, as many as the axes multiply to; one without a flag (docs/sharding.md)."""

    def build_mesh(self) -> Mesh:
        """The mesh over the first devices of this machine, over all of them where `data` is none.

        Raises:
          ConfigError: more devices than there are.
        """
        return build_mesh(self.mesh, only_needed=True)
