"""Noise schedules and subsequences of timesteps: everything about time that is known before a network runs.

A diffusion of T timesteps t = 0 .. T-1 is given by its betas. With

    alphas_cumprod[t] = prod_{s <= t} (1 - betas[s])

the marginals are q(x_t | x_0) = N(sqrt(alphas_cumprod[t]) x_0, (1 - alphas_cumprod[t]) I). `alphas_cumprod` is what the
DDIM paper (arXiv 2010.02502) writes alpha_t and the DDPM paper (arXiv 2006.11239) writes alpha-bar_t. Sampling walks a
decreasing subsequence tau of the timesteps (section 4.2 and appendix D.2 of the DDIM paper).

Everything here is float64 NumPy on the host: schedules are tiny, and their rounding would be the only one that grows
over T products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddim.validation import as_integer, integer

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "quad", "const", "jsd")
SPACINGS = ("leading", "trailing", "linspace", "quad", "logsnr", "blend")

MAX_BETA_COSINE = 0.999
QUAD_REACH = 0.8
SIGMOID_REACH = 6.0
BLEND_BEND, BLEND_SHARE, BLEND_FINENESS = 1 / 200, 1 / 20, 100
"""Of `blend`, below; it is looked up between so many places a timestep."""


def make_betas(
    beta_schedule: str, num_train_timesteps: int, beta_start: float = 0.0001, beta_end: float = 0.02
) -> NDArray[np.float64]:
    """The variances beta_t of the forward process.

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
    """
    T = integer("num_train_timesteps", num_train_timesteps, 1)
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise ValueError(f"{name} is {beta}; it must lie between 0 and 1, both excluded")
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
    raise ValueError(f"beta_schedule is {beta_schedule!r}; it must be one of {', '.join(BETA_SCHEDULES)}")


def check_betas(betas: ArrayLike) -> NDArray[np.float64]:
    """Trained betas as float64 (T,), checked to be a non-empty list of numbers between 0 and 1; only the last may be 1.

    Raises:
        ValueError: if they are not.
    """
    array = np.asarray(betas, dtype=np.float64)
    # 1 - beta, not beta: what is lost in that difference is no noise at all.
    kept = 1 - array
    if array.ndim != 1 or not array.size or not (np.all((kept[:-1] > 0) & (kept[:-1] < 1)) and 0 <= kept[-1] < 1):
        raise ValueError(
            "trained_betas must be a non-empty list of numbers between 0 and 1, both excluded (the last may be 1)"
        )
    return array


def rescale_zero_terminal_snr(betas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Betas shifted and scaled so that alphas_cumprod[T-1] = 0 exactly and alphas_cumprod[0] is kept (arXiv 2305.08891,
    algorithm 1).

    Args:
        betas: float64 (T,).

    Returns:
        float64 (T,); the last is 1.

    Raises:
        ValueError: for a single beta.
    """
    if len(betas) < 2:
        raise ValueError("rescaling to zero terminal SNR needs at least two timesteps")
    root = np.sqrt(make_alphas_cumprod(betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    ratios: NDArray[np.float64] = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - ratios


def make_alphas_cumprod(betas: NDArray[np.float64]) -> NDArray[np.float64]:
    """alphas_cumprod[t] = prod_{s <= t} (1 - betas[s]); float64 (T,), not increasing, in [0, 1]."""
    return np.cumprod(1 - betas, dtype=np.float64)


def make_timesteps(
    spacing: str, num_inference_steps: int, alphas_cumprod: NDArray[np.float64], steps_offset: int = 0
) -> list[int]:
    """The subsequence tau of timesteps to visit, largest first.

    With S = `num_inference_steps` and i = 0 .. S-1:

    - `leading`: i * (T // S) + steps_offset, the choice of most pretrained models; where S divides T it is the
      "uniform" of the original code;
    - `trailing`: round(T - i T / S) - 1, which starts from T - 1 (arXiv 2305.08891, table 2);
    - `linspace`: S points from T - 1 to 0, rounded;
    - `quad`: int(linspace(0, sqrt(0.8 T), S)**2), the paper's choice for CIFAR-10. Its smallest entries repeat from
      S = 30 on for T = 1000; a repeated timestep is an identity step in the paper's code, so that it is left
      out here and fewer than S steps give the same picture;
    - `logsnr`: S timesteps nearest to equal steps in log(alphas_cumprod / (1 - alphas_cumprod)), all distinct;
    - `blend`: S timesteps nearest to equal steps in u + log(1 + 200 u) / 20, u = t / T, down from T - 1 and ending one
      step above 0, all distinct: like `trailing` where there is much noise, with shorter steps where there is little.
      For order 2.

    Args:
        spacing: one of `SPACINGS`.
        num_inference_steps: S, from 1 to T.
        alphas_cumprod: float64 (T,).
        steps_offset: added to the `leading` timesteps (Stable Diffusion's models want 1); the other spacings ignore it.

    Returns:
        At most S integers in [0, T - 1], strictly decreasing.

    Raises:
        ValueError: for an unknown spacing, an S that is not a whole number from 1 to T, or an offset that leads outside
            [0, T - 1].
    """
    T = len(alphas_cumprod)
    S = integer("num_inference_steps", num_inference_steps, 1)
    if S > T:
        raise ValueError(
            f"num_inference_steps is {S}; the model was trained with {T} timesteps and can take no more than that"
        )
    if spacing == "leading":
        ascending = np.arange(S) * (T // S) + steps_offset
        if ascending[0] < 0 or ascending[-1] >= T:
            raise ValueError(
                f"{S} leading steps with steps_offset {steps_offset} reach timesteps {ascending[0]} to "
                f"{ascending[-1]}; they must stay within 0 and {T - 1}"
            )
    elif spacing == "trailing":
        # Rounding lets arange end one entry late for some S; the first S are those that are meant.
        ascending = (np.round(np.arange(T, 0, -T / S)[:S]) - 1)[::-1]
    elif spacing == "linspace":
        ascending = np.round(np.linspace(0, T - 1, S))
    elif spacing == "quad":
        ascending = np.unique((np.linspace(0, np.sqrt(T * QUAD_REACH), S) ** 2).astype(np.int64))
    elif spacing == "blend":
        u = np.arange(T * BLEND_FINENESS) / (T * BLEND_FINENESS)
        w = u + np.log1p(u / BLEND_BEND) * BLEND_SHARE
        end = float(np.interp((T - 1) / T, u, w))
        steps = np.interp(np.arange(1, S + 1) / S * end, w, u)
        ascending = _distinct(np.round(T * steps).astype(np.int64), T - 1)
    elif spacing == "logsnr":
        ascending = _equal_log_snr(S, alphas_cumprod)
    else:
        raise ValueError(f"timestep_spacing is {spacing!r}; it must be one of {', '.join(SPACINGS)}")
    return [int(t) for t in ascending[::-1]]


def _equal_log_snr(S: int, alphas_cumprod: NDArray[np.float64]) -> NDArray[np.int64]:
    """S distinct timesteps, ascending, nearest to equal steps in log SNR between t = 0 and t = T - 1."""
    T = len(alphas_cumprod)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    # A schedule that ends without signal (or starts without noise) has an infinite end; its neighbour bounds the grid
    # instead.
    finite = np.flatnonzero(np.isfinite(log_snr))
    if len(finite) < S:
        return np.arange(T - S, T)
    # From the noisy end, which a single step must start from.
    wanted = np.linspace(log_snr[finite[-1]], log_snr[finite[0]], S)[::-1]
    steps = finite[0] + np.round(np.interp(-wanted, -log_snr[finite], np.arange(len(finite)))).astype(np.int64)
    return _distinct(steps, int(finite[-1]))


def _distinct(steps: NDArray[np.int64], last: int) -> NDArray[np.int64]:
    """Ascending timesteps without repeats, of which there may be some near t = 0: pushed up, then back under the last
    timestep.
    """
    room = np.arange(len(steps))
    steps = np.maximum.accumulate(steps - room) + room
    return np.minimum(steps, last - room[::-1])


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> list[int]:
    """A subsequence of one's own, checked.

    Args:
        timesteps: whole numbers in [0, T - 1], strictly decreasing (a list, tuple, array or tensor).
        num_train_timesteps: T.

    Returns:
        The same as a list of `int`.

    Raises:
        ValueError: naming the first entry that is not allowed, or if there is none.
    """
    entries = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(entries, Iterable) or isinstance(entries, str):
        raise ValueError(f"timesteps is {timesteps!r}; it must be a list of whole numbers")
    entries = list(entries)
    if not entries:
        raise ValueError("timesteps is empty; it must hold at least one timestep")
    checked: list[int] = []
    for entry in entries:
        t = as_integer(entry)
        if t is None:
            raise ValueError(f"timesteps holds {entry!r}; every entry must be a whole number")
        if not 0 <= t < num_train_timesteps:
            raise ValueError(f"timesteps holds {entry!r}; every entry must lie between 0 and {num_train_timesteps - 1}")
        if checked and t >= checked[-1]:
            raise ValueError(f"timesteps holds {t} after {checked[-1]}; they must be strictly decreasing")
        checked.append(t)
    return checked


def check_timesteps_by_steps(by_steps: Mapping[Any, Sequence[int]], num_train_timesteps: int) -> dict[int, list[int]]:
    """Subsequences by their length, checked.

    Args:
        by_steps: a subsequence, as `check_timesteps` takes it, for each of some numbers of steps, which are integers or
            their digits (as in JSON).
        num_train_timesteps: T.

    Raises:
        ValueError: naming the number of steps whose entry is not allowed.
        TypeError: if it is no mapping.
    """
    if not isinstance(by_steps, Mapping):
        raise TypeError(f"timesteps_by_steps is {by_steps!r}; it must be a mapping of numbers of steps to timesteps")
    checked = {}
    for key, timesteps in by_steps.items():
        S = as_integer(int(key) if isinstance(key, str) and key.isdecimal() else key)
        try:
            chosen = check_timesteps(timesteps, num_train_timesteps)
        except ValueError as error:
            raise ValueError(f"timesteps_by_steps[{key!r}]: {error}") from None
        if len(chosen) != S:
            raise ValueError(f"timesteps_by_steps[{key!r}] has {len(chosen)} timesteps; it wants as many as it says")
        checked[S] = chosen
    return checked
