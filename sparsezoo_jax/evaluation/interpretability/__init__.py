"""How well features of a language model can be explained: detection and fuzzing by a judge, and figures without one."""

from sparsezoo_jax.evaluation.interpretability.config import InterpretEvaluation, JudgeName
from sparsezoo_jax.evaluation.interpretability.contexts import read_contexts
from sparsezoo_jax.evaluation.interpretability.detection import FeatureScore, Interpretation, interpret
from sparsezoo_jax.evaluation.interpretability.endpoint import EndpointJudge
from sparsezoo_jax.evaluation.interpretability.experts import ExpertFigures, expert_figures
from sparsezoo_jax.evaluation.interpretability.judges import Judge, built_in_judge
from sparsezoo_jax.evaluation.interpretability.windows import Window

__all__ = [
    "EndpointJudge",
    "ExpertFigures",
    "FeatureScore",
    "InterpretEvaluation",
    "Interpretation",
    "Judge",
    "JudgeName",
    "Window",
    "built_in_judge",
    "expert_figures",
    "interpret",
    "read_contexts",
]
