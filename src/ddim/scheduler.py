"""`DDIMScheduler` and `DDIMInverseScheduler`: the `diffusers`-shaped faces of `ddim.diffusion`.

Their constructors, methods and configuration files are those of the classes of these names in `diffusers`, and so are
their numbers, with one exception: `step` of `diffusers` assumes that the previous timestep is t - T // S, false for
`linspace`, for `trailing` where S does not divide T, and for every custom list. Here the previous timestep is the next
entry of `timesteps`; only from between `leading` timesteps a step leads to t - T // S, too.

Schedules are computed in float64 (`diffusers`: float32); `betas`, `alphas` and `alphas_cumprod` are float32, as scripts
expect. Where their numbers cannot be read without losing a gradient or breaking a trace, the tensors themselves are
computed with.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddim.diffusion import schedule
from ddim.diffusion.equations import (
    PREDICTION_TYPES,
    Coefficients,
    Step,
    add_noise,
    ddim_inverse,
    ddim_step,
    dynamic_threshold,
    make_steps,
    training_target,
    velocity,
)
from ddim.diffusion.learned import Row, check_coefficients_by_steps, learned_steps
from ddim.diffusion.noise import noise_from_generator
from ddim.diffusion.sampling_config import check_order
from ddim.diffusion.solvers import NUM_LAST_STEPS, add_corrections, history_length, multistep
from ddim.io.config import DEFAULTED, register_to_config
from ddim.io.diffusers_mixins import join_mixins
from ddim.io.pretrained import SchedulerFiles
from ddim.outputs import DDIMSchedulerOutput
from ddim.untouched import are_operators_transformed, has_members
from ddim.validation import as_integer, choice, integer, pluralize, real

logger = logging.getLogger(__name__)

FOREIGN_SETTINGS = frozenset(
    (
        *("algorithm_type", "disable_corrector", "euler_at_final", "final_sigmas_type", "flow_shift"),
        *("interpolation_type", "lambda_min_clipped", "lower_order_final", "original_inference_steps", "predict_x0"),
        *("rho", "shift_terminal", "sigma_data", "sigma_max", "sigma_min", "sigma_schedule", "skip_prk_steps"),
        *("solver_order", "solver_p", "solver_type", "time_shift_type", "timestep_scaling", "timestep_type"),
        *("use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas"),
        *("use_lu_lambdas", "variance_type"),
    )
)
"""Arguments of the other schedulers of `diffusers`, whose configurations are taken here."""

MAX_RANGE = 1e6
"""Bounds of samples are below this: they are in [-1, 1]."""
NO_INVERSE = "a step of order 2 or more depends on those before it and has no inverse of its own; use order=1"


class DDIMScheduler(SchedulerFiles):
    """The noise schedule, the timesteps at which the network is evaluated, and the step from one to the next.

    Args:
        num_train_timesteps: T, the number of timesteps.
        beta_start: beta at t = 0, in (0, 1).
        beta_end: beta at t = T - 1, in (0, 1).
        beta_schedule: one of `ddim.diffusion.schedule.BETA_SCHEDULES`; `diffusers` has the first three.
        trained_betas: T betas that replace the schedule; `num_train_timesteps` follows their number.
        clip_sample: clip the predicted x_0 at `clip_sample_range`.
        set_alpha_to_one: the last step leads to alpha = 1, a clean image; otherwise to alphas_cumprod[0].
        steps_offset: added to `leading` timesteps.
        prediction_type: `epsilon`, `sample` (x_0) or `v_prediction`: what the network predicts.
        thresholding: dynamic thresholding of the predicted x_0, instead of clipping.
        dynamic_thresholding_ratio: quantile of dynamic thresholding, in (0, 1].
        clip_sample_range: the bound for clipping, positive.
        sample_max_value: largest threshold of dynamic thresholding.
        timestep_spacing: one of `ddim.diffusion.schedule.SPACINGS`; `diffusers` has the first three.
        rescale_betas_zero_snr: rescale the betas so that x_{T-1} is pure noise; requires a network that predicts x_0 or
            v.
        solver_order: 1 for DDIM, 2 to 4 for `ddim.diffusion.solvers.multistep`, whose steps remember the epsilons of
            the previous ones.
        timesteps_by_steps: learned subsequences, as `ddim.tuning` finds them for this `solver_order`, by their length:
            `{"10": [999, ...]}`.
        coefficients_by_steps: learned coefficients, as `ddim.coefficients` finds them, by their number of steps, as
            rows of `ddim.diffusion.learned`. They are used where neither an order nor timesteps are asked for.

    The last three are only this library's. The configuration holds them in the entry `_ddim`, where they differ from
    their defaults, which `diffusers` passes on unread.

    Attributes:
        alphas_cumprod: float32 (T,); `alphas_cumprod_float64` is the same before rounding. It may be replaced, or
            changed in place, as all of these: methods use what it holds, and pass gradients to it where it requires
            them.
        timesteps: int64 tensor, decreasing: all T of them until `set_timesteps` is called.
        num_inference_steps: how many there are, `None` until then. One that is assigned makes `step` lead from t to
            t - T // num_inference_steps.
        final_alpha_cumprod: where the last step leads, () in the default dtype.
        betas: float32 (T,); `alphas` is 1 - betas. For information: steps depend on `alphas_cumprod`.
        solver_order: as given.
        timesteps_by_steps: as given; `{}` for none.
        coefficients_by_steps: as given; `{}` for none.
        init_noise_sigma: standard deviation of the initial noise, 1.
        order: of the method, 1.

    Raises:
        ValueError: for names that do not exist and numbers out of range.

    References:
        Equations (12) and (16) of arXiv 2010.02502.

    Example:
        >>> scheduler = DDIMScheduler(clip_sample=False)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps
        tensor([750, 500, 250,   0])
    """

    config_name = "scheduler_config.json"
    learned_settings: ClassVar = {"timesteps_by_steps": None, "coefficients_by_steps": None}
    """What is learned for a model and a number of steps, without anything learned: formulas take its place."""
    own_settings: ClassVar = {"solver_order": 1, **learned_settings}
    foreign_settings = FOREIGN_SETTINGS
    has_compatibles = True
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
        coefficients_by_steps: Mapping[str, Sequence[Row]] | None = None,
    ) -> None:
        choice("prediction_type", prediction_type, PREDICTION_TYPES)
        choice("timestep_spacing", timestep_spacing, schedule.SPACINGS)
        real("dynamic_thresholding_ratio", dynamic_thresholding_ratio, above=0, maximum=1)
        real("clip_sample_range", clip_sample_range, above=0, below=MAX_RANGE)
        real("sample_max_value", sample_max_value, above=0, below=MAX_RANGE)
        integer("steps_offset", steps_offset, 0)
        check_order(solver_order)
        betas = (
            schedule.make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
            if trained_betas is None
            else schedule.check_betas(trained_betas)
        )
        if num_train_timesteps != len(betas):
            if "num_train_timesteps" not in self.config.get(DEFAULTED, ()):
                logger.warning(
                    "num_train_timesteps is %d, the number of trained_betas, not %d", len(betas), num_train_timesteps
                )
            self.register_to_config(num_train_timesteps=len(betas))
        if rescale_betas_zero_snr:
            betas = schedule.rescale_zero_terminal_snr(betas)
        self.solver_order = solver_order
        learned = {} if timesteps_by_steps is None else timesteps_by_steps
        self._learned_timesteps = schedule.check_timesteps_by_steps(learned, len(betas))
        self.timesteps_by_steps = dict(learned)
        coefficients = {} if coefficients_by_steps is None else coefficients_by_steps
        self._learned_rows = check_coefficients_by_steps(coefficients, len(betas))
        self.coefficients_by_steps = dict(coefficients)
        alphas_cumprod = schedule.make_alphas_cumprod(betas)
        final_alpha = np.float64(1.0) if set_alpha_to_one else alphas_cumprod[0]
        self.betas = torch.tensor(betas, dtype=torch.float32)
        self.alphas = torch.tensor(1 - betas, dtype=torch.float32)
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32)
        # The default dtype for 1, float32 otherwise, as in `diffusers`.
        final_dtype = torch.get_default_dtype() if set_alpha_to_one else torch.float32
        self.final_alpha_cumprod = torch.tensor(final_alpha, dtype=final_dtype)
        self._exact = {"alphas_cumprod": alphas_cumprod, "final_alpha_cumprod": np.asarray(final_alpha)}
        self.num_inference_steps: int | None = None
        self._set_timesteps(list(range(len(betas)))[::-1], None)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **overrides: Any) -> Self:
        """Build a scheduler from a configuration; another `solver_order` drops what was learned for the old one.

        Args:
            config: a configuration of any diffusion scheduler, such as another scheduler's `.config`.
            return_unused_kwargs: return the entries that were not used, too.
            overrides: constructor arguments that take precedence.

        Raises:
            TypeError: if `config` is not a mapping, or an override is not an argument of the constructor.
            ValueError: if a value is not allowed.

        Example:
            >>> DDIMScheduler.from_config({"num_train_timesteps": 100}, clip_sample=False).config.clip_sample
            False
        """
        if isinstance(config, Mapping) and "solver_order" in overrides:
            previous = cls.extract_init_dict(config)[0].get("solver_order", 1)
            if overrides["solver_order"] != previous:
                overrides = cls.learned_settings | overrides
        return super().from_config(config, return_unused_kwargs, **overrides)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A scheduler that was pickled with `diffusers` has its attributes alone.
        built = {} if "_exact" in state else vars(DDIMScheduler.from_config(state["_internal_dict"]))
        vars(self).update(built | state)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string().rstrip()}"

    @property
    def alphas_cumprod_float64(self) -> NDArray[np.float64]:
        """`alphas_cumprod` before it was rounded, float64 (T,); what it holds, where it has been changed since."""
        return self._before_rounding("alphas_cumprod")

    def _before_rounding(self, name: str) -> NDArray[np.float64]:
        """Return the numbers that a public tensor was rounded from, if they are still those that it holds."""
        exact, held = self._exact[name], torch.as_tensor(getattr(self, name)).detach().cpu().double().numpy()
        unchanged = held.shape == exact.shape and np.array_equal(held, exact.astype(np.float32))
        return exact if unchanged else held

    @property
    def distilled_steps(self) -> int | None:
        """The number of steps that a model was distilled to (`ddim.distillation`); `None` for one that samples in any.

        It is not an entry of its own: a student has as many timesteps as steps, and `timesteps_by_steps` lists them.

        Example:
            >>> DDIMScheduler(trained_betas=[0.5, 0.999], timesteps_by_steps={"2": [1, 0]}).distilled_steps
            2
        """
        S = len(self)
        is_student = self.solver_order == 1 and self._learned_timesteps == {S: list(range(S - 1, -1, -1))}
        return S if is_student else None

    @property
    def clip(self) -> Callable[[Tensor], Tensor] | None:
        """The function applied to the predicted x_0: dynamic thresholding, clipping, or `None`."""
        config = self.config
        if config.thresholding:
            ratio, largest = config.dynamic_thresholding_ratio, config.sample_max_value
            return partial(dynamic_threshold, ratio=ratio, max_value=largest)
        if config.clip_sample:
            return partial(torch.clamp, min=-config.clip_sample_range, max=config.clip_sample_range)
        return None

    @property
    def _step_clip(self) -> Callable[[Tensor], Tensor] | None:
        """`clip` as `step` applies it: dynamic thresholding by the method that subclasses override."""
        return self._threshold_sample if self.config.thresholding else self.clip

    def make_timesteps(
        self, num_inference_steps: int, spacing: str | None = None, order: int | None = None
    ) -> list[int]:
        """Return the subsequence of timesteps for a number of steps.

        Args:
            num_inference_steps: S, from 1 to T. A model that was distilled to fewer steps takes those, with a warning.
            spacing: one of `ddim.diffusion.schedule.SPACINGS`; `None` for learned timesteps where the configuration has
                some for S and this order, else those of the configured spacing; above order 1, `leading`, the default
                of all configurations, stands for `blend`.
            order: of the solver, 1 to 4; `None` for the configured `solver_order`.

        Returns:
            At most S integers in [0, T - 1], strictly decreasing.

        Raises:
            ValueError: for an unknown spacing, another order, or a number of steps that is not an integer from 1 to T.

        Example:
            >>> DDIMScheduler().make_timesteps(4, "trailing")
            [999, 749, 499, 249]
        """
        config = self.config
        order = self.solver_order if order is None else check_order(order)
        if spacing is None:
            learned = self._learned_timesteps.get(as_integer(num_inference_steps) or 0)
            if learned is not None and order == self.solver_order:
                return list(learned)
            spacing = config.timestep_spacing
            if order > 1 and spacing == "leading":
                spacing = "blend"
            distilled, asked = self.distilled_steps, as_integer(num_inference_steps)
            if distilled is not None and asked is not None and asked > distilled:
                logger.warning(
                    "this model was distilled to %s and takes no more; %d were asked for",
                    *(pluralize(distilled, "step"), asked),
                )
                num_inference_steps = distilled
        return schedule.make_timesteps(spacing, num_inference_steps, self.alphas_cumprod_float64, config.steps_offset)

    def make_steps(
        self, timesteps: Sequence[int], eta: float = 0.0, use_sigma_hat: bool = False, order: int = 1
    ) -> list[Step]:
        """Return the coefficients of all steps along a subsequence of timesteps.

        Args:
            timesteps: strictly decreasing integers in [0, T - 1].
            eta: the noise of the process, at least 0: 0 for DDIM, 1 for DDPM.
            use_sigma_hat: draw the noise with DDPM's larger variance.
            order: of the solver: 1, or 2 to 4 (`ddim.diffusion.solvers.multistep`), which require eta = 0.

        Raises:
            ValueError: for a list, an eta or an order that is not allowed, or a timestep without any signal where the
                network predicts epsilon.
            TypeError: if `eta` is not a number.

        References:
            Equations (12) and (16) of arXiv 2010.02502.

        Example:
            >>> [step.prev_timestep for step in DDIMScheduler().make_steps([900, 300, 0])]
            [300, 0, -1]
        """
        check_order(order, real("eta", eta, minimum=0))
        checked = schedule.check_timesteps(timesteps, len(self))
        final_alpha = float(self._before_rounding("final_alpha_cumprod"))
        steps = make_steps(checked, self.alphas_cumprod_float64, final_alpha, eta, use_sigma_hat)
        if self.config.prediction_type == "epsilon" and steps[0].alpha == 0:
            raise ValueError(
                f"at timestep {checked[0]} the schedule leaves no signal, so epsilon does not determine x_0; "
                "use prediction_type='v_prediction' or 'sample', or start from a smaller timestep"
            )
        return multistep(steps, order) if order > 1 else steps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the subsequence of timesteps that `step` follows.

        Args:
            num_inference_steps: S, from 1 to T.
            device: where the tensor `timesteps` is kept; the CPU lets `step` look a timestep up without waiting for a
                device.
            timesteps: a custom list instead of S: strictly decreasing integers in [0, T - 1].

        Raises:
            ValueError: for both or neither, or values that the schedule does not allow.

        Example:
            >>> scheduler = DDIMScheduler()
            >>> scheduler.set_timesteps(timesteps=[900, 300, 0])
            >>> scheduler.num_inference_steps
            3
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps, not both or neither")
        learned = None
        if timesteps is not None:
            chosen = schedule.check_timesteps(timesteps, len(self))
        elif (learned := self.make_learned_steps(num_inference_steps)) is not None:
            chosen = [step.timestep for step in learned]
        else:
            chosen = self.make_timesteps(num_inference_steps)  # type: ignore[arg-type]
        self.num_inference_steps = self._num_set = len(chosen)
        self._set_timesteps(chosen, device)
        self._learned_steps = learned

    _num_set: int | None = None
    """`num_inference_steps` as `set_timesteps` left it."""

    _learned_steps: list[Step] | None = None
    """Those that `step` takes; `None` for the steps of a formula."""

    def _set_timesteps(self, timesteps: list[int], device: str | torch.device | None) -> None:
        self._learned_steps = None
        self._history: list[tuple[int, Tensor]] = []
        self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        self._listed = self.timesteps, timesteps[::-1]

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """Return the sample unchanged: DDIM feeds x_t to the network unscaled.

        Args:
            sample: x_t, (N, C, H, W).
            timestep: not used; schedulers are interchangeable.
        """
        return sample

    def make_learned_steps(self, num_inference_steps: int | None) -> list[Step] | None:
        """Return the steps of learned coefficients.

        Args:
            num_inference_steps: S.

        Returns:
            S steps, whose `timestep` is the one that the network is given; `None` where the configuration has none.

        Example:
            >>> scheduler = DDIMScheduler(coefficients_by_steps={"2": [[900, 880, 0.1], [300, 310, 0.0, -0.2]]})
            >>> [step.timestep for step in scheduler.make_learned_steps(2)]
            [880, 310]
        """
        rows = self._learned_rows.get(as_integer(num_inference_steps) or 0)
        return None if rows is None else self.make_row_steps(rows)

    def make_row_steps(self, rows: Sequence[Row]) -> list[Step]:
        """Return the steps of rows of coefficients along this schedule.

        Args:
            rows: a row per step, as `ddim.diffusion.learned.learned_steps` takes them.

        Example:
            >>> DDIMScheduler().make_row_steps([[900, 880, 0.1]])[0].timestep
            880
        """
        return learned_steps(rows, self.alphas_cumprod_float64, float(self._before_rounding("final_alpha_cumprod")))

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: Literal[True] = True,
    ) -> DDIMSchedulerOutput: ...

    @overload
    def step(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Tensor, Tensor]: ...

    def step(  # type: ignore[misc]  # the second signature stands for all arguments
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
        """Take one step of the generative process.

        Args:
            model_output: what the network predicts from `sample`, (N, C, H, W).
            timestep: t. The step leads to the next smaller entry of `timesteps`, or to `final_alpha_cumprod` after the
                last; from between `leading` timesteps to t - T // S.
            sample: x_t, (N, C, H, W).
            eta: 0 for DDIM, 1 for DDPM.
            use_clipped_model_output: recompute epsilon from the clipped x_0.
            generator: draws the noise when eta > 0.
            variance_noise: the noise itself, (N, C, H, W), instead of a generator.
            return_dict: `False` for a tuple.

        Returns:
            `DDIMSchedulerOutput` with `prev_sample` and `pred_original_sample`, or the two as a tuple.

        Raises:
            ValueError: if `set_timesteps` has not been called, the timestep is outside the schedule, eta is negative,
                or both a generator and noise are given.

        References:
            Equations (12) and (16) of arXiv 2010.02502.

        Example:
            >>> scheduler = DDIMScheduler()
            >>> scheduler.set_timesteps(1)
            >>> scheduler.step(torch.zeros(1, 1, 2, 2), 0, torch.full((1, 1, 2, 2), 0.5)).prev_sample.mean()
            tensor(0.5000)
        """
        if eta > 0 and generator is not None and variance_noise is not None:
            raise ValueError("generator and variance_noise exclude each other; give one of them")
        t, coefficients = self._transition(timestep, eta)
        noise = variance_noise if eta > 0 else None
        if eta > 0 and noise is None:
            noise = noise_from_generator(model_output.shape, generator, model_output.device, model_output.dtype)()
        prev_sample, x0 = ddim_step(
            model_output,
            sample,
            coefficients,
            self.config.prediction_type,
            self._step_clip,
            bool(use_clipped_model_output),
            noise,
        )
        length = self.solver_order - 1 if self._learned_steps is None else history_length(self._learned_steps)
        if length:
            history = [epsilon for _, epsilon in self._history_before(t)]
            prev_sample, epsilon = add_corrections(prev_sample, x0, sample, coefficients, history)
            self._history = [(t, epsilon), *self._history_before(t)][:length]
        return DDIMSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _transition(self, timestep: Tensor | int, eta: float) -> tuple[int, Coefficients]:
        """Return t and the factors of the step from there to the next smaller entry of `timesteps`.

        They are numbers; or tensors, where the schedule has a gradient or `_get_variance` is another than that below.
        """
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps(num_inference_steps) must be called before step")
        (t,) = schedule.check_timesteps([timestep], len(self))  # type: ignore[list-item]
        if self._learned_steps is not None:
            learned = {step.timestep: step for step in self._learned_steps}
            if t not in learned:
                raise ValueError(f"timestep must be one of those that were set ({list(learned)}), got {t}")
            if eta:
                raise ValueError(f"learned coefficients require eta=0, got eta={eta:g}")
            return t, learned[t].coefficients()
        next_timestep = self._next_timestep(t)
        visited, index = [t] if next_timestep is None else [t, next_timestep], 0
        if self.solver_order > 1:
            visited, index = self._visited_around(t)
        is_differentiable = not all(_is_plain(values) for values in (self.alphas_cumprod, self.final_alpha_cumprod))
        own_variance = not torch.compiler.is_compiling() and has_members(self, _VARIANCE)
        if own_variance and not is_differentiable:
            return t, self.make_steps(visited, eta, order=self.solver_order)[index].coefficients()
        check_order(self.solver_order, real("eta", eta, minimum=0))
        t_prev = -1 if next_timestep is None else next_timestep
        alpha, alpha_prev = self._alpha(t), self._alpha(t_prev)
        sigma: float | Tensor = 0.0
        if eta > 0:
            variance = _variance(alpha, alpha_prev) if own_variance else self._get_variance(t, t_prev)
            sigma = eta * torch.as_tensor(variance).double().sqrt()
        direction = (1 - alpha_prev - sigma**2).clamp(min=0).sqrt()
        corrections: tuple[float, ...] = ()
        if self.solver_order > 1:
            corrections = self.make_steps(visited, order=self.solver_order)[index].corrections
        return t, Coefficients(alpha.sqrt(), (1 - alpha).sqrt(), alpha_prev.sqrt(), direction, sigma, *corrections)

    def _visited_around(self, t: int) -> tuple[list[int], int]:
        """Return the timesteps that a multistep method's step from t depends on, and the index of t among them."""
        visited = [*(u for u, _ in reversed(self._history_before(t))), t]
        index = len(visited) - 1
        # Those after it decide whether it is among the last.
        while len(visited) - index <= NUM_LAST_STEPS and (after := self._next_timestep(visited[-1])) is not None:
            visited.append(after)
        return visited, index

    def _history_before(self, t: int) -> list[tuple[int, Tensor]]:
        """Return the timesteps and epsilons of the steps before t in the same run, the last one first."""
        return self._history if self._history and self._history[0][0] > t else []

    def _alpha(self, t: int) -> Tensor:
        """Return alphas_cumprod at t, or for t = -1 where the last step leads, float64 ()."""
        name = "alphas_cumprod" if t >= 0 else "final_alpha_cumprod"
        held = getattr(self, name)
        values = torch.from_numpy(self._before_rounding(name)) if _is_plain(held) else torch.as_tensor(held).double()
        return values[t] if t >= 0 else values

    def _next_timestep(self, t: int) -> int | None:
        """Return where the step from t leads; `None` for `final_alpha_cumprod`."""
        timesteps, entries = self._listed
        if timesteps is not self.timesteps or not torch.compiler.is_compiling():
            entries = sorted(torch.as_tensor(self.timesteps).tolist())
        T, S = len(self), self.num_inference_steps
        is_assigned = S not in (None, self._num_set, len(entries))
        # Between the entries of `leading` timesteps, which scripts of `diffusers` start from.
        is_between = (
            self.config.timestep_spacing == "leading"
            and t not in entries
            and all(b - a == T // len(entries) for a, b in itertools.pairwise(entries))
        )
        if is_assigned or is_between:
            strided = t - T // integer("num_inference_steps", S, 1, T)
            return strided if strided >= 0 else None
        smaller = [entry for entry in entries if entry < t]
        return smaller[-1] if smaller else None

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Return a predicted x_0 after dynamic thresholding, which scripts call, (N, C, H, W)."""
        ratio, largest = self.config.dynamic_thresholding_ratio, self.config.sample_max_value
        return dynamic_threshold(sample, ratio=ratio, max_value=largest)

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """Return sigma^2 of equation (16) at eta = 1, which scripts read, float32 ()."""
        alpha = self.alphas_cumprod[timestep]
        alpha_prev = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod
        return _variance(alpha, alpha_prev)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise.

        Args:
            original_samples: x_0, (N, ...).
            noise: standard Gaussian of the same shape.
            timesteps: (N,) or () integers.

        References:
            Equation (4) of arXiv 2010.02502.

        Example:
            >>> x0 = torch.ones(2, 1, 4, 4)
            >>> DDIMScheduler().add_noise(x0, torch.zeros_like(x0), torch.tensor([0, 999])).amax((1, 2, 3))
            tensor([0.9999, 0.0064])
        """
        return add_noise(original_samples, noise, self._alphas(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = sqrt(alpha_t) noise - sqrt(1 - alpha_t) x_0.

        Args:
            sample: x_0, (N, ...).
            noise: standard Gaussian of the same shape.
            timesteps: (N,) or () integers.

        References:
            Appendix D of arXiv 2202.00512.
        """
        return velocity(sample, noise, self._alphas(timesteps, sample))

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a network of the configured prediction type learns to predict: epsilon, x_0 or v.

        Args:
            original_samples: x_0, (N, ...).
            noise: standard Gaussian of the same shape.
            timesteps: (N,) or () integers.
        """
        return training_target(
            original_samples, noise, self._alphas(timesteps, original_samples), self.config.prediction_type
        )

    def _alphas(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return alphas_cumprod at the timesteps, float64, on the device of `like` and broadcastable against it."""
        device = torch.device("cpu") if like.device.type == "mps" else like.device  # MPS has no float64
        if not _is_plain(self.alphas_cumprod):
            moved = torch.as_tensor(self.alphas_cumprod).to(device).double()
        elif are_operators_transformed():  # whose tensors must not be kept
            moved = torch.from_numpy(self.alphas_cumprod_float64).to(device)
        else:
            alphas = self.alphas_cumprod_float64
            cached, moved = self._moved_alphas
            if cached is not alphas or moved.device != device:
                moved = torch.from_numpy(alphas).to(device)
                self._moved_alphas = alphas, moved
        return moved[timesteps.to(device)].reshape(-1, *[1] * (like.ndim - 1))

    _moved_alphas: tuple[NDArray[np.float64] | None, Tensor] = (None, torch.empty(0))
    """The schedule, and its copy on the device where it was used last."""


class DDIMInverseScheduler(DDIMScheduler):
    """The steps of a `DDIMScheduler` with eta = 0 in reverse, from images to noise.

    `timesteps` are those that a `DDIMScheduler` of the same configuration visits, for every spacing, smallest first.
    The step to timestep t comes from the next smaller entry, or from `initial_alpha_cumprod` for the first.

        inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        inverse.set_timesteps(50)
        for t in inverse.timesteps:
            x = inverse.step(unet(x, t).sample, t, x).prev_sample

    is an Euler encoding, as with the class of that name in `diffusers`, whose arguments these are (and those of
    `DDIMScheduler`). Two things are wrong there and right here: it steps from t - T // S whatever the previous timestep
    is, and with v-prediction its step is not the inverse of `DDIMScheduler.step`. Here, given the model output at the
    x_t that results, `step` inverts `DDIMScheduler.step` exactly, so that a fixed-point iteration over it does too;
    `DDIMPipeline.encode` does this, and better. A `solver_order` above 1 is refused.

    Clipping, on by default as in `diffusers`, cannot be undone; switch it off for images to come back. Neither can, for
    a good denoiser, the step from alpha = 1: `set_alpha_to_one=False` starts from alphas_cumprod[0].

    The arguments are those of `DDIMScheduler`.

    Attributes:
        timesteps: int64 tensor, increasing.

    References:
        Equation (13) and section 4.3 of arXiv 2010.02502.

    Example:
        >>> inverse = DDIMInverseScheduler()
        >>> inverse.set_timesteps(4)
        >>> inverse.timesteps
        tensor([  0, 250, 500, 750])
    """

    @property
    def initial_alpha_cumprod(self) -> Tensor:
        """Alpha where the first step comes from, float32 (): 1, or alphas_cumprod[0]."""
        return self.final_alpha_cumprod

    def _set_timesteps(self, timesteps: list[int], device: str | torch.device | None) -> None:
        if self.solver_order != 1:
            raise ValueError(f"solver_order must be 1, got {self.solver_order}: {NO_INVERSE}")
        super()._set_timesteps(timesteps, device)
        self.timesteps = self.timesteps.flip(0)
        self._listed = self.timesteps, timesteps[::-1]

    @overload  # type: ignore[override]  # the interface of `diffusers`
    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: Literal[True] = True
    ) -> DDIMSchedulerOutput: ...

    @overload
    def step(self, *args: Any, return_dict: Literal[False], **kwargs: Any) -> tuple[Tensor, Tensor]: ...

    def step(  # type: ignore[misc]  # the second signature stands for all arguments
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return x_t from x at the next smaller timestep.

        Args:
            model_output: what the network predicts, (N, C, H, W).
            timestep: t, where the step leads.
            sample: x at the next smaller timestep, (N, C, H, W).
            return_dict: `False` for a tuple.

        Returns:
            `DDIMSchedulerOutput` with x_t, called `prev_sample` as in `diffusers`, and `pred_original_sample`; or the
            two as a tuple.

        Raises:
            ValueError: if `set_timesteps` has not been called, the timestep is outside the schedule, or the step comes
                from alpha = 1 and the network predicts x_0, which leaves x_t open.
        """
        _, coefficients = self._transition(timestep, 0.0)
        x, x0 = ddim_inverse(model_output, sample, coefficients, self.config.prediction_type)
        clip = self._step_clip
        if clip is not None:
            clipped = clip(x0)
            x, x0 = x + coefficients.signal * (clipped - x0), clipped
        return DDIMSchedulerOutput(x, x0) if return_dict else (x, x0)


_VARIANCE = {"_get_variance": vars(DDIMScheduler)["_get_variance"]}


def _variance(alpha: Tensor, alpha_prev: Tensor) -> Tensor:
    """Return sigma^2 of equation (16) at eta = 1."""
    return (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)


def _is_plain(values: Any) -> bool:
    """Return whether reading a tensor's numbers is possible and loses no gradient."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (isinstance(values, Tensor) and values.requires_grad and torch.is_grad_enabled())


join_mixins(DDIMScheduler, "schedulers.scheduling_utils.SchedulerMixin", "configuration_utils.ConfigMixin")

_STEP_METHODS = {
    name: member
    for name, member in vars(DDIMScheduler).items()
    if callable(member) or isinstance(member, property)
    if name not in ("__init__", "__repr__", "from_config", "add_noise", "get_velocity", "training_target", "_alphas")
}
"""The methods and properties that decide the steps, as they are defined above."""


def has_own_steps(scheduler: Any) -> bool:
    """Return whether a scheduler takes exactly the steps of `DDIMScheduler`, which a sampler may compute by itself.

    Args:
        scheduler: any object.

    Returns:
        `False` for another class, a subclass or an instance with its own `step`, `set_timesteps` or whatever they
        depend on, and after a method of the class has been replaced.

    Example:
        >>> has_own_steps(DDIMScheduler()), has_own_steps(DDIMInverseScheduler())
        (True, False)
    """
    return isinstance(scheduler, DDIMScheduler) and has_members(scheduler, _STEP_METHODS)


def check_own_steps(scheduler: Any) -> DDIMScheduler:
    """Check that a scheduler takes exactly the steps of `DDIMScheduler`.

    Args:
        scheduler: any object.

    Returns:
        The scheduler.

    Raises:
        TypeError: if it does not.

    Example:
        >>> check_own_steps(DDIMInverseScheduler())
        Traceback (most recent call last):
        TypeError: scheduler must be a DDIMScheduler without methods of its own, got DDIMInverseScheduler; ...
    """
    if not has_own_steps(scheduler):
        raise TypeError(
            f"scheduler must be a DDIMScheduler without methods of its own, got {type(scheduler).__name__}; use "
            "DDIMScheduler.from_config(scheduler.config)"
        )
    return scheduler
