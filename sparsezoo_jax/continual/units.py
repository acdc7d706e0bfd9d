"""Ages of units, and connections that are rewired by them: what protects earlier tasks in SHARP.

A unit is plastic at age 0 and a candidate at age 1, for as long as phases choose it; each task that ends makes what
is not plastic older. Shapes: I inputs of a layer, O of its units.
"""

from __future__ import annotations

import math

import numpy as np

PLASTIC, CANDIDATE = 0, 1


def covered_share(phase: int, cosine_phases: int, least: float) -> float:
    """Share of a layer's activation that chosen units cover after phase `phase`, counted from 0 (tau).

    `(1 + cos(pi t / cosine_phases)) / 2`, at least `least`.
    """
    return max(least, 0.5 * (1 + math.cos(math.pi * phase / cosine_phases)))


def chosen_units(activation_O: np.ndarray, share: float) -> np.ndarray:
    """The fewest units that hold `share` of the summed activation, bool [O]; none of a layer that is silent.

    Of equal units the first ones are chosen.
    """
    order = np.argsort(-activation_O, kind="stable")
    held = np.cumsum(activation_O[order].astype(np.float64))
    chosen = np.zeros(len(activation_O), bool)
    if held[-1] > 0:
        # Up to and with the unit that reaches the share; rounding of the last sum must not take silent ones along.
        chosen[order[: 1 + int(np.searchsorted(held, share * held[-1] * (1 - 1e-12)))]] = True
    return chosen


def with_candidates(ages_O: np.ndarray, chosen_O: np.ndarray) -> np.ndarray:
    """Ages after a phase: of units that no earlier task made older, the chosen ones are candidates, others plastic."""
    return np.where(ages_O > CANDIDATE, ages_O, np.where(chosen_O, CANDIDATE, PLASTIC))


def older(ages_O: np.ndarray) -> np.ndarray:
    """Ages after a task."""
    return np.where(ages_O > PLASTIC, ages_O + 1, ages_O)


def frozen_units(ages_O: np.ndarray, replayed_tasks: int) -> np.ndarray:
    """Units into which connections stay as they are, bool [O]: of tasks that are replayed no more."""
    return ages_O > replayed_tasks + 1


def rewired(
    connected_IO: np.ndarray, plastic_inputs_I: np.ndarray, ages_O: np.ndarray, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Connections without those from plastic units into others, as many as before; and those that are new.

    New ones are drawn among the free places of plastic units first, then of those that are not plastic and have inputs
    that are not either. Where free places are fewer than connections to drop, some of these stay, drawn at random.

    Returns:
      bool [I, O] each.
    """
    shielded_IO = plastic_inputs_I[:, None] & (ages_O > PLASTIC)
    dropped = np.flatnonzero(connected_IO & shielded_IO)
    free_IO = ~connected_IO & ~shielded_IO
    first = draw.permutation(np.flatnonzero(free_IO & (ages_O == PLASTIC)))
    others = draw.permutation(np.flatnonzero(free_IO & (ages_O > PLASTIC)))
    places = np.concatenate([first, others])[: len(dropped)]
    dropped = draw.permutation(dropped)[: len(places)]
    made, new = connected_IO.copy(), np.zeros_like(connected_IO)
    made.flat[dropped] = False
    made.flat[places] = True
    new.flat[places] = True
    return made, new
