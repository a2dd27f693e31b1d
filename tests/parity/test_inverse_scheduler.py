"""`DDIMInverseScheduler` against the class of that name in `diffusers`, and against the `DDIMScheduler` it inverts.

`diffusers` takes a step to t from t - T // S, whatever the previous timestep is, and inverts a v-prediction wrongly.
The comparison covers cases that neither affects; separate tests show both. As in `test_scheduler`, steps are compared
twice: with tables and inputs in float64, and as shipped.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler as DiffusersInverseScheduler
from diffusers import DDIMScheduler as DiffusersScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ddim.diffusion.schedule import SPACINGS
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler
from helpers import ALPHAS, public, randn, relative_error

T = 1000
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
# timestep_spacing, steps_offset, S, where t - T // S is the entry before t.
SUBSEQUENCES = [
    *(("leading", offset, S) for offset in (0, 1) for S in (1, 7, 10, 50)),
    *(("trailing", 0, S) for S in (1, 10, 50, 1000)),
]
NETWORKS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "sample"},
    {"prediction_type": "sample", "rescale_betas_zero_snr": True},
]
CLIPS: list[dict[str, Any]] = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.5},
]
GRID = [
    ({**network, "beta_schedule": betas, "timestep_spacing": spacing, "steps_offset": offset}, S)
    for network in NETWORKS
    for betas in ("linear", "scaled_linear")
    for spacing, offset, S in SUBSEQUENCES
]
GRID_IDS = ["-".join(str(value) for value in (*config.values(), S)) for config, S in GRID]


SAMPLE, OUTPUT = (randn(2, 3, 4, 4, seed=seed, dtype=torch.float64) for seed in range(2))


def in_float64(reference: DiffusersInverseScheduler) -> DiffusersInverseScheduler:
    """Copy the scheduler of diffusers with its tables computed by its own formulas in float64."""
    config, twin = reference.config, copy.copy(reference)
    if config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, T, dtype=torch.float64)
    else:
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float64) ** 2
    twin.alphas_cumprod = (1 - (rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas)).cumprod(
        0
    )
    first = torch.ones((), dtype=torch.float64) if config.set_alpha_to_one else twin.alphas_cumprod[0]
    twin.initial_alpha_cumprod = first
    return twin


def some(timesteps: list[int]) -> list[int]:
    return sorted({timesteps[0], timesteps[len(timesteps) // 2], timesteps[-1]})


def pairs(
    config: dict[str, Any], S: int
) -> Iterator[tuple[DDIMInverseScheduler, DiffusersInverseScheduler, DiffusersInverseScheduler, int]]:
    """Yield our scheduler, that of diffusers, its float64 twin, and a timestep."""
    for clip, set_alpha_to_one in itertools.product(CLIPS, (True, False)):
        ours, reference = (
            make(**config, **clip, set_alpha_to_one=set_alpha_to_one)
            for make in (DDIMInverseScheduler, DiffusersInverseScheduler)
        )
        exact = in_float64(reference)
        for scheduler in (ours, reference, exact):
            scheduler.set_timesteps(S)
        timesteps = reference.timesteps.tolist()
        for t in some(timesteps):
            # From alpha = 1 diffusers divides by zero when x_0 is predicted.
            if not (config["prediction_type"] == "sample" and set_alpha_to_one and t == timesteps[0]):
                yield ours, reference, exact, t


@pytest.mark.parametrize(("timestep_spacing", "steps_offset", "S"), SUBSEQUENCES)
def test_timesteps(timestep_spacing: str, steps_offset: int, S: int) -> None:
    config = {"timestep_spacing": timestep_spacing, "steps_offset": steps_offset}
    ours, reference, forward = (
        DDIMInverseScheduler(**config),
        DiffusersInverseScheduler(**config),
        DiffusersScheduler(**config),
    )
    assert torch.equal(ours.timesteps, reference.timesteps)
    for scheduler in (ours, reference, forward):
        scheduler.set_timesteps(S)
    assert ours.timesteps.dtype == reference.timesteps.dtype == torch.int64
    assert ours.timesteps.tolist() == reference.timesteps.tolist() == forward.timesteps.tolist()[::-1]
    assert ours.num_inference_steps == reference.num_inference_steps == S
    # The condition under which steps of diffusers are comparable.
    timesteps = reference.timesteps.tolist()
    assert [t - T // S for t in timesteps[1:]] == timesteps[:-1]
    assert timesteps[0] - T // S < 0


@pytest.mark.parametrize("S", [1, 7, 50, 999])
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
def test_timesteps_reverse_forward_scheduler(timestep_spacing: str, S: int) -> None:
    forward = DDIMScheduler(timestep_spacing=timestep_spacing)
    inverse = DDIMInverseScheduler.from_config(forward.config)
    for scheduler in (forward, inverse):
        scheduler.set_timesteps(S)
    assert inverse.timesteps.tolist() == forward.timesteps.tolist()[::-1]
    inverse.set_timesteps(timesteps=[900, 30, 2])
    assert inverse.timesteps.tolist() == [2, 30, 900]


@pytest.mark.parametrize(("config", "S"), GRID, ids=GRID_IDS)
def test_step_in_float64(config: dict[str, Any], S: int) -> None:
    for ours, _, exact, t in pairs(config, S):
        a, b = ours.step(OUTPUT, t, SAMPLE), exact.step(OUTPUT, t, SAMPLE)
        assert relative_error(a.prev_sample, b.prev_sample) <= 1e-9, (ours.config, t)
        assert relative_error(a.pred_original_sample, b.pred_original_sample) <= 1e-9, (ours.config, t)


@pytest.mark.parametrize(("config", "S"), GRID, ids=GRID_IDS)
def test_step_as_shipped(config: dict[str, Any], S: int) -> None:
    """The two agree, or ours is closer to the float64 result, to which ours is always close."""
    for ours, reference, exact, t in pairs(config, S):
        truth = exact.step(OUTPUT, t, SAMPLE)
        a, b = (scheduler.step(OUTPUT.float(), t, SAMPLE.float()) for scheduler in (ours, reference))
        for name in ("prev_sample", "pred_original_sample"):
            x, y, z = (result[name] for result in (a, b, truth))
            assert x.dtype == torch.float32
            # x_0 from epsilon is a difference of values larger by 1 / sqrt(alpha), which clipping does not scale back.
            divided = config["prediction_type"] == "epsilon" and ours.alphas_cumprod[t] < 0.01
            bound = 1e-5 if divided and ours.clip is not None else 1e-6
            assert relative_error(x, z) <= bound, (ours.config, t, name)
            assert relative_error(x, y) <= bound or relative_error(x, z) < relative_error(y, z), (ours.config, t, name)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_x0_is_as_accurate_as_diffusers(dtype: torch.dtype, timestep_spacing: str) -> None:
    """Computed from x_t, which the step rounds, x_0 would be lost where alpha is small."""
    config = {"timestep_spacing": timestep_spacing, "clip_sample": False}
    ours, reference = DDIMInverseScheduler(**config), DiffusersInverseScheduler(**config)
    exact = in_float64(reference)
    for scheduler in (ours, reference, exact):
        scheduler.set_timesteps(10)
    for t in reference.timesteps.tolist():
        a = exact.alphas_cumprod[t - 100] if t >= 100 else exact.initial_alpha_cumprod
        x_prev = (a.sqrt() * SAMPLE.clamp(-1, 1) + (1 - a).sqrt() * OUTPUT).to(dtype)
        truth = exact.step(OUTPUT.to(dtype).double(), t, x_prev.double()).pred_original_sample
        x0, theirs = (s.step(OUTPUT.to(dtype), t, x_prev).pred_original_sample for s in (ours, reference))
        assert x0.dtype == dtype
        assert relative_error(x0, truth) <= 2 * relative_error(theirs, truth) + 4 * torch.finfo(dtype).eps, t


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_attributes_read_by_pipelines(prediction_type: str, set_alpha_to_one: bool) -> None:
    arguments = {"prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one}
    ours, reference = DDIMInverseScheduler(**arguments), DiffusersInverseScheduler(**arguments)
    assert len(ours) == len(reference) == T
    assert ours.order == reference.order == 1
    assert ours.init_noise_sigma == reference.init_noise_sigma == 1
    assert ours.num_inference_steps is reference.num_inference_steps is None
    assert ours.scale_model_input(SAMPLE, 5) is SAMPLE
    assert float(ours.initial_alpha_cumprod) == pytest.approx(float(reference.initial_alpha_cumprod), abs=1e-7)
    assert float(ours.initial_alpha_cumprod) == pytest.approx(1 if set_alpha_to_one else 1 - 1e-4, abs=1e-7)
    assert relative_error(ours.alphas_cumprod, reference.alphas_cumprod) <= 1e-5


def test_signatures_and_results_match_diffusers() -> None:
    parameters = [
        list(inspect.signature(cls.step).parameters.values())
        for cls in (DDIMInverseScheduler, DiffusersInverseScheduler)
    ]
    ours, theirs = ([(p.name, p.default) for p in entries] for entries in parameters)
    assert ours == theirs
    assert set(inspect.signature(DiffusersInverseScheduler).parameters) - {"kwargs"} <= set(
        inspect.signature(DDIMInverseScheduler).parameters
    )
    for scheduler in (DDIMInverseScheduler(), DiffusersInverseScheduler()):
        scheduler.set_timesteps(10)
        result = scheduler.step(OUTPUT, 500, SAMPLE)
        pair = scheduler.step(OUTPUT, torch.tensor(500), SAMPLE, return_dict=False)
        assert type(pair) is tuple
        assert torch.equal(result.prev_sample, pair[0])
        assert torch.equal(result.pred_original_sample, pair[1])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}],
)
def test_configurations_are_interchangeable(arguments: dict[str, Any], tmp_path: Path) -> None:
    ours, reference = DDIMInverseScheduler(**arguments), DiffusersInverseScheduler(**arguments)
    theirs = public(reference.config)
    assert set(public(ours.config)) - set(theirs) == {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
    ours.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    twins = [
        DDIMInverseScheduler.from_config(reference.config),
        DDIMInverseScheduler.from_config(DDIMScheduler(**arguments).config),
        DDIMInverseScheduler.from_config(DiffusersScheduler(**arguments).config),
        DDIMInverseScheduler.from_pretrained(tmp_path / "ours"),
        DDIMInverseScheduler.from_pretrained(tmp_path / "theirs"),
    ]
    assert all(type(twin) is DDIMInverseScheduler and public(twin.config) == public(ours.config) for twin in twins)
    assert public(DDIMScheduler.from_config(ours.config).config) == public(ours.config)
    for twin in (
        DiffusersInverseScheduler.from_config(ours.config),
        DiffusersInverseScheduler.from_pretrained(tmp_path / "ours"),
    ):
        assert {name: twin.config[name] for name in theirs} == theirs
    assert json.loads((tmp_path / "ours/scheduler_config.json").read_text())["_class_name"] == "DDIMInverseScheduler"


# Arguments of set_timesteps.
TIMESTEP_ARGUMENTS: dict[str, dict[str, Any]] = {
    "7 steps": {"num_inference_steps": 7},
    "50 steps": {"num_inference_steps": 50},
    "a list": {"timesteps": [998, 600, 599, 31, 2]},
}


def inverses(
    prediction_type: str, name: str, **config: Any
) -> Iterator[tuple[int, DDIMScheduler, DDIMInverseScheduler]]:
    """Yield a timestep, the forward and the inverse scheduler, without clipping."""
    for set_alpha_to_one, zero_snr in itertools.product((True, False), (True, False)):
        forward = DDIMScheduler(
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=set_alpha_to_one,
            rescale_betas_zero_snr=zero_snr,
            **config,
        )
        inverse = DDIMInverseScheduler.from_config(forward.config)
        for scheduler in (forward, inverse):
            scheduler.set_timesteps(**TIMESTEP_ARGUMENTS[name])
        for t in inverse.timesteps.tolist():
            has_no_inverse = prediction_type == "sample" and set_alpha_to_one and t == int(inverse.timesteps[0])
            has_no_signal = prediction_type == "epsilon" and zero_snr and t == T - 1
            # The step between timestep 0 and alphas_cumprod[0] is the identity in both.
            if not has_no_inverse and not has_no_signal:
                yield t, forward, inverse


@pytest.mark.parametrize("name", TIMESTEP_ARGUMENTS)
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_is_inverted_exactly_given_output_at_x_t(prediction_type: str, timestep_spacing: str, name: str) -> None:
    count = 0
    for t, forward, inverse in inverses(prediction_type, name, timestep_spacing=timestep_spacing):
        x_prev, x0 = forward.step(OUTPUT, t, SAMPLE, return_dict=False)
        result = inverse.step(OUTPUT, t, x_prev)
        assert relative_error(result.prev_sample, SAMPLE) <= 1e-9, (inverse.config, t)
        assert relative_error(result.pred_original_sample, x0) <= 1e-9, (inverse.config, t)
        count += 1
    assert count >= 4 * 4


def diffusers_inversion_errors(config: dict[str, Any], S: int) -> list[float]:
    """Return, per timestep, the error of the inverse step of diffusers after its own forward step."""
    config = {**config, "clip_sample": False, "set_alpha_to_one": False}
    forward, reference = DiffusersScheduler(**config), in_float64(DiffusersInverseScheduler(**config))
    ours = DDIMScheduler(**config)
    for scheduler in (forward, ours, reference):
        scheduler.set_timesteps(S)
    assert reference.timesteps.tolist() == ours.timesteps.tolist()[::-1]
    timesteps = reference.timesteps.tolist()[1:]
    return [relative_error(reference.step(OUTPUT, t, ours.step(OUTPUT, t, SAMPLE)[0])[0], SAMPLE) for t in timesteps]


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_diffusers_does_not_invert_v_prediction(timestep_spacing: str) -> None:
    config = {"timestep_spacing": timestep_spacing}
    for right in ("epsilon", "sample"):
        assert max(diffusers_inversion_errors({**config, "prediction_type": right}, 10)) <= 1e-9
    errors = diffusers_inversion_errors({**config, "prediction_type": "v_prediction"}, 10)
    assert min(errors) > 1e-5
    assert max(errors) > 1e-2


def test_diffusers_steps_from_wrong_timestep_if_s_does_not_divide_t() -> None:
    assert max(diffusers_inversion_errors({"timestep_spacing": "trailing"}, 7)) > 1e-4


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clipping_applies_to_x0_of_x_t(prediction_type: str) -> None:
    """With x_t = sqrt(alpha) x_0 + sqrt(1 - alpha) epsilon, x_0 is clipped and epsilon stays."""
    for clip in ({"clip_sample_range": 0.5}, {"thresholding": True, "dynamic_thresholding_ratio": 0.9}):
        config = {"prediction_type": prediction_type, "set_alpha_to_one": False}
        plain = DDIMInverseScheduler(clip_sample=False, **config)
        clipping = DDIMInverseScheduler(**config, **clip)
        for scheduler in (plain, clipping):
            scheduler.set_timesteps(10)
        for t in (100, 500, 900):
            a = torch.tensor(ALPHAS[t])
            x, x0 = plain.step(OUTPUT, t, SAMPLE, return_dict=False)
            epsilon = (x - a.sqrt() * x0) / (1 - a).sqrt()
            if "thresholding" in clip:
                s = x0.abs().flatten(1).quantile(0.9, 1).clamp_min(1).view(-1, 1, 1, 1)
                # sample_max_value is 1 by default, and so is the threshold.
                expected = x0.clamp(-s.clamp_max(1), s.clamp_max(1))
            else:
                expected = x0.clamp(-0.5, 0.5)
            clipped, pred_x0 = clipping.step(OUTPUT, t, SAMPLE, return_dict=False)
            assert relative_error(pred_x0, expected) <= 1e-9
            assert relative_error(clipped, a.sqrt() * expected + (1 - a).sqrt() * epsilon) <= 1e-9


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_requires_set_timesteps(prediction_type: str) -> None:
    with pytest.raises(ValueError, match=r"set_timesteps.* must be called"):
        DDIMInverseScheduler(prediction_type=prediction_type).step(OUTPUT, 500, SAMPLE)


@pytest.mark.parametrize("t", [-1, 1000, 2.5])
def test_timestep_out_of_range_raises(t: Any) -> None:
    inverse = DDIMInverseScheduler()
    inverse.set_timesteps(10)
    with pytest.raises(ValueError, match=f"timesteps must be integers from 0 to .* got {t}"):
        inverse.step(OUTPUT, t, SAMPLE)


def test_x0_prediction_from_clean_image_raises() -> None:
    inverse = DDIMInverseScheduler(prediction_type="sample")
    inverse.set_timesteps(10)
    with pytest.raises(ValueError, match="has no inverse; use set_alpha_to_one=False"):
        inverse.step(OUTPUT, 0, SAMPLE)
    inverse.step(OUTPUT, 100, SAMPLE)


def test_epsilon_prediction_without_signal_raises() -> None:
    inverse = DDIMInverseScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    inverse.set_timesteps(10)
    with pytest.raises(ValueError, match="at timestep 999 the schedule leaves no signal"):
        inverse.step(OUTPUT, 999, SAMPLE)
