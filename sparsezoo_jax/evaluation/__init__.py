"""What a trained model is worth: perplexity, bits per byte, sparsity, and what its tokens cost."""

from sparsezoo_jax.evaluation.calibration import Calibration, calibrate
from sparsezoo_jax.evaluation.corpora import evaluate_corpora
from sparsezoo_jax.evaluation.cost import Cost, as_rows, contexts, cost_table, parameter_counts
from sparsezoo_jax.evaluation.history import History, read_history, read_rows
from sparsezoo_jax.evaluation.meters import Meters, measure
from sparsezoo_jax.evaluation.perplexity import Evaluation, evaluate_model

__all__ = [
    "Calibration",
    "Cost",
    "Evaluation",
    "History",
    "Meters",
    "as_rows",
    "calibrate",
    "contexts",
    "cost_table",
    "evaluate_corpora",
    "evaluate_model",
    "measure",
    "parameter_counts",
    "read_history",
    "read_rows",
]
