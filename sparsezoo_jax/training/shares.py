"""How much of each corpus of a mixture a run was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sparsezoo_jax.training.processes import gather


class TokenShares:
    """Shares of the target tokens of each corpus, measured from one row of metrics to the next."""

    def __init__(self):
        self._counts: Counter[str] = Counter()

    def add(self, counts: Mapping[str, int]) -> None:
        """Count the target tokens of a step's batch, of the rows that this process feeds."""
        self._counts.update(counts)

    def take(self) -> dict[str, float]:
        """`shares/<corpus>` of the steps since the last call, over all processes: each has to call this at the same
        place. Empty for a run on one corpus.
        """
        if not self._counts:
            return {}
        counts: Counter[str] = sum((Counter(one) for one in gather(dict(self._counts))), Counter())
        names, total = list(self._counts), sum(counts.values())
        self._counts = Counter()
        return {f"shares/{name}": counts[name] / max(total, 1) for name in names}
