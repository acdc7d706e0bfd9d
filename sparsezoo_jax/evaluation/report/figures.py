"""What a report shows of one run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from sparsezoo_jax.errors import StorageError
from sparsezoo_jax.evaluation.cett import Course
from sparsezoo_jax.evaluation.cost import CONTEXTS, Cost, cost_table
from sparsezoo_jax.evaluation.history import History, read_history
from sparsezoo_jax.evaluation.meters import LayerMeters, Meters, measure
from sparsezoo_jax.evaluation.sparsified import recorded
from sparsezoo_jax.models import DecoderConfig, count_parameters
from sparsezoo_jax.untrusted import read_json


@dataclasses.dataclass(frozen=True)
class RunFigures:
    """One run."""

    name: str
    """What the run is called in the report; distinct among its runs."""
    configuration: dict[str, Any]
    """Dotted field names and values."""
    parameters: int
    evaluation: dict[str, Any]
    """The final figures of training (`evaluation.json`), empty where there are none."""
    history: History
    meters: Meters
    costs: list[Cost]
    activation: Course | None = None
    """Activation ratio of the kept checkpoints, where it was asked for."""
    sparsified: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How it was made of a dense run (`sparsify.json`); empty where it was not."""

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, for JSON."""
        return dataclasses.asdict(self)

    def layer_mean(self, value: Callable[[LayerMeters], float | None]) -> float | None:
        """Mean of a figure over the layers that have it."""
        values = [x for x in map(value, self.meters.layers) if x is not None]
        return sum(values) / len(values) if values else None

    def cost(self, context: int, variant: str) -> Cost | None:
        """The cost at a context, where it was counted."""
        return next((c for c in self.costs if (c.context, c.variant) == (context, variant)), None)

    @property
    def contexts(self) -> list[int]:
        """Context lengths at which costs were counted."""
        return list(dict.fromkeys(cost.context for cost in self.costs))

    def headline(self) -> dict[str, str]:
        """The run in a few figures, formatted; "–" where there is none."""
        figures = self.evaluation

        def final(name: str, form: str) -> str:
            value = figures.get(name)
            return format(value, form) if isinstance(value, int if form == ",d" else (int, float)) else "–"

        layers = self.meters.layers
        neurons = sum(layer.ffn.neurons for layer in layers if layer.ffn)
        dead = sum(layer.ffn.dead for layer in layers if layer.ffn)
        rows = {
            "parameters": f"{self.parameters:,}",
            "step": final("step", ",d"),
            "tokens of a step (rows x length)": self._tokens_of_a_step(),
            "validation loss (nats/token)": final("loss", ".4f"),
            "perplexity": final("perplexity", ".2f"),
            "bits per byte": final("bits_per_byte", ".4f"),
            "FFN density": _shown(self.layer_mean(_density), ".2%"),
            "FFN selection: recall": _shown(
                self.layer_mean(lambda x: x.ffn_selection and x.ffn_selection.recall), ".3f"
            ),
            "FFN selection: precision": _shown(
                self.layer_mean(lambda x: x.ffn_selection and x.ffn_selection.precision), ".3f"
            ),
            "dead neurons": f"{dead:,} of {neurons:,}" if neurons else "–",
            "attended keys": _shown(self.layer_mean(lambda x: x.attention and x.attention.attended.mean), ".1f"),
        }
        experts = self.meters.experts
        if experts is not None:
            rows |= {
                "experts: TLS": f"{experts.tls:.2%}",
                **{f"experts: CLS_{n}": _shown(experts.cls[n], ".2%") for n in ("8", "32")},
                "experts: CLS_8, chunks of the stream": _shown(experts.cls_stream["8"], ".2%"),
                "experts: reuse": _shown(experts.reuse, ".2%"),
                "dead experts": f"{experts.dead:,} of {experts.experts - experts.shared:,}",
            }
        for context in self.contexts:
            measured, dense = self.cost(context, "measured"), self.cost(context, "dense")
            cost = measured or self.cost(context, "configured")
            if cost is not None:
                ratio = f" (dense {dense.flops_mean / cost.flops_mean:.2f} times)" if dense else ""
                rows[f"MFLOPs per token, context {context:,}, mean"] = f"{cost.flops_mean / 1e6:,.2f}{ratio}"
                ratio = f" (dense {dense.bytes_last / cost.bytes_last:.2f} times)" if dense else ""
                rows[f"MB read per token, context {context:,}, last"] = f"{cost.bytes_last / 1e6:,.2f}{ratio}"
        return rows

    def _tokens_of_a_step(self) -> str:
        """Losses after as many steps are comparable only where these are equal."""
        sizes = [str(self.configuration.get(f"data.{name}")) for name in ("batch_size", "seq_len")]
        if not all(size.isdecimal() for size in sizes):
            return "–"
        rows, length = map(int, sizes)
        return f"{rows * length:,} ({rows:,} x {length:,})"


def run_figures(
    directory: Path,
    name: str,
    configuration: Mapping[str, Any],
    decoder: DecoderConfig,
    model: nnx.Module,
    batches: Iterable[Mapping[str, Any]],
    contexts: Sequence[int] = CONTEXTS,
    activation: Course | None = None,
) -> RunFigures:
    """Measure a model over `batches` and read what its run left in `directory`.

    Args:
      name: of the run in the report.
      configuration: the run's fields and values, to be shown.
      decoder: the model's configuration.
      contexts: lengths at which costs are counted.
      activation: the activation ratio of its checkpoints, if it is to be shown.

    Raises:
      StorageError: the run's files can't be read.
    """
    evaluation, history = _final_figures(directory / "evaluation.json"), read_history(directory)
    meters = measure(model, decoder, batches)
    return RunFigures(
        name=name,
        configuration={field: written(value) for field, value in configuration.items()},
        parameters=count_parameters(decoder).total,
        evaluation=evaluation,
        history=history,
        meters=meters,
        costs=cost_table(decoder, contexts, meters.sparsity(decoder)),
        activation=activation,
        sparsified=recorded(directory),
    )


def _density(layer: LayerMeters) -> float | None:
    """The share of a layer's FFN that a token uses: of neurons, in a mixture of experts."""
    if layer.ffn is not None:
        return layer.ffn.density
    return None if layer.experts is None else 1 - layer.experts.tls


def written(value: Any) -> str:
    """A value of a configuration as it is written on the command line and in `config.json`."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=dataclasses.asdict)


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _final_figures(path: Path) -> dict[str, Any]:
    """What training wrote at its end; nothing for a run that has not ended or was converted."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: can't be read ({error})") from None
    return values if isinstance(values, dict) else {}
