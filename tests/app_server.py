"""`ddim app` in a separate process, for the tests of the page and its endpoints.

with AppServer(folder) as server:
    server.url                     # http://127.0.0.1:...
    server.client()                # a gradio_client
    server.memory()                # resident bytes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from gradio_client import Client


class AppServer:
    """A server of the built-in model on a free port.

    Args:
        folder: where it runs and writes app.log.
        arguments: further arguments of the command line.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.log = folder / "app.log"
        self._client: Client | None = None
        self._lock = threading.Lock()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # Uploads and downloads are stored there.
            "TMPDIR": str(folder),
        }
        command = [sys.executable, "-m", "ddim", "app", *(arguments or ("mnist",)), "--port", "0", "--no-open"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().rstrip("/")
        assert self.url.startswith("http://127.0.0.1:"), self.log.read_text()
        # Without certificates, which each new client reads: an eighth of a second.
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.terminate()
        assert self.process.wait(30) == 0
        # Its temporary folder is deleted.
        assert not list(self.folder.glob("ddim-app-*"))

    def client(self) -> Client:
        """Return a client with a new session, whose downloads are stored in the folder."""
        # It makes several HTTP clients per call; none of them may need certificates.
        return Client(
            self.url,
            verbose=False,
            download_files=str(self.folder / "downloads"),
            ssl_verify=False,
            analytics_enabled=False,
        )

    def call(self, endpoint: str, **arguments: Any) -> Any:
        """Return the result of an endpoint, called by one client for all."""
        with self._lock:
            self._client = self._client or self.client()
        return self._client.predict(api_name=endpoint, **arguments)

    def post(self, endpoint: str, **arguments: Any) -> str:
        """Ask for a run without a client, and return its id; nobody listens to it yet."""
        answer = self.http.post(f"/gradio_api/call/v2{endpoint}", json=arguments)
        return str(answer.raise_for_status().json()["event_id"])

    @contextmanager
    def listen(self, endpoint: str, run: str) -> Iterator[Iterator[Any]]:
        """Listen to a run: its reports, of which the last is the result or the reason of a failure."""

        def reports(lines: Iterator[str]) -> Iterator[Any]:
            for line in lines:
                if line.startswith("data: ") and line != "data: null":
                    data = json.loads(line.removeprefix("data: "))
                    yield data[0] if isinstance(data, list) else data

        with self.http.stream("GET", f"/gradio_api/call{endpoint}/{run}") as stream:
            yield reports(stream.iter_lines())

    def run(self, endpoint: str, **arguments: Any) -> Any:
        """Return the result of an endpoint, or the reason of its failure, without a client."""
        with self.listen(endpoint, self.post(endpoint, **arguments)) as reports:
            return list(reports)[-1]

    def memory(self) -> int:
        """Return the resident bytes of the process."""
        return int(psutil.Process(self.process.pid).memory_info().rss)
