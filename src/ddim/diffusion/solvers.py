"""Solvers of higher order than DDIM's, as coefficients of its steps.

A step of theirs is one of DDIM plus a combination of the last predictions (`Step.correction`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ddim.diffusion.equations import Coefficients, Step

BEND = 0.06
"""The angle, nearly the ratio of noise to signal, at which the variable of `second_order` turns from an angle into a
logarithm; measured in docs/fewer-steps.md."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
"""Gauss and Legendre's rule of 32 points on [-1, 1]."""


def second_order(steps: Sequence[Step]) -> list[Step]:
    """Return the steps of the two-step method: those of DDIM, with the factor of the change of epsilon that each adds.

    With sigma = sqrt(1 - alpha) / sqrt(alpha) the paper's ODE (14) has the solution

        x_prev / sqrt(alpha_prev) = x_t / sqrt(alpha) + integral of epsilon d sigma       from sigma_t to sigma_prev

    A step of DDIM takes epsilon to be constant in it. Here it is the line through the last two predictions
    (Adams-Bashforth, which section 7 of the paper names) in the variable

        s = log(BEND + phi)        phi = arccos(sqrt(alpha)), so that sigma = tan(phi)

    which is the angle by which a step of DDIM turns x where there is much noise, and the log SNR where there is little,
    but not down to none, where that is infinite. The step then adds

        k (epsilon - epsilon of the previous step)
        k = sqrt(alpha_prev) / (s_t - s_previous) (integral of (s - s_t) d sigma)

    k is 0 for the first step, which has no previous one. The integral is taken by Gauss and Legendre's rule over v with
    sigma = sinh(v), in which nothing has a pole.

    Args:
        steps: with eta = 0, in the order in which they are taken.

    Returns:
        The same steps, each with its `correction`.

    References:
        Equation (14) and section 7 of arXiv 2010.02502.

    Example:
        >>> from ddim.diffusion.equations import make_steps
        >>> steps = second_order(make_steps([2, 1, 0], [0.9, 0.5, 0.1]))
        >>> [step.correction < 0 for step in steps]
        [False, True, True]
    """
    corrected = list(steps[:1])
    for previous, step in itertools.pairwise(steps):
        s_previous, s = (math.log(BEND + math.acos(math.sqrt(alpha))) for alpha in (previous.alpha, step.alpha))
        v, v_prev = (math.asinh(math.sqrt((1 - alpha) / alpha)) for alpha in (step.alpha, step.alpha_prev))
        half = (v_prev - v) / 2
        nodes = v + half * (1 + NODES)
        rise = np.log(BEND + np.arctan(np.sinh(nodes))) - s
        integral = half * float(WEIGHTS @ (rise * np.cosh(nodes)))
        corrected.append(replace(step, correction=math.sqrt(step.alpha_prev) * integral / (s - s_previous)))
    return corrected


def add_correction(
    x_prev: Tensor, x0: Tensor, sample: Tensor, coefficients: Coefficients, previous_epsilon: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add the second-order correction to a step of DDIM.

    Args:
        x_prev: the result of the step of DDIM, (N, C, H, W).
        x0: the x_0 predicted in it, after clipping, (N, C, H, W).
        sample: x_t, which the step started from, (N, C, H, W).
        coefficients: those of the step.
        previous_epsilon: the epsilon of the step before; `None` for the first step.

    Returns:
        The corrected x_prev, and the epsilon of this step, which the next one takes as `previous_epsilon`.

    Example:
        >>> import torch
        >>> step = Step(timestep=5, prev_timestep=-1, alpha=0.75, alpha_prev=1.0, correction=0.5)
        >>> x_prev, x0, x, previous = torch.zeros(4, 1, 1, 1, 1)
        >>> add_correction(x_prev, x0, x + 1, step.coefficients(), previous)[0].item()
        1.0
    """
    # Equation (4), solved for epsilon.
    epsilon = (sample - coefficients.signal * x0) / coefficients.noise
    if previous_epsilon is not None:
        x_prev = x_prev + coefficients.correction * (epsilon - previous_epsilon)
    return x_prev, epsilon
