"""What a trained model is worth: perplexity, bits per byte and sparsity."""

from sparsezoo_jax.evaluation.perplexity import Evaluation, evaluate_model

__all__ = ["Evaluation", "evaluate_model"]
