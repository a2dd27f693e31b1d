"""`ddim.diffusion.inversion`: the solver on equations with values solutions, and the inverse of single steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

import helpers
from ddim.diffusion.equations import PREDICTION_TYPES, Step, ddim_step, make_steps
from ddim.diffusion.inversion import Inversion, anderson, mixing
from ddim.diffusion.loop import in_batches, run_steps
from helpers import ALPHAS

STEPS = make_steps([900, 600, 300, 100, 5], ALPHAS, float(ALPHAS[0]))
rand = partial(helpers.rand, dtype=torch.float64)


class Recorder:
    """A residual function that records its inputs and the largest residuals per image."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
        self.f, self.calls = f, 0
        self.inputs: list[list[Tensor]] = [[] for _ in range(count)]
        self.sizes: list[list[float]] = [[] for _ in range(count)]

    def __call__(self, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        fx = self.f(x, active)
        assert len(x) == len(active) == len(fx) > 0
        for image, index in enumerate(active.tolist()):
            self.inputs[index].append(x[image].clone())
            self.sizes[index].append(float(fx[image].abs().max()))
        return fx, 10 * x


def linear_systems(count: int, side: int, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return symmetric matrices (count, D, D) with eigenvalues from `low` to `high`, and right-hand sides."""
    rng = np.random.default_rng(0)
    D = side * side
    matrices = []
    for _ in range(count):
        basis, _ = np.linalg.qr(rng.standard_normal((D, D)))
        matrices.append(basis @ np.diag(rng.uniform(low, high, D)) @ basis.T)
    return torch.from_numpy(np.stack(matrices)), torch.from_numpy(rng.standard_normal((count, 1, side, side)))


# The spectrum of a step x_prev = g(x), for image variances from 0 to that of the noise.
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.timestep}-{step.prev_timestep}")
def test_linear_systems_are_solved(step: Step) -> None:
    low = math.sqrt((1 - step.alpha_prev) / (1 - step.alpha))
    A, b = linear_systems(4, 4, low, 1.0)

    def f(x: Tensor, active: Tensor) -> Tensor:
        return b[active] - (A[active] @ x.flatten(1)[..., None]).view_as(x)

    recorder = Recorder(f, 4)
    x, output, residual, evaluations = anderson(recorder, b, mixing(step), 1e-10, 300)
    truth = np.linalg.solve(A.numpy(), b.flatten(1).numpy()[..., None])[..., 0]
    # |x - truth| = |A^-1 f| <= |f| / low, where |f| is at most the root of 16 values times the largest.
    assert np.linalg.norm(x.flatten(1).numpy() - truth, axis=1).max() <= 4 * 1e-10 / low
    assert torch.equal(output, 10 * x)
    assert residual.tolist() == [min(sizes) for sizes in recorder.sizes]
    assert residual.max() <= 1e-10
    assert evaluations.tolist() == [len(xs) for xs in recorder.inputs]


def test_acceleration_reduces_evaluations() -> None:
    A, b = linear_systems(4, 4, 0.1, 1.0)

    def f(x: Tensor, active: Tensor) -> Tensor:
        return b[active] - (A[active] @ x.flatten(1)[..., None]).view_as(x)

    plain = []
    for image in range(4):
        x, count = b[image : image + 1], 1
        while (fx := f(x, torch.tensor([image]))).abs().max() > 1e-8:
            x, count = x + fx, count + 1
        plain.append(count)
    # With c = 1 / sqrt(0.1), the mixing of the inversion, the plain iteration would diverge.
    for c in (1.0, 1 / math.sqrt(0.1)):
        evaluations = anderson(Recorder(f, 4), b, c, 1e-8, 500)[3].tolist()
        assert all(count < slow / 3 for count, slow in zip(evaluations, plain, strict=True))


def test_two_iterates_give_secant_method() -> None:
    """With one unknown, the third iterate is the root of the line through two residuals, up to regularization."""
    x, _, residual, evaluations = anderson(
        Recorder(lambda x, _: 0.7 - 3 * x, 1), torch.zeros(1, 1, 1, 1).double(), 0.1, 1e-3, 3
    )
    assert evaluations.tolist() == [3]
    assert float(x) == pytest.approx(0.7 / 3, abs=1e-4)
    assert float(residual) <= 1e-4


def test_nonlinear_map_is_solved() -> None:
    y = rand(3, 2, 4, 4) * 1.3

    def f(x: Tensor, active: Tensor) -> Tensor:
        return y[active] - (0.3 * x + torch.tanh(x))

    x, _, residual, _ = anderson(Recorder(f, 3), y, 1.0, 1e-12, 200)
    truth = [brentq(lambda x, v=v: v - (0.3 * x + math.tanh(x)), -5, 5, xtol=1e-15) for v in y.flatten().tolist()]
    assert residual.max() <= 1e-12
    assert np.abs(x.flatten().numpy() - truth).max() <= 1e-11


def test_converged_image_is_not_evaluated_again() -> None:
    # Later images have more unequal pixels and take more evaluations.
    k = 1 - torch.tensor([0.0, 0.01, 0.1, 0.5, 0.9]).double()[:, None] * torch.linspace(0, 1, 64).double()
    k, y = k.view(5, 1, 8, 8), rand(5, 1, 8, 8)
    recorder = Recorder(lambda x, active: y[active] - k[active] * x, 5)
    x, _, residual, evaluations = anderson(recorder, y * 0.5, 1.0, 1e-9, 100)
    counts = evaluations.tolist()
    assert counts == [len(xs) for xs in recorder.inputs]
    assert counts == sorted(counts)
    assert counts[0] == 2 < counts[-1]
    assert recorder.calls == max(counts)
    for image in range(5):
        *earlier, last = recorder.sizes[image]
        assert last <= 1e-9 < min(earlier)
        assert torch.equal(x[image], recorder.inputs[image][-1])
        assert float(residual[image]) == last


def test_exact_guess_takes_one_evaluation() -> None:
    y = rand(2, 1, 4, 4)
    recorder = Recorder(lambda x, active: y[active] - x, 2)
    x, _, residual, evaluations = anderson(recorder, y, 1.0, 1e-9, 100)
    assert torch.equal(x, y)
    assert residual.tolist() == [0, 0]
    assert evaluations.tolist() == [1, 1]


@pytest.mark.parametrize("max_iterations", [1, 2, 5, 17])
def test_max_iterations_limits_evaluations(max_iterations: int) -> None:
    A, b = linear_systems(3, 4, 0.001, 1.0)

    def f(x: Tensor, active: Tensor) -> Tensor:
        return b[active] - (A[active] @ x.flatten(1)[..., None]).view_as(x)

    recorder = Recorder(f, 3)
    x, _, residual, evaluations = anderson(recorder, b, 1.0, 1e-14, max_iterations)
    assert recorder.calls == max_iterations
    assert evaluations.tolist() == [max_iterations] * 3
    for image, sizes in enumerate(recorder.sizes):
        assert float(residual[image]) == min(sizes)
        assert torch.equal(x[image], recorder.inputs[image][int(np.argmin(sizes))])


def scripted(*sizes: list[float]) -> Recorder:
    """Return a recorder of scripted residuals: one list per image, independent of x and constant over the pixels."""
    calls = [0] * len(sizes)

    def f(x: Tensor, active: Tensor) -> Tensor:
        fx = torch.empty_like(x)
        for row, image in enumerate(active.tolist()):
            fx[row] = sizes[image][calls[image]]
            calls[image] += 1
        return fx

    return Recorder(f, len(sizes))


def test_divergence_keeps_best_iterate() -> None:
    recorder = scripted([3, 1, 5, 20], [3, 4, 5, 6], [4, 3, 2, 1])
    x, output, residual, evaluations = anderson(recorder, rand(3, 1, 2, 2), 1.0, 1e-3, 4)
    assert residual.tolist() == [1, 3, 1]
    assert evaluations.tolist() == [4, 4, 4]
    for image, best in enumerate((1, 0, 3)):
        assert torch.equal(x[image], recorder.inputs[image][best])
        assert torch.equal(output[image], 10 * recorder.inputs[image][best])


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "best", "residual"),
    [([NAN] * 9, None, INF), ([2, NAN, *[1.0] * 7], 0, 2), ([3, 2, NAN, *[1.0] * 6], 1, 2), ([INF] * 9, None, INF)],
)
def test_nan_does_not_converge_or_affect_other_images(
    sizes: list[float], best: int | None, residual: float, dtype: torch.dtype
) -> None:
    others = [[1.0, 0.5, 0.25, 0.0], [1.0, 2.0, 0.0]]
    guess = rand(3, 1, 4, 4, dtype=dtype)
    recorder = scripted(others[0], sizes, others[1])
    x, output, reached, evaluations = anderson(recorder, guess, 1.0, 1e-6, 9)
    assert float(reached[1]) == residual
    assert not (reached <= 1e-6)[1]
    assert torch.isfinite(x).all()
    assert torch.isfinite(output).all()
    assert torch.equal(x[1], guess[1] if best is None else recorder.inputs[1][best])
    assert int(evaluations[1]) == len(recorder.inputs[1])
    expected = anderson(scripted(*others), guess[[0, 2]], 1.0, 1e-6, 9)
    for batch_result, single_result in zip((x, output, reached, evaluations), expected, strict=True):
        assert torch.equal(batch_result[[0, 2]], single_result)
    assert reached[[0, 2]].tolist() == [0, 0]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    num_threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(num_threads)


# PyTorch splits sums of 32768 or more values among threads.
@pytest.mark.parametrize(
    ("shape", "number"), [((1, 8, 8), 1), ((3, 28, 28), 1), ((3, 28, 28), 2), ((3, 106, 106), 1), ((3, 106, 106), 2)]
)
def test_solution_is_independent_of_batch(shape: tuple[int, ...], number: int, threads: Callable[[int], None]) -> None:
    threads(number)
    count = 9
    y = rand(count, *shape, dtype=torch.float32)
    spread = torch.linspace(0, 0.9, count).view(-1, 1, 1, 1)
    k = 1 - spread * rand(count, *shape, seed=1, dtype=torch.float32).abs()

    def solve(images: list[int]) -> tuple[Tensor, ...]:
        b, slope = y[images], k[images]
        return anderson(Recorder(lambda x, active: b[active] - slope[active] * x, count), b * 0.9, 1.0, 1e-5, 12)

    full_batch = solve(list(range(count)))
    assert len(set(full_batch[3].tolist())) > 2
    for images in ([0], [4], [8], [8, 0, 3]):
        for batch_result, subset_result in zip(full_batch, solve(images), strict=True):
            assert torch.equal(batch_result[images], subset_result), images


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.timestep}-{step.prev_timestep}")
def test_mixing_balances_both_extremes(step: Step) -> None:
    """c times the slope of a step is q for images without variance and 1 / q for the variance of the noise."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    slopes = []
    for variance in (0.0, 1.0):
        epsilon = math.sqrt(1 - step.alpha) * x / (step.alpha * variance + 1 - step.alpha)
        start, end = ddim_step(epsilon, x, step)[0].flatten().tolist()
        slopes.append(end - start)
    shrink, stretch = (mixing(step) * slope for slope in slopes)
    assert shrink * stretch == pytest.approx(1, abs=1e-12)
    assert shrink < 1 < stretch


class Denoiser:
    """A small nonlinear function of x and t that records timesteps and batch sizes."""

    def __init__(self) -> None:
        self.timesteps: list[int] = []
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.timesteps.append(int(t))
        self.sizes.append(len(x))
        return self.at(x, int(t))

    @staticmethod
    def at(x: Tensor, t: int) -> Tensor:
        return 0.4 * x + 0.1 * torch.sin(2 * x + t / 500) + 0.05 * x.roll(1, -1) + 0.1


def predictions(output: Tensor, x: Tensor, a: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Solve x = sqrt(a) x_0 + sqrt(1 - a) epsilon and the equation of the output for x_0 and epsilon."""
    matrix = np.array([[math.sqrt(a), math.sqrt(1 - a)], [-math.sqrt(1 - a), math.sqrt(a)]])
    row = {"epsilon": [0.0, 1.0], "sample": [1.0, 0.0], "v_prediction": matrix[1].tolist()}[prediction_type]
    values = np.stack([x.numpy(), output.numpy()])
    x0, epsilon = np.tensordot(np.linalg.inv(np.array([matrix[0], row])), values, 1)
    return torch.from_numpy(x0), torch.from_numpy(epsilon)


def forward(x: Tensor, step: Step, prediction_type: str) -> Tensor:
    """Compute g(x) by the equations written out."""
    x0, epsilon = predictions(Denoiser.at(x, step.timestep), x, step.alpha, prediction_type)
    return math.sqrt(step.alpha_prev) * x0 + math.sqrt(1 - step.alpha_prev) * epsilon


def encode(prediction_type: str, exact: bool, **limits: Any) -> tuple[list[Tensor], list[Tensor], Inversion, Denoiser]:
    """Encode; return the samples, the x_0 predicted per step, the inversion and the denoiser."""
    denoiser = Denoiser()
    inversion = Inversion(denoiser, prediction_type, exact, **({"tolerance": 1e-10, "max_iterations": 100} | limits))
    xs, x0s = [rand(3, 1, 4, 4)], []
    for state in run_steps(xs[0], STEPS[::-1], inversion):
        xs.append(state.sample)
        x0s.append(state.pred_original_sample)
    return xs, x0s, inversion, denoiser


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_euler_evaluates_once_per_step_and_once_at_start(prediction_type: str) -> None:
    xs, _, inversion, denoiser = encode(prediction_type, exact=False)
    ascending = [5, 100, 300, 600, 900]
    # At timestep 0 for the image, then at the end of each step.
    assert denoiser.timesteps == [0, *ascending]
    assert [entry.tolist() for entry in inversion.evaluations] == [[2] * 3, *[[1] * 3] * 4]
    for (x_prev, x), t_prev, step in zip(pairwise(xs), [0, *ascending[:-1]], STEPS[::-1], strict=True):
        # Equation (13) with x / sqrt(alpha) and sigma = sqrt((1 - alpha) / alpha).
        _, epsilon = predictions(Denoiser.at(x_prev, t_prev), x_prev, step.alpha_prev, prediction_type)
        sigma, sigma_prev = (math.sqrt((1 - a) / a) for a in (step.alpha, step.alpha_prev))
        expected = math.sqrt(step.alpha) * (x_prev / math.sqrt(step.alpha_prev) + (sigma - sigma_prev) * epsilon)
        assert (x - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_residuals_match_sampling_step(prediction_type: str, exact: bool) -> None:
    xs, x0s, inversion, _ = encode(prediction_type, exact)
    for index, step in enumerate(STEPS[::-1]):
        difference = xs[index] - forward(xs[index + 1], step, prediction_type)
        expected = difference.abs().flatten(1).amax(1)
        assert inversion.residuals[index].tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-14)
        output = Denoiser.at(xs[index + 1], step.timestep)
        x0, _ = predictions(output, xs[index + 1], step.alpha, prediction_type)
        assert (x0s[index] - x0).abs().max() <= 1e-9
        if exact:
            assert expected.max() <= 1e-10
        else:
            assert expected.min() > 1e-6


def test_first_guess_extrapolates_epsilon_linearly() -> None:
    """An epsilon linear in t is guessed exactly once two of its values are values, and never by Euler."""
    steps = make_steps([500, 400, 300, 200, 100], ALPHAS, float(ALPHAS[0]))
    x = rand(2, 1, 4, 4)
    residuals = []
    for exact in (True, False):
        inversion = Inversion(lambda x, t: 0.2 + torch.full_like(x, int(t) / 1000), "epsilon", exact, 1e-9, 1)
        list(run_steps(x, steps[::-1], inversion))
        residuals.append(torch.stack(inversion.residuals, 1))
    line, euler = residuals
    assert torch.equal(line[:, 0], euler[:, 0])
    assert line[:, 1:].max() <= 1e-12
    assert euler.min() > 1e-3


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_evaluations_are_counted_per_image(prediction_type: str) -> None:
    _, _, inversion, denoiser = encode(prediction_type, exact=True, tolerance=1e-9)
    assert sum(int(entry.sum()) for entry in inversion.evaluations) == sum(denoiser.sizes)
    for step, entry in zip(STEPS[::-1], inversion.evaluations, strict=True):
        count = denoiser.timesteps.count(step.timestep) + (step is STEPS[-1])
        assert int(entry.max()) == count
    _, _, inversion, _ = encode(prediction_type, exact=True, max_iterations=2)
    assert [entry.tolist() for entry in inversion.evaluations] == [[3] * 3, *[[2] * 3] * 4]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_in_batches_evaluates_full_batches(batch_size: int, make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    sizes = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return unet(x, t).sample

    x, t = rand(9, 3, 16, 16, dtype=torch.float32), torch.tensor(300)
    denoiser = in_batches(network, batch_size)
    with torch.no_grad():
        output = denoiser(x, t)
        assert set(sizes) == {batch_size}
        assert len(sizes) == -(-9 // batch_size)
        assert (output - unet(x, t).sample).abs().max() <= 1e-5
        for images in ([0], [8], [4, 2], [7, 6, 5, 4, 3, 2, 1]):
            assert torch.equal(denoiser(x[images], t), output[images])
    assert set(sizes) == {batch_size}


def test_in_batches_leaves_full_batches_unchanged() -> None:
    seen = []
    denoiser = in_batches(lambda x, t: (seen.append(x), x * t)[1], 2)
    x = rand(4, 1, 2, 2)
    assert torch.equal(denoiser(x, torch.tensor(3)), x * 3)
    assert all(torch.equal(a, b) for a, b in zip(seen, x.split(2), strict=True))
