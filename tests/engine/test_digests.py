"""Every change of weights changes a fingerprint, though it is hidden from PyTorch's version counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddim.engine.digests import MULTIPLIERS, concatenate, digest_bits, digest_bits_on_device, fingerprint_weights
from helpers import randn

FLOATS_PER_ROW = MULTIPLIERS.nbytes // 4


def swap(first: int, second: int) -> Callable[[Tensor], Any]:
    def change(weights: Tensor) -> None:
        values = weights.flatten()
        values[[first, second]] = values[[second, first]]

    return change


def flip_bit(index: int, bit: int) -> Callable[[Tensor], Any]:
    def change(weights: Tensor) -> None:
        values = weights.view(torch.int32).flatten()
        values[index] ^= -(2**31) if bit == 31 else 1 << bit

    return change


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "flipped": lambda weights: weights.copy_(weights.flip(0)),
    "rolled": lambda weights: weights.copy_(weights.roll(1, 0)),
    "rows swapped": lambda weights: weights[:2].copy_(weights[[1, 0]]),
    "neighbors swapped": swap(0, 1),
    "values of two integers swapped": swap(0, 2),
    "values of two rows of bits swapped": swap(5, 5 + 3 * FLOATS_PER_ROW),
    "negated": lambda weights: weights.neg_(),
    "one value negated": lambda weights: weights[-1, -1].neg_(),
    "first bit": flip_bit(0, 0),
    "sign bit": flip_bit(FLOATS_PER_ROW, 31),
    "last bit": flip_bit(-1, 0),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_is_seen(change: Callable[[Tensor], Any], memory_format: torch.memory_format) -> None:
    conv = nn.Conv2d(32, 32, 3)
    with torch.no_grad():
        conv.weight.copy_(randn(32, 32, 3, 3))
    conv.to(memory_format=memory_format)  # type: ignore[call-overload]
    before = fingerprint_weights(conv)
    assert before == fingerprint_weights(conv)
    version, weights = conv.weight._version, conv.weight.data
    change(weights.as_strided((32, weights[0].numel()), (weights[0].numel(), 1)))
    assert conv.weight._version == version
    assert before != fingerprint_weights(conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_digests_of_devices_have_the_same_numbers(dtype: torch.dtype) -> None:
    weights = randn(5001).to(dtype)
    number = weights.nbytes // MULTIPLIERS.nbytes
    digest, numbers = digest_bits(weights), digest_bits_on_device(weights)
    assert digest[: 8 * number] == numbers[:number].numpy().tobytes()
    assert list(digest[8 * number :]) == numbers[number:].tolist()


def test_concatenation_keeps_order_and_limit() -> None:
    vectors = [randn(n, seed=n) for n in (3, 5, 1, 40, 2)] + [randn(4).bfloat16(), randn(2).bfloat16()]
    groups = list(concatenate(vectors, limit=4 * 9))
    assert [len(group) for group in groups] == [9, 40, 2, 6]
    assert torch.equal(torch.cat(groups[:3]), torch.cat(vectors[:5]))
    assert torch.equal(groups[3], torch.cat(vectors[5:]))
