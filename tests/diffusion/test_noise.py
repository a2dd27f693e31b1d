"""Seeded noise: what it may depend on, and its equality with `randn_tensor` of `diffusers`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ddim.diffusion.noise import MAX_SEED, check_seeds, noise_from_generator, noise_from_seeds
from helpers import seeded

CPU = torch.device("cpu")
SHAPE = (3, 2, 4, 4)
SEEDS = [7, 0, MAX_SEED]


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("draws", [1, 3])
def test_noise_is_independent_of_batch_size_and_order(draws: int) -> None:
    batch, reverse = noise_from_seeds(SHAPE, SEEDS, CPU), noise_from_seeds(SHAPE, SEEDS[::-1], CPU)
    single = [noise_from_seeds((1, *SHAPE[1:]), [seed], CPU) for seed in SEEDS]
    for _ in range(draws):
        noise = batch()
        assert noise.shape == SHAPE
        assert torch.equal(noise, torch.cat([draw() for draw in single]))
        assert torch.equal(noise, reverse().flip(0))


def test_noise_differs_between_seeds_and_between_draws() -> None:
    draw = noise_from_seeds(SHAPE, SEEDS, CPU)
    first, second = draw(), draw()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_seeds_match_seeded_generators() -> None:
    ours, theirs = noise_from_seeds(SHAPE, SEEDS, CPU), [seeded(seed) for seed in SEEDS]
    for _ in range(2):
        assert torch.equal(ours(), randn_tensor(SHAPE, theirs, CPU, torch.float32))


@pytest.mark.usefixtures("float64_by_default")
def test_seeds_draw_float32_for_any_default_dtype() -> None:
    noise = noise_from_seeds(SHAPE, SEEDS, CPU)()
    assert noise.dtype == torch.float32
    assert torch.equal(noise, randn_tensor(SHAPE, [seeded(seed) for seed in SEEDS], CPU, torch.float32))


def test_seeds_leave_global_generator_unchanged() -> None:
    state = torch.get_rng_state()
    noise_from_seeds(SHAPE, SEEDS, CPU)()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["one", "list", "tuple"])
def test_generators_match_diffusers(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = ([seeded(seed) for seed in (1, 2, 3)] for _ in range(2))
    generator, expected = {"one": (ours[0], theirs[0]), "list": (ours, theirs), "tuple": (tuple(ours), theirs)}[kind]
    draw = noise_from_generator(SHAPE, generator, CPU, dtype)
    for _ in range(2):
        noise = draw()
        assert noise.dtype == dtype
        assert torch.equal(noise, randn_tensor(SHAPE, expected, CPU, dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def test_single_generator_in_list() -> None:
    shape = (1, *SHAPE[1:])
    noise = noise_from_generator(shape, [seeded(5)], CPU, torch.float32)()
    assert torch.equal(noise, randn_tensor(shape, [seeded(5)], CPU, torch.float32))
    assert torch.equal(noise, noise_from_generator(shape, seeded(5), CPU, torch.float32)())


def test_none_uses_global_generator() -> None:
    torch.manual_seed(11)
    draw = noise_from_generator(SHAPE, None, CPU, torch.float32)
    ours = [draw(), draw()]
    torch.manual_seed(11)
    for noise in ours:
        assert torch.equal(noise, randn_tensor(SHAPE, None, CPU, torch.float32))


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_generator_count_mismatch_raises(count: int) -> None:
    message = f"one per image, got {count} for a batch_size of 3"
    with pytest.raises(ValueError, match=message):
        noise_from_generator(SHAPE, [seeded(i) for i in range(count)], CPU, torch.float32)


@pytest.mark.parametrize(
    ("generator", "kind"), [(7, "int"), ([seeded(0), 7, seeded(1)], "int"), ([None] * 3, "NoneType"), ("seed", "str")]
)
def test_generator_type_is_validated(generator: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"generator must be a torch.Generator or a list of them, got {kind}"):
        noise_from_generator(SHAPE, generator, CPU, torch.float32)


def test_generator_device_mismatch_raises() -> None:
    class CudaGenerator(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"generator must be on the model's device \(cpu\) or on the CPU, got cuda"):
        noise_from_generator(SHAPE, CudaGenerator(), CPU, torch.float32)


@pytest.mark.parametrize("seeds", [[7, 0, MAX_SEED], (7, 0, MAX_SEED), torch.tensor([7, 0, MAX_SEED]), iter(SEEDS)])
def test_integer_sequences_are_accepted_as_seeds(seeds: object) -> None:
    checked = check_seeds(seeds, 3)
    assert checked == SEEDS
    assert all(type(seed) is int for seed in checked)


@pytest.mark.parametrize("entry", [-1, MAX_SEED + 1, 1.0, "7", None, True, float("nan")])
def test_invalid_seed_raises(entry: object) -> None:
    with pytest.raises(ValueError, match=f"seeds must be integers from 0 to .* got {entry!r}"):
        check_seeds([3, entry], 2)


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_seed_count_mismatch_raises(seeds: list[int]) -> None:
    with pytest.raises(
        ValueError, match=f"seeds must hold one integer per image, got {len(seeds)} for a batch_size of 2"
    ):
        check_seeds(seeds, 2)
