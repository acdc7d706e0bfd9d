"""Routers of mixtures of experts: from a token's scores of the experts to the weights with which they join.

All is float32. Shape letters beside those of `models.common`: E routed experts, K chosen experts of a token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax.models.common import CallContext
from sparsezoo_jax.pallas_kernels.grouped_ffn import spread
from sparsezoo_jax.sharding import num_shards


class RouterBias(nnx.Variable):
    """A bias that balances loads without a loss: no parameter, moved after each train step by `balanced_bias`."""


RouterName = Literal["topk", "deepseek", "grin", "remoe", "topp", "ling"]
FIXED_COUNT: tuple[RouterName, ...] = ("topk", "deepseek", "grin", "ling")
"""Routers that give every token the same number of experts."""


class Routing(NamedTuple):
    """Which experts each token takes, and with which weights."""

    weights_BTE: jax.Array
    """Weight of every expert, 0 where it is not taken; differentiable."""
    active_BTE: jax.Array
    """True where the expert is taken, even if its weight has become 0."""
    probabilities_BTE: jax.Array
    """What the router would balance: non-negative; sums to 1 over experts but for `remoe`, where it is the weights."""
    experts_BTK: jax.Array | None = None
    """The experts taken, where their number is fixed."""
    weights_BTK: jax.Array | None = None
    """Their weights."""


def top_k(scores_BTE: jax.Array, k: int) -> Routing:
    """Softmax, the k largest, renormalised to sum 1 (Mixtral, arXiv 2401.04088, section 2.1)."""
    q_BTE = jax.nn.softmax(scores_BTE, axis=-1)
    best_BTK, experts_BTK = jax.lax.top_k(q_BTE, k)
    return _chosen(experts_BTK, best_BTK / jnp.sum(best_BTK, axis=-1, keepdims=True), q_BTE)


def top_1(scores_BTE: jax.Array) -> Routing:
    """The best expert, with the weight 1, whose gradient is that of the logarithm of its probability q.

    So an expert is taken whole, and a loss behind the experts still moves the scores: the gradient for the weight's is
    `g (onehot - q)`. Read-ME (arXiv 2410.19123) has no such gradient; its scores have a loss of their own.
    """
    q_BTE = jax.nn.softmax(scores_BTE, axis=-1)
    experts_BT1 = jnp.argmax(scores_BTE, axis=-1, keepdims=True)
    best_BT1 = jnp.take_along_axis(q_BTE, experts_BT1, axis=-1)
    return _chosen(experts_BT1, best_BT1 / jax.lax.stop_gradient(best_BT1), q_BTE)


def biased_sigmoid(
    scores_BTE: jax.Array, bias_E: jax.Array, k: int, scale: float, groups: int = 1, kept_groups: int = 1
) -> Routing:
    """Sigmoid scores; those of the k largest score + bias in the best groups of experts, renormalised to sum `scale`.

    The bias takes part in the choice only, and gets no gradient: `balanced_bias` moves it. With several `groups`,
    neighbouring experts in equal numbers, a token's experts come from the `kept_groups` whose two largest
    score + bias have the largest sum.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; the loss-free balancing of arXiv 2408.15664; Ling 2.0 (arXiv
    2510.22115) for the groups.
    """
    q_BTE = jax.nn.sigmoid(scores_BTE)
    experts_BTK = best_with_bias(q_BTE, bias_E, k, groups, kept_groups)
    best_BTK = jnp.take_along_axis(q_BTE, experts_BTK, axis=-1)
    weights_BTK = scale * best_BTK / (jnp.sum(best_BTK, axis=-1, keepdims=True) + 1e-20)
    return _chosen(experts_BTK, weights_BTK, q_BTE / (jnp.sum(q_BTE, axis=-1, keepdims=True) + 1e-20))


def best_with_bias(q_BTE: jax.Array, bias_E: jax.Array, k: int, groups: int = 1, kept_groups: int = 1) -> jax.Array:
    """The k experts of largest q + bias in the best groups, int [B, T, k]; the choice has no gradient."""
    biased_BTE = jax.lax.stop_gradient(q_BTE + bias_E)
    if groups > 1:
        biased_BTGE = biased_BTE.reshape(*biased_BTE.shape[:-1], groups, -1)
        group_BTG = jnp.sum(jax.lax.top_k(biased_BTGE, 2)[0], axis=-1)
        kept_BTK = jax.lax.top_k(group_BTG, kept_groups)[1]
        kept_BTG = jnp.any(kept_BTK[..., None] == jnp.arange(groups), axis=-2)
        biased_BTE = jnp.where(kept_BTG[..., None], biased_BTGE, -jnp.inf).reshape(biased_BTE.shape)
    return jax.lax.top_k(biased_BTE, k)[1]


def balanced_bias(bias_E: jax.Array, load_E: jax.Array, rate: float, *, zero_mean: bool = False) -> jax.Array:
    """The bias after a step: up by `rate` for experts with less than the mean load, down for those with more.

    `zero_mean` takes the mean of these changes from each: the bias then only tells experts apart, and does not drift
    where more experts lie on one side of the mean load than on the other (Ling 2.0, arXiv 2510.22115).
    """
    change_E = jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
    if zero_mean:
        change_E -= jnp.mean(change_E, axis=-1, keepdims=True)
    return bias_E + rate * change_E


def sparse_mixer(scores_BTE: jax.Array, k: int, eps: float, rng: jax.Array | None) -> Routing:
    """SparseMixer-v2: k rounds without replacement, each over the experts that come close to the best one left.

    In a round with best score mx an expert is left out if (mx - s) / max(|s|, mx) > 2 eps; pi is the softmax over the
    others. Training samples one of them from pi, else the best is taken. Its weight is m = pi of it, times c: 1 if it
    is the best, and otherwise 1 with probability 1/4, else 1/3 (Heun's third-order rule). The gradient is m's, which
    for the output's gradient g is g * m * (onehot - pi): c takes no part in it. Weights are not renormalised.

    Args:
      scores_BTE: float32 [B, T, E].
      k: rounds, at most E.
      eps: width of the band of competitors.
      rng: key of the samples; None takes the best of each round.

    Source: GRIN (arXiv 2409.12136), section 2; constants from its released code as restated for BlockFFN's baselines.
    """
    taken_BTE = jnp.zeros(scores_BTE.shape, bool)
    experts, weights = [], []
    for i in range(k):
        left_BTE = jnp.where(taken_BTE, -jnp.inf, scores_BTE)
        fixed_BTE = jax.lax.stop_gradient(left_BTE)
        top_BT1 = jnp.max(fixed_BTE, axis=-1, keepdims=True)
        best_BT = jnp.argmax(fixed_BTE, axis=-1)
        # The smallest normal number: a best score of exactly 0 competes with itself alone.
        reach_BTE = jnp.maximum(jnp.maximum(jnp.abs(scores_BTE), top_BT1), jnp.finfo(jnp.float32).tiny)
        close_BTE = ~taken_BTE & (top_BT1 - scores_BTE <= 2 * eps * reach_BTE)
        pi_BTE = jax.nn.softmax(scores_BTE, axis=-1, where=jax.lax.stop_gradient(close_BTE))
        expert_BT, c_BT = best_BT, jnp.ones(best_BT.shape)
        if rng is not None:
            sample, lift = jax.random.split(jax.random.fold_in(rng, i))
            noise_BTE = jax.random.gumbel(sample, scores_BTE.shape)
            expert_BT = jnp.argmax(jnp.where(close_BTE, fixed_BTE + noise_BTE, -jnp.inf), axis=-1)
            whole_BT = (expert_BT == best_BT) | (jax.random.uniform(lift, best_BT.shape) > 0.75)
            c_BT = jnp.where(whole_BT, 1.0, 1 / 3)
        m_BT = jnp.take_along_axis(pi_BTE, expert_BT[..., None], axis=-1)[..., 0]
        weights.append(m_BT + jax.lax.stop_gradient((c_BT - 1) * m_BT))
        experts.append(expert_BT)
        taken_BTE |= jax.nn.one_hot(expert_BT, scores_BTE.shape[-1], dtype=bool)
    q_BTE = jax.nn.softmax(scores_BTE, axis=-1)
    return _chosen(jnp.stack(experts, axis=-1), jnp.stack(weights, axis=-1), q_BTE)


def relu(scores_BTE: jax.Array) -> Routing:
    """The positive scores, whatever their number (ReMoE, arXiv 2412.14711, section 3.1)."""
    weights_BTE = jax.nn.relu(scores_BTE)
    return Routing(weights_BTE, weights_BTE > 0, weights_BTE)


def top_p(scores_BTE: jax.Array, p: float) -> Routing:
    """Softmax; the fewest of the largest that sum to more than p, renormalised (DynamicMoE, arXiv 2403.07652)."""
    q_BTE = jax.nn.softmax(scores_BTE, axis=-1)
    order_BTE = jnp.argsort(-jax.lax.stop_gradient(q_BTE), axis=-1)
    sorted_BTE = jnp.take_along_axis(jax.lax.stop_gradient(q_BTE), order_BTE, axis=-1)
    before_BTE = jnp.cumsum(sorted_BTE, axis=-1) - sorted_BTE
    # The best expert has none before it and so is always kept.
    active_BTE = jnp.take_along_axis(before_BTE <= p, jnp.argsort(order_BTE, axis=-1), axis=-1)
    kept_BTE = q_BTE * active_BTE
    return Routing(kept_BTE / jnp.sum(kept_BTE, axis=-1, keepdims=True), active_BTE, q_BTE)


def _chosen(experts_BTK: jax.Array, weights_BTK: jax.Array, probabilities_BTE: jax.Array) -> Routing:
    count = probabilities_BTE.shape[-1]
    active_BTE = spread(experts_BTK, jnp.ones_like(weights_BTK), count) > 0
    return Routing(spread(experts_BTK, weights_BTK, count), active_BTE, probabilities_BTE, experts_BTK, weights_BTK)


def loads(active_BTE: jax.Array, ctx: CallContext) -> jax.Array:
    """Share of the real tokens that take each expert, float32 [E]; it has no gradient."""
    real_BT = ctx.valid_BT.astype(jnp.float32)
    taken_E = jnp.einsum("bte,bt->e", jax.lax.stop_gradient(active_BTE).astype(jnp.float32), real_BT)
    return taken_E / jnp.maximum(jnp.sum(real_BT), 1)


def device_load(load_E: jax.Array) -> dict[str, jax.Array]:
    """Assignments of the device that has most, of the mean, where a mesh splits the experts: `max_device_load`."""
    devices = num_shards("experts", load_E.size)
    if devices == 1:
        return {}
    load_n = jnp.sum(load_E.reshape(devices, -1), axis=1)
    return {"max_device_load": jnp.max(load_n) / jnp.maximum(jnp.mean(load_n), 1e-20)}


def _mean_over_tokens(x_BTE: jax.Array, ctx: CallContext) -> jax.Array:
    real_BT = ctx.valid_BT.astype(jnp.float32)
    # Padding is left out before the product: its scores may be anything.
    kept_BTE = jnp.where(ctx.valid_BT[..., None], x_BTE, 0)
    return jnp.sum(kept_BTE, axis=(0, 1)) / jnp.maximum(jnp.sum(real_BT), 1)


def balance_loss(routing: Routing, ctx: CallContext) -> jax.Array:
    """`E * sum_e mean_t(q_te) * count_e / sum(count)` over real tokens: 1 for perfectly even routing, at most E.

    The counts carry no gradient. Source: Switch Transformer (arXiv 2101.03961), section 2.2, for k experts a token.
    """
    load_E = loads(routing.active_BTE, ctx)
    share_E = load_E / jnp.maximum(jnp.sum(load_E), 1e-20)
    return load_E.size * jnp.sum(_mean_over_tokens(routing.probabilities_BTE, ctx) * share_E)


def l1_balance_loss(routing: Routing, ctx: CallContext, k: int) -> jax.Array:
    """`E / (T^2 k) * sum_e n_e sum_t A_te`: an L1 penalty that weighs experts by how many tokens n_e take them.

    T counts real tokens; n_e carries no gradient. Source: ReMoE (arXiv 2412.14711), section 3.4.
    """
    load_E = loads(routing.active_BTE, ctx)
    return load_E.size / k * jnp.sum(_mean_over_tokens(routing.weights_BTE, ctx) * load_E)


def z_loss(scores_BTE: jax.Array, ctx: CallContext) -> jax.Array:
    """Mean over real tokens of the squared log-sum-exp of the scores (ST-MoE, arXiv 2202.08906, equation 5)."""
    return ctx.mean_over_tokens(jnp.square(jax.nn.logsumexp(scores_BTE, axis=-1)))


def entropy_loss(routing: Routing, ctx: CallContext) -> jax.Array:
    """Mean entropy of the router's probabilities, nats (DynamicMoE's dynamic loss, arXiv 2403.07652, section 3)."""
    q_BTE = routing.probabilities_BTE
    return ctx.mean_over_tokens(-jnp.sum(q_BTE * jnp.log(jnp.maximum(q_BTE, 1e-20)), axis=-1))
