"""`DDIMScheduler` against the class of that name in `diffusers`.

`diffusers` computes its tables in float32, whose rounding causes most of the difference between the two as shipped.
Each step is therefore compared twice: with tables and inputs in float64, where the two agree to 1e-9, and as shipped,
where they agree to 1e-6 or ours is closer to the result in float64.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from diffusers import DDIMScheduler as DiffusersScheduler
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from ddim.scheduler import DDIMScheduler
from helpers import error, public, randn, seeded

T = 1000
PREDICTIONS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "sample"},
    {"prediction_type": "sample", "rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]
# timestep_spacing, steps_offset, S, where t - T // S of diffusers is the next entry of its timesteps.
SUBSEQUENCES = [
    *(("leading", 0, S) for S in (1, 7, 10, 50, 1000)),
    *(("leading", 1, S) for S in (1, 7, 10, 50)),
    *(("trailing", 0, S) for S in (1, 10, 50, 1000)),
    *(("linspace", 0, S) for S in (1, 1000)),
]
GRID = [
    ({**prediction, "beta_schedule": betas, "timestep_spacing": spacing, "steps_offset": offset}, S)
    for prediction in PREDICTIONS
    for betas in ("linear", "scaled_linear", "squaredcos_cap_v2")
    for spacing, offset, S in SUBSEQUENCES
]
GRID_IDS = ["-".join(str(value) for value in (*config.values(), S)) for config, S in GRID]
# A sample_max_value of 1, the default, would make thresholding plain clipping.
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}
CLIPS = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"clip_sample": False, **THRESHOLDING},
    {"clip_sample": True, **THRESHOLDING},
]


SAMPLE, OUTPUT, NOISE = (randn(2, 3, 4, 4, seed=seed) for seed in range(3))


@cache
def alphas_in_float64(beta_schedule: str, rescale_betas_zero_snr: bool) -> Tensor:
    """Compute alphas_cumprod of diffusers by its own formulas, in float64."""
    if beta_schedule == "linear":
        betas = torch.linspace(0.0001, 0.02, T, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(0.0001**0.5, 0.02**0.5, T, dtype=torch.float64) ** 2
    else:
        bar = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)], dtype=torch.float64)
    return (1 - (rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas)).cumprod(0)


def in_float64(reference: DiffusersScheduler) -> DiffusersScheduler:
    twin = copy.copy(reference)
    twin.alphas_cumprod = alphas_in_float64(reference.config.beta_schedule, reference.config.rescale_betas_zero_snr)
    last = torch.ones((), dtype=torch.float64) if reference.config.set_alpha_to_one else twin.alphas_cumprod[0]
    twin.final_alpha_cumprod = last
    return twin


def options(
    config: dict, S: int
) -> Iterator[tuple[DDIMScheduler, DiffusersScheduler, DiffusersScheduler, tuple[int, float, bool]]]:
    """Yield our scheduler, that of diffusers, its float64 twin, and timestep, eta and use_clipped_model_output.

    A case of the grid has one kind of clipping: each meets every subsequence, prediction type and schedule.
    """
    block, place = divmod(GRID.index((config, S)), len(SUBSEQUENCES))
    clip = CLIPS[(block + place) % len(CLIPS)]
    for set_alpha_to_one in (True, False):
        ours, reference = (
            make(**config, **clip, set_alpha_to_one=set_alpha_to_one) for make in (DDIMScheduler, DiffusersScheduler)
        )
        exact = in_float64(reference)
        for scheduler in (ours, reference, exact):
            scheduler.set_timesteps(S)
        timesteps = reference.timesteps.tolist()
        some = sorted({timesteps[0], timesteps[S // 2], timesteps[-1]})
        for arguments in itertools.product(some, (0.0, 0.5, 1.0), (False, True)):
            yield ours, reference, exact, arguments


def step(
    scheduler: DDIMScheduler | DiffusersScheduler, dtype: torch.dtype, t: int, eta: float, clipped: bool
) -> list[Tensor]:
    noise = NOISE.to(dtype) if eta else None
    result = scheduler.step(OUTPUT.to(dtype), t, SAMPLE.to(dtype), eta, clipped, variance_noise=noise)
    return [result.prev_sample, result.pred_original_sample]


def exact_step(reference: DiffusersScheduler, t: int, eta: float, clipped: bool) -> list[Tensor]:
    prev, x0 = step(reference, torch.float64, t, eta, clipped)
    if prev.isnan().any():
        # From alpha = 0 equation (16) gives sigma^2 = 1 - alpha_prev for eta = 1, so that no epsilon is left.
        # diffusers takes the root of the difference, which is a rounding error of either sign.
        assert (reference.alphas_cumprod[t], eta, reference.num_inference_steps) == (0, 1, 1)
        prev = reference.final_alpha_cumprod.sqrt() * x0 + (1 - reference.final_alpha_cumprod).sqrt() * NOISE.double()
    return [prev, x0]


@pytest.mark.parametrize(("timestep_spacing", "steps_offset", "S"), SUBSEQUENCES)
def test_grid_holds_only_correct_cases_of_diffusers(timestep_spacing: str, steps_offset: int, S: int) -> None:
    ours, reference = (
        make(timestep_spacing=timestep_spacing, steps_offset=steps_offset)
        for make in (DDIMScheduler, DiffusersScheduler)
    )
    ours.set_timesteps(S)
    reference.set_timesteps(S)
    timesteps = reference.timesteps.tolist()
    assert ours.timesteps.tolist() == timesteps
    assert [t - T // S for t in timesteps[:-1]] == timesteps[1:]
    assert timesteps[-1] - T // S < 0


@pytest.mark.parametrize(("config", "S"), GRID, ids=GRID_IDS)
def test_step_in_float64(config: dict, S: int) -> None:
    for ours, _, exact, arguments in options(config, S):
        for a, b in zip(step(ours, torch.float64, *arguments), exact_step(exact, *arguments), strict=True):
            assert error(a, b) <= 1e-9, (ours.config, arguments)


@pytest.mark.parametrize(("config", "S"), GRID, ids=GRID_IDS)
def test_step_as_shipped(config: dict, S: int) -> None:
    for ours, reference, exact, arguments in options(config, S):
        # An x_0 from epsilon is divided by sqrt(alpha), which leaves it some 1e-7 / sqrt(alpha) of error in float32,
        # small beside its range until that is clipped to [-1, 1].
        divided = config["prediction_type"] == "epsilon" and exact.alphas_cumprod[arguments[0]] < 0.01
        bound = 3e-5 if divided and ours.clip is not None else 1e-6
        results = (
            step(ours, torch.float32, *arguments),
            step(reference, torch.float32, *arguments),
            exact_step(exact, *arguments),
        )
        for a, b, c in zip(*results, strict=True):
            scale = max(1.0, c.abs().max().item())
            our_error, reference_error, difference = error(a, c) / scale, error(b, c) / scale, error(a, b) / scale
            assert our_error <= bound, (ours.config, arguments)
            # diffusers gives NaN as in `exact_step`, and where float32 makes that difference negative.
            is_closer = our_error < reference_error or math.isnan(reference_error)
            assert difference <= bound or is_closer, (ours.config, arguments)


@pytest.mark.parametrize("kind", ["one", "list", "global"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_loop_draws_noise_of_diffusers(dtype: torch.dtype, eta: float, kind: str) -> None:
    ends, states = [], []
    for scheduler in (DDIMScheduler(), in_float64(DiffusersScheduler())):
        torch.manual_seed(3)
        generators = [seeded(seed) for seed in (1, 2)]
        generator = {"one": generators[0], "list": generators, "global": None}[kind]
        scheduler.set_timesteps(10)
        x = SAMPLE.to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x * (1 + t / T)) + 0.1, t, x, eta, generator=generator).prev_sample
        ends.append(x)
        states.append([torch.get_rng_state(), *(g.get_state() for g in generators)])
    assert ends[0].dtype == dtype
    assert error(*ends) <= (1e-6 if dtype == torch.float32 else 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_variance_noise_matches_generator(eta: float) -> None:
    ours = DDIMScheduler()
    ours.set_timesteps(10)
    drawn = ours.step(OUTPUT, 500, SAMPLE, eta, generator=seeded(2)).prev_sample
    assert torch.equal(drawn, ours.step(OUTPUT, 500, SAMPLE, eta, variance_noise=NOISE).prev_sample)


def expected_step(t: int, t_prev: int | None, eta: float) -> Tensor:
    """Apply equations (12) and (16) without clipping, from `t` to `t_prev`, for predicted epsilon."""
    alphas = alphas_in_float64("linear", False)
    a, p = alphas[t], torch.ones(()) if t_prev is None else alphas[t_prev]
    x, epsilon = SAMPLE.double(), OUTPUT.double()
    sigma = eta * ((1 - p) / (1 - a)).sqrt() * (1 - a / p).sqrt()
    x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
    return p.sqrt() * x0 + (1 - p - sigma**2).sqrt() * epsilon + sigma * NOISE.double()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("timestep_spacing", "S", "diffusers_is_wrong"),
    [("linspace", 7, True), ("linspace", 50, True), ("trailing", 7, True), ("quad", 10, None), ("logsnr", 10, None)],
)
def test_step_leads_to_next_timestep(
    timestep_spacing: str, S: int, diffusers_is_wrong: bool | None, eta: float
) -> None:
    ours = DDIMScheduler(timestep_spacing=timestep_spacing, clip_sample=False)
    ours.set_timesteps(S)
    timesteps = ours.timesteps.tolist()
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        assert error(step(ours, torch.float64, t, eta, False)[0], expected_step(t, t_prev, eta)) <= 1e-9
    if diffusers_is_wrong:
        reference = in_float64(DiffusersScheduler(timestep_spacing=timestep_spacing, clip_sample=False))
        reference.set_timesteps(S)
        assert reference.timesteps.tolist() == timesteps
        t, t_prev = timesteps[1:3]
        assert error(step(reference, torch.float64, t, eta, False)[0], expected_step(t, t_prev, eta)) > 1e-4


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_custom_timesteps_are_followed(kind: type) -> None:
    ours = DDIMScheduler(clip_sample=False)
    ours.set_timesteps(timesteps=kind([900, 300, 299, 5]))
    assert ours.num_inference_steps == 4
    for t, t_prev in [(900, 300), (300, 299), (299, 5), (5, None), (600, 300), (2, None)]:
        assert error(step(ours, torch.float64, t, 1.0, False)[0], expected_step(t, t_prev, 1.0)) <= 1e-9


def test_timestep_may_be_tensor() -> None:
    ours = DDIMScheduler()
    ours.set_timesteps(10)
    assert torch.equal(ours.step(OUTPUT, torch.tensor(500), SAMPLE)[0], ours.step(OUTPUT, 500, SAMPLE)[0])


def test_epsilon_with_zero_snr_matches_where_signal_remains() -> None:
    config = {"rescale_betas_zero_snr": True, "clip_sample": False}
    ours, exact = DDIMScheduler(**config), in_float64(DiffusersScheduler(**config))
    for scheduler in (ours, exact):
        scheduler.set_timesteps(10)
    for t in exact.timesteps.tolist():
        assert error(step(ours, torch.float64, t, 1.0, False)[0], step(exact, torch.float64, t, 1.0, False)[0]) <= 1e-9
    with pytest.raises(ValueError, match="at timestep 999 the schedule leaves no signal"):
        ours.step(OUTPUT, 999, SAMPLE)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("rescale_betas_zero_snr", [True, False])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables(beta_schedule: str, rescale_betas_zero_snr: bool, set_alpha_to_one: bool) -> None:
    config = {
        "beta_schedule": beta_schedule,
        "rescale_betas_zero_snr": rescale_betas_zero_snr,
        "set_alpha_to_one": set_alpha_to_one,
    }
    ours, reference = DDIMScheduler(**config), DiffusersScheduler(**config)
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        table, theirs = getattr(ours, name), getattr(reference, name)
        assert table.dtype == theirs.dtype == torch.float32
        assert table.shape == theirs.shape
        assert error(table, theirs) <= 1e-5, name
    exact = alphas_in_float64(beta_schedule, rescale_betas_zero_snr)
    assert torch.equal(ours.alphas_cumprod, exact.float())


def test_trained_betas() -> None:
    betas = [0.1, 0.2, 0.3, 0.4]
    ours, reference = (make(num_train_timesteps=4, trained_betas=betas) for make in (DDIMScheduler, DiffusersScheduler))
    assert torch.equal(ours.betas, reference.betas)
    assert error(ours.alphas_cumprod, reference.alphas_cumprod) <= 1e-7
    assert len(ours) == len(reference) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("timesteps", [[0, 999], [500, 3], [7], 7])
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_add_noise_and_get_velocity(method: str, timesteps: list[int] | int, dtype: torch.dtype) -> None:
    ours, reference = DDIMScheduler(), DiffusersScheduler()
    x0, noise, t = SAMPLE.to(dtype), NOISE.to(dtype), torch.tensor(timesteps)
    result, theirs = (getattr(scheduler, method)(x0, noise, t) for scheduler in (ours, reference))
    assert result.dtype == theirs.dtype == dtype
    if dtype in (torch.float32, torch.float64):
        assert error(result, theirs) <= 1e-5
    # Coefficients from the exact schedule, rounded last.
    alphas = torch.from_numpy(ours.alphas_cumprod_float64)[t].reshape(-1, 1, 1, 1)
    signal, scale = alphas.sqrt().to(dtype), (1 - alphas).sqrt().to(dtype)
    assert torch.equal(result, signal * x0 + scale * noise if method == "add_noise" else signal * noise - scale * x0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_training_target_follows_prediction_type(prediction_type: str) -> None:
    t = torch.tensor([3, 500])
    expected = {"epsilon": NOISE, "sample": SAMPLE, "v_prediction": DiffusersScheduler().get_velocity(SAMPLE, NOISE, t)}
    target = DDIMScheduler(prediction_type=prediction_type).training_target(SAMPLE, NOISE, t)
    assert error(target, expected[prediction_type]) <= 1e-5


def test_attributes_read_by_pipelines() -> None:
    ours, reference = DDIMScheduler(), DiffusersScheduler()
    assert len(ours) == len(reference) == T
    assert ours.order == reference.order == 1
    assert ours.init_noise_sigma == reference.init_noise_sigma == 1
    assert ours.num_inference_steps is reference.num_inference_steps is None
    assert ours.scale_model_input(SAMPLE, 5) is SAMPLE
    assert torch.equal(ours.timesteps, reference.timesteps)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(50, device="cpu")
    assert ours.num_inference_steps == reference.num_inference_steps == 50
    assert ours.timesteps.dtype == reference.timesteps.dtype == torch.int64
    assert torch.equal(ours.timesteps, reference.timesteps)


@pytest.mark.parametrize(
    "method", ["__init__", "step", "add_noise", "get_velocity", "scale_model_input", "set_timesteps"]
)
def test_signatures_match_diffusers(method: str) -> None:
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(getattr(cls, method)).parameters.values()]
        for cls in (DDIMScheduler, DiffusersScheduler)
    )
    if method == "set_timesteps":
        # Ours accepts a list instead of the number, which is therefore optional.
        ours, theirs = ([name for name, _ in arguments] for arguments in (ours[:3], theirs))
    if method == "__init__":
        # Our additional arguments follow those of diffusers.
        assert [ours.pop() for _ in OURS] == [
            ("coefficients_by_steps", None),
            ("timesteps_by_steps", None),
            ("solver_order", 1),
        ]
    assert ours == theirs


def test_results_are_tuples_on_request() -> None:
    ours, reference = DDIMScheduler(), DiffusersScheduler()
    for scheduler in (ours, reference):
        scheduler.set_timesteps(10)
        result = scheduler.step(OUTPUT, 500, SAMPLE)
        pair = scheduler.step(OUTPUT, 500, SAMPLE, return_dict=False)
        assert type(pair) is tuple
        assert torch.equal(result.prev_sample, pair[0])
        assert torch.equal(result.pred_original_sample, pair[1])
        assert result["prev_sample"] is result[0] is result.prev_sample
        assert len(result.to_tuple()) == len(pair) == 2


OURS = ("solver_order", "timesteps_by_steps", "coefficients_by_steps")


@pytest.mark.parametrize("arguments", [{}, {"beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}])
def test_configurations_are_interchangeable(arguments: dict) -> None:
    ours, reference = DDIMScheduler(**arguments), DiffusersScheduler(**arguments)
    assert public(ours.config) == public(reference.config)
    assert public(DiffusersScheduler.from_config(ours.config).config) == public(reference.config)
    assert public(DDIMScheduler.from_config(reference.config).config) == public(ours.config)
    for name, value in public(reference.config).items():
        assert getattr(ours.config, name) == ours.config[name] == value


@pytest.mark.parametrize(
    "arguments", [{}, {"beta_schedule": "sigmoid", "variance_type": "fixed_large", "clip_sample": False}]
)
def test_from_ddpm_config(arguments: dict) -> None:
    config = DDPMScheduler(**arguments).config
    ours = DDIMScheduler.from_config(config)
    assert all(ours.config[name] == config[name] for name in set(public(ours.config)) & set(config))
    assert DDIMScheduler.from_config(config, prediction_type="sample").config.prediction_type == "sample"
    if arguments.get("beta_schedule") != "sigmoid":
        assert public(ours.config) == public(DiffusersScheduler.from_config(config).config)


def test_step_requires_set_timesteps() -> None:
    for scheduler in (DDIMScheduler(), DiffusersScheduler()):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(OUTPUT, 500, SAMPLE)


def test_generator_with_variance_noise_raises() -> None:
    for scheduler in (DDIMScheduler(), DiffusersScheduler()):
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="generator"):
            scheduler.step(OUTPUT, 500, SAMPLE, 1.0, generator=torch.Generator(), variance_noise=NOISE)


def test_zero_eta_ignores_generator_and_variance_noise() -> None:
    for scheduler in (DDIMScheduler(), DiffusersScheduler()):
        scheduler.set_timesteps(10)
        generator = torch.Generator()
        before = generator.get_state()
        prev = scheduler.step(OUTPUT, 500, SAMPLE, 0.0, generator=generator, variance_noise=NOISE).prev_sample
        assert torch.equal(prev, scheduler.step(OUTPUT, 500, SAMPLE).prev_sample)
        assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_invalid_eta_raises(eta: float) -> None:
    ours = DDIMScheduler()
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=f"eta must .* got {eta}"):
        ours.step(OUTPUT, 500, SAMPLE, eta)


@pytest.mark.parametrize("t", [-1, 1000])
def test_timestep_out_of_range_raises(t: int) -> None:
    ours = DDIMScheduler()
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=f"timesteps must be integers from 0 to 999, got {t}"):
        ours.step(OUTPUT, t, SAMPLE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "score"}, "prediction_type must be one of .* got 'score'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of .* got 'karras'"),
        ({"beta_schedule": "cubic"}, "beta_schedule must be one of .* got 'cubic'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer from 1 to 1000000, got 0"),
        ({"beta_end": 1.5}, r"beta_end must be a number above 0 and below 1, got 1\.5"),
        ({"trained_betas": [0.1, 2.0]}, "trained_betas must be"),
        ({"clip_sample_range": 0.0}, r"clip_sample_range must be a number above 0 and below 1e\+06, got 0\.0"),
        ({"clip_sample_range": float("nan")}, "clip_sample_range must be a finite number, got nan"),
        (
            {"dynamic_thresholding_ratio": 0.0},
            r"dynamic_thresholding_ratio must be a number above 0 and at most 1, got 0\.0",
        ),
        (
            {"dynamic_thresholding_ratio": 1.5},
            r"dynamic_thresholding_ratio must be a number above 0 and at most 1, got 1\.5",
        ),
    ],
)
def test_invalid_options_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDIMScheduler(**arguments)


@pytest.mark.parametrize("S", [0, -3, 1001, 2.5, "ten", True])
def test_invalid_step_count_raises(S: object) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must .* got {S!r}"):
        DDIMScheduler().set_timesteps(S)


@pytest.mark.parametrize("arguments", [{}, {"num_inference_steps": 2, "timesteps": [5, 0]}])
def test_step_count_with_timesteps_raises(arguments: dict) -> None:
    with pytest.raises(ValueError, match="give either num_inference_steps or timesteps"):
        DDIMScheduler().set_timesteps(**arguments)
