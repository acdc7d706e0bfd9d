"""Which edges of a token-feature matrix are kept under a budget: by token, by feature, or of the whole matrix.

Codes [N, F]: N tokens, F features. Of equal codes the first in order of (token, feature) is kept. Kept edges whose code
is 0 contribute nothing.

Source: Feature Choice and Mutual Choice (arXiv 2411.02124); TopK is arXiv 2406.04093, BatchTopK arXiv 2412.06410.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def token_choice(codes_NF: jax.Array, k: int) -> jax.Array:
    """True for the k largest codes of each token (TopK), bool [N, F]."""
    _, best_NK = jax.lax.top_k(codes_NF, k)
    return jnp.zeros(codes_NF.shape, bool).at[jnp.arange(len(codes_NF))[:, None], best_NK].set(True)


def mutual_choice(codes_NF: jax.Array, budget: int) -> jax.Array:
    """True for the `budget` largest codes of all (BatchTopK), bool [N, F]."""
    _, best_M = jax.lax.top_k(codes_NF.reshape(-1), budget)
    return jnp.zeros(codes_NF.size, bool).at[best_M].set(True).reshape(codes_NF.shape)


def feature_choice(codes_NF: jax.Array, budgets_F: jax.Array) -> jax.Array:
    """True for the `budgets_F[j]` largest codes of each feature j, bool [N, F]."""
    order_FN = jnp.argsort(-codes_NF.T, axis=-1, stable=True)
    rank_FN = jnp.argsort(order_FN, axis=-1)
    return (rank_FN < budgets_F[:, None]).T


def zipf_shares(features: int, exponent: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Shares of ranks 1..F under the law (r + offset)^-exponent, float64 [F], sum 1."""
    law = (np.arange(1, features + 1) + offset) ** -exponent
    return law / law.sum()


def whole_budgets(shares: np.ndarray, budget: int, most: int) -> np.ndarray:
    """`budget * shares` as whole numbers that sum to `budget`, by largest remainder; each from 1 to `most` at the end.

    Where those bounds bite the sum may differ from the budget.
    """
    exact = budget * shares
    whole = np.floor(exact).astype(int)
    missing = budget - whole.sum()
    whole[np.argsort(-(exact - whole), kind="stable")[:missing]] += 1
    return np.clip(whole, 1, most)
