"""Whether a network's weights are those that an engine was made from.

PyTorch counts in-place changes of a tensor, but not those made through `.data` or NumPy. So the bits of all weights are
read before each run, about as fast as memory can be read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONCATENATED_BYTES = 256 << 20
"""Weights on a GPU that are read together: hundreds of small tensors one by one take longer to launch than to read."""

MULTIPLIERS = np.random.default_rng(0).integers(0, 2**62, 1024) * 2 + 1
"""Odd factors by position in a row of bits, (1024,) int64: 8 KiB, which stay in the fastest cache."""


def fingerprint_weights(network: nn.Module) -> Any:
    """Return a value that changes whenever a weight does, in whatever way: addresses, versions, digests of the bits.

    Args:
        network: any network.

    Returns:
        The value, to be compared by `==`.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint_weights(layer)
        >>> _ = layer.weight.data.copy_(layer.weight.data.flip(0))
        >>> before == fingerprint_weights(layer)
        False
    """
    parameters = list(network.parameters())
    identities = [(p.data_ptr(), p._version, p.dtype) for p in parameters]
    stored = [_in_storage_order(p.detach()) for p in parameters]
    if all(weights.device.type == "cpu" for weights in stored):
        return identities, [digest_bits(weights) for weights in stored]
    # A GPU's digests are read all at once: reading one waits for the device.
    return identities, torch.cat([digest_bits_on_device(weights) for weights in concatenate(stored)]).tolist()


def concatenate(vectors: Sequence[Tensor], limit: int = CONCATENATED_BYTES) -> Iterator[Tensor]:
    """Concatenate vectors as far as dtype, device and size allow.

    Args:
        vectors: (L,) each.
        limit: bytes of a result of several vectors.

    Yields:
        Vectors with the same numbers in the same order.

    Example:
        >>> [len(x) for x in concatenate([torch.ones(2), torch.ones(3), torch.ones(1).half()])]
        [5, 1]
    """
    group: list[Tensor] = []
    size = 0
    for vector in vectors:
        fits = group and size + vector.nbytes <= limit
        if group and not (fits and (vector.dtype, vector.device) == (group[0].dtype, group[0].device)):
            yield torch.cat(group)
            group, size = [], 0
        group.append(vector)
        size += vector.nbytes
    if group:
        yield torch.cat(group)


def _in_storage_order(weights: Tensor) -> Tensor:
    """Return weights as a vector, without a copy in either memory format."""
    is_nhwc = weights.ndim == 4 and weights.is_contiguous(memory_format=torch.channels_last)
    return (weights.permute(0, 2, 3, 1) if is_nhwc else weights).flatten()


def digest_bits(weights: Tensor) -> bytes:
    """Return what depends on each bit of weights and its position.

    The bits are rows of integers; each row is multiplied by `MULTIPLIERS`, modulo 2^64. Factors are odd, so that no bit
    of an integer is lost, and random, so that integers that change places change the sum. The rest is kept as it is.

    Args:
        weights: (L,), contiguous, of any dtype, on the CPU.

    Returns:
        8 bytes per row of 8 KiB, and the rest.

    Example:
        >>> len(digest_bits(torch.zeros(2048, dtype=torch.float32))), len(digest_bits(torch.zeros(3)))
        (8, 12)
    """
    # NumPy has no bfloat16.
    array = weights.numpy() if weights.dtype == torch.float32 else weights.view(torch.uint8).numpy()
    octets = array.view(np.uint8)
    aligned = octets.size // MULTIPLIERS.nbytes * MULTIPLIERS.nbytes
    rows = octets[:aligned].view(np.int64).reshape(-1, len(MULTIPLIERS))
    # The fastest product of integers that NumPy has.
    return np.einsum("ij,j->i", rows, MULTIPLIERS).tobytes() + octets[aligned:].tobytes()


def digest_bits_on_device(weights: Tensor) -> Tensor:
    """Return the numbers of `digest_bits` for weights on an accelerator, without waiting for it.

    Args:
        weights: (L,), contiguous, of any dtype.

    Returns:
        (number of rows + bytes of the rest,) int64 on the device of the weights.

    Example:
        >>> digest_bits_on_device(torch.zeros(1, dtype=torch.bfloat16))
        tensor([0, 0])
    """
    octets = weights.view(torch.uint8)
    aligned = octets.numel() // MULTIPLIERS.nbytes * MULTIPLIERS.nbytes
    multipliers = _multipliers_on(weights.device)
    rows = octets[:aligned].view(torch.int64).view(-1, len(multipliers))
    return torch.cat([(rows * multipliers).sum(1), octets[aligned:].to(torch.int64)])


@functools.cache
def _multipliers_on(device: torch.device) -> Tensor:
    return torch.from_numpy(MULTIPLIERS).to(device)
