"""A report of one or several runs as one HTML file that needs nothing else."""

from sparsezoo_jax.evaluation.report.figures import RunFigures
from sparsezoo_jax.evaluation.report.page import render, write_report

__all__ = ["RunFigures", "render", "write_report"]
