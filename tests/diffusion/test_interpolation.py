"""Spherical interpolation: against equation (67) of arXiv 2010.02502 in NumPy, rotations of the complex plane, and
rotation matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ddim
from ddim.diffusion.interpolation import add_direction, slerp, slerp_grid, slerp_path

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)


def latent(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape or (3, 4, 5))).to(dtype)


def orthonormal(dimension: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return two orthogonal unit vectors."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, 2)))
    return q[:, 0], q[:, 1]


def equation_67(z0: np.ndarray, z1: np.ndarray, t: float) -> np.ndarray:
    """Evaluate the paper's equation literally, with the arc cosine, in NumPy."""
    theta = np.arccos((z0 * z1).sum() / (np.sqrt((z0**2).sum()) * np.sqrt((z1**2).sum())))
    return np.sin((1 - t) * theta) / np.sin(theta) * z0 + np.sin(t * theta) / np.sin(theta) * z1


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are bitwise equal; unlike `torch.equal`, it distinguishes -0.0 from 0.0."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(BITS[a.dtype]), b.contiguous().view(BITS[b.dtype]))


def rotated(start: complex, angle: float, t: float) -> complex:
    """Rotate `start` around the origin by a fraction t of the angle."""
    return start * complex(math.cos(t * angle), math.sin(t * angle))


def plane(*points: complex) -> list[Tensor]:
    return [torch.tensor([z.real, z.imag], dtype=torch.float64) for z in points]


# --- the formula


@pytest.mark.parametrize("shape", [(2,), (7,), (3, 4, 5), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("scale", [1, 2.5])
def test_equation_67(shape: tuple[int, ...], scale: float) -> None:
    """Latents may differ in norm, as those of real images do."""
    z0, z1 = latent(1, *shape), scale * latent(2, *shape)
    got = slerp(z0, z1, TIMES)
    assert got.shape == (21, *shape)
    expected = np.stack([equation_67(z0.numpy(), z1.numpy(), float(t)) for t in TIMES])
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-13)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    start=st.floats(-math.pi, math.pi),
    angle=st.floats(0.01, math.pi - 0.01),
    side=st.sampled_from([-1, 1]),
    radius=st.floats(0.01, 100),
    t=st.floats(0, 1),
)
def test_latents_of_two_values_rotate_in_the_plane(
    start: float, angle: float, side: int, radius: float, t: float
) -> None:
    begin = radius * complex(math.cos(start), math.sin(start))
    z0, z1 = plane(begin, rotated(begin, side * angle, 1))
    got = complex(*slerp(z0, z1, t).tolist())
    assert abs(got - rotated(begin, side * angle, t)) <= 1e-12 * radius


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 9.9e-7, 1.01e-6, 1e-5, 1e-3, 1, 3, math.pi - 1e-3, math.pi - 1e-5])
def test_small_and_large_angles_in_the_plane(angle: float) -> None:
    """Angles on both sides of the switch to linear interpolation, and where the arc cosine is inexact."""
    begin = complex(0.6, -0.8)
    z0, z1 = plane(begin, rotated(begin, angle, 1))
    # Between nearly opposite latents, their own rounding is magnified by 1 / sin(angle).
    bound = 1e-12 if angle < 3 else 1e-15 / math.sin(angle)
    for t, frame in zip(TIMES.tolist(), slerp(z0, z1, TIMES), strict=True):
        assert abs(complex(*frame.tolist()) - rotated(begin, angle, t)) <= bound


@pytest.mark.parametrize("dimension", [2, 3, 12])
@pytest.mark.parametrize("angle", [1e-4, 0.3, 1.5, 3.1])
def test_matches_rotation_matrix(dimension: int, angle: float) -> None:
    e, f = orthonormal(dimension)
    generator = np.outer(f, e) - np.outer(e, f)

    def rotation(turn: float) -> np.ndarray:
        """Return exp(turn generator) by Rodrigues' formula, which holds for rotations in a plane in any dimension."""
        return np.eye(dimension) + math.sin(turn) * generator + (1 - math.cos(turn)) * generator @ generator

    z0, z1 = 5 * e, rotation(angle) @ (5 * e)
    for t in (0, 0.1, 0.5, 0.75, 1):
        got = slerp(torch.from_numpy(z0), torch.from_numpy(z1), t).numpy()
        np.testing.assert_allclose(got, rotation(t * angle) @ z0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-7, 0.01, 1, 2, 3.14])
def test_equal_norms_give_constant_norm_and_angular_speed(angle: float) -> None:
    e, f = (v.reshape(3, 16, 16) for v in orthonormal(768))
    radius = math.sqrt(768)
    z0, z1 = (radius * torch.from_numpy(v) for v in (e, math.cos(angle) * e + math.sin(angle) * f))
    frames = slerp(z0, z1, torch.linspace(0, 1, 51, dtype=torch.float64)).flatten(1).numpy()
    np.testing.assert_allclose(np.linalg.norm(frames, axis=1), radius, rtol=1e-12)
    # Coordinates along e and f give the angle of a frame without an arc cosine.
    turns = np.unwrap(np.arctan2(frames @ f.ravel(), frames @ e.ravel()))
    np.testing.assert_allclose(turns, np.linspace(0, angle, 51), rtol=0, atol=1e-10)
    # All frames lie in the plane of the two latents.
    inside = np.outer(frames @ e.ravel(), e.ravel()) + np.outer(frames @ f.ravel(), f.ravel())
    np.testing.assert_allclose(frames, inside, rtol=0, atol=1e-10)


def test_typical_norm_is_kept() -> None:
    z0, z1 = latent(3, 3, 32, 32), latent(4, 3, 32, 32)
    typical = math.sqrt(3 * 32 * 32)
    assert 0.97 * typical < float(slerp(z0, z1, 0.5).norm()) < 1.03 * typical
    assert float(((z0 + z1) / 2).norm()) < 0.73 * typical


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), dimension=st.integers(3, 40), scale=st.floats(0.01, 100), t=st.floats(0, 1))
def test_symmetries(seed: int, dimension: int, scale: float, t: float) -> None:
    z0, z1 = latent(seed, dimension), scale * latent(seed + 1, dimension)
    got = slerp(z0, z1, t)
    size = float(z0.norm() + z1.norm())
    # Reversal,
    torch.testing.assert_close(slerp(z1, z0, 1 - t), got, rtol=0, atol=1e-12 * size)
    # scaling,
    torch.testing.assert_close(slerp(7 * z0, 7 * z1, t), 7 * got, rtol=0, atol=1e-12 * size)
    # and rotation.
    q, _ = torch.linalg.qr(latent(seed + 2, dimension, dimension))
    torch.testing.assert_close(slerp(q @ z0, q @ z1, t), q @ got, rtol=0, atol=1e-11 * size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), dimension=st.integers(3, 40), s=st.floats(0.01, 1), t=st.floats(0, 1))
def test_nested_interpolation_composes(seed: int, dimension: int, s: float, t: float) -> None:
    """On the sphere, interpolating by t to the point at s is interpolating by s t."""
    z0, z1 = (z / z.norm() for z in (latent(seed, dimension), latent(seed + 1, dimension)))
    torch.testing.assert_close(slerp(z0, slerp(z0, z1, s), t), slerp(z0, z1, s * t), rtol=0, atol=1e-11)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), count=st.integers(1, 6), t=st.floats(0, 1))
def test_frames_are_finite_and_end_points_exact(data: st.DataObject, count: int, t: float) -> None:
    numbers = st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=count, max_size=count)
    z0, z1 = (torch.tensor(data.draw(numbers)) for _ in range(2))
    between = slerp(z0, z1, t)
    assert bool(torch.isfinite(between).all())
    # The norm hardly exceeds that of the latents: nearly opposite latents do not cause a division by nearly 0.
    largest = max(float(z0.double().norm()), float(z1.double().norm()))
    assert float(between.double().norm()) <= largest * max(1, norm_bound(z0, z1)) * (1 + 1e-5) + 1e-40
    assert same_bits(slerp(z0, z1, 0), z0)
    assert same_bits(slerp(z0, z1, 1), z1)


def norm_bound(z0: Tensor, z1: Tensor) -> float:
    """Bound the norm of equation (67) relative to the larger norm: 1 / sin(theta) where the norms differ."""
    u, v = (z.double() / z.double().norm().clamp_min(1e-300) for z in (z0, z1))
    sine = math.sin(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))
    return 1 / sine if sine > 1e-6 else 1


# --- the ends, and types


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (40,)])
def test_end_points_are_bitwise_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    z0, z1 = latent(5, *shape, dtype=dtype), latent(6, *shape, dtype=dtype)
    z0.view(-1)[0], z1.view(-1)[1] = -0.0, -0.0
    z1.view(-1)[2] = torch.finfo(dtype).smallest_normal / 4
    copies = z0.clone(), z1.clone()
    frames = slerp(z0, z1, torch.tensor([1, 0.5, 0, 1e-9]))
    assert frames.dtype == dtype
    assert same_bits(frames[0], z1)
    assert same_bits(frames[2], z0)
    for t in (0, 0.0, torch.tensor(0), torch.tensor(0.0)):
        assert same_bits(slerp(z0, z1, t), z0)
    for t in (1, 1.0, torch.tensor(1), torch.tensor(1.0)):
        assert same_bits(slerp(z0, z1, t), z1)
    # Frames are copies: changing them does not change the latents.
    frames.zero_()
    slerp(z0, z1, 0).zero_()
    assert same_bits(z0, copies[0])
    assert same_bits(z1, copies[1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision_is_computed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    z0, z1 = latent(7, 3, 16, 16, dtype=dtype), latent(8, 3, 16, 16, dtype=dtype)
    got = slerp(z0, z1, TIMES)
    assert got.dtype == dtype
    assert torch.equal(got, slerp(z0.double(), z1.double(), TIMES).to(dtype))


def test_number_and_tensor_t() -> None:
    z0, z1 = latent(9), latent(10)
    quarter = slerp(z0, z1, 0.25)
    assert quarter.shape == z0.shape
    values: list[Any] = [torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), np.float32(0.25), np.array(0.25)]
    for t in values:
        assert torch.equal(slerp(z0, z1, t), quarter)
    for t in ([0.75, 0, 0.25, 0.25], (0.75, 0, 0.25, 0.25)):
        frames = slerp(z0, z1, torch.tensor(t))
        assert frames.shape == (4, 3, 4, 5)
        torch.testing.assert_close(frames[0], slerp(z0, z1, 0.75), rtol=0, atol=1e-14)
        assert torch.equal(frames[1], z0)
        torch.testing.assert_close(frames[2], quarter, rtol=0, atol=1e-14)
        assert torch.equal(frames[2], frames[3])
    assert slerp(z0, z1, torch.tensor([0.25])).shape == (1, 3, 4, 5)
    assert slerp(z0, z1, torch.tensor([0, 1])).shape == (2, 3, 4, 5)
    assert slerp(z0, z1, torch.zeros(0)).shape == (0, 3, 4, 5)


def test_batch_pairs_have_separate_angles() -> None:
    e, f = (torch.from_numpy(v).view(1, 4, 5) for v in orthonormal(20))
    angles = [1e-9, 0.1, 1.0, 3.0, math.pi]
    z0 = torch.stack([e] * 5)
    z1 = torch.stack([math.cos(a) * e + math.sin(a) * f for a in angles[:4]] + [-e])
    assert slerp(z0, z1, 0.5).shape == (5, 1, 4, 5)
    frames = slerp(z0, z1, TIMES)
    assert frames.shape == (21, 5, 1, 4, 5)
    for index, angle in enumerate(angles[:4]):
        expected = torch.stack([math.cos(t * angle) * e + math.sin(t * angle) * f for t in TIMES.tolist()])
        torch.testing.assert_close(frames[:, index], expected, rtol=0, atol=1e-13)
    for index in range(5):
        assert torch.equal(frames[:, index], slerp(z0[index], z1[index], TIMES))
    # Without a batch dimension, the same values are one latent with one angle.
    assert not torch.allclose(slerp(z0[:, 0], z1[:, 0], TIMES), frames[:, :, 0], atol=1e-2)


def test_slerp_is_exported() -> None:
    assert ddim.slerp is slerp


# --- where equation (67) divides by zero


@pytest.mark.parametrize("distance", [0, 1e-15, 1e-12, 1e-9, 1e-7])
def test_nearly_equal_latents(distance: float) -> None:
    z0 = latent(11)
    z1 = z0 + distance * latent(12)
    frames = slerp(z0, z1, TIMES)
    straight = z0 + TIMES.view(-1, 1, 1, 1) * (z1 - z0)
    # So flat an arc equals its chord.
    torch.testing.assert_close(frames, straight, rtol=0, atol=1e-14)
    if distance == 0:
        assert bool((frames == z0).all())


def test_parallel_latents_of_different_norms() -> None:
    """Equation (67) is linear in the limit of parallel latents."""
    z0 = latent(13)
    frames = slerp(z0, 3 * z0, TIMES)
    torch.testing.assert_close(frames, (1 + 2 * TIMES.view(-1, 1, 1, 1)) * z0, rtol=1e-14, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_opposite_latents_follow_half_circle(seed: int) -> None:
    z0 = latent(seed)
    frames = slerp(z0, -z0, TIMES)
    assert torch.equal(frames, slerp(z0.clone(), -z0.clone(), TIMES))
    assert same_bits(frames[0], z0)
    assert same_bits(frames[-1], -z0)
    flat = frames.flatten(1).numpy() / float(z0.norm())
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 1, rtol=1e-14)
    # At t the angle is pi t to the first latent, hence pi (1 - t) to the second,
    np.testing.assert_allclose(flat @ flat[0], np.cos(np.pi * TIMES.numpy()), rtol=0, atol=1e-14)
    # at constant speed, in one plane.
    chords = np.linalg.norm(np.diff(flat, axis=0), axis=1)
    np.testing.assert_allclose(chords, 2 * math.sin(math.pi / 40), rtol=1e-12)
    assert np.linalg.matrix_rank(flat, tol=1e-10) == 2


@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0], [1e-20, 1e20]])
def test_opposite_latents_on_axes_and_diagonals(values: list[float]) -> None:
    z0 = torch.tensor(values, dtype=torch.float64)
    frames = slerp(z0, -z0, TIMES)
    torch.testing.assert_close(frames.norm(dim=1), z0.norm().expand(21), rtol=1e-14, atol=0)


def test_opposite_latents_of_different_norms_avoid_zero() -> None:
    z0 = latent(14)
    frames = slerp(z0, -4 * z0, torch.linspace(0, 1, 1001, dtype=torch.float64))
    norms = (frames.flatten(1).norm(dim=1) / z0.norm()).numpy()
    assert norms.min() == pytest.approx(1)
    assert norms.max() == pytest.approx(4)
    assert float((frames[1:] - frames[:-1]).flatten(1).norm(dim=1).max() / z0.norm()) < 4 * math.pi / 1000 + 3 / 1000
    assert same_bits(frames[-1], -4 * z0)


@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1.5e-6, 1e-6, 9e-7, 1e-9, 1e-12, 1e-15])
def test_nearly_opposite_latents(distance: float) -> None:
    """Frames are continuous in t and on the sphere, for either half circle."""
    e, f = (torch.from_numpy(v) for v in orthonormal(48))
    z0 = e
    z1 = -math.cos(distance) * e + math.sin(distance) * f
    frames = slerp(z0, z1, torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert same_bits(frames[0], z0)
    assert same_bits(frames[-1], z1)
    # 1e-6: below this distance a half circle replaces the formula, and ends in -z0 instead of z1.
    torch.testing.assert_close(frames.norm(dim=1), torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-8)
    chords = (frames[1:] - frames[:-1]).norm(dim=1)
    assert float(chords.max()) <= math.pi / 1000 + 1.1e-6
    assert float(chords.min()) >= (math.pi - distance) / 1000 * 0.999 - 1.1e-6
    assert torch.equal(frames, slerp(z0, z1, torch.linspace(0, 1, 1001, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_latent(dtype: torch.dtype) -> None:
    z, zero = latent(15, dtype=dtype), torch.zeros(3, 4, 5, dtype=dtype)
    t = torch.tensor([0, 0.25, 0.5, 1])
    assert torch.equal(slerp(zero, z, t), torch.stack([zero, z / 4, z / 2, z]))
    assert torch.equal(slerp(z, zero, t), torch.stack([z, (z.double() * 0.75).to(dtype), z / 2, zero]))
    assert torch.equal(slerp(zero, zero, t), torch.zeros(4, 3, 4, 5, dtype=dtype))
    # A zero latent does not affect other pairs of a batch.
    batch = slerp(torch.stack([zero, z]), torch.stack([z, -z]), 0.5)
    assert torch.equal(batch[0], z / 2)
    assert torch.equal(batch[1], slerp(z, -z, 0.5))


def test_latents_of_one_value_are_interpolated_linearly() -> None:
    z0, z1 = torch.tensor([2.0]), torch.tensor([-4.0])
    assert slerp(z0, z1, torch.tensor([0, 0.5, 1])).tolist() == [[2], [-1], [-4]]
    assert slerp(z0[0], z1[0], 0.5).shape == ()


@pytest.mark.parametrize("kind", ["far", "parallel", "opposite", "zero"])
def test_continuous_in_t(kind: str) -> None:
    z0 = latent(16)
    z1 = {"far": latent(17), "parallel": z0 + 1e-9 * latent(17), "opposite": -z0, "zero": torch.zeros_like(z0)}[kind]
    size = float(z0.norm() + z1.norm())
    for t in (0, 1e-12, 0.3, 0.5, 1 - 1e-9):
        step = slerp(z0, z1, t + 1e-9) - slerp(z0, z1, t)
        assert float(step.norm()) <= 4e-9 * size


# --- paths


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("frames", [2, 3, 8])
@pytest.mark.parametrize("closed", [False, True])
def test_path_passes_through_its_latents(dtype: torch.dtype, count: int, frames: int, closed: bool) -> None:
    latents = [latent(seed, 2, 3, 4, dtype=dtype) for seed in range(count)]
    path = slerp_path(latents, frames, closed)
    assert path.dtype == dtype
    assert path.shape == (count * (frames - 1) if closed else (count - 1) * (frames - 1) + 1, 2, 3, 4)
    for index, z in enumerate(latents):
        assert same_bits(path[index * (frames - 1)], z)


def test_path_matches_equation_67() -> None:
    latents = [latent(seed, 2, 3, 4) for seed in range(3)]
    path = slerp_path(latents, 6, closed=True)
    for leg in range(3):
        for step in range(5):
            expected = equation_67(latents[leg].numpy(), latents[(leg + 1) % 3].numpy(), step / 5)
            np.testing.assert_allclose(path[5 * leg + step].numpy(), expected, rtol=0, atol=1e-13)
    # An open path omits the return, and ends in the last latent.
    assert torch.equal(slerp_path(latents, 6), path[:11])


def test_closed_path_of_two_latents_is_symmetric() -> None:
    latents = [latent(seed, 2, 3, 4) for seed in range(2)]
    path = slerp_path(latents, 5, closed=True)
    assert len(path) == 8
    torch.testing.assert_close(path[1:], path[1:].flip(0), rtol=0, atol=1e-14)


def test_latents_as_list_tuple_and_tensor() -> None:
    latents = latent(18, 4, 2, 3, 5)
    expected = slerp_path(list(latents), 3, closed=True)
    assert torch.equal(slerp_path(tuple(latents), 3, closed=True), expected)
    assert torch.equal(slerp_path(latents, 3, closed=True), expected)
    assert torch.equal(slerp_grid(latents, 3, 4), slerp_grid(list(latents), 3, 4))


# --- grids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (3, 5), (5, 3), (2, 7)])
def test_grid_corners_and_edges(dtype: torch.dtype, rows: int, columns: int) -> None:
    upper_left, upper_right, lower_left, lower_right = corners = [
        latent(seed, 2, 3, 4, dtype=dtype) for seed in range(20, 24)
    ]
    flat = slerp_grid(corners, rows, columns)
    assert flat.dtype == dtype
    assert flat.shape == (rows * columns, 2, 3, 4)
    grid = flat.view(rows, columns, 2, 3, 4)
    assert same_bits(grid[0, 0], upper_left)
    assert same_bits(grid[0, -1], upper_right)
    assert same_bits(grid[-1, 0], lower_left)
    assert same_bits(grid[-1, -1], lower_right)
    assert same_bits(grid[0], slerp_path([upper_left, upper_right], columns))
    assert same_bits(grid[-1], slerp_path([lower_left, lower_right], columns))
    assert same_bits(grid[:, 0], slerp_path([upper_left, lower_left], rows))
    assert same_bits(grid[:, -1], slerp_path([upper_right, lower_right], rows))


def test_grid_interior_matches_equation_67() -> None:
    corners = [latent(seed, 2, 3, 4).numpy() for seed in range(30, 34)]
    grid = slerp_grid([torch.from_numpy(z) for z in corners], 4, 6).view(4, 6, 2, 3, 4)
    for row in range(4):
        for column in range(6):
            upper = equation_67(corners[0], corners[1], column / 5)
            lower = equation_67(corners[2], corners[3], column / 5)
            expected = equation_67(upper, lower, row / 3)
            np.testing.assert_allclose(grid[row, column].numpy(), expected, rtol=0, atol=1e-12)


# --- invalid input


Z = latent(40)


def with_value(value: float) -> Tensor:
    z = Z.clone()
    z[1, 2, 3] = value
    return z


@pytest.mark.parametrize(
    ("z1", "message"),
    [
        (latent(0, 3, 4, 6), r"latent 1: expected shape \(3, 4, 5\) as of latent 0, got \(3, 4, 6\)"),
        (latent(0, 1, 3, 4, 5), r"latent 1: expected shape \(3, 4, 5\) as of latent 0, got \(1, 3, 4, 5\)"),
        (latent(0, 1), r"latent 1: expected shape \(3, 4, 5\) as of latent 0, got \(1,\)"),
        (Z.float(), r"latent 1: expected torch.float64 as of latent 0, got torch.float32"),
        (with_value(math.nan), "latent 1 must be finite floating-point numbers, got NaN, infinity or integers"),
        (with_value(math.inf), "latent 1 must be finite"),
        (with_value(-math.inf), "latent 1 must be finite"),
    ],
)
def test_mismatched_or_non_finite_latents_raise(z1: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slerp(Z, z1, 0.5)
    with pytest.raises(ValueError, match=message):
        slerp_path([Z, z1, Z], 3)
    with pytest.raises(ValueError, match=message.replace("latent 1", "latent 2")):
        slerp_path([Z, Z, z1], 3, closed=True)
    for index in (1, 2, 3):
        corners = [Z] * 4
        corners[index] = z1
        with pytest.raises(ValueError, match=message.replace("latent 1", f"latent {index}")):
            slerp_grid(corners, 3, 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_non_float_latents_raise(dtype: torch.dtype) -> None:
    z = torch.ones(3, 4, 5, dtype=dtype)
    with pytest.raises(
        ValueError, match=r"latent 0 must be finite floating-point numbers, got NaN, infinity or integers"
    ):
        slerp(z, z, 0.5)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 5), (3, 0, 5)])
def test_empty_latents_raise(shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"latent 0 must not be empty, got shape \(.*\)"):
        slerp(z, z, 0.5)


def test_non_tensor_latents_raise() -> None:
    array: Any = Z.numpy()
    with pytest.raises(TypeError, match="latent 0 must be a tensor, got ndarray"):
        slerp(array, array, 0.5)
    with pytest.raises(TypeError, match="latent 1 must be a tensor, got list"):
        slerp_path([Z, array.tolist()], 3)


RULE = r"^t must be a number from 0 to 1, or a one-dimensional tensor of them, got "


@pytest.mark.parametrize("t", [-0.01, 1.01, -1, 2, math.nan, math.inf, -math.inf])
def test_t_out_of_range_raises(t: float) -> None:
    values = torch.linspace(0, 1, 500)
    values[400] = t
    for times in (t, torch.tensor(t), torch.tensor([t]), torch.tensor([0, t, 1]), values):
        with pytest.raises(ValueError, match=rf"{RULE}{t}$"):
            slerp(Z, Z, times)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (0, 3), (1, 1, 1)])
def test_multidimensional_t_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{RULE}shape {re.escape(str(shape))}$"):
        slerp(Z, Z, torch.zeros(shape))


@pytest.mark.parametrize(
    ("latents", "message"),
    [([], "a path requires at least two latents, got 0"), ([Z], "a path requires at least two latents, got 1")],
)
def test_path_of_too_few_latents_raises(latents: Sequence[Tensor], message: str) -> None:
    for closed in (False, True):
        with pytest.raises(ValueError, match=message):
            slerp_path(latents, 3, closed)


@pytest.mark.parametrize("frames", [1, 0, -1, 2.5, 2.0, True, "3", None])
def test_invalid_frame_count_raises(frames: Any) -> None:
    with pytest.raises(ValueError, match=rf"^frames must be an integer of at least 2, got {frames!r}$"):
        slerp_path([Z, Z], frames)


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_wrong_corner_count_raises(count: int) -> None:
    with pytest.raises(ValueError, match=f"corners must be the four latents of a grid, got {count}"):
        slerp_grid([Z] * count, 3, 3)


@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("value", [1, 0, -1, 2.5, True, None])
def test_invalid_grid_size_raises(name: str, value: Any) -> None:
    """The message names the argument."""
    size: dict[str, Any] = {"rows": 3, "columns": 3} | {name: value}
    with pytest.raises(ValueError, match=f"^{name} must be an integer of at least 2, got {value!r}$"):
        slerp_grid([Z] * 4, **size)


@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (2, 3, 4, 5)])
def test_grid_latents_must_have_image_shape(shape: tuple[int, ...]) -> None:
    """Stacked, other shapes would be taken for one latent or for batches of latents."""
    with pytest.raises(ValueError, match=r"latent 0 of a grid: expected shape \(C, H, W\), got \(.*\)"):
        slerp_grid([torch.ones(shape)] * 4, 3, 3)


# --- directions


@pytest.mark.parametrize("strength", [-3.0, 0.0, 0.5, 100.0])
def test_directions_keep_the_norm(strength: float) -> None:
    latents, direction = latent(0, 4, 3, 5, 5), latent(1, 3, 5, 5)
    moved = add_direction(latents, direction, strength)
    for before, after in zip(latents.numpy(), moved.numpy(), strict=True):
        expected = before + strength * direction.numpy()
        np.testing.assert_allclose(after, expected * np.linalg.norm(before) / np.linalg.norm(expected), rtol=1e-12)


def test_invalid_directions_raise() -> None:
    latents = latent(0, 2, 3, 5, 5)
    with pytest.raises(ValueError, match=r"direction: expected shape \(3, 5, 5\), that of a latent, got \(5, 5\)"):
        add_direction(latents, latent(1, 5, 5), 1.0)
    with pytest.raises(ValueError, match="strength must leave something of every latent"):
        add_direction(latents, latents[0], -1.0)
