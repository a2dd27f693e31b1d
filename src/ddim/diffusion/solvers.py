"""Solvers of higher order than DDIM's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ddim.diffusion.equations import Step

BEND = 0.06
"""The angle, and nearly the ratio of noise to signal, at which the variable of `second_order` turns from an angle into
a logarithm; docs/fewer-steps.md has what was measured.
"""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)


def second_order(steps: Sequence[Step]) -> list[Step]:
    """Steps of the two-step method: those of DDIM with eta = 0, and what each adds of the change of epsilon.

    With sigma = sqrt(1 - alpha) / sqrt(alpha) the paper's ODE (14) has the solution

        x_prev / sqrt(alpha_prev) = x_t / sqrt(alpha) + integral of epsilon d sigma       from sigma_t to sigma_prev

    A step of DDIM takes epsilon to be constant in it. Here it is the line through the last two predictions
    (Adams-Bashforth, which section 7 of the paper names) in the variable

        s = log(BEND + phi)        phi = arccos(sqrt(alpha)), so that sigma = tan(phi)

    which is the angle by which a step of DDIM turns x where there is much noise, and the log SNR where there is little,
    but not down to none, where that is infinite. The step then adds

        k (epsilon - epsilon of the step before)
        k = sqrt(alpha_prev) / (s_t - s_before) (integral of (s - s_t) d sigma)

    k is 0 for the first step, which has none before it. The integral is taken by Gauss and Legendre's rule over v with
    sigma = sinh(v), in which nothing has a pole.

    Args:
        steps: with eta = 0.
    """
    corrected = list(steps[:1])
    for before, step in itertools.pairwise(steps):
        s_before, s = (math.log(BEND + math.acos(math.sqrt(alpha))) for alpha in (before.alpha, step.alpha))
        v, v_prev = (math.asinh(math.sqrt((1 - alpha) / alpha)) for alpha in (step.alpha, step.alpha_prev))
        half = (v_prev - v) / 2
        nodes = v + half * (1 + NODES)
        rise = np.log(BEND + np.arctan(np.sinh(nodes))) - s
        integral = half * float(WEIGHTS @ (rise * np.cosh(nodes)))
        corrected.append(replace(step, correction=math.sqrt(step.alpha_prev) * integral / (s - s_before)))
    return corrected
