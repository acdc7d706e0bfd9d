"""Chess interpretability: what single FFN features say about the board (MoE-X, arXiv 2503.07639, Section 5.1).

`score_features` scores any function from tokens to activations; `games_for` chooses what it is scored on.
"""

from sparsezoo_jax.evaluation.chess.config import ChessEvaluation
from sparsezoo_jax.evaluation.chess.evaluation import ChessScores, games_for, score_features

__all__ = [
    "ChessEvaluation",
    "ChessScores",
    "games_for",
    "score_features",
]
