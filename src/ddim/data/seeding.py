"""Random generators that are functions of what they are for, so that no generator state has to be saved."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Create a generator whose numbers depend on these arguments alone.

    What happens in step n of a run is then a function of (seed, n).

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, such as `order`; numbers for different purposes are independent.
        index: number of the step or epoch.
        device: the device that draws them.

    Returns:
        A new generator.

    Example:
        >>> first, second = (torch.rand(2, generator=generator_for(0, "noise", 7)) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    digest = hashlib.sha256(f"{seed} {purpose} {index}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
