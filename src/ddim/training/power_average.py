"""Power-function averages of weights, and how any of them follows from a few snapshots of two.

The power-function average of exponent gamma over the weights theta(s) of steps s = 1, ..., t is

    average_gamma(t) = sum_s (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1) theta(s),

the integral of theta under the profile p(tau) = (gamma+1) tau^gamma / t^(gamma+1) on [0, t] (Karras et al., eq. 1), if
theta is constant within a step. It forgets the beginning at every length of training, and is tracked like an
exponential average, with a decay that depends on the step (eq. 2):

    average(t) = beta(t) average(t-1) + (1 - beta(t)) theta(t),    beta(t) = (1 - 1/t)^(gamma+1).

Its length is stated as the standard deviation of the profile relative to t,

    sigma_rel = (gamma+1)^(1/2) (gamma+2)^(-1) (gamma+3)^(-1/2),

so that gamma is the root of (gamma+2)^2 (gamma+3) = (gamma+1) / sigma_rel^2 (appendix C): 16.97 for 0.05, 6.94 for
0.10, and 0, the plain mean of all steps, for 12^(-1/2) = 0.289.

An average is linear in theta, with its profile as the weights. An average with profile p that was not tracked is
therefore approximated by the combination sum_i x_i average_i of stored ones whose profiles p_i make sum_i x_i p_i
nearest to p in the mean square (section 3.2): x minimizes x'Ax - 2b'x with the inner products A_ij = <p_i, p_j> and
b_i = <p_i, p>. For exponents a, b and steps s <= t,

    <p_(a,s), p_(b,t)> = (a+1)(b+1) (s/t)^b / ((a+b+1) t).

All profiles integrate to 1. Here x must sum to 1 as well, the one change to the paper's solution: what the stored
profiles cannot express, mostly the earliest steps, otherwise shrinks the weights. The solution under this constraint
is that of a linear system with a Lagrange multiplier,

    [A 1; 1' 0] [x; mu] = [b; 1].

References:
    Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696, section 3 and
    appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from ddim.validation import real

MIN_SIGMA_REL, MAX_SIGMA_REL = 0.005, 0.28
"""Lengths of averages: two hundredths of the training and less; nearly the plain mean of all of it."""


class Profile(NamedTuple):
    """The profile of a power-function average.

    Attributes:
        step: number of steps averaged over.
        sigma_rel: its length: the standard deviation relative to `step`.

    Example:
        >>> Profile(1000, 0.05).sigma_rel
        0.05
    """

    step: int
    sigma_rel: float


class Combination(NamedTuple):
    """A profile as a combination of others.

    Attributes:
        coefficients: one per profile; they sum to 1.
        residual: root mean square of what is not met, relative to that of the profile.

    Example:
        >>> combine([Profile(50, 0.05), Profile(100, 0.05)], Profile(100, 0.05)).residual < 1e-6
        True
    """

    coefficients: np.ndarray
    residual: float


@cache
def exponent(sigma_rel: float) -> float:
    """Compute the exponent gamma of an average from its length.

    Args:
        sigma_rel: standard deviation of the profile relative to the number of steps, from `MIN_SIGMA_REL` to
            `MAX_SIGMA_REL`.

    Returns:
        gamma, above 0.

    Raises:
        ValueError: if the length is out of range.

    Example:
        >>> round(exponent(0.05), 2), round(exponent(0.10), 2)
        (16.97, 6.94)
    """
    inverse = real("sigma_rel", sigma_rel, MIN_SIGMA_REL, MAX_SIGMA_REL) ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def decay(sigma_rel: float, step: int) -> float:
    """Compute the weight beta of the earlier average in a step.

    Args:
        sigma_rel: length of the average.
        step: number of steps with this one, at least 1.

    Returns:
        beta in [0, 1); 0 for the first step, so that no initial value is needed.

    Example:
        >>> decay(0.05, 1), round(decay(0.05, 1000), 3)
        (0.0, 0.982)
    """
    return float((1 - 1 / step) ** (exponent(sigma_rel) + 1))


def inner_products(first: Sequence[Profile], second: Sequence[Profile], unit: float = 1.0) -> np.ndarray:
    """Compute the inner products of profiles.

    Args:
        first: M profiles.
        second: N profiles.
        unit: steps in which the integration variable is measured.

    Returns:
        float64 (M, N).

    Example:
        >>> profile = Profile(10, 0.25)
        >>> float(inner_products([profile], [profile])[0, 0] * 10) > 1
        True
    """
    (s, a), (t, b) = ((_steps(profiles) / unit, _exponents(profiles)) for profiles in (first, second))
    s, a = s[:, None], a[:, None]
    ratio = np.minimum(s, t) / np.maximum(s, t)
    power = np.where(s <= t, b, a)
    return np.asarray((a + 1) * (b + 1) * ratio**power / ((a + b + 1) * np.maximum(s, t)))


def combine(profiles: Sequence[Profile], target: Profile) -> Combination:
    """Find the combination of profiles that is nearest to another one.

    Args:
        profiles: those of stored averages.
        target: the profile to approximate.

    Returns:
        The coefficients, and how well they meet it.

    Raises:
        ValueError: if `profiles` is empty.

    Example:
        >>> stored = [Profile(step, sigma_rel) for step in range(100, 2001, 100) for sigma_rel in (0.05, 0.10)]
        >>> combine(stored, Profile(2000, 0.07)).residual < 0.005
        True
    """
    if not profiles:
        raise ValueError("profiles must hold at least one profile, got none")
    A = inner_products(profiles, profiles, target.step)
    b = inner_products(profiles, [target], target.step)[:, 0]
    ones = np.ones((len(b), 1))
    system = np.block([[A, ones], [ones.T, np.zeros((1, 1))]])
    # Least squares, since neighboring profiles of many snapshots are nearly dependent.
    x = np.linalg.lstsq(system, np.append(b, 1.0), rcond=None)[0][:-1]
    square = inner_products([target], [target], target.step)[0, 0]
    residual = max(0.0, float(square - 2 * x @ b + x @ A @ x))
    return Combination(x, float(np.sqrt(residual / square)))


def _steps(profiles: Sequence[Profile]) -> np.ndarray:
    return np.array([profile.step for profile in profiles], np.float64)


def _exponents(profiles: Sequence[Profile]) -> np.ndarray:
    return np.array([exponent(profile.sigma_rel) for profile in profiles])
