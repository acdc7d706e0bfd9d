"""How long a step may take, from what it computes and moves, and how much of that is useful work."""

from __future__ import annotations

from collections.abc import Mapping

OVERLAPS = ("none", "half", "full")


def step_seconds(parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step whose parts (compute, memory, links) take these seconds by themselves, by how they overlap.

    none: one after another, their sum. full: at the same time, the longest of them. half: the mean of the two.
    """
    total, longest = sum(parts.values()), max(parts.values())
    return {"none": total, "half": (total + longest) / 2, "full": longest}


def utilisation(useful: Mapping[str, float], seconds: Mapping[str, float], peak: float) -> dict[str, dict[str, float]]:
    """Model FLOPs utilisation: share of the peak that useful FLOPs have in a step of each of these times.

    Args:
      useful: FLOPs of a step on one device that a forward and a backward pass need, by how they are counted.
      seconds: of a step, by name.
      peak: FLOP/s of a device.
    """
    return {name: {key: flops / (time * peak) for key, time in seconds.items()} for name, flops in useful.items()}
