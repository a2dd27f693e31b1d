"""Seeded Gaussian noise.

Two conventions meet here. A `torch.Generator`, or a list with one per image, gives the numbers that `diffusers` draws
from it, in the same order. `seeds` gives each image its own CPU generator, drawn in float32: neither the device, nor
the dtype, nor the batch that an image happens to share can change its noise. `seeds=[7]` and
`generator=[torch.Generator().manual_seed(7)]` are the same noise on a float32 model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ddim.validation import as_integer, shown

NoiseSource = Callable[[], Tensor]
"""Draws the next tensor of a fixed shape, standard Gaussian if nothing else is said."""

Distribution = Callable[..., Tensor]
"""`torch.randn`, or another function of its arguments."""

MAX_SEED = 2**63 - 1
"""The largest seed that is accepted."""


def list_seeds(seeds: Iterable[int]) -> list[int]:
    """Return seeds as a list, of entries not yet checked.

    Args:
        seeds: any iterable.

    Raises:
        TypeError: if it is not iterable, such as a single integer.

    Example:
        >>> list_seeds(range(3))
        [0, 1, 2]
        >>> list_seeds(3)
        Traceback (most recent call last):
        TypeError: seeds must be a list of integers, one per image, got 3
    """
    try:
        entries = iter(seeds)
    except TypeError:
        raise TypeError(f"seeds must be a list of integers, one per image, got {shown(seeds)}") from None
    return list(entries)


def check_seeds(seeds: Iterable[int], batch_size: int) -> list[int]:
    """Check that there is one seed per image.

    Args:
        seeds: integers in [0, 2^63 - 1].
        batch_size: the number of images.

    Returns:
        The seeds as Python integers.

    Raises:
        ValueError: for another number of seeds than `batch_size`, or an entry that is not such an integer.
        TypeError: if `seeds` is not iterable.

    Example:
        >>> check_seeds(range(3), 3)
        [0, 1, 2]
    """
    entries = list_seeds(seeds)
    if len(entries) != batch_size:
        raise ValueError(f"seeds must hold one integer per image, got {len(entries)} for a batch_size of {batch_size}")
    checked = []
    for entry in entries:
        seed = as_integer(entry)
        if seed is None or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds must be integers from 0 to 2^63 - 1, got {shown(entry)}")
        checked.append(seed)
    return checked


def noise_from_seeds(
    shape: Sequence[int], seeds: Sequence[int], device: torch.device, distribution: Distribution = torch.randn
) -> NoiseSource:
    """Return a source of noise in which image i depends on `seeds[i]` alone.

    Args:
        shape: (N, C, H, W).
        seeds: N integers, as `check_seeds` returns them.
        device: the device of the noise.
        distribution: `torch.randn` for standard Gaussian noise, `torch.rand` for uniform numbers.

    Returns:
        A function that draws float32 noise (N, C, H, W), other noise at each call.

    Example:
        >>> two = noise_from_seeds((2, 1, 4, 4), [3, 5], torch.device("cpu"))()
        >>> one = noise_from_seeds((1, 1, 4, 4), [5], torch.device("cpu"))()
        >>> torch.equal(two[1:], one)
        True
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return noise_from_generator(shape, generators, device, torch.float32, distribution)


def noise_from_generator(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
    distribution: Distribution = torch.randn,
) -> NoiseSource:
    """Return a source of noise in the order in which `diffusers` draws it.

    Args:
        shape: (N, C, H, W).
        generator: one for the whole batch, a list of N, or `None` for PyTorch's global one.
        device: the device of the noise. CPU generators draw on the CPU, whatever the device.
        dtype: in which the noise is drawn.
        distribution: `torch.randn` for standard Gaussian noise, `torch.rand` for uniform numbers.

    Returns:
        A function that draws noise (N, C, H, W), other noise at each call.

    Raises:
        ValueError: for a list of another length than N, or a generator of a device that is neither the CPU nor
            `device`.
        TypeError: for anything that is not a generator.

    Example:
        >>> source = noise_from_generator((2, 3), torch.Generator().manual_seed(0), torch.device("cpu"), torch.float32)
        >>> torch.equal(source(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
        True
    """
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    for g in generators:
        if g is None and not isinstance(generator, Sequence):
            continue
        if not isinstance(g, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(g).__name__}")
        if g.device.type not in ("cpu", device.type):
            raise ValueError(f"generator must be on the model's device ({device}) or on the CPU, got {g.device}")
    if isinstance(generator, Sequence) and len(generators) != shape[0]:
        raise ValueError(
            f"generator must be one for all images or a list of one per image, got {len(generators)} for a batch_size "
            f"of {shape[0]}"
        )
    part_shape = tuple(shape) if len(generators) == 1 else (1, *shape[1:])

    def draw() -> Tensor:
        parts = [
            _to_device(distribution(part_shape, generator=g, device=g.device if g else device, dtype=dtype), device)
            for g in generators
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return draw


def _to_device(noise: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting for the device, which a copy from pageable memory would do."""
    if device.type == "cuda" and noise.device.type == "cpu":
        noise = noise.pin_memory()
    return noise.to(device, non_blocking=True)
