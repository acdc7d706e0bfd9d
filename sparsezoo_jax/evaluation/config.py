"""Configuration of evaluation during and after training."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from sparsezoo_jax.errors import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """How much of the validation split is read."""

    batches: int | None = 8
    """Batches of an evaluation during training, of each corpus of a mixture; None reads the whole split."""
    final_batches: int | None = None
    """Batches of the evaluation at the end, of each corpus of a mixture; None reads the whole split."""
    meter_batches: int = 0
    """Batches of each evaluation during training on which neurons and experts that are never active are counted, for
    the metrics dead_neurons and dead_experts of each layer; 0 counts none. In one process only."""
    histograms: bool = False
    """Show a histogram of each parameter's values, of all layers together, with each evaluation, where a writer can
    (TensorBoard, Weights & Biases). In one process only."""
    report: bool = True
    """Write report.html at the end of training."""

    def __post_init__(self):
        for name in ("batches", "final_batches"):
            value = getattr(self, name)
            require(value is None or value > 0, f"eval.{name}", value, "must be above 0, or none for all")
        require(self.meter_batches >= 0, "eval.meter_batches", self.meter_batches, "must be at least 0")
