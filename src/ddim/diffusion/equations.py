"""The paper's equations as pure functions of tensors: no state, no files, no randomness of their own.

Notation (arXiv 2010.02502): alpha is `alphas_cumprod[t]`, alpha_prev is `alphas_cumprod` at the timestep the step leads
to (1 for the last jump to a clean image). A sample, its clean image and its noise are tied by the marginal

    x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) epsilon                                                    (4)

and the generative process goes from x_t to x_prev with any variance sigma^2:

    x_prev = sqrt(alpha_prev) x_0 + sqrt(1 - alpha_prev - sigma^2) epsilon + sigma noise               (12)
    sigma  = eta sqrt((1 - alpha_prev) / (1 - alpha)) sqrt(1 - alpha / alpha_prev)                     (16)

with x_0 and epsilon as the network predicts them. eta = 0 is DDIM, eta = 1 the posterior of DDPM.

Tensors are samples (N, C, H, W) of any floating dtype. Coefficients are Python floats, or tensors that are on the
samples' device already, so that no function waits for a device; functions that training calls with one alpha per image
take any shape that broadcasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.validation import join_choices, shown

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
"""What a network may predict: epsilon, x_0 (`sample`) or v."""


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Return a sample of q(x_t | x_0).

    Args:
        x0: clean images, (N, C, H, W).
        noise: standard Gaussian, of the shape of `x0`.
        alpha: alphas_cumprod at t, float64: 1 - alpha cancels near the images, where half precision has no noise left;
            broadcasts against `x0`, for example (N, 1, 1, 1).

    References:
        Equation (4) of arXiv 2010.02502.

    Example:
        >>> float(add_noise(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.64)))
        1.100000023841858
    """
    signal, scale = _coefficients(alpha, x0)
    return signal * x0 + scale * noise


def _coefficients(alpha: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha) and sqrt(1 - alpha), computed in the dtype of `alpha`, in the dtype and device of `like`."""
    return alpha.sqrt().to(like.device, like.dtype), (1 - alpha).sqrt().to(like.device, like.dtype)


def velocity(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Return v = sqrt(alpha) epsilon - sqrt(1 - alpha) x_0.

    Args:
        x0: clean images, (N, C, H, W).
        noise: epsilon, of the shape of `x0`.
        alpha: alphas_cumprod at t, float64; broadcasts against `x0`, for example (N, 1, 1, 1).

    References:
        Appendix D of arXiv 2202.00512.

    Example:
        >>> round(float(velocity(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.64))), 6)
        -0.2
    """
    signal, scale = _coefficients(alpha, x0)
    return signal * noise - scale * x0


def training_target(x0: Tensor, noise: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """Return what a network learns to predict from x_t.

    Args:
        x0: clean images, (N, C, H, W).
        noise: epsilon, of the shape of `x0`.
        alpha: alphas_cumprod at t, float64; broadcasts against `x0`, for example (N, 1, 1, 1).
        prediction_type: `epsilon`, `sample` (x_0) or `v_prediction`.

    Example:
        >>> float(training_target(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.64), "epsilon"))
        0.5
    """
    if prediction_type == "v_prediction":
        return velocity(x0, noise, alpha)
    return x0 if prediction_type == "sample" else noise


def predict_x0_epsilon(
    model_output: Tensor, sample: Tensor, alpha: float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Return the x_0 and the epsilon that a prediction implies by equation (4).

    Args:
        model_output: what the network predicts from `sample`; of its shape.
        sample: x_t.
        alpha: in (0, 1); 0 as well unless the network predicts epsilon, 1 as well unless it predicts x_0.
        prediction_type: one of `PREDICTION_TYPES`.

    Returns:
        (x_0, epsilon), both of the shape of `sample`.

    Raises:
        ValueError: for an unknown prediction type.

    References:
        Equations (4) and (9) of arXiv 2010.02502; v: appendix D of arXiv 2202.00512.

    Example:
        >>> x0, epsilon = predict_x0_epsilon(torch.tensor(0.5), torch.tensor(1.1), 0.64, "epsilon")
        >>> round(float(x0), 6), float(epsilon)
        (1.0, 0.5)
    """
    return _predict(model_output, sample, math.sqrt(alpha), math.sqrt(1 - alpha), prediction_type)


def _predict(
    model_output: Tensor, sample: Tensor, signal: float | Tensor, noise: float | Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    if prediction_type == "epsilon":
        return (sample - noise * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (sample - signal * model_output) / noise
    if prediction_type == "v_prediction":
        return signal * sample - noise * model_output, signal * model_output + noise * sample
    raise ValueError(f"prediction_type must be one of {join_choices(PREDICTION_TYPES)}, got {shown(prediction_type)}")


def x0_to_epsilon(x0: Tensor, sample: Tensor, alpha: float) -> Tensor:
    """Return the epsilon of equation (4) for given x_0 and x_t.

    Args:
        x0: clean images, (N, C, H, W).
        sample: x_t, of the same shape.
        alpha: alphas_cumprod at t, in [0, 1).

    Example:
        >>> round(float(x0_to_epsilon(torch.tensor(1.0), torch.tensor(1.1), 0.64)), 6)
        0.5
    """
    return _predict(x0, sample, math.sqrt(alpha), math.sqrt(1 - alpha), "sample")[1]


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Clip each image at the `ratio` quantile s of its |x_0|, then divide it by s (dynamic thresholding).

    Args:
        x0: (N, C, H, W).
        ratio: the quantile, in (0, 1].
        max_value: s is limited to [1, max_value], so that images within [-1, 1] do not change.

    Returns:
        (N, C, H, W) in [-1, 1].

    References:
        Section 2.3 of Imagen, arXiv 2205.11487.

    Example:
        >>> dynamic_threshold(torch.tensor([[[[0.5, -4.0]]]]), ratio=1.0, max_value=2.0)
        tensor([[[[ 0.2500, -1.0000]]]])
    """
    flat = x0.flatten(1)
    # quantile exists for float32 and float64 only.
    wide = flat if flat.dtype == torch.float64 else flat.float()
    s = wide.abs().quantile(ratio, dim=1, keepdim=True).clamp(1.0, max(1.0, max_value))
    return (wide.clamp(-s, s) / s).to(x0.dtype).view_as(x0)


def sigma_ddim(alpha: float, alpha_prev: float, eta: float) -> float:
    """Return the standard deviation of a step's noise; 0 for eta = 0 and for the last step to alpha_prev = 1.

    Args:
        alpha: alphas_cumprod at t, in [0, 1).
        alpha_prev: alphas_cumprod where the step leads, in (0, 1].
        eta: 0 for DDIM, 1 for DDPM.

    References:
        Equation (16) of arXiv 2010.02502.

    Example:
        >>> sigma_ddim(0.5, 1.0, eta=1.0)
        0.0
    """
    return eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) if eta else 0.0


def sigma_hat(alpha: float, alpha_prev: float) -> float:
    """Return DDPM's larger standard deviation, sqrt(1 - alpha / alpha_prev): sqrt(beta_t) for neighboring timesteps.

    Args:
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod where the step leads.

    References:
        Section 5 of arXiv 2010.02502.

    Example:
        >>> sigma_hat(0.75, 1.0)
        0.5
    """
    return math.sqrt(1 - alpha / alpha_prev)


MAX_CORRECTIONS = 3
"""The largest number of earlier predictions that a step uses."""


@dataclass(frozen=True)
class Step:
    """One transition of the generative process: everything that is known of it before the network runs.

    Attributes:
        timestep: t, at which the network is evaluated.
        prev_timestep: the next entry of the subsequence, -1 for the jump to the clean image.
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod at `prev_timestep`.
        sigma: of equation (16).
        noise_std: the scale of the noise that is added: `sigma`, or the larger sigma-hat.
        direction_offset: k_0 of `ddim.diffusion.learned`: what is added to the weight of epsilon; 0 for a step of DDIM.
        corrections: k_1, k_2, ... of `ddim.diffusion.solvers.multistep`, at most `MAX_CORRECTIONS`; none for a step of
            DDIM.
    """

    timestep: int
    prev_timestep: int
    alpha: float
    alpha_prev: float
    sigma: float = 0.0
    noise_std: float = 0.0
    corrections: tuple[float, ...] = ()
    direction_offset: float = 0.0

    def coefficients(self) -> Coefficients:
        """Return the factors of the step's equation.

        Example:
            >>> Step(9, -1, alpha=0.64, alpha_prev=1.0).coefficients().signal
            0.8
        """
        # For eta above 1 the radicand can turn negative; the largest variance that keeps the marginal leaves no
        # direction at all.
        direction = math.sqrt(max(0.0, 1 - self.alpha_prev - self.sigma**2)) + self.direction_offset
        signal, noise = math.sqrt(self.alpha), math.sqrt(1 - self.alpha)
        return Coefficients(signal, noise, math.sqrt(self.alpha_prev), direction, self.noise_std, *self.corrections)


class Coefficients(NamedTuple):
    """The factors of a step's equation.

    They are Python floats; or tensors () on the samples' device, which a captured step reads anew each time it runs.

    Attributes:
        signal: sqrt(alpha).
        noise: sqrt(1 - alpha).
        signal_prev: sqrt(alpha_prev).
        direction: sqrt(1 - alpha_prev - sigma^2).
        noise_std: as of `Step`.
        correction_1: k_1 of `Step.corrections`; `ddim_step` leaves these to `ddim.diffusion.solvers.add_corrections`.
        correction_2: k_2.
        correction_3: k_3.
    """

    signal: float | Tensor
    noise: float | Tensor
    signal_prev: float | Tensor
    direction: float | Tensor
    noise_std: float | Tensor
    correction_1: float | Tensor = 0.0
    correction_2: float | Tensor = 0.0
    correction_3: float | Tensor = 0.0

    @property
    def corrections(self) -> tuple[float | Tensor, ...]:
        """The factors of the changes of epsilon since one, two and three steps before."""
        return self.correction_1, self.correction_2, self.correction_3


def make_steps(
    timesteps: Sequence[int],
    alphas_cumprod: Sequence[float] | NDArray[np.float64],
    final_alpha: float = 1.0,
    eta: float = 0.0,
    use_sigma_hat: bool = False,
) -> list[Step]:
    """Return the coefficients of all steps along a subsequence of timesteps.

    Args:
        timesteps: strictly decreasing, within the schedule.
        alphas_cumprod: the schedule, length T.
        final_alpha: alpha after the last step: 1 for a clean image, or alphas_cumprod[0].
        eta: 0 for DDIM, 1 for DDPM's posterior; not negative.
        use_sigma_hat: draw the noise with the paper's sigma-hat while the mean keeps the sigma of `eta` (which is then
            1 in the paper).

    Returns:
        One step per timestep, in the order in which they are taken.

    References:
        Equations (12) and (16) of arXiv 2010.02502.

    Example:
        >>> [step.prev_timestep for step in make_steps([2, 0], [0.9, 0.8, 0.7])]
        [0, -1]
    """
    steps = []
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha = float(alphas_cumprod[t])
        alpha_prev = float(alphas_cumprod[t_prev]) if t_prev >= 0 else float(final_alpha)
        sigma = sigma_ddim(alpha, alpha_prev, eta)
        # The paper adds no noise in the step that ends in a clean image, sigma-hat or not.
        noise_std = sigma_hat(alpha, alpha_prev) if use_sigma_hat and t_prev >= 0 else sigma
        steps.append(Step(t, t_prev, alpha, alpha_prev, sigma, noise_std))
    return steps


def ddim_inverse(
    model_output: Tensor, x_prev: Tensor, step: Step | Coefficients, prediction_type: str = "epsilon"
) -> tuple[Tensor, Tensor]:
    """Return x_t from x_prev: the deterministic `ddim_step` (eta = 0) solved for x_t, given its model output.

    For a network that predicts epsilon this is a step of the paper's ODE (14) towards noise,

        x_t = sqrt(alpha / alpha_prev) (x_prev - sqrt(1 - alpha_prev) epsilon) + sqrt(1 - alpha) epsilon

    and the others follow likewise. With the model output at x_t itself the inverse is exact; with the epsilon predicted
    at x_prev it is the encoding of section 4.3.

    Args:
        model_output: what the network predicts, of the shape of `x_prev`.
        x_prev: x at `step.prev_timestep`.
        step: the coefficients, or the step that has them, of eta = 0; `alpha_prev` may be 1 unless the network predicts
            x_0 (which then is x_prev, whatever x_t was), and `alpha` may be 0.
        prediction_type: one of `PREDICTION_TYPES`.

    Returns:
        (x_t, the predicted x_0).

    Raises:
        ValueError: for alpha_prev = 1 with predicted x_0, or an unknown prediction type.

    References:
        Equations (13) and (14) and section 4.3 of arXiv 2010.02502.

    Example:
        >>> step = Step(9, 0, alpha=0.5, alpha_prev=0.9)
        >>> epsilon, x = torch.tensor(0.3), torch.tensor(1.2)
        >>> x_prev, _ = ddim_step(epsilon, x, step)
        >>> round(float(ddim_inverse(epsilon, x_prev, step)[0]), 5)
        1.2
    """
    # Without noise the direction is all that alpha_prev leaves: sqrt(1 - alpha_prev).
    signal, noise, signal_prev, noise_prev, *_ = step.coefficients() if isinstance(step, Step) else step
    if prediction_type == "v_prediction":
        # Along the circle of angles arccos(sqrt(alpha)) a step is a rotation: x_prev = cos x_t - sin v.
        cos, sin = signal * signal_prev + noise * noise_prev, noise * signal_prev - signal * noise_prev
        x = (x_prev + sin * model_output) / cos
        return x, signal * x - noise * model_output
    if prediction_type == "sample":
        if noise_prev == 0:
            raise ValueError(
                "a step that ends in the predicted x_0 itself (alpha = 1) has no inverse; use set_alpha_to_one=False"
            )
        return signal * model_output + noise * (x_prev - signal_prev * model_output) / noise_prev, model_output
    if prediction_type == "epsilon":
        # Not from x_t: dividing by a small alpha would magnify its rounding.
        x0 = (x_prev - noise_prev * model_output) / signal_prev
        return signal * x0 + noise * model_output, x0
    raise ValueError(f"prediction_type must be one of {join_choices(PREDICTION_TYPES)}, got {shown(prediction_type)}")


def ddim_step(
    model_output: Tensor,
    sample: Tensor,
    step: Step | Coefficients,
    prediction_type: str = "epsilon",
    clip: Callable[[Tensor], Tensor] | None = None,
    use_clipped_model_output: bool = False,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take a step of the generative process: prediction, clipping, and the update to x_prev.

    Args:
        model_output: what the network predicts from `sample`, (N, C, H, W).
        sample: x_t, (N, C, H, W).
        step: the coefficients, or the step that has them.
        prediction_type: what the network predicts: one of `PREDICTION_TYPES`.
        clip: applied to the predicted x_0; `None` leaves it.
        use_clipped_model_output: recompute epsilon from the clipped x_0, so that the two agree with x_t again.
        noise: standard Gaussian of the shape of `sample`; may be `None` where `step.noise_std` is 0.

    Returns:
        (x_prev, the predicted x_0 after clipping), both (N, C, H, W).

    Raises:
        ValueError: for an unknown prediction type.

    References:
        Equation (12) of arXiv 2010.02502.

    Example:
        >>> x_prev, x0 = ddim_step(torch.tensor(0.5), torch.tensor(1.1), Step(9, -1, alpha=0.64, alpha_prev=1.0))
        >>> round(float(x_prev), 6)
        1.0
    """
    c = step.coefficients() if isinstance(step, Step) else step
    x0, epsilon = _predict(model_output, sample, c.signal, c.noise, prediction_type)
    if clip is not None:
        x0 = clip(x0)
    if use_clipped_model_output:
        epsilon = _predict(x0, sample, c.signal, c.noise, "sample")[1]
    x_prev = c.signal_prev * x0 + c.direction * epsilon
    return x_prev if noise is None else x_prev + c.noise_std * noise, x0
