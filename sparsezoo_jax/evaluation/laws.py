"""How the activation ratio follows from the tokens trained on: the laws of Sparsing Law, and fits of them.

The activation ratio is the share of neurons that are active, as `evaluation.cett` measures it. For ReLU it falls with
training, A(D) = exp(b - c D^alpha) + A0; for SiLU it rises, A(D) = A0 - c / D^alpha. D counts 1e9 tokens, and A0 is the
limit. A fit of a run's first checkpoints foretells what its sparsity comes to.

Source: Sparsing Law (arXiv 2411.02335).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from sparsezoo_jax.errors import ConfigError, require

Array = NDArray[np.float64]
LawName = Literal["relu", "silu"]
L = TypeVar("L", "ReLULaw", "SiLULaw")


class ReLULaw(NamedTuple):
    """`A(D) = exp(b - c D^alpha) + A0`."""

    alpha: float
    b: float
    c: float
    limit: float
    """A0, what the ratio falls to."""

    def __call__(self, tokens: ArrayLike) -> Array:
        """Activation ratio after `tokens` * 1e9 tokens, of the same shape."""
        return np.exp(self.b - self.c * np.asarray(tokens, np.float64) ** self.alpha) + self.limit

    def slopes(self, tokens: Array) -> Array:
        """Derivatives by alpha, b, c and A0, [points, 4]."""
        power = tokens**self.alpha
        above = np.exp(self.b - self.c * power)
        return np.stack([-above * self.c * power * np.log(tokens), above, -above * power, np.ones_like(tokens)], -1)


class SiLULaw(NamedTuple):
    """`A(D) = A0 - c / D^alpha`."""

    alpha: float
    c: float
    limit: float
    """A0, what the ratio rises to."""

    def __call__(self, tokens: ArrayLike) -> Array:
        """Activation ratio after `tokens` * 1e9 tokens, of the same shape."""
        return self.limit - self.c * np.asarray(tokens, np.float64) ** -self.alpha

    def slopes(self, tokens: Array) -> Array:
        """Derivatives by alpha, c and A0, [points, 3]."""
        power = tokens**-self.alpha
        return np.stack([self.c * power * np.log(tokens), -power, np.ones_like(tokens)], -1)


#: Coefficients that arXiv 2411.02335 publishes, by the models' parameters.
PUBLISHED_RELU = {
    "0.1B": ReLULaw(0.101, -0.0151, 3.20, 0.0614),
    "0.2B": ReLULaw(0.449, -3.05, 0.286, 0.0674),
    "0.4B": ReLULaw(0.683, -3.46, 0.0790, 0.0690),
    "0.8B": ReLULaw(1.01, -3.49, 7.97e-3, 0.0721),
    "1.2B": ReLULaw(1.33, -3.89, 9.03e-4, 0.0782),
    "2.4B": ReLULaw(1.53, -3.46, 1.56e-4, 0.0648),
}
PUBLISHED_SILU = {
    "0.1B": SiLULaw(0.479, 0.102, 0.409),
    "0.2B": SiLULaw(0.844, 0.208, 0.390),
    "0.4B": SiLULaw(1.03, 0.420, 0.385),
    "0.8B": SiLULaw(0.995, 0.562, 0.383),
    "1.2B": SiLULaw(0.967, 0.538, 0.382),
}


@dataclass(frozen=True)
class Fit:
    """A law fitted to points, and how sure that is."""

    law: ReLULaw | SiLULaw
    covariance: Array
    """Of the law's coefficients, in their order; infinite where the points don't determine them."""
    points: int
    residual_std: float
    """Standard deviation of the points about the law, with the coefficients' degrees of freedom taken off."""
    confidence: float
    """Share of repetitions whose intervals would hold the true value."""

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Confidence interval of each coefficient by its name: Student's t times the standard error, linearised."""
        errors = self._t * np.sqrt(np.diag(self.covariance))
        named = zip(self.law._fields, self.law, errors, strict=True)
        return {name: (float(value - error), float(value + error)) for name, value, error in named}

    def half_width(self, tokens: ArrayLike) -> Array:
        """Half the width of the law's confidence band after `tokens` * 1e9 tokens, of the same shape."""
        at = np.asarray(tokens, np.float64)
        if not np.isfinite(self.covariance).all():
            return np.full(at.shape, math.inf)
        slopes = self.law.slopes(at)
        variance = np.einsum("...i,ij,...j->...", slopes, self.covariance, slopes)
        return self._t * np.sqrt(np.maximum(variance, 0))

    @property
    def _t(self) -> float:
        return float(stats.t.ppf((1 + self.confidence) / 2, self.points - len(self.law)))


#: Exponents from which fits start; the best of the fits counts.
STARTS = (0.1, 0.3, 0.7, 1.2, 2.0)


def fit_relu(tokens: ArrayLike, ratios: ArrayLike, *, confidence: float = 0.95) -> Fit:
    """The `ReLULaw` of least squares, by Levenberg-Marquardt; arguments and errors as in `fit`."""

    def starts(at: Array, seen: Array) -> list[Array]:
        found = []
        for alpha in STARTS:
            for share in (0.5, 0.95):
                limit = share * float(np.min(seen))
                # Given exponent and limit, the law is a line in D^alpha after a logarithm.
                slope, b = np.polyfit(at**alpha, np.log(seen - limit), 1)
                found.append(np.array([alpha, b, math.log(max(-slope, 1e-6)), limit]))
        return found

    return _fitted(_relu, ReLULaw, starts, tokens, ratios, confidence)


def fit_silu(tokens: ArrayLike, ratios: ArrayLike, *, confidence: float = 0.95) -> Fit:
    """The `SiLULaw` of least squares, by Levenberg-Marquardt; arguments and errors as in `fit`."""

    def starts(at: Array, seen: Array) -> list[Array]:
        found = []
        for alpha in STARTS:
            # Given the exponent, the law is a line in D^-alpha.
            slope, limit = np.polyfit(at**-alpha, seen, 1)
            found.append(np.array([alpha, math.log(max(-slope, 1e-6)), limit]))
        return found

    return _fitted(_silu, SiLULaw, starts, tokens, ratios, confidence)


def fit(law: LawName, tokens: ArrayLike, ratios: ArrayLike, *, confidence: float = 0.95) -> Fit:
    """The law of least squares through a run's points.

    Args:
      law: "relu", which falls, or "silu", which rises.
      tokens: trained on by each checkpoint, in 1e9; leave out those of the warm-up (paper, appendix).
      ratios: activation ratio of each checkpoint, in (0, 1].
      confidence: of the intervals, in (0, 1).

    Raises:
      ConfigError: points that are no more than the law's coefficients, or out of range; or no law through them found.
    """
    return (fit_relu if law == "relu" else fit_silu)(tokens, ratios, confidence=confidence)


# Coefficients span orders of magnitude and are above 0: fits move the logarithm of c.
def _relu(x: Array) -> ReLULaw:
    return ReLULaw(x[0], x[1], math.exp(min(x[2], 50.0)), x[3])


def _silu(x: Array) -> SiLULaw:
    return SiLULaw(x[0], math.exp(min(x[1], 50.0)), x[2])


def _fitted(
    law_of: Callable[[Array], L],
    kind: type[L],
    starts: Callable[[Array, Array], Sequence[Array]],
    tokens: ArrayLike,
    ratios: ArrayLike,
    confidence: float,
) -> Fit:
    at, seen = np.asarray(tokens, np.float64), np.asarray(ratios, np.float64)
    names = kind._fields
    require(at.ndim == 1 and at.shape == seen.shape, "points", f"{at.shape}, {seen.shape}", "must be two equal lists")
    require(len(at) > len(names), "points", len(at), f"must be more than the law's {len(names)} coefficients")
    require(bool(np.all(at > 0)), "tokens", float(np.min(at)), "must be above 0")
    require(
        bool(np.all((seen > 0) & (seen <= 1))), "activation ratios", f"{seen.min()}..{seen.max()}", "must be in (0, 1]"
    )
    require(0 < confidence < 1, "confidence", confidence, "must be in (0, 1)")
    c = names.index("c")

    def residuals(x: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.nan_to_num(law_of(x)(at) - seen, nan=1e6, posinf=1e6, neginf=-1e6)

    def jacobian(x: Array) -> Array:
        law = law_of(x)
        with np.errstate(over="ignore", invalid="ignore"):
            slopes = law.slopes(at)
            slopes[:, c] *= law[c]
            return np.nan_to_num(slopes, nan=0.0, posinf=1e6, neginf=-1e6)

    solve: Callable[..., Any] = optimize.least_squares
    how = {"jac": jacobian, "method": "lm", "xtol": 1e-12, "ftol": 1e-12, "max_nfev": 400}
    solutions = [solve(residuals, start, **how) for start in starts(at, seen)]
    best = min((s for s in solutions if s.x[0] > 0), key=lambda s: s.cost, default=None)
    if best is None:
        raise ConfigError("points", f"<{len(at)} values>", f"no law of the form {kind.__doc__} goes through them")
    law = law_of(best.x)
    freedom = len(at) - len(names)
    variance = 2 * best.cost / freedom
    slopes = law.slopes(at)
    scale = np.linalg.norm(slopes, axis=0)
    normal = (slopes / scale).T @ (slopes / scale)
    # Of nearly dependent slopes the inverse is noise: the points say nothing of the coefficients then.
    sure = np.all(np.isfinite(normal)) and np.linalg.cond(normal) < 1e15
    covariance = np.full_like(normal, math.inf)
    if sure:
        covariance = variance * np.linalg.inv(normal) / np.outer(scale, scale)
    return Fit(law, covariance, len(at), math.sqrt(variance), confidence)
