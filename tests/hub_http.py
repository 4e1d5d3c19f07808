"""HTTP/1.1 for the test Hub: requests, answers, the log, and faults on request.

Faults are asked for under `/_control/`, which needs no token:

    POST /_control/faults   a list of rules, in place of those before
    GET  /_control/log      the requests so far: method, path, status (None: none was sent), fault, user
    POST /_control/reset    no rules, an empty log

A rule is `{"fault": kind}` with, all optional, `match` (`method`, and `path`: a regular expression searched in the
decoded path), `times` (how often; null for ever, which is the default of `down` and of rules with a `probability`;
else 1), `after` (requests to let pass first), `probability` and `seed` (a draw for every matching request).
The first rule that fires wins. The kinds:

    status            `status`, `headers` and `message` instead of an answer
    cut               the connection breaks with half of the body read, or, with `"when": "response"` (the default
                      for a request without a body), half of the answer sent: the request was carried out
    slow              the answer comes after `seconds`
    expired_token     401 with the Hub's message
    moved             412 as for a commit whose parent is no longer the head
    down              no answer; with no `match`, connections that are open are closed at once
    allow_bad_names   commits may hold names that leave the folder, as on a malicious server
"""

from __future__ import annotations

import json
import random
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from hub_store import HubError, Store


CHUNK = 1 << 20
INVALID_TOKEN = "Invalid credentials in Authorization header"
FAULTS = ["status", "cut", "slow", "expired_token", "moved", "down", "allow_bad_names"]
MOVED = "A commit has happened since. Please refresh and try again."
# Clients ask once per home folder which coding agents there are. It has nothing to do with what a test does, so it
# uses up no fault and is not in the log.
AGENTS = "/api/agent-harnesses"


@dataclass
class Answer:
    """A response: its body is bytes or the part of a file from `start` of `length` bytes."""

    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    length: int | None = None


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(
        status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json"} | (headers or {})
    )


def as_error(error: HubError) -> Answer:
    headers = {"X-Error-Message": " ".join(error.message.encode("ascii", "replace").decode().split())}
    if error.code:
        headers["X-Error-Code"] = error.code
    commit = error.body.pop("commit", None)
    return as_json({"error": error.message} | error.body, error.status, headers | commit_header(commit))


def commit_header(commit: str | None) -> dict[str, str]:
    return {"X-Repo-Commit": commit} if commit else {}


class Faults:
    """The rules in force, and how often each has fired."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: list[dict[str, Any]] = []

    def set(self, rules: list[dict[str, Any]]) -> None:
        unknown = [rule["fault"] for rule in rules if rule["fault"] not in FAULTS]
        if unknown:
            raise HubError(400, f"Unknown faults: {unknown}. There are: {FAULTS}")
        with self.lock:
            self.rules = [self._complete(rule) for rule in rules]

    def _complete(self, rule: dict[str, Any]) -> dict[str, Any]:
        times = None if rule["fault"] == "down" or "probability" in rule else 1
        return {"times": times, "after": 0, "match": {}, "random": random.Random(rule.get("seed", 0))} | rule

    @property
    def allow_bad_names(self) -> bool:
        return any(rule["fault"] == "allow_bad_names" for rule in self.rules)

    def next(self, method: str, path: str) -> dict[str, Any]:
        """The rule that this request meets, empty if there is none."""
        with self.lock:
            return next((rule for rule in self.rules if self._fires(rule, method, path)), {})

    def _fires(self, rule: dict[str, Any], method: str, path: str) -> bool:
        match = rule["match"]
        if rule["fault"] == "allow_bad_names" or match.get("method", method) != method or rule["times"] == 0:
            return False
        if not re.search(match.get("path", ""), path):
            return False
        if rule["after"] > 0:
            rule["after"] -= 1
            return False
        if rule["random"].random() >= rule.get("probability", 1):
            return False
        if rule["times"] is not None:
            rule["times"] -= 1
        return True


class Body:
    """The body of a request, of a known length or in chunks."""

    def __init__(self, stream: Any, headers: Any) -> None:
        self.stream, self.left = stream, int(headers.get("Content-Length") or 0)
        self.chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()

    def __bool__(self) -> bool:
        return self.chunked or self.left > 0

    def _exactly(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise ConnectionError("the client went away")
        return data

    def chunks(self) -> Iterator[bytes]:
        while self.chunked:
            size = int(self.stream.readline().split(b";")[0] or b"0", 16)
            data = self._exactly(size + 2)[:-2]
            self.chunked = size > 0
            yield data
        while self.left:
            data = self._exactly(min(self.left, CHUNK))
            self.left -= len(data)
            yield data

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def read_half(self) -> None:
        if self.chunked:
            next(self.chunks())
        self._exactly(self.left // 2)

    def json(self) -> Any:
        try:
            return json.loads(self.read() or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error


class HubServer(ThreadingHTTPServer):
    """The socket, the store and what all requests share."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path, port: int, tokens: dict[str, str], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.store, self.tokens = Store(root), tokens
        self.faults = Faults()
        self.log: list[dict[str, Any]] = []
        self.connections: set[socket.socket] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests; anything else is an error of this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection. A subclass says what to answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = CHUNK
    server: HubServer

    def reply(self) -> Answer:
        """The answer to this request, or a `HubError`."""
        raise NotImplementedError

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr: the log is kept for `/_control/log`."""

    def _serve(self) -> None:
        self.body = Body(self.rfile, self.headers)
        self.url = urlsplit(self.path)
        self.query = dict(parse_qsl(self.url.query))
        path = unquote(self.url.path)
        self.entry: dict[str, Any] = {"method": self.command, "path": path, "status": None, "user": None}
        if self.url.path.startswith("/_control/"):
            return self._send(self._control(self.url.path.removeprefix("/_control/")))
        if self.url.path == AGENTS:
            return self._send(as_json({"standardEnvVars": [], "harnesses": {}}))
        rule = self.server.faults.next(self.command, path)
        fault = rule.get("fault")
        self.server.log.append(self.entry | {"fault": fault})
        self.entry = self.server.log[-1]
        cut = rule.get("when", "request" if self.body else "response") if fault == "cut" else None
        if cut == "request":
            self.body.read_half()
        if cut == "request" or fault == "down":
            return self._drop()
        if fault == "slow":
            time.sleep(rule["seconds"])
        self._send(self._answer(rule), cut=cut == "response")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, rule: dict[str, Any]) -> Answer:
        try:
            return fault_answer(rule) or self.reply()
        except HubError as error:
            return as_error(error)
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            return as_error(HubError(500, f"The test Hub failed: {error!r}"))
        finally:
            for _ in self.body.chunks():  # what the answer did not need; the next request follows it
                pass

    def _send(self, answer: Answer, cut: bool = False) -> None:
        size = answer.length if isinstance(answer.body, Path) else len(answer.body)
        left = 0 if self.command == "HEAD" else (size or 0) // (2 if cut else 1)
        self.entry["status"] = answer.status
        if cut and not left:
            return self._drop()
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(size)} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(answer.body, Path):
            with answer.body.open("rb") as file:
                file.seek(answer.start)
                while left:
                    left -= self.wfile.write(file.read(min(left, CHUNK)))
        else:
            self.wfile.write(answer.body[:left])
        if cut:
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        shut(self.connection)

    def _control(self, name: str) -> Answer:
        rules = self.body.json() if self.command == "POST" else []
        if name == "log":
            return as_json(self.server.log)
        if name not in ("faults", "reset"):
            return as_error(HubError(404, name))
        if name == "reset":
            self.server.log.clear()
            rules = []
        try:
            self.server.faults.set(rules)
        except HubError as error:
            return as_error(error)
        if any(rule["fault"] == "down" and not rule.get("match") for rule in rules):
            for connection in self.server.connections - {self.connection}:
                shut(connection)
        return as_json({"rules": len(rules)})


def fault_answer(rule: dict[str, Any]) -> Answer | None:
    """The answer that a fault puts in place of the real one."""
    if rule.get("fault") == "status":
        answer = as_error(HubError(rule["status"], rule.get("message", "A fault that the test asked for")))
        answer.headers |= rule.get("headers", {})
        return answer
    if rule.get("fault") == "expired_token":
        raise HubError(401, INVALID_TOKEN)
    if rule.get("fault") == "moved":
        raise HubError(412, MOVED)
    return None


def shut(connection: socket.socket) -> None:
    with suppress(OSError):  # the client was faster
        connection.shutdown(socket.SHUT_RDWR)
