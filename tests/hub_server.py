"""A hub on the loopback interface, for the real `huggingface_hub` client: just the requests that it makes to look at,
download and upload models, and `datasets` to download data sets, answered as the public hub answers them.

    with Hub() as hub:
        commit = hub.add("owner/name", {"config.json": b"{}"})
        hub.add("datasets/owner/name", {"train.parquet": ...})
        ...                                        # a client whose HF_ENDPOINT is hub.url
        hub.downloaded("owner/name")               # ["config.json"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(
    r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+)(?:/(.+))?)?"
)
RESOLVE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CREATE = "/api/repos/create"
VALIDATE = "/api/validate-yaml"

READER, WRITER = "hf_reader", "hf_writer"


class RefusalError(Exception):
    """An answer with an error status, and the headers that tell the client which of its exceptions to raise."""

    def __init__(self, status: int, code: str | None, message: str, **more: str) -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message, **more}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Repository:
    """Commits (SHA -> path -> content) and branches (name -> SHA)."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str) -> str:
        """Put these files on a branch, in place of what is there."""
        digest = hashlib.sha1(f"{len(self.commits)} {branch}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str:
        """The SHA of a branch or commit."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Hub:
    """The server: a context manager that listens between `__enter__` and `__exit__`.

    Attributes:
        url: for the client's `HF_ENDPOINT`.
        requests: (method, path) of each request so far.
        failing: answer everything with status 503.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.failing = False
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *error: object) -> None:
        self._hang_up()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Nobody listens at the address: connections are refused."""
        self._hang_up()
        try:
            yield
        finally:
            self._listen()

    def _listen(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), type("HubHandler", (Handler,), {"hub": self}))
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def _hang_up(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Publish a folder or files in a repository, which is made where it is missing; the commit's SHA."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*.*")}
        return self.repositories.setdefault(repo_id, Repository(private, gated)).commit(files, branch)

    def downloaded(self, repo_id: str) -> list[str]:
        """The files of a repository whose content was sent, each as often as it was, sorted."""
        matches = [RESOLVE.fullmatch(path) for method, path in self.requests if method == "GET"]
        return sorted(match[3] for match in matches if match and match[1] == repo_id)

    def open(self, repo_id: str, token: str | None) -> Repository:
        """A repository for the bearer of a token, or a refusal that does not tell whether it exists."""
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and token is None):
            raise RefusalError(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repository


def about(name: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def list_tree(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What is in a folder of a commit, and, if `recursive`, in the folders below."""
    prefix = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(prefix)]
    if not inside:
        raise RefusalError(404, "EntryNotFound", f"{folder} does not exist")
    parents = {str(parent) for name in inside for parent in PurePosixPath(name).parents}
    folders = [name for name in sorted(parents - {"."}) if name.startswith(prefix)]
    listed = [{"type": "directory", "path": name, "size": 0, "oid": 40 * "0"} for name in folders]
    listed += [about(name, files[name]) for name in inside]
    return [entry for entry in listed if recursive or "/" not in entry["path"].removeprefix(prefix)]


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is set in a subclass."""

    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        try:
            if self.hub.failing:
                raise RefusalError(503, None, "Service Unavailable")
            token = self._token()
            if path == CREATE:
                self._send_json(self._create(json.loads(body), token))
            elif path == VALIDATE:  # what a model card says of itself
                self._send_json({"errors": [], "warnings": []})
            elif match := RESOLVE.fullmatch(path):
                self._send_file(*map(unquote, match.groups()), token)
            elif match := API.fullmatch(path):
                self._send_json(self._call(*match.groups(), body, token))
            else:
                raise RefusalError(404, None, f"no such page: {path}")
        except RefusalError as refusal:
            self._send_json(refusal.content, refusal.status, refusal.headers)

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, READER, WRITER):
            raise RefusalError(401, None, "Invalid credentials in Authorization header")
        return token

    def _check_writer(self, token: str | None) -> None:
        if token is None:
            raise RefusalError(401, None, "Invalid username or password.")
        if token != WRITER:
            raise RefusalError(403, None, "you need a write token")

    def _create(self, wanted: dict[str, Any], token: str | None) -> dict[str, Any]:
        self._check_writer(token)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            raise RefusalError(409, None, "You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        # Which of the two a client sends depends on its version.
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories[repo_id] = Repository(private)
        self.hub.add(repo_id, {".gitattributes": b""})
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    def _call(
        self, repo_id: str, action: str | None, revision: str | None, folder: str | None, body: bytes, token: str | None
    ) -> Any:
        repository = self.hub.open(repo_id, token)
        branch = unquote(revision or "main")
        sha = repository.find(branch)
        files = repository.commits[sha]
        if action == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
            return list_tree(files, unquote(folder or ""), recursive)
        if action == "preupload":
            self._check_writer(token)
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if action == "commit":
            self._check_writer(token)
            lines = [json.loads(line) for line in body.splitlines()]
            new = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            sha = repository.commit(files | {name: base64.b64decode(text) for name, text in new.items()}, branch)
            return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "siblings": siblings}

    def _send_file(self, repo_id: str, revision: str, name: str, token: str | None) -> None:
        repository = self.hub.open(repo_id, token)
        sha = repository.find(revision)
        # The public hub lists the files of a gated repository, and refuses their contents.
        if repository.gated and token != WRITER:
            raise RefusalError(401 if token is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if name not in repository.commits[sha]:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        content = repository.commits[sha][name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self._send(content[start : end + 1], 206, headers)
        else:
            self._send(content, 200, headers)

    def _send_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | dict(headers or {}))

    def _send(self, content: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
