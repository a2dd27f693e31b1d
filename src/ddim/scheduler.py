"""`DDIMScheduler` and `DDIMInverseScheduler`: the `diffusers`-shaped faces of `schedule` and `process`.

Their constructors, methods and configuration files are those of the classes of these names in `diffusers`. The numbers
are too wherever the peer's are right. One is not: its `step` assumes that the previous timestep is t - T // S, which is
false for `linspace`, for `trailing` when S does not divide T, and for every list of one's own. Here the previous
timestep is the next entry of `timesteps`.

Schedules are computed in float64 (the peer: float32); `betas`, `alphas` and `alphas_cumprod` show them in float32, as
scripts expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ddim.diffusion import schedule
from ddim.diffusion.equations import (
    PREDICTION_TYPES,
    Step,
    add_noise,
    ddim_inverse,
    ddim_step,
    dynamic_threshold,
    make_steps,
    training_target,
    velocity,
    x0_to_epsilon,
)
from ddim.diffusion.noise import noise_from_generator
from ddim.diffusion.solvers import second_order
from ddim.io.config import ConfigMixin, register_to_config
from ddim.io.hub import SchedulerFiles
from ddim.outputs import DDIMSchedulerOutput
from ddim.validation import as_integer, integer

NO_INVERSE = "a step of order 2 depends on the one before it and has no inverse of its own; give order 1"


def check_order(order: int) -> int:
    """The order of the method, 1 or 2; ValueError for others."""
    if order not in (1, 2) or isinstance(order, bool):
        raise ValueError(f"order is {order!r}; it must be 1 (DDIM) or 2 (the two-step method)")
    return order


class DDIMScheduler(ConfigMixin, SchedulerFiles):
    """When the network is asked, and what becomes of its answers.

    Args:
        num_train_timesteps: T.
        beta_start: as in `ddim.diffusion.schedule.make_betas`.
        beta_end: as in `ddim.diffusion.schedule.make_betas`.
        beta_schedule: one of `ddim.diffusion.schedule.BETA_SCHEDULES`; the peer has the first three.
        trained_betas: T betas that replace the schedule.
        clip_sample: clip the predicted x_0 at `clip_sample_range`.
        set_alpha_to_one: the last step leads to alpha = 1, a clean picture; otherwise to alphas_cumprod[0].
        steps_offset: added to `leading` timesteps.
        prediction_type: `epsilon`, `sample` (x_0) or `v_prediction`: what the network predicts.
        thresholding: dynamic thresholding of the predicted x_0, in place of clipping.
        dynamic_thresholding_ratio: its quantile, in (0, 1].
        clip_sample_range: the bound for clipping, positive.
        sample_max_value: its largest threshold.
        timestep_spacing: one of `ddim.diffusion.schedule.SPACINGS`; the peer has the first three.
        rescale_betas_zero_snr: rescale the betas so that x_{T-1} is pure noise; needs a network that predicts x_0 or v.
        solver_order: 1 for DDIM, 2 for `ddim.diffusion.solvers.second_order`, whose steps remember the epsilon of the one before;
            the peer ignores it.
        timesteps_by_steps: learned subsequences, as `ddim.tuning` finds them for this `solver_order`, by their length:
            `{"10": [999, ...]}`; the peer ignores them.

    Attributes:
        timesteps: int64 tensor, decreasing: all T of them until `set_timesteps` is called.
        num_inference_steps: how many there are, `None` until then.
        final_alpha_cumprod: where the last step leads, float32 ().
        init_noise_sigma: standard deviation of the initial noise, 1.
        order: of the method, 1.

    Raises:
        ValueError: for names that do not exist and numbers out of range.
    """

    config_name = "scheduler_config.json"
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: ArrayLike | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        solver_order: int = 1,
        timesteps_by_steps: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; it must be one of {', '.join(PREDICTION_TYPES)}")
        if timestep_spacing not in schedule.SPACINGS:
            raise ValueError(
                f"timestep_spacing is {timestep_spacing!r}; it must be one of {', '.join(schedule.SPACINGS)}"
            )
        if not 0 < dynamic_thresholding_ratio <= 1:
            raise ValueError(
                f"dynamic_thresholding_ratio is {dynamic_thresholding_ratio}; it must lie above 0 and be at most 1"
            )
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range is {clip_sample_range}; it must be positive")
        integer("steps_offset", steps_offset, 0)
        check_order(solver_order)
        betas = (
            schedule.make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
            if trained_betas is None
            else schedule.check_betas(trained_betas)
        )
        if rescale_betas_zero_snr:
            betas = schedule.rescale_zero_terminal_snr(betas)
        learned = {} if timesteps_by_steps is None else timesteps_by_steps
        self._learned = schedule.check_timesteps_by_steps(learned, len(betas))
        self._alphas_cumprod = schedule.make_alphas_cumprod(betas)
        self._final_alpha = 1.0 if set_alpha_to_one else float(self._alphas_cumprod[0])
        self.betas = torch.tensor(betas, dtype=torch.float32)
        self.alphas = torch.tensor(1 - betas, dtype=torch.float32)
        self.alphas_cumprod = torch.tensor(self._alphas_cumprod, dtype=torch.float32)
        self.final_alpha_cumprod = torch.tensor(self._final_alpha, dtype=torch.float32)
        self.num_inference_steps: int | None = None
        self._use(list(range(len(betas)))[::-1], None)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """As everywhere; another `solver_order` than the configured one drops the timesteps learned for that."""
        if isinstance(config, Mapping) and overrides.get("solver_order") not in (None, config.get("solver_order", 1)):
            overrides = {"timesteps_by_steps": None} | overrides
        return super().from_config(config, **overrides)

    def __len__(self) -> int:
        return len(self._alphas_cumprod)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.config_json().rstrip()}"

    @property
    def clip(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to the predicted x_0: dynamic thresholding, clipping, or nothing (`None`)."""
        config = self.config
        if config.thresholding:
            return partial(
                dynamic_threshold, ratio=config.dynamic_thresholding_ratio, max_value=config.sample_max_value
            )
        if config.clip_sample:
            return partial(torch.clamp, min=-config.clip_sample_range, max=config.clip_sample_range)
        return None

    def make_timesteps(
        self, num_inference_steps: int, spacing: str | None = None, order: int | None = None
    ) -> list[int]:
        """The subsequence for this number of steps.

        Args:
            num_inference_steps: S, from 1 to T.
            spacing: one of `ddim.diffusion.schedule.SPACINGS`. Unless it is given, learned timesteps are taken where there are
                some for S and this order, else those of the configured spacing; at order 2, `leading`, the default of
                all configurations, stands for `blend`.
            order: of the method, 1 or 2; the configured `solver_order` unless given.

        Raises:
            ValueError: as `ddim.diffusion.schedule.make_timesteps`, or for another order.
        """
        config = self.config
        order = config.solver_order if order is None else check_order(order)
        if spacing is None:
            learned = self._learned.get(as_integer(num_inference_steps) or 0)
            if learned is not None and order == config.solver_order:
                return list(learned)
            spacing = config.timestep_spacing
            if order == 2 and spacing == "leading":
                spacing = "blend"
        return schedule.make_timesteps(spacing, num_inference_steps, self._alphas_cumprod, config.steps_offset)

    def make_steps(
        self, timesteps: Sequence[int], eta: float = 0.0, use_sigma_hat: bool = False, order: int = 1
    ) -> list[Step]:
        """The coefficients of all steps along a subsequence, checked.

        Args:
            timesteps: as in `ddim.diffusion.schedule.check_timesteps`.
            eta: of equation (16), not negative.
            use_sigma_hat: as in `ddim.diffusion.equations.make_steps`.
            order: 1, or 2 for steps as `ddim.diffusion.solvers.second_order` makes them, which want eta = 0.

        Raises:
            ValueError: for a list, an eta or an order that is not allowed, or a timestep without any signal where the
                network predicts epsilon.
        """
        if not 0 <= eta < float("inf"):
            raise ValueError(f"eta is {eta}; it must be 0 (DDIM) or larger, 1 for DDPM")
        if check_order(order) == 2 and eta:
            raise ValueError(f"order 2 is of the process without noise and wants eta=0, not {eta}")
        checked = schedule.check_timesteps(timesteps, len(self))
        steps = make_steps(checked, self._alphas_cumprod, self._final_alpha, eta, use_sigma_hat)
        if self.config.prediction_type == "epsilon" and steps[0].alpha == 0:
            raise ValueError(
                f"at timestep {checked[0]} the schedule leaves no signal, so that x_0 cannot be told from a predicted "
                "epsilon; "
                "use prediction_type 'v_prediction' or 'sample', or start from a smaller timestep"
            )
        return second_order(steps) if order == 2 else steps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the subsequence that `step` walks.

        Args:
            num_inference_steps: S, from 1 to T.
            device: where the tensor `timesteps` is kept; the CPU lets `step` look a timestep up without waiting for a
                device.
            timesteps: a list of one's own in place of S.

        Raises:
            ValueError: for both or neither, or as `ddim.diffusion.schedule.make_timesteps` and `check_timesteps` do.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        if timesteps is not None:
            chosen = schedule.check_timesteps(timesteps, len(self))
        else:
            chosen = self.make_timesteps(num_inference_steps)  # type: ignore[arg-type]
        self.num_inference_steps = len(chosen)
        self._use(chosen, device)

    def _use(self, timesteps: list[int], device: str | torch.device | None) -> None:
        self._timesteps = timesteps
        self._before: tuple[int, Tensor] | None = None
        self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """The sample as it is: DDIM feeds x_t to the network unscaled. Here for schedulers to be interchangeable."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of the generative process, equations (12) and (16).

        Args:
            model_output: what the network predicts from `sample`, (N, C, H, W).
            timestep: t. The step leads to the next smaller entry of `timesteps`, or to `final_alpha_cumprod` after the
                last.
            sample: x_t, (N, C, H, W).
            eta: 0 for DDIM, 1 for DDPM.
            use_clipped_model_output: recompute epsilon from the clipped x_0.
            generator: draws the noise when eta > 0.
            variance_noise: the noise itself, in place of a generator.
            return_dict: `False` for a tuple.

        Returns:
            `DDIMSchedulerOutput` with `prev_sample` and `pred_original_sample`, or the two as a tuple.

        Raises:
            ValueError: if `set_timesteps` has not been called, the timestep is outside the schedule, eta is negative,
                or both a generator and noise are given.
        """
        if eta > 0 and generator is not None and variance_noise is not None:
            raise ValueError("give either generator or variance_noise, not both")
        transition = self._transition(timestep, eta)
        noise = variance_noise if eta > 0 else None
        if eta > 0 and noise is None:
            noise = noise_from_generator(model_output.shape, generator, model_output.device, model_output.dtype)()
        prev_sample, x0 = ddim_step(
            model_output,
            sample,
            transition,
            self.config.prediction_type,
            self.clip,
            bool(use_clipped_model_output),
            noise,
        )
        if self.config.solver_order == 2:
            epsilon = x0_to_epsilon(x0, sample, transition.alpha)
            if self._before is not None and self._before[0] > transition.timestep:
                prev_sample = prev_sample + transition.correction * (epsilon - self._before[1])
            self._before = transition.timestep, epsilon
        return DDIMSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _transition(self, timestep: Tensor | int, eta: float) -> Step:
        """The step between a timestep and the next smaller entry of `timesteps`."""
        if self.num_inference_steps is None:
            raise ValueError("no timesteps are set: call set_timesteps(num_inference_steps) before step")
        (t,) = schedule.check_timesteps([timestep], len(self))  # type: ignore[list-item]
        if self.config.solver_order == 2 and self._before is not None and self._before[0] > t:
            around = [self._before[0], t]
        else:
            around = [t]
        index = len(around) - 1
        around += [entry for entry in self._timesteps if entry < t][:1]
        return self.make_steps(around, eta, order=self.config.solver_order)[index]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise, equation (4).

        Args:
            original_samples: x_0, (N, ...).
            noise: standard Gaussian of the same shape.
            timesteps: (N,) or () integers.
        """
        return add_noise(original_samples, noise, self._alphas(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(alpha_t) noise - sqrt(1 - alpha_t) x_0; arguments as in `add_noise`, `sample` being x_0."""
        return velocity(sample, noise, self._alphas(timesteps, sample))

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network of the configured prediction type shall predict: epsilon, x_0 or v; arguments as in
        `add_noise`.
        """
        return training_target(
            original_samples, noise, self._alphas(timesteps, original_samples), self.config.prediction_type
        )

    def _alphas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """alphas_cumprod at the timesteps, with the dtype and device of `like`, broadcastable against it."""
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        alphas = self.alphas_cumprod[timesteps.to(like.device)].to(like.dtype)
        return alphas.reshape(-1, *[1] * (like.ndim - 1))


class DDIMInverseScheduler(DDIMScheduler):
    """From pictures to noise: the steps of a `DDIMScheduler` with eta = 0, turned round.

    `timesteps` are those that a `DDIMScheduler` of the same configuration walks, for every spacing, the smallest first.
    The step to timestep t comes from the next smaller entry, or from `initial_alpha_cumprod` for the first.

        inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        inverse.set_timesteps(50)
        for t in inverse.timesteps:
            x = inverse.step(unet(x, t).sample, t, x).prev_sample

    is an Euler encoding, as with the class of that name in `diffusers`, whose arguments these are (and those of
    `DDIMScheduler`). Two things are wrong there and right here: it steps from t - T // S whatever the timestep before
    is, and with v-prediction its step is not the inverse of its twin's. Here, given the model output at the x_t that
    results, `step` inverts `DDIMScheduler.step` exactly, so that a fixed-point iteration over it does too;
    `DDIMPipeline.encode` does this, and better. A `solver_order` of 2 is refused.

    Clipping, on by default as in `diffusers`, cannot be undone; switch it off for pictures to come back. So cannot, for
    a good denoiser, the step from alpha = 1: `set_alpha_to_one=False` starts from alphas_cumprod[0].

    Args:
        as for `DDIMScheduler`.

    Attributes:
        timesteps: int64 tensor, increasing.
        initial_alpha_cumprod: 1, or alphas_cumprod[0], where the first step comes from.
        others: as of `DDIMScheduler`.
    """

    @property
    def initial_alpha_cumprod(self) -> Tensor:
        return self.final_alpha_cumprod

    def _use(self, timesteps: list[int], device: str | torch.device | None) -> None:
        if self.config.solver_order != 1:
            raise ValueError(f"solver_order is {self.config.solver_order}; {NO_INVERSE}")
        super()._use(timesteps, device)
        self.timesteps = self.timesteps.flip(0)

    def step(  # type: ignore[override]  # the interface of the peer's class
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t from x at the timestep before t.

        Args:
            model_output: what the network predicts, (N, C, H, W).
            timestep: t, where the step leads.
            sample: x at the timestep before, (N, C, H, W).
            return_dict: `False` for a tuple.

        Returns:
            `DDIMSchedulerOutput` with x_t, called `prev_sample` as in the peer, and `pred_original_sample`; or the two
            as a tuple.

        Raises:
            ValueError: if `set_timesteps` has not been called, the timestep is outside the schedule, or the step comes
                from alpha = 1 and the network predicts x_0, which leaves x_t open.
        """
        transition = self._transition(timestep, 0.0)
        x, x0 = ddim_inverse(model_output, sample, transition, self.config.prediction_type)
        if self.clip is not None:
            clipped = self.clip(x0)
            x, x0 = x + transition.alpha**0.5 * (clipped - x0), clipped
        return DDIMSchedulerOutput(x, x0) if return_dict else (x, x0)
