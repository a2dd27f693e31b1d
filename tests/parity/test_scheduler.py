"""`DDIMScheduler` against the class of that name in `diffusers`.

The peer computes its tables in float32; their rounding is the larger part of what separates the two as shipped. Each
step is therefore compared twice: with tables and inputs in float64, where the two agree to 1e-9, and as shipped, where
they agree to 1e-6 or ours is the one nearer to the result in float64.
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
from diffusers import DDIMScheduler as Peer
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from ddim.scheduler import DDIMScheduler
from helpers import error, randn, seeded

T = 1000
PREDICTIONS = [
    {"prediction_type": "epsilon"},
    {"prediction_type": "sample"},
    {"prediction_type": "sample", "rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
]
# timestep_spacing, steps_offset, S: those where the peer's t - T // S is the next entry of its timesteps.
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
    """The peer's alphas_cumprod by its own formulas, but in float64."""
    if beta_schedule == "linear":
        betas = torch.linspace(0.0001, 0.02, T, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(0.0001**0.5, 0.02**0.5, T, dtype=torch.float64) ** 2
    else:
        bar = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)], dtype=torch.float64)
    return (1 - (rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas)).cumprod(0)


def in_float64(peer: Peer) -> Peer:
    twin = copy.copy(peer)
    twin.alphas_cumprod = alphas_in_float64(peer.config.beta_schedule, peer.config.rescale_betas_zero_snr)
    last = torch.ones((), dtype=torch.float64) if peer.config.set_alpha_to_one else twin.alphas_cumprod[0]
    twin.final_alpha_cumprod = last
    return twin


def options(config: dict, S: int) -> Iterator[tuple[DDIMScheduler, Peer, Peer, tuple[int, float, bool]]]:
    """Our scheduler, the peer and its twin in float64, with a timestep, eta and use_clipped_model_output for `step`."""
    for clip, set_alpha_to_one in itertools.product(CLIPS, (True, False)):
        ours, peer = (make(**config, **clip, set_alpha_to_one=set_alpha_to_one) for make in (DDIMScheduler, Peer))
        exact = in_float64(peer)
        for scheduler in (ours, peer, exact):
            scheduler.set_timesteps(S)
        timesteps = peer.timesteps.tolist()
        some = sorted({timesteps[0], timesteps[S // 2], timesteps[-1]})
        for arguments in itertools.product(some, (0.0, 0.5, 1.0), (False, True)):
            yield ours, peer, exact, arguments


def step(scheduler: DDIMScheduler | Peer, dtype: torch.dtype, t: int, eta: float, clipped: bool) -> list[Tensor]:
    noise = NOISE.to(dtype) if eta else None
    result = scheduler.step(OUTPUT.to(dtype), t, SAMPLE.to(dtype), eta, clipped, variance_noise=noise)
    return [result.prev_sample, result.pred_original_sample]


def exact_step(peer: Peer, t: int, eta: float, clipped: bool) -> list[Tensor]:
    prev, x0 = step(peer, torch.float64, t, eta, clipped)
    if prev.isnan().any():
        # From alpha = 0 equation (16) gives sigma^2 = 1 - alpha_prev for eta = 1, so that no epsilon is left. The peer
        # takes the root of the difference, which is a rounding error of either sign.
        assert (peer.alphas_cumprod[t], eta, peer.num_inference_steps) == (0, 1, 1)
        prev = peer.final_alpha_cumprod.sqrt() * x0 + (1 - peer.final_alpha_cumprod).sqrt() * NOISE.double()
    return [prev, x0]


@pytest.mark.parametrize(("timestep_spacing", "steps_offset", "S"), SUBSEQUENCES)
def test_grid_holds_only_correct_cases_of_diffusers(timestep_spacing: str, steps_offset: int, S: int) -> None:
    ours, peer = (make(timestep_spacing=timestep_spacing, steps_offset=steps_offset) for make in (DDIMScheduler, Peer))
    ours.set_timesteps(S)
    peer.set_timesteps(S)
    timesteps = peer.timesteps.tolist()
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
    for ours, peer, exact, arguments in options(config, S):
        # An x_0 from epsilon is divided by sqrt(alpha), which leaves it some 1e-7 / sqrt(alpha) of error in float32,
        # small beside its range until that is clipped to [-1, 1].
        divided = config["prediction_type"] == "epsilon" and exact.alphas_cumprod[arguments[0]] < 0.01
        bound = 3e-5 if divided and ours.clip is not None else 1e-6
        results = (
            step(ours, torch.float32, *arguments),
            step(peer, torch.float32, *arguments),
            exact_step(exact, *arguments),
        )
        for a, b, c in zip(*results, strict=True):
            scale = max(1.0, c.abs().max().item())
            ours_off, peer_off, apart = error(a, c) / scale, error(b, c) / scale, error(a, b) / scale
            assert ours_off <= bound, (ours.config, arguments)
            # The peer is NaN as in `exact_step`, and where float32 makes that difference negative.
            nearer = ours_off < peer_off or math.isnan(peer_off)
            assert apart <= bound or nearer, (ours.config, arguments)


@pytest.mark.parametrize("kind", ["one", "list", "global"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_loop_draws_noise_of_diffusers(dtype: torch.dtype, eta: float, kind: str) -> None:
    ends, states = [], []
    for scheduler in (DDIMScheduler(), in_float64(Peer())):
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


def by_hand(t: int, later: int | None, eta: float) -> Tensor:
    """Equations (12) and (16) without clipping, from `t` to `later`, for a predicted epsilon."""
    alphas = alphas_in_float64("linear", False)
    a, p = alphas[t], torch.ones(()) if later is None else alphas[later]
    x, epsilon = SAMPLE.double(), OUTPUT.double()
    sigma = eta * ((1 - p) / (1 - a)).sqrt() * (1 - a / p).sqrt()
    x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
    return p.sqrt() * x0 + (1 - p - sigma**2).sqrt() * epsilon + sigma * NOISE.double()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("timestep_spacing", "S", "peer_is_wrong"),
    [("linspace", 7, True), ("linspace", 50, True), ("trailing", 7, True), ("quad", 10, None), ("logsnr", 10, None)],
)
def test_step_leads_to_next_timestep(timestep_spacing: str, S: int, peer_is_wrong: bool | None, eta: float) -> None:
    ours = DDIMScheduler(timestep_spacing=timestep_spacing, clip_sample=False)
    ours.set_timesteps(S)
    timesteps = ours.timesteps.tolist()
    for t, later in zip(timesteps, [*timesteps[1:], None], strict=True):
        assert error(step(ours, torch.float64, t, eta, False)[0], by_hand(t, later, eta)) <= 1e-9
    if peer_is_wrong:
        peer = in_float64(Peer(timestep_spacing=timestep_spacing, clip_sample=False))
        peer.set_timesteps(S)
        assert peer.timesteps.tolist() == timesteps
        t, later = timesteps[1:3]
        assert error(step(peer, torch.float64, t, eta, False)[0], by_hand(t, later, eta)) > 1e-4


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_custom_timesteps_are_followed(kind: type) -> None:
    ours = DDIMScheduler(clip_sample=False)
    ours.set_timesteps(timesteps=kind([900, 300, 299, 5]))
    assert ours.num_inference_steps == 4
    for t, later in [(900, 300), (300, 299), (299, 5), (5, None), (600, 300), (2, None)]:
        assert error(step(ours, torch.float64, t, 1.0, False)[0], by_hand(t, later, 1.0)) <= 1e-9


def test_timestep_may_be_tensor() -> None:
    ours = DDIMScheduler()
    ours.set_timesteps(10)
    assert torch.equal(ours.step(OUTPUT, torch.tensor(500), SAMPLE)[0], ours.step(OUTPUT, 500, SAMPLE)[0])


def test_epsilon_with_zero_snr_matches_where_signal_remains() -> None:
    config = {"rescale_betas_zero_snr": True, "clip_sample": False}
    ours, exact = DDIMScheduler(**config), in_float64(Peer(**config))
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
    ours, peer = DDIMScheduler(**config), Peer(**config)
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        table, theirs = getattr(ours, name), getattr(peer, name)
        assert table.dtype == theirs.dtype == torch.float32
        assert table.shape == theirs.shape
        assert error(table, theirs) <= 1e-5, name
    exact = alphas_in_float64(beta_schedule, rescale_betas_zero_snr)
    assert torch.equal(ours.alphas_cumprod, exact.float())


def test_trained_betas() -> None:
    betas = [0.1, 0.2, 0.3, 0.4]
    ours, peer = (make(num_train_timesteps=4, trained_betas=betas) for make in (DDIMScheduler, Peer))
    assert torch.equal(ours.betas, peer.betas)
    assert error(ours.alphas_cumprod, peer.alphas_cumprod) <= 1e-7
    assert len(ours) == len(peer) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("timesteps", [[0, 999], [500, 3], [7], 7])
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_add_noise_and_get_velocity(method: str, timesteps: list[int] | int, dtype: torch.dtype) -> None:
    ours, peer = DDIMScheduler(), Peer()
    x0, noise, t = SAMPLE.to(dtype), NOISE.to(dtype), torch.tensor(timesteps)
    result, theirs = (getattr(scheduler, method)(x0, noise, t) for scheduler in (ours, peer))
    assert result.dtype == theirs.dtype == dtype
    if dtype in (torch.float32, torch.float64):
        assert error(result, theirs) <= 1e-5
    peer.alphas_cumprod = ours.alphas_cumprod
    assert torch.equal(result, getattr(peer, method)(x0, noise, t))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_training_target_follows_prediction_type(prediction_type: str) -> None:
    t = torch.tensor([3, 500])
    wanted = {"epsilon": NOISE, "sample": SAMPLE, "v_prediction": Peer().get_velocity(SAMPLE, NOISE, t)}
    target = DDIMScheduler(prediction_type=prediction_type).training_target(SAMPLE, NOISE, t)
    assert error(target, wanted[prediction_type]) <= 1e-5


def test_attributes_read_by_pipelines() -> None:
    ours, peer = DDIMScheduler(), Peer()
    assert len(ours) == len(peer) == T
    assert ours.order == peer.order == 1
    assert ours.init_noise_sigma == peer.init_noise_sigma == 1
    assert ours.num_inference_steps is peer.num_inference_steps is None
    assert ours.scale_model_input(SAMPLE, 5) is SAMPLE
    assert torch.equal(ours.timesteps, peer.timesteps)
    for scheduler in (ours, peer):
        scheduler.set_timesteps(50, device="cpu")
    assert ours.num_inference_steps == peer.num_inference_steps == 50
    assert ours.timesteps.dtype == peer.timesteps.dtype == torch.int64
    assert torch.equal(ours.timesteps, peer.timesteps)


@pytest.mark.parametrize(
    "method", ["__init__", "step", "add_noise", "get_velocity", "scale_model_input", "set_timesteps"]
)
def test_signatures_match_diffusers(method: str) -> None:
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(getattr(cls, method)).parameters.values()]
        for cls in (DDIMScheduler, Peer)
    )
    if method == "set_timesteps":
        # Ours takes a list in place of the number, which is therefore optional.
        ours, theirs = ([name for name, _ in arguments] for arguments in (ours[:3], theirs))
    if method == "__init__":
        # Ours alone, after the peer's.
        assert [ours.pop() for _ in OURS] == [("timesteps_by_steps", None), ("solver_order", 1)]
    assert ours == theirs


def test_results_are_tuples_on_request() -> None:
    ours, peer = DDIMScheduler(), Peer()
    for scheduler in (ours, peer):
        scheduler.set_timesteps(10)
        result = scheduler.step(OUTPUT, 500, SAMPLE)
        pair = scheduler.step(OUTPUT, 500, SAMPLE, return_dict=False)
        assert type(pair) is tuple
        assert torch.equal(result.prev_sample, pair[0])
        assert torch.equal(result.pred_original_sample, pair[1])
        assert result["prev_sample"] is result[0] is result.prev_sample
        assert len(result.to_tuple()) == len(pair) == 2


OURS = ("solver_order", "timesteps_by_steps")


def public(config: dict) -> dict:
    """But for what is ours alone."""
    return {name: value for name, value in config.items() if not name.startswith("_") and name not in OURS}


@pytest.mark.parametrize("arguments", [{}, {"beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}])
def test_configurations_are_interchangeable(arguments: dict) -> None:
    ours, peer = DDIMScheduler(**arguments), Peer(**arguments)
    assert public(ours.config) == public(peer.config)
    assert public(Peer.from_config(ours.config).config) == public(peer.config)
    assert public(DDIMScheduler.from_config(peer.config).config) == public(ours.config)
    for name, value in public(peer.config).items():
        assert getattr(ours.config, name) == ours.config[name] == value


@pytest.mark.parametrize(
    "arguments", [{}, {"beta_schedule": "sigmoid", "variance_type": "fixed_large", "clip_sample": False}]
)
def test_from_ddpm_config(arguments: dict) -> None:
    config = DDPMScheduler(**arguments).config
    ours = DDIMScheduler.from_config(config)
    assert "variance_type" not in ours.config
    assert all(ours.config[name] == config[name] for name in set(ours.config) & set(config))
    assert DDIMScheduler.from_config(config, prediction_type="sample").config.prediction_type == "sample"
    if arguments.get("beta_schedule") != "sigmoid":
        assert public(ours.config) == public(Peer.from_config(config).config)


def test_step_requires_set_timesteps() -> None:
    for scheduler in (DDIMScheduler(), Peer()):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(OUTPUT, 500, SAMPLE)


def test_generator_with_variance_noise_raises() -> None:
    for scheduler in (DDIMScheduler(), Peer()):
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="generator"):
            scheduler.step(OUTPUT, 500, SAMPLE, 1.0, generator=torch.Generator(), variance_noise=NOISE)


def test_zero_eta_ignores_generator_and_variance_noise() -> None:
    for scheduler in (DDIMScheduler(), Peer()):
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
    ("arguments", "named"),
    [
        ({"prediction_type": "score"}, "prediction_type must be one of .* got 'score'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of .* got 'karras'"),
        ({"beta_schedule": "cubic"}, "beta_schedule must be one of .* got 'cubic'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer of at least 1, got 0"),
        ({"beta_end": 1.5}, r"beta_end must be a number above 0 and below 1, got 1\.5"),
        ({"trained_betas": [0.1, 2.0]}, "trained_betas must be"),
        ({"clip_sample_range": 0.0}, r"clip_sample_range must be a number above 0, got 0\.0"),
        ({"clip_sample_range": float("nan")}, "clip_sample_range must be a number above 0, got nan"),
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
def test_invalid_options_raise(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DDIMScheduler(**arguments)


@pytest.mark.parametrize("S", [0, -3, 1001, 2.5, "ten", True])
def test_invalid_step_count_raises(S: object) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps must .* got {S!r}"):
        DDIMScheduler().set_timesteps(S)


@pytest.mark.parametrize("arguments", [{}, {"num_inference_steps": 2, "timesteps": [5, 0]}])
def test_step_count_with_timesteps_raises(arguments: dict) -> None:
    with pytest.raises(ValueError, match="give either num_inference_steps or timesteps"):
        DDIMScheduler().set_timesteps(**arguments)
