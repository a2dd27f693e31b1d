"""Inversion: the deterministic process (eta = 0) run from images to noise.

A step of DDIM takes x_t to x_prev = g(x_t), with the network inside g. Its inverse has no formula, because the network
must be evaluated at the x_t that is sought. In the paper's ODE (14), with the signs reversed, one Euler step
(equation 13, section 4.3) evaluates it at x_prev instead:

    x_t = ddim_inverse(epsilon(x_prev), x_prev)

which is wrong to first order in the step. Here that is the first guess, and the equation itself is solved,

    f(x) = x_prev - g(x) = 0

so that decoding, which applies g, lands on x_prev again. x + c f(x) is a fixed-point iteration, and Anderson
acceleration (type II: Walker and Ni, SIAM J. Numer. Anal. 49, 2011) combines its last few iterates so that their
residuals cancel best, image by image.

The scale c. If the images were Gaussian, g would shrink or stretch each direction of x by a factor between
sqrt((1 - alpha_prev) / (1 - alpha)) (no variance among images: what is seen there is noise, which the step removes)
and about 1 (much variance). c is one over the geometric mean of the two, which errs by the same factor at both ends.

Residuals that remain. The step next to the images removes nearly all noise: g is nearly flat in most directions, and
for an image without any noise of its own the network's g may not reach x_prev at all. The residual then stays, and is
reported. Later steps of decoding shrink what a step leaves, or magnify it: little for images like those that the model
was trained on, up to a hundred thousandfold for others, beyond what float32 can hold. Only decoding shows it (`verify`
of `ddim.latents.LatentSpace.encode`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddim.diffusion.equations import Step, ddim_inverse, ddim_step, predict_x0_epsilon
from ddim.diffusion.guidance import take_rows
from ddim.diffusion.loop import Denoiser

HISTORY = 5
"""Differences of iterates that Anderson acceleration combines."""

REGULARIZATION = 1e-4
"""Of the least squares, relative to the squared length of each difference of residuals: keeps the coefficients small
where differences are nearly parallel."""


class Inversion:
    """The step function of `run_steps` that takes x at `step.prev_timestep` to x at `step.timestep`.

    It serves one run, along steps in the order in which noise grows.

    Args:
        denoiser: the network.
        prediction_type: what it predicts: `epsilon`, `sample` or `v_prediction`.
        exact: solve each step's equation; otherwise take the Euler step of equation (13).
        tolerance: an image has converged when its residual, the largest |x_prev - g(x_t)| among its values, is at most
            this.
        max_iterations: network evaluations per step and image, at most; the best of them is kept.

    Attributes:
        residuals: one float tensor (N,) per step taken: the residual reached.
        evaluations: one int64 tensor (N,) per step taken: network evaluations spent on each image.

    References:
        Section 4.3 of arXiv 2010.02502; Anderson acceleration: Walker and Ni, SIAM J. Numer. Anal. 49, 2011.

    Example:
        >>> from ddim.diffusion.loop import run_steps
        >>> steps = [Step(timestep=9, prev_timestep=0, alpha=0.3, alpha_prev=0.9)]
        >>> inversion = Inversion(lambda x, t: 0.1 * x, "epsilon", exact=True, tolerance=1e-6, max_iterations=20)
        >>> (state,) = run_steps(torch.ones(1, 1, 2, 2), steps, inversion)
        >>> bool(inversion.residuals[0] < 1e-6)
        True
    """

    def __init__(
        self, denoiser: Denoiser, prediction_type: str, exact: bool, tolerance: float, max_iterations: int
    ) -> None:
        self.denoiser, self.prediction_type = denoiser, prediction_type
        self.exact, self.tolerance = exact, tolerance
        # The residual of an Euler step costs nothing: it asks the network where the next step does.
        self.max_iterations = max_iterations if exact else 1
        self.residuals: list[Tensor] = []
        self.evaluations: list[Tensor] = []
        self._history: list[tuple[int, Tensor]] = []

    def __call__(self, x_prev: Tensor, timestep: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return x at `step.timestep` and the x_0 predicted there, as a `ddim.diffusion.loop.StepFn`.

        Args:
            x_prev: x at `step.prev_timestep`, (N, C, H, W).
            timestep: `step.timestep` as an int64 tensor () on the same device.
            step: the coefficients.
        """
        extra_evaluations = int(not self._history)
        if not self._history:
            source = timestep.new_tensor(max(step.prev_timestep, 0))
            output = self.denoiser(x_prev, source)
            epsilon = predict_x0_epsilon(output, x_prev, step.alpha_prev, self.prediction_type)[1]
            self._history = [(int(source), epsilon)]

        def f(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
            output = take_rows(self.denoiser, active)(x, timestep)
            return x_prev[active] - ddim_step(output, x, step, self.prediction_type)[0], output

        guess, _ = ddim_inverse(self._guess_epsilon(step.timestep), x_prev, step)
        x, output, residual, evaluations = anderson(f, guess, mixing(step), self.tolerance, self.max_iterations)
        x0, epsilon = predict_x0_epsilon(output, x, step.alpha, self.prediction_type)
        self.residuals.append(residual)
        self.evaluations.append(evaluations + extra_evaluations)
        self._history = [*self._history[-1:], (step.timestep, epsilon)]
        return x, x0

    def _guess_epsilon(self, t: int) -> Tensor:
        """Return the epsilon at x_prev (equation 13), or the line through the last two, which is closer."""
        t1, epsilon = self._history[-1]
        if not self.exact or len(self._history) == 1:
            return epsilon
        t0, previous_epsilon = self._history[0]
        # The network knows no timestep of the image itself, which a step from timestep 0 leads to.
        if t0 == t1:
            return epsilon
        return epsilon + min(1.0, (t - t1) / (t1 - t0)) * (epsilon - previous_epsilon)


def mixing(step: Step) -> float:
    """Return the scale c of the fixed-point iteration x + c f(x).

    Args:
        step: the coefficients of the step to invert.

    Example:
        >>> round(mixing(Step(timestep=9, prev_timestep=0, alpha=0.25, alpha_prev=0.75)), 4)
        1.4142
    """
    stretch = math.sqrt(step.alpha * step.alpha_prev) + math.sqrt((1 - step.alpha) * (1 - step.alpha_prev))
    shrink = math.sqrt((1 - step.alpha_prev) / (1 - step.alpha))
    return 1 / math.sqrt(stretch * shrink)


def anderson(
    f: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    guess: Tensor,
    mixing: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve f(x) = 0 for each image by Anderson acceleration; images that have converged are not evaluated again.

    Args:
        f: called as `f(x, active)` with the images that have not converged, (n, C, H, W), and their indices, (n,);
            returns their residuals and any other result of the same shape that is to be kept.
        guess: the first iterate, (N, C, H, W).
        mixing: the scale c of the plain iteration x + c f(x).
        tolerance: for the largest |f(x)| among an image's values.
        max_iterations: calls of `f`, at most.

    Returns:
        For each image the x of the smallest residual, what `f` returned with it, that residual (N,), and the number of
        times f was called for it, int64 (N,).

    References:
        Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49, 2011.

    Example:
        >>> f = lambda x, active: (torch.cos(x) - x, x)
        >>> x, _, residual, evaluations = anderson(f, torch.zeros(1, 1, 1, 1), 1.0, 1e-6, 20)
        >>> round(float(x), 4), bool(residual < 1e-6)
        (0.7391, True)
    """
    best, best_output = guess.clone(), torch.zeros_like(guess)
    residual = guess.new_full((len(guess),), math.inf)
    evaluations = torch.zeros(len(guess), dtype=torch.int64, device=guess.device)
    active = torch.arange(len(guess), device=guess.device)
    x = guess
    # Iterates and their residuals, the latest last: (n, h, C H W).
    xs = fs = guess.new_empty(len(guess), 0, guess[0].numel())
    for _ in range(max_iterations):
        fx, output = f(x, active)
        size = fx.abs().flatten(1).amax(1)
        evaluations[active] += 1
        is_better = size < residual[active]
        better = active[is_better]
        best[better], best_output[better], residual[better] = x[is_better], output[is_better], size[is_better]
        pending = size > tolerance
        if not bool(pending.any()):
            break
        active = active[pending]
        xs = torch.cat([xs[pending], x[pending].flatten(1)[:, None]], 1)[:, -HISTORY - 1 :]
        fs = torch.cat([fs[pending], fx[pending].flatten(1)[:, None]], 1)[:, -HISTORY - 1 :]
        x = _accelerate(xs, fs, mixing).view(-1, *guess.shape[1:])
    return best, best_output, residual, evaluations


def _accelerate(xs: Tensor, fs: Tensor, mixing: float) -> Tensor:
    """Return the next iterate, (n, D), from iterates and residuals (n, h, D), the latest last."""
    x, f = xs[:, -1], fs[:, -1]
    if xs.shape[1] == 1:
        return x + mixing * f
    dx, df = xs.diff(dim=1), fs.diff(dim=1)
    # Least squares for f = gamma df by the normal equations, each difference scaled to length 1. One product per image
    # gives all lengths and angles: sums, and products of several images, round differently for one image.
    products = torch.stack([rows @ rows.mT for rows in torch.cat([df, f[:, None]], 1)])
    scale = products.diagonal(dim1=1, dim2=2)[:, :-1, None].clamp_min(torch.finfo(f.dtype).tiny).rsqrt()
    gram = scale * products[:, :-1, :-1] * scale.mT
    gram = gram + REGULARIZATION * torch.eye(df.shape[1], dtype=f.dtype, device=f.device)
    gamma = scale * torch.linalg.solve(gram, scale * products[:, :-1, -1:])
    return x + mixing * f - ((dx + mixing * df) * gamma).sum(1)
