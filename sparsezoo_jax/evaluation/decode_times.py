"""The time of a token in decoding, of models by turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from sparsezoo_jax.inference import Engine, Formats, Sampling, packed
from sparsezoo_jax.models import Decoder

#: Tokens that each model generates in its turn.
TURN = 32


def beside(
    model: Decoder,
    other: Decoder,
    prompt: Sequence[int],
    *,
    rounds: int,
    formats: Formats | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """How long a token of a model takes beside one of another, both laid out for decoding: see `compared`.

    Args:
      model: that is looked at.
      other: that it is compared with.
      prompt: token ids that both have read before.
      rounds: turns of each that count.
      formats: number formats of the weights. None: as they are.
      mesh: whose devices share each model. None: one device.

    Raises:
      UserError: prompt and tokens exceed a model's max_seq_len.
    """
    forms = () if formats is None else (formats,)
    models = {"own": packed(model, *forms), "other": packed(other, *forms)}
    shared = None if mesh is None or mesh.size == 1 else mesh
    return compared(decode_times(models, prompt, tokens=TURN, rounds=rounds, mesh=shared), "own", "other")


def decode_times(
    models: Mapping[str, Decoder], prompt: Sequence[int], *, tokens: int, rounds: int, mesh: Mesh | None = None
) -> dict[str, list[float]]:
    """Milliseconds a token of each model, by round.

    In a round each model reads the prompt and generates `tokens` more of the likeliest, one after the other and every
    second round the other way round, so that what else the machine does meets all of them alike. Compiling and the
    prompt are not in the times, and a first round, in which memory is touched for the first time, is left out.

    Args:
      models: laid out as they decode (`inference.packed`), by name.
      prompt: token ids. A model with a smaller vocabulary reads them modulo its size: the time is the same.
      tokens: after the first one, that are timed; at least 1.
      rounds: that count; at least 1.
      mesh: whose devices share each model. None: one device.

    Raises:
      UserError: prompt and tokens exceed a model's max_seq_len.
    """
    engines = {name: Engine(model, mesh) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name in list(engines)[:: -1 if turn % 2 else 1]:
            engine = engines[name]
            ids = [token % engine.model.config.vocab_size for token in prompt]
            generation = engine.generate([ids], max_new_tokens=tokens + 1, sampling=Sampling(temperature=0))
            for _ in generation:
                pass
            if turn > 0:
                found[name].append(1e3 * generation.stats.decode_seconds / generation.stats.decoded)
    return found


def compared(times: Mapping[str, list[float]], name: str, beside: str) -> dict[str, Any]:
    """How long a token of one model takes beside another.

    Returns:
      "milliseconds" and "milliseconds_beside", medians; "ratio", the median over rounds of how many times as long the
      other takes; "ratio_quartiles", its first and third quartile, the ratio itself where there is one round.
    """
    ratios = [other / own for own, other in zip(times[name], times[beside], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (*ratios, 0, *ratios)
    return {
        "milliseconds": statistics.median(times[name]),
        "milliseconds_beside": statistics.median(times[beside]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
    }
