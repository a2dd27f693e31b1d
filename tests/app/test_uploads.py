"""The sums of uploads, per client and in all."""

from __future__ import annotations

import pytest

from ddim.app.uploads import UploadLedger


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_ledger() -> tuple[UploadLedger, Clock]:
    clock = Clock()
    return UploadLedger(4_000_000, 10_000_000, 15_000_000, lifetime=100, clock=clock), clock


def add(ledger: UploadLedger, client: str, *parts: int) -> None:
    with ledger.upload(client) as upload:
        for num_bytes in parts:
            ledger.add(upload, num_bytes)


def test_a_request_is_limited() -> None:
    ledger, _ = make_ledger()
    with pytest.raises(ValueError, match="uploads exceed the maximum allowed size of 4 MB per request"):
        add(ledger, "a", 4_000_001)


def test_sum_per_client_and_in_all_expires() -> None:
    ledger, clock = make_ledger()
    for _ in range(3):
        add(ledger, "a", 3_000_000)
    with pytest.raises(ValueError, match="size of 10 MB per client; try again in an hour"):
        add(ledger, "a", 2_000_000)
    for _ in range(2):
        add(ledger, "b", 3_000_000)
    with pytest.raises(ValueError, match="size of 15 MB in all; try again in an hour"):
        add(ledger, "c", 1_000_000)
    clock.now = 101
    add(ledger, "a", 4_000_000)


def test_bytes_count_as_they_arrive_and_failed_requests_do_not() -> None:
    ledger, _ = make_ledger()
    for _ in range(10):
        with pytest.raises(ValueError, match="per request"):
            add(ledger, "a", *[1_000_000] * 5)
    add(ledger, "a", 4_000_000)
