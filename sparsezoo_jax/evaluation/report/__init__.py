"""A report of one or several runs as one HTML file that needs nothing else."""

from sparsezoo_jax.evaluation.report.figures import RunFigures, run_figures
from sparsezoo_jax.evaluation.report.page import render, write_report

__all__ = ["RunFigures", "render", "run_figures", "write_report"]
