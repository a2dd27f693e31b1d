"""Noise schedules and subsequences of timesteps: everything about time that is known before a network runs.

A diffusion of T timesteps t = 0 .. T-1 is given by its betas. With

    alphas_cumprod[t] = prod_{s <= t} (1 - betas[s])

the marginals are q(x_t | x_0) = N(sqrt(alphas_cumprod[t]) x_0, (1 - alphas_cumprod[t]) I). `alphas_cumprod` is what the
DDIM paper (arXiv 2010.02502) writes alpha_t and the DDPM paper (arXiv 2006.11239) writes alpha-bar_t. Sampling visits a
decreasing subsequence tau of the timesteps (section 4.2 and appendix D.2 of the DDIM paper).

Everything here is float64 NumPy on the host: schedules are tiny, and their rounding would be the only one that grows
over T products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddim.validation import as_integer, integer, join_choices, nearest, shorten, shown

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "quad", "const", "jsd")
"""The formulas of `make_betas`."""
SPACINGS = ("leading", "trailing", "linspace", "quad", "logsnr", "blend")
"""The formulas of `make_timesteps`."""

MAX_TRAIN_TIMESTEPS = 1_000_000
MAX_DIGITS = len(str(MAX_TRAIN_TIMESTEPS))
"""Of a number of steps, which is at most that of the timesteps."""
MAX_BETA_COSINE = 0.999
QUAD_REACH = 0.8
SIGMOID_REACH = 6.0
BLEND_BEND, BLEND_WEIGHT = 1 / 200, 1 / 20
"""The `blend` spacing is uniform in u + BLEND_WEIGHT log(1 + u / BLEND_BEND)."""
BLEND_POINTS_PER_TIMESTEP = 100
"""Resolution of the table by which `blend` is inverted."""


def make_betas(
    beta_schedule: str, num_train_timesteps: int, beta_start: float = 0.0001, beta_end: float = 0.02
) -> NDArray[np.float64]:
    """Return the variances beta_t of the forward process.

    Args:
        beta_schedule: one of `BETA_SCHEDULES`. `linear` is DDPM's; `scaled_linear` (called `quad` in the original DDIM
            code: one formula under two names) is linear in sqrt(beta); `squaredcos_cap_v2` is the cosine schedule of
            arXiv 2102.09672, eq. (17), capped at 0.999, which ignores `beta_start` and `beta_end`; `sigmoid`, `const`
            (every beta is `beta_end`) and `jsd` (beta_t = 1 / (T - t)) are those of the original code.
        num_train_timesteps: T, at least 1.
        beta_start: beta at t = 0, in (0, 1).
        beta_end: beta at t = T - 1, in (0, 1).

    Returns:
        float64 (T,).

    Raises:
        ValueError: for an unknown schedule, T below 1, or a beta outside (0, 1).

    References:
        `linear`: arXiv 2006.11239; `squaredcos_cap_v2`: arXiv 2102.09672, equation (17); the others: the code of arXiv
        2010.02502.

    Example:
        >>> make_betas("linear", 3, 0.1, 0.3)
        array([0.1, 0.2, 0.3])
    """
    T = integer("num_train_timesteps", num_train_timesteps, 1, MAX_TRAIN_TIMESTEPS)
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise ValueError(f"{name} must be a number above 0 and below 1, got {beta}")
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, T)
    if beta_schedule in ("scaled_linear", "quad"):
        return np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        alpha_bar: NDArray[np.float64] = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA_COSINE)
    if beta_schedule == "sigmoid":
        return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-SIGMOID_REACH, SIGMOID_REACH, T)))
    if beta_schedule == "const":
        return np.full(T, float(beta_end))
    if beta_schedule == "jsd":
        return 1.0 / np.linspace(T, 1, T)
    near = nearest(beta_schedule, BETA_SCHEDULES)
    raise ValueError(f"beta_schedule must be one of {join_choices(BETA_SCHEDULES)}, got {shown(beta_schedule)}{near}")


def check_betas(betas: ArrayLike) -> NDArray[np.float64]:
    """Check trained betas: a non-empty list of numbers between 0 and 1, of which only the last may be 1.

    Args:
        betas: T numbers.

    Returns:
        float64 (T,).

    Raises:
        ValueError: if they are anything else.

    Example:
        >>> check_betas([0.1, 0.2])
        array([0.1, 0.2])
    """
    try:
        array = np.asarray(betas, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"trained_betas must be a list of numbers, got {shown(betas)}") from None
    integer("the number of trained_betas", array.size, 1, MAX_TRAIN_TIMESTEPS)
    # 1 - beta, not beta: a beta that is lost in that difference adds no noise.
    signal = 1 - array
    if array.ndim != 1 or not array.size or not (np.all((signal[:-1] > 0) & (signal[:-1] < 1)) and 0 <= signal[-1] < 1):
        raise ValueError(
            "trained_betas must be a non-empty list of numbers between 0 and 1, both excluded (the last may be 1)"
        )
    return array


def rescale_zero_terminal_snr(betas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and scale betas so that alphas_cumprod[T-1] = 0 exactly and alphas_cumprod[0] stays as it is.

    Args:
        betas: float64 (T,).

    Returns:
        float64 (T,); the last is 1.

    Raises:
        ValueError: for a single beta.

    References:
        Algorithm 1 of arXiv 2305.08891.

    Example:
        >>> float(make_alphas_cumprod(rescale_zero_terminal_snr(make_betas("linear", 1000)))[-1])
        0.0
    """
    if len(betas) < 2:
        raise ValueError("rescale_betas_zero_snr requires at least two timesteps, got 1")
    root = np.sqrt(make_alphas_cumprod(betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    # Of steep schedules more than the last may be 0.
    ratios: NDArray[np.float64] = alpha_bar.copy()
    np.divide(alpha_bar[1:], alpha_bar[:-1], out=ratios[1:], where=alpha_bar[:-1] > 0)
    return 1 - ratios


def make_alphas_cumprod(betas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return alphas_cumprod[t] = prod_{s <= t} (1 - betas[s]).

    Args:
        betas: float64 (T,).

    Returns:
        float64 (T,), not increasing, in [0, 1].

    Example:
        >>> make_alphas_cumprod(np.array([0.5, 0.5]))
        array([0.5 , 0.25])
    """
    return np.cumprod(1 - betas, dtype=np.float64)


def make_timesteps(
    spacing: str, num_inference_steps: int, alphas_cumprod: NDArray[np.float64], steps_offset: int = 0
) -> list[int]:
    """Return the subsequence tau of timesteps to visit, largest first.

    With S = `num_inference_steps` and i = 0 .. S-1:

    - `leading`: i * (T // S) + steps_offset, the choice of most pretrained models; where S divides T it is the
      "uniform" of the original code;
    - `trailing`: round(T - i T / S) - 1, which starts from T - 1 (arXiv 2305.08891, table 2);
    - `linspace`: S points from T - 1 to 0, rounded;
    - `quad`: int(linspace(0, sqrt(0.8 T), S)**2), the paper's choice for CIFAR-10. Its smallest entries repeat from
      S = 30 on for T = 1000; a repeated timestep is an identity step in the paper's code, so that it is left
      out here and fewer than S steps give the same image;
    - `logsnr`: S timesteps nearest to equal steps in log(alphas_cumprod / (1 - alphas_cumprod)), all distinct;
    - `blend`: S timesteps nearest to equal steps in u + log(1 + 200 u) / 20, u = t / T, down from T - 1 and ending one
      step above 0, all distinct: like `trailing` where there is much noise, with shorter steps where there is little.
      For orders above 1.

    Args:
        spacing: one of `SPACINGS`.
        num_inference_steps: S, from 1 to T.
        alphas_cumprod: float64 (T,).
        steps_offset: added to the `leading` timesteps (1 for Stable Diffusion's models); the other spacings ignore it.

    Returns:
        At most S integers in [0, T - 1], strictly decreasing.

    Raises:
        ValueError: for an unknown spacing, an S that is not an integer from 1 to T, or an offset that leads outside
            [0, T - 1].

    References:
        Appendix D.2 of arXiv 2010.02502; `trailing`: table 2 of arXiv 2305.08891.

    Example:
        >>> alphas_cumprod = make_alphas_cumprod(make_betas("linear", 1000))
        >>> make_timesteps("leading", 4, alphas_cumprod), make_timesteps("trailing", 4, alphas_cumprod)
        ([750, 500, 250, 0], [999, 749, 499, 249])
    """
    T = len(alphas_cumprod)
    S = integer("num_inference_steps", num_inference_steps, 1)
    if S > T:
        raise ValueError(
            f"num_inference_steps must be at most {T}, the number of timesteps the model was trained with, got {S}"
        )
    if spacing == "leading":
        ascending = np.arange(S) * (T // S) + steps_offset
        if ascending[0] < 0 or ascending[-1] >= T:
            raise ValueError(
                f"timesteps must lie from 0 to {T - 1}; {S} leading steps with steps_offset {steps_offset} reach from "
                f"{ascending[0]} to {ascending[-1]}"
            )
    elif spacing == "trailing":
        # Rounding lets arange end one entry late for some S.
        ascending = (np.round(np.arange(T, 0, -T / S)[:S]) - 1)[::-1]
    elif spacing == "linspace":
        ascending = np.round(np.linspace(0, T - 1, S))
    elif spacing == "quad":
        ascending = np.unique((np.linspace(0, np.sqrt(T * QUAD_REACH), S) ** 2).astype(np.int64))
    elif spacing == "blend":
        points = T * BLEND_POINTS_PER_TIMESTEP
        u = np.arange(points) / points
        w = u + np.log1p(u / BLEND_BEND) * BLEND_WEIGHT
        end = float(np.interp((T - 1) / T, u, w))
        steps = np.interp(np.arange(1, S + 1) / S * end, w, u)
        ascending = make_distinct(np.round(T * steps).astype(np.int64), T - 1)
    elif spacing == "logsnr":
        ascending = _equal_log_snr(S, alphas_cumprod)
    else:
        near = nearest(spacing, SPACINGS)
        raise ValueError(f"timestep_spacing must be one of {join_choices(SPACINGS)}, got {shown(spacing)}{near}")
    return [int(t) for t in ascending[::-1]]


def _equal_log_snr(S: int, alphas_cumprod: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return S distinct timesteps, ascending, nearest to equal steps in log SNR between t = 0 and t = T - 1."""
    T = len(alphas_cumprod)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    # A schedule that ends without signal (or starts without noise) has an infinite end; its neighbor bounds the grid
    # instead.
    finite = np.flatnonzero(np.isfinite(log_snr))
    if len(finite) < S:
        return np.arange(T - S, T)
    # From the noisy end, which a single step must start from.
    targets = np.linspace(log_snr[finite[-1]], log_snr[finite[0]], S)[::-1]
    steps = finite[0] + np.round(np.interp(-targets, -log_snr[finite], np.arange(len(finite)))).astype(np.int64)
    return make_distinct(steps, int(finite[-1]))


def make_distinct(steps: NDArray[np.int64], last: int) -> NDArray[np.int64]:
    """Return ascending timesteps without the repeats near t = 0: pushed up, then back under the last timestep.

    Args:
        steps: int64 (S,), not decreasing.
        last: the largest timestep that is allowed, at least S - 1.

    Example:
        >>> make_distinct(np.array([0, 0, 0, 5]), 9).tolist()
        [0, 1, 2, 5]
    """
    index = np.arange(len(steps))
    steps = np.maximum.accumulate(steps - index) + index
    return np.minimum(steps, last - index[::-1])


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> list[int]:
    """Check a custom subsequence of timesteps.

    Args:
        timesteps: integers in [0, T - 1], strictly decreasing (a list, tuple, array or tensor).
        num_train_timesteps: T.

    Returns:
        The same as a list of `int`.

    Raises:
        ValueError: naming the first entry that is not allowed, or if there is none.

    Example:
        >>> check_timesteps((900, 300, 0), 1000)
        [900, 300, 0]
        >>> check_timesteps([300, 900], 1000)
        Traceback (most recent call last):
        ValueError: timesteps must be strictly decreasing, got 900 after 300
    """
    entries = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(entries, Iterable) or isinstance(entries, str):
        raise ValueError(f"timesteps must be a list of integers, got {shown(timesteps)}")
    entries = list(entries)
    if not entries:
        raise ValueError("timesteps must hold at least one timestep, got none")
    checked: list[int] = []
    for entry in entries:
        t = as_integer(entry)
        if t is None or not 0 <= t < num_train_timesteps:
            raise ValueError(f"timesteps must be integers from 0 to {num_train_timesteps - 1}, got {shown(entry)}")
        if checked and t >= checked[-1]:
            raise ValueError(f"timesteps must be strictly decreasing, got {t} after {checked[-1]}")
        checked.append(t)
    return checked


def check_timesteps_by_steps(by_steps: Mapping[Any, Sequence[int]], num_train_timesteps: int) -> dict[int, list[int]]:
    """Check learned subsequences of timesteps, keyed by their length.

    Args:
        by_steps: for some numbers of steps a subsequence each, as `check_timesteps` takes it; the keys are integers or
            their digits (as in JSON).
        num_train_timesteps: T.

    Returns:
        The same with integers as keys and lists as values.

    Raises:
        ValueError: naming the number of steps whose entry is not allowed.
        TypeError: if it is not a mapping.

    Example:
        >>> check_timesteps_by_steps({"2": [900, 0]}, 1000)
        {2: [900, 0]}
    """
    checked = {}
    for name, count, S, timesteps in entries_by_steps("timesteps_by_steps", by_steps, "timesteps"):
        try:
            chosen = check_timesteps(timesteps, num_train_timesteps)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if S is None or len(chosen) != S:
            raise ValueError(f"{name} must list {count} timesteps, got {len(chosen)}")
        checked[S] = chosen
    return checked


def entries_by_steps(name: str, by_steps: Any, kind: str) -> Iterator[tuple[str, str, int | None, Any]]:
    """Iterate over what is learned for some numbers of steps.

    Args:
        name: of the mapping, in messages.
        by_steps: the mapping; its keys are integers or their digits (as in JSON).
        kind: what its values list, in messages.

    Yields:
        The name of the entry, its key as text, its number of steps (`None` for a key that is none), and its value.

    Raises:
        TypeError: if it is not a mapping.

    Example:
        >>> list(entries_by_steps("x", {"2": [900, 0]}, "timesteps"))
        [("x['2']", '2', 2, [900, 0])]
    """
    if not isinstance(by_steps, Mapping):
        raise TypeError(f"{name} must be a mapping of numbers of steps to {kind}, got {shown(by_steps)}")
    for key, value in by_steps.items():
        is_text = isinstance(key, str) and key.isdecimal() and len(key) <= MAX_DIGITS
        S = as_integer(int(key) if is_text else key)
        yield f"{name}[{shown(key)}]", shorten(str(key)), S, value
