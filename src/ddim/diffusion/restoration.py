"""Restoration: sampling images from an unconditional model, given measurements y = A x_0 + noise_std n of them.

The loop is that of sampling. Each step predicts x_0 and epsilon from x_t; a method then moves the predicted x_0, or
x_prev, towards what was measured:

| | x_0 becomes | for |
|---|---|---|
| `DDNM`   | A^+ y + (1 - A^+ A) x_0; by parts, with noise          | linear A |
| `DDRM`   | in A's singular basis, as much y as its noise allows   | linear A |
| `RePaint`| kept; x_prev is replaced by a noisy y where it is known | masks, without noise |
| `PiGDM`  | kept; x_prev moves along J^T A^T (r^2 A A^T + noise^2)^-1 (y - A x_0) | any A, by gradients |
| `MMPS`   | x_0 + V A^T (A V A^T + noise^2)^-1 (y - A x_0)         | any A, by gradients |
| `DPS`    | kept; x_prev moves down the gradient of |y - A x_0|    | any A, by gradients |

J is the derivative of the predicted x_0 by x_t. By Tweedie's formula the mean of x_0 given x_t and y is

    E[x_0 | x_t, y] = x_0 + (1 - alpha) / sqrt(alpha) grad log p(y | x_t)

in which `PiGDM` takes the covariance of x_0 given x_t for r^2 = 1 - alpha, and `MMPS` for what it is where the data are
Gaussian, V = (1 - alpha) / sqrt(alpha) J: there it samples the exact posterior.

A run may go back on its way, `resampled`: noise is added again, and the steps are taken anew, so that what was put in
from y and what the model adds harmonize. All methods are step functions of `ddim.diffusion.loop.run_steps`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ddim.diffusion.equations import MAX_CORRECTIONS, Step, add_noise, ddim_step, predict_x0_epsilon, x0_to_epsilon
from ddim.diffusion.loop import Denoiser, StepFn
from ddim.diffusion.noise import NoiseSource
from ddim.diffusion.operators import LinearOperator
from ddim.diffusion.solvers import add_corrections

Operator = Callable[[Tensor], Tensor]
"""Takes images (N, C, H, W) in [-1, 1]; returns measurements (N, ...). A `LinearOperator` is one."""
Predictor = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes x_t; returns the predicted x_0 and epsilon."""

MIN_NOISE_STD = 1e-3
"""The smallest noise that systems of equations are solved with: without any they may have no solution."""
MAX_PROJECTIONS = 2000
"""Rounds of `project`."""


@dataclass(frozen=True)
class Problem:
    """What is known of the images.

    Attributes:
        measurement: y, (N, ...), a row per image.
        operator: A.
        noise_std: the standard deviation of the measurement's Gaussian noise.
    """

    measurement: Tensor
    operator: Operator
    noise_std: float = 0.0

    @property
    def linear(self) -> LinearOperator:
        """The operator, where it is linear."""
        assert isinstance(self.operator, LinearOperator)
        return self.operator


class Method(ABC):
    """A way to sample given a measurement.

    Attributes:
        name: by which it is chosen.
        requires_linear: whether A must be a `LinearOperator`.
        requires_gradient: whether it differentiates the network.
        default_steps: its number of steps.
        default_eta: the noise of its process.
        default_order: of its solver.
        default_resampling: length and repeats of `resampled`; `None` for a run that does not go back.
    """

    name: ClassVar[str]
    requires_linear: ClassVar[bool] = True
    requires_gradient: ClassVar[bool] = False
    default_steps: ClassVar[int] = 50
    default_eta: ClassVar[float] = 0.0
    default_order: ClassVar[int] = 1
    default_resampling: ClassVar[tuple[int, int] | None] = None

    @classmethod
    def of(cls, eta: float) -> Self:
        """Return the method for one run.

        Args:
            eta: the noise of the process, which most methods know from their steps.
        """
        return cls()

    def start(self, noise: Tensor, problem: Problem, step: Step) -> Tensor:
        """Return x at the first timestep.

        Args:
            noise: standard Gaussian, (N, C, H, W).
            problem: what is known.
            step: the first step.
        """
        return noise

    @abstractmethod
    def __call__(
        self, x: Tensor, step: Step, predict: Predictor, problem: Problem, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            x: x_t, (N, C, H, W).
            step: its coefficients.
            predict: the model at x_t.
            problem: what is known.
            noise: draws standard Gaussian noise of the shape of `x`.

        Returns:
            x_prev, and the x_0 that it is made from.
        """


def restoration_step(
    denoiser: Denoiser, prediction_type: str, method: Method, problem: Problem, noise: NoiseSource
) -> StepFn:
    """Return the step function of a method.

    Args:
        denoiser: the network.
        prediction_type: what it predicts.
        method: takes the steps towards images; steps towards noise (`resampled`) add noise.
        problem: what is known.
        noise: draws standard Gaussian noise (N, C, H, W).

    Returns:
        A step function for one run.
    """
    last_x0: Tensor | None = None

    def step_fn(x: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        nonlocal last_x0
        if step.alpha_prev < step.alpha:
            assert last_x0 is not None
            ratio = torch.tensor(step.alpha_prev / step.alpha, dtype=torch.float64)
            return add_noise(x, noise(), ratio), last_x0

        def predict(sample: Tensor) -> tuple[Tensor, Tensor]:
            return predict_x0_epsilon(denoiser(sample, timestep), sample, step.alpha, prediction_type)

        x_prev, last_x0 = method(x, step, predict, problem, noise)
        return x_prev, last_x0

    return step_fn


def _update(step: Step, x0: Tensor, epsilon: Tensor, noise: NoiseSource) -> Tensor:
    """Return x_prev by equation (12), from an x_0 and an epsilon that need not belong to one x_t."""
    c = step.coefficients()
    return c.signal_prev * x0 + c.direction * epsilon + c.noise_std * noise()


def resampled(steps: Sequence[Step], length: int, repeats: int) -> list[Step]:
    """Return the steps of a run that goes back on its way.

    At every multiple of `length` steps before the end it goes back as many, `repeats` - 1 times.

    Args:
        steps: towards images.
        length: of a way back, at least 1.
        repeats: how often each part of the way is taken, at least 1.

    Returns:
        The steps in the order in which they are taken. Those towards noise lead from `prev_timestep` of a step to the
        timestep of an earlier one.

    References:
        Section 4.2 of RePaint, arXiv 2201.09865; section 3.3 of DDNM, arXiv 2212.00490.

    Example:
        >>> from ddim.diffusion.equations import make_steps
        >>> way = resampled(make_steps([2, 1, 0], [0.9, 0.6, 0.3]), length=1, repeats=2)
        >>> [(step.timestep, step.prev_timestep) for step in way]
        [(2, 1), (1, 0), (0, 1), (1, 0), (0, -1), (-1, 0), (0, -1)]
    """
    left = {len(steps) - done: repeats - 1 for done in range(length + 1, len(steps) + 1)}
    left = {remaining: times for remaining, times in left.items() if remaining % length == 0}
    way: list[Step] = []
    index = 0
    while index < len(steps):
        step = steps[index]
        way.append(step)
        index += 1
        remaining = len(steps) - index
        if left.get(remaining, 0):
            left[remaining] -= 1
            index -= length
            back = steps[index]
            way.append(Step(step.prev_timestep, back.timestep, step.alpha_prev, back.alpha))
    return way


class DDNM(Method):
    """The range of the predicted x_0 is replaced by what was measured, its null space is kept.

        x_0 <- x_0 + A^+ (y - A x_0)

    With noise (DDNM+) each singular component moves by the part lambda that keeps the noise in it below that of the
    step, sigma, and gets the rest of that noise:

        lambda = min(1, sigma s / (sqrt(alpha_prev) noise_std))
        x_prev = ... + sqrt(sigma^2 - (sqrt(alpha_prev) lambda noise_std / s)^2) n

    References:
        Equations (13), (17) to (19) of arXiv 2212.00490.
    """

    name = "ddnm"
    default_steps = 80
    default_eta = 0.85
    default_resampling = (10, 3)

    def __call__(
        self, x: Tensor, step: Step, predict: Predictor, problem: Problem, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Take a step, as `Method` says."""
        operator, y = problem.linear, problem.measurement
        c = step.coefficients()
        x0, epsilon = predict(x)
        inverse = operator.inverse_values(x0)
        residual = inverse * operator.unmeasure(y - operator(x0))
        if not problem.noise_std:
            x0 = x0 + operator.from_coefficients(residual)
            return _update(step, x0, epsilon, noise), x0
        # The noise that all of the residual would bring into x_prev.
        brought = step.alpha_prev**0.5 * problem.noise_std * inverse
        part = (step.noise_std / brought.clamp(min=1e-12)).clamp(max=1)
        x0 = x0 + operator.from_coefficients(part * residual)
        rest = (step.noise_std**2 - (part * brought).square()).clamp(min=0).sqrt()
        added = operator.from_coefficients(rest * operator.to_coefficients(noise()))
        return c.signal_prev * x0 + c.direction * epsilon + added, x0


class DDRM(Method):
    """Each singular component is sampled with as much of the measurement as its noise allows.

    With x / sqrt(alpha) in the basis V, sigma = sqrt(1 - alpha_prev) / sqrt(alpha_prev), y / s in the basis U, whose
    noise is noise_std / s:

        s = 0:                   x_0 + sigma (sqrt(1 - eta^2) epsilon + eta n)
        sigma < noise_std / s:   x_0 + sigma (sqrt(1 - eta^2) (y / s - x_0) / (noise_std / s) + eta n)
        else:                    y / s + sqrt(sigma^2 - (noise_std / s)^2) n

    eta is that of the process, and the last line has the paper's eta_b = 1.

    References:
        Equations (7) and (8) of arXiv 2201.11793.
    """

    name = "ddrm"
    default_steps = 20
    default_eta = 0.85

    def __init__(self, eta: float = 0.85) -> None:
        self.eta = eta

    @classmethod
    def of(cls, eta: float) -> Self:
        """Return the method for one run of the process of `eta`."""
        return cls(eta)

    def start(self, noise: Tensor, problem: Problem, step: Step) -> Tensor:
        """Return x at the first timestep, what was measured with as much noise as belongs to it."""
        operator = problem.linear
        signal, sigma = math.sqrt(step.alpha), math.sqrt((1 - step.alpha) / max(step.alpha, 1e-12))
        measured, std = _measured(problem, noise)
        drawn = operator.to_coefficients(noise)
        is_known = (std <= sigma) & (operator.inverse_values(noise) > 0)
        known = measured + (sigma**2 - std.square()).clamp(min=0).sqrt() * drawn
        return signal * operator.from_coefficients(torch.where(is_known, known, sigma * drawn))

    def __call__(
        self, x: Tensor, step: Step, predict: Predictor, problem: Problem, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Take a step, as `Method` says."""
        operator = problem.linear
        signal_prev, sigma = math.sqrt(step.alpha_prev), math.sqrt((1 - step.alpha_prev) / step.alpha_prev)
        x0, epsilon = predict(x)
        measured, std = _measured(problem, x)
        c0, direction, drawn = (operator.to_coefficients(t) for t in (x0, epsilon, noise()))
        kept = math.sqrt(max(0.0, 1 - self.eta**2))
        unknown = c0 + sigma * (kept * direction + self.eta * drawn)
        vague = c0 + sigma * (kept * (measured - c0) / std.clamp(min=1e-12) + self.eta * drawn)
        clear = measured + (sigma**2 - std.square()).clamp(min=0).sqrt() * drawn
        is_measured = operator.inverse_values(x) > 0
        result = torch.where(is_measured, torch.where(std > sigma, vague, clear), unknown)
        return signal_prev * operator.from_coefficients(result), x0


def _measured(problem: Problem, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return y / s in the basis V, and the standard deviation of its noise, 0 where s is 0."""
    inverse = problem.linear.inverse_values(like)
    return inverse * problem.linear.unmeasure(problem.measurement), inverse * problem.noise_std


class RePaint(Method):
    """Known pixels are replaced by their noisy selves after each step; the run goes back often (`resampled`).

    References:
        Equation (8) and algorithm 1 of arXiv 2201.09865.
    """

    name = "repaint"
    default_steps = 250
    default_eta = 1.0
    default_resampling = (10, 10)

    def __call__(
        self, x: Tensor, step: Step, predict: Predictor, problem: Problem, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Take a step, as `Method` says."""
        mask = problem.linear.singular_values.to(x.device, x.dtype)
        c = step.coefficients()
        x0, epsilon = predict(x)
        unknown = _update(step, x0, epsilon, noise)
        known = c.signal_prev * problem.measurement + math.sqrt(1 - step.alpha_prev) * noise()
        return mask * known + (1 - mask) * unknown, x0


class PiGDM(Method):
    """Pseudo-inverse guidance: x_prev moves along the gradient of log p(y | x_t), with r^2 = 1 - alpha.

        x_prev <- x_prev + sqrt(alpha) r^2 J^T A^T (r^2 A A^T + noise_std^2)^-1 (y - A x_0)

    For a `LinearOperator` the system is solved in its singular basis; for another callable A A^T is taken for 1.

    References:
        Algorithm 1 of Song et al., Pseudoinverse-guided diffusion models, ICLR 2023.
    """

    name = "pigdm"
    requires_linear = False
    requires_gradient = True
    default_steps = 100
    default_eta = 1.0

    def __call__(
        self, x: Tensor, step: Step, predict: Predictor, problem: Problem, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Take a step, as `Method` says."""
        variance, operator = 1 - step.alpha, problem.operator
        with torch.enable_grad():
            sample = x.detach().requires_grad_()
            x0, epsilon = predict(sample)
            predicted = operator(x0)
            residual = (problem.measurement - predicted).detach()
            if isinstance(operator, LinearOperator):
                values = operator.singular_values.to(x0.device, x0.dtype)
                total = variance * values.square() + problem.noise_std**2
                weights = torch.where(values > 0, variance / total.clamp(min=1e-12), 0)
                weighted = operator.measure(weights * operator.unmeasure(residual))
            else:
                weighted = residual * variance / (variance + problem.noise_std**2)
            (gradient,) = torch.autograd.grad((predicted * weighted).sum(), sample)
        x0 = x0.detach()
        return _update(step, x0, epsilon.detach(), noise) + math.sqrt(step.alpha) * gradient, x0


class MMPS(Method):
    """Moment matching posterior sampling: x_0 becomes its mean given y, for a Gaussian with the covariance V of x_0.

        x_0 <- x_0 + V A^T w,     (A V A^T + noise_std^2) w = y - A x_0,     V = (1 - alpha) / sqrt(alpha) J

    The system is solved by conjugate gradients, each of whose iterations is one derivative of the network, backwards.
    The step from this x_0 is DDIM's, or of higher order.

    Args:
        iterations: of conjugate gradients, at most.

    References:
        Section 4.2 and algorithm 3 of arXiv 2405.13712.
    """

    name = "mmps"
    requires_linear = False
    requires_gradient = True
    default_order = 2

    def __init__(self, iterations: int = 3) -> None:
        self.iterations = iterations
        self._history: list[Tensor] = []

    def __call__(
        self, x: Tensor, step: Step, predict: Predictor, problem: Problem, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Take a step, as `Method` says."""
        scale = (1 - step.alpha) / math.sqrt(step.alpha)
        variance = max(problem.noise_std, MIN_NOISE_STD) ** 2
        with torch.enable_grad():
            sample = x.detach().requires_grad_()
            x0, _ = predict(sample)
            predicted = problem.operator(x0)
        x0 = x0.detach()

        def pull_back(w: Tensor) -> Tensor:
            """Return V A^T w."""
            (gradient,) = torch.autograd.grad(predicted, sample, w, retain_graph=True)
            return scale * gradient

        def apply(w: Tensor) -> Tensor:
            """Return (A V A^T + noise_std^2) w, with A linear around x_0."""
            _, pushed = torch.autograd.functional.jvp(problem.operator, x0, pull_back(w))  # type: ignore[no-untyped-call]
            return pushed + variance * w

        residual = (problem.measurement - predicted).detach()
        x0 = x0 + pull_back(conjugate_gradients(apply, residual, self.iterations))
        epsilon = x0_to_epsilon(x0, x, step.alpha)
        x_prev, _ = ddim_step(epsilon, x, step, "epsilon", noise=noise() if step.noise_std else None)
        if step.corrections or self._history:
            x_prev, epsilon = add_corrections(x_prev, x0, x, step.coefficients(), self._history)
        self._history = [epsilon, *self._history][:MAX_CORRECTIONS]
        return x_prev, x0


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """Solve a symmetric positive definite system per row.

    Args:
        apply: the matrix, of (N, ...).
        right: the right side, (N, ...).
        iterations: at most; a row whose curvature is not positive stays as it is.

    Returns:
        The solution, (N, ...).

    Example:
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradients(lambda w: w @ matrix, torch.tensor([[3.0, 4.0]]), 2).round(decimals=4).tolist()
        [[1.0, 1.0]]
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).reshape(len(a), -1).sum(1).view(-1, *[1] * (a.ndim - 1))

    solution, residual, direction = torch.zeros_like(right), right, right
    square = dot(residual, residual)
    # Below this the residual is rounding, in which further iterations would lose themselves.
    enough = torch.finfo(right.dtype).eps ** 2 * square
    for _ in range(iterations):
        applied = apply(direction)
        curvature = dot(direction, applied)
        is_active = (curvature > 0) & (square > enough)
        length = torch.where(is_active, square / curvature.clamp(min=torch.finfo(right.dtype).tiny), 0)
        solution = solution + length * direction
        residual = residual - length * applied
        previous, square = square, dot(residual, residual)
        ratio = square / previous.clamp(min=torch.finfo(right.dtype).tiny)
        direction = residual + ratio * direction
    return solution


class DPS(Method):
    """Diffusion posterior sampling: x_prev moves down the gradient of the distance to the measurement.

        x_prev <- x_prev - scale grad |y - A x_0|

    Args:
        scale: of the move, as in its authors' code; they take 0.3 to 1.

    References:
        Algorithm 1 of arXiv 2209.14687.
    """

    name = "dps"
    requires_linear = False
    requires_gradient = True
    default_steps = 1000
    default_eta = 1.0

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(
        self, x: Tensor, step: Step, predict: Predictor, problem: Problem, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Take a step, as `Method` says."""
        with torch.enable_grad():
            sample = x.detach().requires_grad_()
            x0, epsilon = predict(sample)
            residual = (problem.measurement - problem.operator(x0)).reshape(len(x), -1)
            (gradient,) = torch.autograd.grad(residual.norm(dim=1).sum(), sample)
        x0 = x0.detach()
        return _update(step, x0, epsilon.detach(), noise) - self.scale * gradient, x0


METHODS: dict[str, type[Method]] = {method.name: method for method in (DDNM, DDRM, RePaint, PiGDM, MMPS, DPS)}
"""The methods by name."""


def project(x: Tensor, problem: Problem, bound: float = 1.0) -> Tensor:
    """Return the images near x that agree with a measurement without noise and lie within [-bound, bound].

    Args:
        x: (N, C, H, W).
        problem: with a linear operator.
        bound: of the images.

    Returns:
        Images whose measurements are y, as far as any within the bound are (Dykstra's alternating projections).

    Example:
        >>> from ddim.diffusion.operators import Mask
        >>> problem = Problem(torch.tensor([[[[0.5, 0.0]]]]), Mask((1, 1, 2), torch.tensor([[True, False]])))
        >>> project(torch.tensor([[[[0.9, 1.5]]]]), problem).tolist()
        [[[[0.5, 1.0]]]]
    """
    operator, y = problem.linear, problem.measurement
    x = x.clamp(-bound, bound)
    left = torch.zeros_like(x)
    for _ in range(MAX_PROJECTIONS):
        agreeing = x + operator.pseudo_inverse(y - operator(x))
        clamped = (agreeing + left).clamp(-bound, bound)
        left = agreeing + left - clamped
        x = clamped
        if float((y - operator(x)).abs().max()) < 1e-6:
            break
    return x
