"""Which requests the server answers, and what their bodies must look like; everything else is refused in one sentence.

Gradio has many more routes than the page uses (proxies, recordings, components on disk), and takes whatever JSON comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from urllib.parse import parse_qs

from ddim.app.listeners import Listeners
from ddim.validation import pluralize, shown

API = "/gradio_api"

MAX_JSON_DEPTH = 32
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")

Kind = Literal["plain", "stream", "json", "upload"]


class Refusal(Exception):
    """A request is refused.

    Args:
        status: of HTTP.
        sentence: why.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Route:
    """Paths that are answered alike.

    Attributes:
        kind: `plain` has no body, `stream` is a stream of events, `json` and `upload` have bodies of these kinds.
        pattern: of the path; its groups are `name`, of an endpoint, and `key`, of a session or run.
    """

    kind: Kind
    pattern: re.Pattern[str]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of HTTP that are allowed."""
        return ("POST",) if self.kind in ("json", "upload") else ("GET", "HEAD")


def _make_route(kind: Kind, pattern: str) -> Route:
    return Route(kind, re.compile(pattern))


ROUTES = (
    _make_route("plain", r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"),
    _make_route("plain", r"/(assets|static|svelte)/.+"),
    _make_route("plain", rf"{API}/(info/?|openapi\.json|startup-events|theme\.css|app_id/?|user/?|login_check/?)"),
    _make_route("plain", rf"{API}/(queue/status|upload_progress)"),
    _make_route("plain", rf"{API}/file=.+"),
    _make_route("plain", rf"{API}/heartbeat/(?P<session>[^/]+)"),
    _make_route("stream", rf"{API}/queue/data"),
    _make_route("stream", rf"{API}/call/(v2/)?(?P<name>[^/]+)/(?P<key>[^/]+)"),
    _make_route("json", rf"{API}/queue/join"),
    _make_route("json", rf"{API}/call/(?P<name>[^/]+)/?"),
    _make_route("json", rf"{API}/call/v2/(?P<name>[^/]+)/?"),
    _make_route("json", rf"{API}/(run|api)/(?P<name>[^/]+)/?"),
    _make_route("json", rf"{API}/(cancel|reset)/?"),
    _make_route("upload", rf"{API}/upload"),
)


def find_route(method: str, path: str) -> tuple[Route, Mapping[str, str]]:
    """Find the route of a request.

    Args:
        method: of HTTP.
        path: decoded.

    Returns:
        The route, and the named parts of the path.

    Raises:
        Refusal: 404 for a path that the server does not answer, 405 for a method that the path does not allow.

    Example:
        >>> find_route("POST", "/gradio_api/call/sample")[1]
        {'name': 'sample'}
    """
    matches = [(route, match) for route in ROUTES if (match := route.pattern.fullmatch(path))]
    if not matches:
        raise Refusal(404, f"this server has no page {shown(path)}")
    for route, match in matches:
        if method in route.methods:
            return route, {name: value for name, value in match.groupdict().items() if value is not None}
    allowed = " or ".join(dict.fromkeys(name for route, _ in matches for name in route.methods))
    raise Refusal(405, f"the method must be {allowed}, got {shown(method)}")


def check_path(path: str) -> None:
    """Check the path of a request that has no body.

    Args:
        path: decoded.

    Raises:
        Refusal: 403 for a file at another address, or a path that cannot be one of a file.
    """
    file = path.removeprefix(f"{API}/file=")
    if file != path and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|//", file):
        raise Refusal(403, "this server fetches nothing from other addresses")
    if "\0" in path or any(len(part.encode(errors="replace")) > 255 for part in path.split("/")):
        raise Refusal(404, "the path must be that of a file offered here")


def stream_key(names: Mapping[str, str], query: str, listeners: Listeners) -> str:
    """Return the key of a stream of events.

    Args:
        names: the named parts of the path.
        query: of the address.
        listeners: know which keys exist.

    Returns:
        The id of the session, or of the run.

    Raises:
        Refusal: 404 for a key that no run was requested for, 409 for a run that is listened to.
    """
    key = names.get("key") or parse_qs(query).get("session_hash", [""])[0]
    if not listeners.is_known(key):
        raise Refusal(404, f"no run of the id {shown(key)} waits for a listener; request one first")
    if "key" in names and listeners.is_open([key]):
        raise Refusal(409, f"the run {shown(key)} is listened to already")
    return key


def parse_body(body: bytes, content_type: str) -> dict[str, Any]:
    """Parse the body of a request.

    Args:
        body: of the request.
        content_type: of its headers.

    Returns:
        The JSON object.

    Raises:
        Refusal: 415 for another type of content, 400 for anything but a JSON object.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, f"the content type must be application/json, got {shown(content_type)}")
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise Refusal(400, f"the JSON must be nested at most {MAX_JSON_DEPTH} deep") from None
    except ValueError as error:
        raise Refusal(400, f"the body must be valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, got {shown(value)}")
    if _depth(value) > MAX_JSON_DEPTH:
        raise Refusal(400, f"the JSON must be nested at most {MAX_JSON_DEPTH} deep")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_JSON_DEPTH:
        children = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [child for item in children if isinstance(item, list) for child in item]
        depth += 1
    return depth


@dataclass(frozen=True)
class Function:
    """What a request may call.

    Attributes:
        name: of the endpoint; empty if it has none.
        num_inputs: how many values it takes.
        parameters: their names, of an endpoint.
    """

    name: str
    num_inputs: int
    parameters: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The function and what it takes, for a message."""
        names = f" ({', '.join(self.parameters)})" if self.parameters else ""
        return f"{self.name or 'this event'} takes {pluralize(self.num_inputs, 'value')}{names}"


def check_body(path: str, names: Mapping[str, str], body: dict[str, Any], functions: Mapping[int, Function]) -> None:
    """Check the body of a request for a run.

    Args:
        path: of the request.
        names: the named parts of the path.
        body: of the request.
        functions: what may be called, by index.

    Raises:
        Refusal: 400, or 404 if no such function exists.
    """
    _check_type(body, "session_hash", str, optional="/cancel" not in path)
    session = body.get("session_hash")
    if session is not None and not SESSION.fullmatch(session):
        raise Refusal(400, f"session_hash must be up to 64 letters and digits, got {shown(session)}")
    for key, kind in (("fn_index", int), ("trigger_id", int), ("event_id", str)):
        _check_type(body, key, kind)
    if "name" not in names and not path.endswith("/join"):  # cancel and reset
        _check_type(body, "event_id", str, optional=False)
        _check_type(body, "fn_index", int, optional="/reset" in path)
        return
    for key in ("simple_format", "batched"):
        _check_type(body, key, bool)
    function = _function(names.get("name"), body.get("fn_index"), functions)
    if "/call/v2/" in path:
        unknown = set(body) - {*function.parameters, "session_hash"}
        if unknown:
            raise Refusal(400, f"{function.description}, got {shown(sorted(unknown)[0])}")
        return
    _check_type(body, "data", list, optional=False)
    if path.endswith("/queue/join") and session is None:
        raise Refusal(400, "session_hash must be given")
    if function.num_inputs != len(body["data"]):
        raise Refusal(400, f"{function.description}, got {len(body['data'])}")


def _function(name: str | None, index: int | None, functions: Mapping[int, Function]) -> Function:
    if index is not None:
        if index not in functions:
            raise Refusal(404, f"this server has no function of index {shown(index)}")
        return functions[index]
    for function in functions.values():
        if name and function.name == name:
            return function
    raise Refusal(404, f"this server has no endpoint {shown(name)}" if name else "fn_index must be given")


def _check_type(body: Mapping[str, Any], key: str, kind: type, optional: bool = True) -> None:
    value = body.get(key)
    if value is None and optional:
        return
    is_valid = isinstance(value, kind)
    if kind is int:
        is_valid = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    if not is_valid:
        names = {str: "a string", int: "an integer", list: "a list", bool: "true or false"}
        raise Refusal(400, f"{key} must be {names[kind]}, got {shown(value)}")
