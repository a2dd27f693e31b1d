"""Betas against the formulas of their publications, timesteps against the paper's code and `diffusers`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as DiffusersScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim.diffusion.schedule import (
    BETA_SCHEDULES,
    SPACINGS,
    check_betas,
    check_timesteps,
    check_timesteps_by_steps,
    make_alphas_cumprod,
    make_betas,
    make_timesteps,
    rescale_zero_terminal_snr,
)

T = 1000
LINEAR = make_alphas_cumprod(make_betas("linear", T))


def original_betas(beta_schedule: str, beta_start: float, beta_end: float, steps: int) -> np.ndarray:
    """`get_beta_schedule` of github.com/ermongroup/ddim, under this library's names."""
    if beta_schedule in ("quad", "scaled_linear"):
        return np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, steps, dtype=np.float64)
    if beta_schedule == "const":
        return beta_end * np.ones(steps, dtype=np.float64)
    if beta_schedule == "jsd":
        return 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)
    betas = np.linspace(-6, 6, steps)
    return 1 / (np.exp(-betas) + 1) * (beta_end - beta_start) + beta_start


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
@pytest.mark.parametrize("beta_schedule", [name for name in BETA_SCHEDULES if name != "squaredcos_cap_v2"])
def test_betas_match_original_code(beta_schedule: str, steps: int) -> None:
    betas = make_betas(beta_schedule, steps, 0.0002, 0.03)
    assert betas.dtype == np.float64
    assert betas.shape == (steps,)
    np.testing.assert_allclose(betas, original_betas(beta_schedule, 0.0002, 0.03, steps), rtol=1e-14)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_cosine_betas_match_published_alpha_bar(steps: int) -> None:
    betas = make_betas("squaredcos_cap_v2", steps)
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    # The last beta alone is capped: alpha-bar would otherwise be 0.
    np.testing.assert_allclose(make_alphas_cumprod(betas)[:-1], np.array(f[1:-1]) / f[0], rtol=1e-10)
    assert betas[-1] == 0.999
    assert np.all(betas[:-1] < 0.999)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_alphas_cumprod_is_running_product(beta_schedule: str) -> None:
    betas = make_betas(beta_schedule, 30)
    np.testing.assert_allclose(
        make_alphas_cumprod(betas), [math.prod(1 - betas[: t + 1]) for t in range(30)], rtol=1e-13
    )


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_keeps_first_and_zeroes_last_alpha(beta_schedule: str) -> None:
    alphas = make_alphas_cumprod(make_betas(beta_schedule, T))
    rescaled = rescale_zero_terminal_snr(make_betas(beta_schedule, T))
    rescaled_alphas = make_alphas_cumprod(rescaled)
    assert rescaled[-1] == 1
    assert rescaled_alphas[-1] == 0
    assert rescaled_alphas[0] == pytest.approx(alphas[0], rel=1e-14)
    # Algorithm 1 of arXiv 2305.08891: an affine map of sqrt(alpha-bar).
    root, rescaled_root = np.sqrt(alphas), np.sqrt(rescaled_alphas)
    np.testing.assert_allclose(rescaled_root, root[0] * (root - root[-1]) / (root[0] - root[-1]), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("cubic", 10), "cubic"),
        (("linear", 0), "num_train_timesteps must be an integer from 1 to 1000000, got 0"),
        (("linear", 10.5), "num_train_timesteps must be an integer from 1 to 1000000, got 10.5"),
        (("linear", 10, 0.0), "beta_start must be a number above 0 and below 1, got 0.0"),
        (("linear", 10, 0.1, 1.0), "beta_end must be a number above 0 and below 1, got 1.0"),
        (("linear", 10, float("nan")), "beta_start must be a number above 0 and below 1, got nan"),
    ],
)
def test_invalid_betas_raise(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_betas(*arguments)


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.1], [0.1, float("nan")], 0.1])
def test_invalid_trained_betas_raise(betas: object) -> None:
    with pytest.raises(ValueError, match="trained_betas must be"):
        check_betas(betas)


def test_trained_betas_may_end_at_1() -> None:
    np.testing.assert_array_equal(check_betas([0.5, 1]), [0.5, 1.0])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_match_diffusers_for_every_step_count(spacing: str) -> None:
    reference = DiffusersScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    differences = {}
    for S in range(1, T + 1):
        reference.set_timesteps(S)
        theirs = reference.timesteps.tolist()
        # numpy.arange(T, 0, -T / S) has an entry S + 1, some 1e-13 above 0, where S times the rounded T / S falls short
        # of T; it rounds to the timestep -1.
        assert theirs[S:] in ([], [-1])
        assert len(theirs) == S or spacing == "trailing"
        if make_timesteps(spacing, S, LINEAR) != theirs[:S]:
            differences[S] = theirs[:S]
    assert not differences, f"{spacing}: other timesteps than diffusers' for S in {sorted(differences)}"


def test_extra_trailing_timestep_of_diffusers_is_omitted() -> None:
    reference = DiffusersScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    reference.set_timesteps(61)
    assert len(reference.timesteps) == 62
    assert len(make_timesteps("trailing", 61, LINEAR)) == 61


@pytest.mark.parametrize("offset", [0, 1, 19])
def test_leading_timesteps_are_shifted_by_offset(offset: int) -> None:
    assert make_timesteps("leading", 50, LINEAR, offset) == [20 * i + offset for i in range(50)][::-1]


@pytest.mark.parametrize("spacing", [name for name in SPACINGS if name != "leading"])
def test_other_spacings_ignore_offset(spacing: str) -> None:
    assert make_timesteps(spacing, 50, LINEAR, 1) == make_timesteps(spacing, 50, LINEAR)


@pytest.mark.parametrize("offset", [-1, 20])
def test_offset_beyond_schedule_raises(offset: int) -> None:
    with pytest.raises(ValueError, match=f"steps_offset {offset} reach from {offset} to {980 + offset}"):
        make_timesteps("leading", 50, LINEAR, offset)


@pytest.mark.parametrize("S", [1, 2, 10, 29, 30, 50, 100, 1000])
def test_quad_matches_paper_without_duplicates(S: int) -> None:
    seq = [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), S) ** 2]
    ours = make_timesteps("quad", S, LINEAR)
    assert ours == list(dict.fromkeys(seq))[::-1]
    assert (len(ours) == S) == (S < 30)


@pytest.mark.parametrize("S", [1, 2, 10, 50, 300])
def test_blend_steps_are_equal_in_blend_variable(S: int) -> None:
    timesteps = np.array(make_timesteps("blend", S, LINEAR))

    def w(u: np.ndarray) -> np.ndarray:
        return u + np.log(1 + 200 * u) / 20

    expected = (S - np.arange(S)) / S * w(timesteps / T)[0]
    assert timesteps[0] == T - 1
    # Exact up to rounding to integers, except small timesteps, which are spread to be distinct.
    is_spaced = timesteps > 3 * S**0.5
    errors = np.abs(w(timesteps / T) - expected)[is_spaced]
    assert np.all(errors <= 0.6 * (w((timesteps + 1) / T) - w(timesteps / T))[is_spaced])


@pytest.mark.parametrize("spacing", SPACINGS)
@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 1200), st.sampled_from(BETA_SCHEDULES), st.booleans())
def test_timesteps_are_distinct_decreasing_and_in_range(
    spacing: str, data: st.DataObject, steps: int, beta_schedule: str, zero_snr: bool
) -> None:
    S = data.draw(st.integers(1, steps))
    betas = make_betas(beta_schedule, steps)
    # A single timestep cannot both keep its signal and lose it.
    alphas = make_alphas_cumprod(rescale_zero_terminal_snr(betas) if zero_snr and steps > 1 else betas)
    timesteps = make_timesteps(spacing, S, alphas)
    assert all(type(t) is int for t in timesteps)
    assert len(timesteps) == S or (spacing == "quad" and len(timesteps) < S)
    assert check_timesteps(timesteps, steps) == timesteps


# Without the cosine schedule: its capped last beta makes one timestep longer than an equal step.
@pytest.mark.parametrize("S", [3, 5, 8])
@pytest.mark.parametrize("beta_schedule", [name for name in BETA_SCHEDULES if name != "squaredcos_cap_v2"])
def test_logsnr_steps_are_nearly_equal_in_log_snr(beta_schedule: str, S: int) -> None:
    alphas = make_alphas_cumprod(make_betas(beta_schedule, T))
    timesteps = make_timesteps("logsnr", S, alphas)
    # The last timestep of `jsd` has no signal and no finite log SNR; the grid starts at the previous one.
    assert (timesteps[0], timesteps[-1]) == (998 if beta_schedule == "jsd" else 999, 0)
    log_snr = np.log(alphas[timesteps] / (1 - alphas[timesteps]))
    np.testing.assert_allclose(np.diff(log_snr), (log_snr[-1] - log_snr[0]) / (S - 1), rtol=0.05)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_logsnr_timesteps_are_nearest_to_equal_steps(beta_schedule: str) -> None:
    alphas = make_alphas_cumprod(make_betas(beta_schedule, T))
    finite = np.flatnonzero(alphas > 0)
    log_snr = np.log(alphas[finite] / (1 - alphas[finite]))
    timesteps = make_timesteps("logsnr", 5, alphas)
    for t, expected in zip(timesteps, np.linspace(log_snr[-1], log_snr[0], 5), strict=True):
        # The expected value lies between the two neighboring timesteps.
        assert log_snr[min(t + 1, len(finite) - 1)] - 1e-9 <= expected <= log_snr[max(t - 1, 0)] + 1e-9


@pytest.mark.parametrize("S", [0, -1, 2.5, T + 1, "ten", True, None, 10.0, float("nan")])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_invalid_step_count_raises(spacing: str, S: object) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be"):
        make_timesteps(spacing, S, LINEAR)


@pytest.mark.parametrize("S", [np.int64(10), torch.tensor(10)])
def test_integer_types_are_accepted_as_step_count(S: object) -> None:
    assert make_timesteps("leading", S, LINEAR) == list(range(900, -1, -100))


def test_unknown_spacing_raises() -> None:
    with pytest.raises(
        ValueError, match="must be one of leading, trailing, linspace, quad, logsnr, or blend, got 'karras'"
    ):
        make_timesteps("karras", 10, LINEAR)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, lambda entries: [torch.tensor(t) for t in entries]]
)
def test_integer_sequences_are_accepted_as_timesteps(kind: object) -> None:
    checked = check_timesteps(kind([999, 500, 3, 0]), T)
    assert checked == [999, 500, 3, 0]
    assert all(type(t) is int for t in checked)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "timesteps must hold at least one timestep"),
        (torch.tensor([], dtype=torch.int64), "timesteps must hold at least one timestep"),
        ([900, 1.5, 0], r"must be integers from 0 to 999, got 1\.5"),
        (np.array([900.0, 3.0]), r"must be integers from 0 to 999, got 900\.0"),
        (["900"], "must be integers from 0 to 999, got '900'"),
        ([900, None], "must be integers from 0 to 999, got None"),
        ([900, True], "must be integers from 0 to 999, got True"),
        (torch.tensor([True, False]), "must be integers from 0 to 999, got True"),
        ([[900, 3]], r"must be integers from 0 to 999, got \[900, 3\]"),
        ([900, 500, 500, 0], "must be strictly decreasing, got 500 after 500"),
        ([0, 500], "must be strictly decreasing, got 500 after 0"),
        ([1000, 0], "must be integers from 0 to 999, got 1000"),
        ([5, -1], "must be integers from 0 to 999, got -1"),
    ],
)
def test_invalid_timesteps_raise(timesteps: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_timesteps(timesteps, T)


@pytest.mark.parametrize("key", ["9" * 5000, "x" * 5000, None, -1, 1.5])
def test_keys_that_are_no_numbers_of_steps_raise_one_sentence(key: Any) -> None:
    with pytest.raises(ValueError, match="timesteps_by_steps") as caught:
        check_timesteps_by_steps({key: [900]}, 1000)
    assert len(str(caught.value)) < 300
