"""The normal quantile from operations that kernels have: `ndtri` has no lowering inside of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Numerators and denominators, lowest power first, of algorithm AS 241 (Wichura, Applied Statistics 37, 1988), PPND16:
# 16 digits. Its third interval lies beyond the probabilities that row_statistics clips to.
_CENTRE = (
    (
        3.3871328727963666080,
        133.14166789178437745,
        1971.5909503065514427,
        13731.693765509461125,
        45921.953931549871457,
        67265.770927008700853,
        33430.575583588128105,
        2509.0809287301226727,
    ),
    (
        1.0,
        42.313330701600911252,
        687.18700749205790830,
        5394.1960214247511077,
        21213.794301586595867,
        39307.895800092710610,
        28729.085735721942674,
        5226.4952788528545610,
    ),
)
_TAIL = (
    (
        1.42343711074968357734,
        4.63033784615654529590,
        5.76949722146069140550,
        3.64784832476320460504,
        1.27045825245236838258,
        0.241780725177450611770,
        0.0227238449892691845833,
        0.000774545014278341407640,
    ),
    (
        1.0,
        2.05319162663775882187,
        1.67638483018380384940,
        0.689767334985100004550,
        0.148103976427480074590,
        0.0151986665636164571966,
        0.000547593808499534494600,
        1.05075007164441684324e-9,
    ),
)


def normal_quantile_of(p: jax.Array) -> jax.Array:
    """Quantile of the standard normal distribution, elementwise, for 1e-10 < p < 1 - 1e-10.

    Within 2e-15 relative in float64, 1e-6 in float32.
    """
    q = p - 0.5
    centre = q * _ratio(_CENTRE, 0.180625 - q * q)
    tail = _ratio(_TAIL, jnp.sqrt(-jnp.log(jnp.minimum(p, 1 - p))) - 1.6)
    return jnp.where(jnp.abs(q) <= 0.425, centre, jnp.where(q < 0, -tail, tail))


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: jax.Array) -> jax.Array:
    above, below = coefficients
    return _polynomial(above, r) / _polynomial(below, r)


def _polynomial(coefficients: tuple[float, ...], r: jax.Array) -> jax.Array:
    total = jnp.full_like(r, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * r + coefficient
    return total
