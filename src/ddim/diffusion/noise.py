"""Seeded Gaussian noise.

Two conventions meet here. A `torch.Generator`, or a list with one an image, gives the numbers that `diffusers` draws
from it, in the same order. `seeds` gives each image a CPU generator of its own, drawn in float32: neither the device,
nor the dtype, nor the batch that an image happens to share can change its noise. `seeds=[7]` and
`generator=[torch.Generator().manual_seed(7)]` are the same noise on a float32 model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ddim.validation import as_integer

NoiseSource = Callable[[], Tensor]
"""Draws the next standard Gaussian tensor of a fixed shape."""

MAX_SEED = 2**63 - 1


def check_seeds(seeds: Iterable[int], batch_size: int) -> list[int]:
    """One seed an image, as integers in [0, 2^63 - 1].

    Raises:
        ValueError: for another number of seeds than `batch_size`, or an entry that is no such integer.
    """
    entries = list(seeds)
    if len(entries) != batch_size:
        raise ValueError(f"{len(entries)} seeds were given for a batch_size of {batch_size}; give one integer an image")
    checked = []
    for entry in entries:
        seed = as_integer(entry)
        if seed is None or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds holds {entry!r}; a seed is a whole number from 0 to 2^63 - 1")
        checked.append(seed)
    return checked


def noise_from_seeds(shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> NoiseSource:
    """A source of float32 noise (N, C, H, W) on `device` in which image i depends on `seeds[i]` alone."""
    return noise_from_generator(shape, [torch.Generator().manual_seed(seed) for seed in seeds], device, torch.float32)


def noise_from_generator(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> NoiseSource:
    """A source of noise of the given shape and dtype, in the order in which `diffusers` draws it.

    Args:
        shape: (N, C, H, W).
        generator: one for the whole batch, a list of N, or `None` for PyTorch's global one.
        device: where the tensors end up. CPU generators draw on the CPU, whatever the device.
        dtype: in which they are drawn.

    Raises:
        ValueError: for a list of another length than N, or a generator of a device that is neither the CPU nor
            `device`.
        TypeError: for anything that is no generator.
    """
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    for g in generators:
        if g is None and not isinstance(generator, Sequence):
            continue
        if not isinstance(g, torch.Generator):
            raise TypeError(f"generator is {type(g).__name__}; it must be a torch.Generator or a list of them")
        if g.device.type not in ("cpu", device.type):
            raise ValueError(
                f"the generator lives on {g.device}, the model on {device}; use one of the model's device or of the CPU"
            )
    if isinstance(generator, Sequence) and len(generators) != shape[0]:
        raise ValueError(
            f"{len(generators)} generators were given for a batch_size of {shape[0]}; give one for all, or one an image"
        )
    each = tuple(shape) if len(generators) == 1 else (1, *shape[1:])

    def draw() -> Tensor:
        parts = [
            _moved(torch.randn(each, generator=g, device=device if g is None else g.device, dtype=dtype), device)
            for g in generators
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return draw


def _moved(noise: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: from pageable memory a copy would."""
    if device.type == "cuda" and noise.device.type == "cpu":
        noise = noise.pin_memory()
    return noise.to(device, non_blocking=True)
