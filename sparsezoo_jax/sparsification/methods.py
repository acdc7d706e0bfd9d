"""The methods of activation sparsity, each a setting of the same configuration."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from sparsezoo_jax.models.masks import NEURONS, SHARED_NEURONS, ActivationSparsity

Quantile = Literal["magnitude", "symmetric", "grid"]
LINEAR_MAPS = (
    *("q", "q_up", "k", "v", "o"),
    *("gate", "up", "down"),
    *("shared_gate", "shared_up", "shared_down"),
)


class Method(NamedTuple):
    """What a method is made of; fields as in `ActivationSparsity`."""

    maps: tuple[str, ...]
    gate: Literal["threshold", "top_k"] = "threshold"
    weighted: tuple[str, ...] = ()
    quantile: Quantile = "magnitude"
    """Which quantile of a map's scores its threshold is; see `calibration.threshold`."""

    rotate: bool = False

    def sparsity(self, target: float, dense_tokens: int = 0) -> ActivationSparsity:
        """The configuration that leaves out a share `target` of the channels.

        Raises:
          ConfigError: a share out of range, or maps that don't go together.
        """
        return ActivationSparsity(
            maps=self.maps,
            target=target,
            gate=self.gate,
            weighted=self.weighted,
            dense_tokens=dense_tokens,
            rotate=self.rotate,
        )


#: By name, as the papers have them.
METHODS = {
    "cats": Method((NEURONS, SHARED_NEURONS)),
    "teal": Method(LINEAR_MAPS),
    "wina": Method(LINEAR_MAPS, gate="top_k", weighted=LINEAR_MAPS),
    "rsparse": Method(LINEAR_MAPS, weighted=LINEAR_MAPS),
}
#: What the authors' code has in place of that.
RELEASED = {
    "cats": METHODS["cats"]._replace(quantile="grid"),
    "teal": METHODS["teal"]._replace(quantile="symmetric"),
    "wina": METHODS["wina"]._replace(weighted=("k", "gate", "shared_gate")),
    "rsparse": METHODS["rsparse"],
}


def without_absent(sparsity: ActivationSparsity, maps: tuple[str, ...]) -> ActivationSparsity:
    """`sparsity` of those of its maps that are among `maps`, which has some of them."""
    kept = tuple(name for name in sparsity.maps if name in maps)
    weighted = tuple(name for name in sparsity.weighted if name in kept)
    ranks = tuple(sparsity.rank(name) for name in kept)
    return dataclasses.replace(sparsity, maps=kept, weighted=weighted, ranks=ranks if any(ranks) else ())
