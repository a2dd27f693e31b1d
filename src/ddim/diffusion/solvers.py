"""Multistep solvers of higher order than DDIM's, as coefficients of its steps.

With sigma = sqrt(1 - alpha) / sqrt(alpha) the paper's ODE (14) has the solution

    x_prev / sqrt(alpha_prev) = x_t / sqrt(alpha) + integral of epsilon d sigma       from sigma_t to sigma_prev

A step of DDIM takes epsilon to be constant in it. A step of order p takes it to be the polynomial through the last p
predictions (Adams-Bashforth, which section 7 of the paper names) in the variable

    s = log(BEND + phi)        phi = arccos(sqrt(alpha)), so that sigma = tan(phi)

which is the angle by which a step of DDIM turns x where there is much noise, and the log SNR where there is little, but
not down to none, where that is infinite. With Lagrange's basis L_j of the nodes s_t and the s of the steps before,

    w_j = sqrt(alpha_prev) integral of L_j(s) d sigma
    k_j = -w_j                                            j = 1, ..., p - 1

the step is that of DDIM plus the sum of k_j (epsilon - epsilon of j steps before), because the L_j add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddim.diffusion.equations import MAX_CORRECTIONS, Coefficients, Step

MAX_ORDER = MAX_CORRECTIONS + 1
"""The largest order."""
BEND = 0.06
"""The angle, nearly the ratio of noise to signal, at which the variable s turns from an angle into a logarithm;
measured in docs/fewer-steps.md."""
NUM_LAST_STEPS, LAST_ORDER = 2, 2
"""The last steps, and their largest order; measured in docs/fewer-steps.md."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
"""Gauss and Legendre's rule of 32 points on [-1, 1]."""


def multistep(steps: Sequence[Step], order: int) -> list[Step]:
    """Return the steps of a multistep method: those of DDIM, with the factors of the changes of epsilon that each adds.

    A step has the order that the steps before it allow: the first is DDIM's, the second has order 2. The last two,
    which are long in s, have at most order 2: polynomials of higher order overshoot there where steps are few.

    The integrals are taken by Gauss and Legendre's rule over v with sigma = sinh(v), in which nothing has a pole.

    Args:
        steps: with eta = 0, in the order in which they are taken.
        order: from 1 to `MAX_ORDER`.

    Returns:
        The same steps, each with its `corrections`.

    References:
        Equation (14) and section 7 of arXiv 2010.02502.

    Example:
        >>> from ddim.diffusion.equations import make_steps
        >>> steps = multistep(make_steps([2, 1, 0], [0.9, 0.5, 0.1]), 2)
        >>> [step.corrections < (0,) for step in steps]
        [True, True, True]
    """
    s = [float(_variable(math.acos(math.sqrt(step.alpha)))) for step in steps]
    corrected = []
    for index, step in enumerate(steps):
        used = min(order, index + 1, order if index < len(steps) - NUM_LAST_STEPS else LAST_ORDER)
        # Sigma of the first step may be infinite.
        weights = _weights(step, [s[index - j] for j in range(used)]) if used > 1 else []
        corrected.append(replace(step, corrections=tuple(-weight for weight in weights[1:])))
    return corrected


def _variable(angle: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return s of an angle phi."""
    return np.log(BEND + np.asarray(angle))


def _weights(step: Step, nodes: Sequence[float]) -> list[float]:
    """Return the w_j of a step, of predictions at some s, the newest first."""
    v, v_prev = (math.asinh(math.sqrt((1 - alpha) / alpha)) for alpha in (step.alpha, step.alpha_prev))
    half = (v_prev - v) / 2
    points = v + half * (1 + NODES)
    s = _variable(np.arctan(np.sinh(points)))
    density = math.sqrt(step.alpha_prev) * half * WEIGHTS * np.cosh(points)
    weights = []
    for j, node in enumerate(nodes):
        basis = np.ones_like(s)
        for other in (*nodes[:j], *nodes[j + 1 :]):
            basis *= (s - other) / (node - other)
        weights.append(float(density @ basis))
    return weights


def add_corrections(
    x_prev: Tensor, x0: Tensor, sample: Tensor, coefficients: Coefficients, history: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Add the corrections of a multistep method to a step of DDIM.

    Args:
        x_prev: the result of the step of DDIM, (N, C, H, W).
        x0: the x_0 predicted in it, after clipping, (N, C, H, W).
        sample: x_t, which the step started from, (N, C, H, W).
        coefficients: those of the step.
        history: the epsilons of the steps before, the last one first, as far as they are used.

    Returns:
        The corrected x_prev, and the epsilon of this step, which belongs to the history of the next ones.

    Example:
        >>> import torch
        >>> step = Step(timestep=5, prev_timestep=-1, alpha=0.75, alpha_prev=1.0, corrections=(0.5,))
        >>> x_prev, x0, x, previous = torch.zeros(4, 1, 1, 1, 1)
        >>> add_corrections(x_prev, x0, x + 1, step.coefficients(), [previous])[0].item()
        1.0
    """
    # Equation (4), solved for epsilon.
    epsilon = (sample - coefficients.signal * x0) / coefficients.noise
    for factor, previous in zip(coefficients.corrections, history, strict=False):
        x_prev = x_prev + factor * (epsilon - previous)
    return x_prev, epsilon


def history_length(steps: Sequence[Step]) -> int:
    """Return how many earlier predictions some steps use.

    Args:
        steps: any.

    Example:
        >>> history_length([Step(5, -1, 0.75, 1.0, corrections=(0.5, 0.1)), Step(5, -1, 0.75, 1.0)])
        2
    """
    return max((len(step.corrections) for step in steps), default=0)
