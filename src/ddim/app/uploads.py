"""How much may be uploaded: the sum of the last hour, per client and in all."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ddim.app.inputs import MAX_LATENTS, MAX_MEGABYTES

MAX_REQUEST_BYTES = MAX_LATENTS * MAX_MEGABYTES * 1_000_000 + 1_000_000
"""Size of one request with files; the last megabyte is for what frames them."""

MAX_CLIENT_BYTES = 200_000_000
"""Sum of the uploads of a client."""

MAX_TOTAL_BYTES = 1_000_000_000
"""Sum of the uploads of all clients."""

UPLOAD_LIFETIME_SECONDS = 3600
"""Age at which uploads are deleted, and no longer count."""


@dataclass(eq=False)
class Upload:
    """One request with files.

    Attributes:
        client: its address.
        started: when it was made.
        num_bytes: what arrived of it.
    """

    client: str
    started: float
    num_bytes: int = 0


class UploadLedger:
    """Counts uploads as they arrive.

    Args:
        max_request: bytes per request.
        max_client: bytes per client.
        max_total: bytes of all clients.
        lifetime: seconds after which an upload no longer counts.
        clock: returns seconds.

    Example:
        >>> ledger = UploadLedger(max_client=10)
        >>> with ledger.upload("192.0.2.1") as upload:
        ...     ledger.add(upload, 11)
        Traceback (most recent call last):
        ValueError: uploads exceed the maximum allowed size of 0 MB per client; try again in an hour
    """

    def __init__(
        self,
        max_request: int = MAX_REQUEST_BYTES,
        max_client: int = MAX_CLIENT_BYTES,
        max_total: int = MAX_TOTAL_BYTES,
        lifetime: float = UPLOAD_LIFETIME_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_request, self._max_client, self._max_total = max_request, max_client, max_total
        self._lifetime, self._clock = lifetime, clock
        self._uploads: deque[Upload] = deque()

    @contextmanager
    def upload(self, client: str) -> Iterator[Upload]:
        """Count one request, unless it fails.

        Args:
            client: its address.

        Yields:
            The upload, for `add`.
        """
        upload = Upload(client, self._clock())
        self._uploads.append(upload)
        try:
            yield upload
        except BaseException:
            upload.num_bytes = 0
            raise

    def check(self, upload: Upload, num_bytes: int) -> None:
        """Check that there is room for further bytes.

        Args:
            upload: the request that they belong to.
            num_bytes: how many.

        Raises:
            ValueError: if they exceed one of the limits.
        """
        while self._uploads and self._clock() - self._uploads[0].started > self._lifetime:
            self._uploads.popleft()
        for num_used, limit, scope in (
            (upload.num_bytes, self._max_request, "per request"),
            (sum(other.num_bytes for other in self._uploads if other.client == upload.client), self._max_client,
             "per client; try again in an hour"),
            (sum(other.num_bytes for other in self._uploads), self._max_total, "in all; try again in an hour"),
        ):  # fmt: skip
            if num_used + num_bytes > limit:
                raise ValueError(f"uploads exceed the maximum allowed size of {limit / 1e6:.0f} MB {scope}")

    def add(self, upload: Upload, num_bytes: int) -> None:
        """Count bytes that arrived.

        Args:
            upload: the request that they belong to.
            num_bytes: how many.

        Raises:
            ValueError: if they exceed one of the limits.
        """
        self.check(upload, num_bytes)
        upload.num_bytes += num_bytes
