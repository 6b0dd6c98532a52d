"""A proxy before the tests' S3 server that injects faults by method, key and n-th request.

request ─▶ matches a `Fault`, or `draw` names one? ─▶ answered, held, cut, sent twice, …
                                          │ no ─▶ passed on as it is
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any, Literal

import pytest

from tests.s3 import REGION, Server

Action = Literal[
    "slow_down", "internal_error", "conflict", "forbidden", "archived",  # answered by the proxy
    "expired",  # the same: this access key has had its day
    "reset", "hang",  # never reaches the server
    "lost",  # done by the server, the answer is lost
    "twice",  # delivered twice; the second answer arrives
    "held",  # under way until `release`; then it is done, and answered if anybody still listens
    "late",  # the connection breaks, and what was sent is done at `release` all the same
    "cut", "short",  # half the body: cut off, or with headers that say it is all
    "flip", "flip_sent",  # one bit of the answer's body, or of the request's
    "long", "endless",  # more than was asked for: some bytes, or without an end and a length
    "whole", "unconditional",  # the server never sees Range, or If-None-Match and If-Match
]  # fmt: skip
_ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "conflict": (409, "ConditionalRequestConflict"),
    "forbidden": (403, "AccessDenied"),
    "archived": (403, "InvalidObjectState"),
    "expired": (400, "ExpiredToken"),
}


@dataclass
class Fault:
    """Befalls `times` requests of a method whose path matches `within`, from the `nth` one on."""

    action: Action
    method: str
    within: str = ""
    """A regular expression, found anywhere in path and query."""
    times: int = 1
    nth: int = 1
    then: Callable[[], object] | None = None
    """Called when a request has met it: before the client could see that anything happened."""


@dataclass
class FaultProxy:
    """An endpoint that passes requests on to a server, but for the faults it is told."""

    server: Server
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    """(method, path with query, status passed on; 0 where none was)."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of every request, names in lower case."""
    streamed_bytes: int = 0
    """Sent by endless answers."""
    draw: Callable[[str, str], Action | None] = lambda method, path: None
    """Names a fault for a request that no listed one befalls; called under `lock`."""
    happened: Counter[str] = field(default_factory=Counter)
    """Action → requests that it befell."""
    valid_key: str | None = None
    """The one access key that has not expired; its requests are signed anew with the server's."""
    endpoint_url: str = ""
    released: list[int] = field(default_factory=list)
    """What the server answered to requests that were held or late."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)
    held: list[threading.Event] = field(default_factory=list)
    late: list[Callable[[], int]] = field(default_factory=list)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """What befalls this request."""
        with self.lock:
            found = self._listed(method, path)
            if found is None and (action := self.draw(method, path)) is not None:
                found = Fault(action, method)
            if found is not None:
                self.happened[found.action] += 1
        return found

    def _listed(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and re.search(fault.within, path):
                fault.nth -= 1
                if fault.nth <= 0 < fault.times:
                    fault.times -= 1
                    return fault
        return None

    def release(self) -> None:
        """Lets all held and late requests arrive now; returns when the late ones have."""
        with self.lock:
            held, self.held = self.held, []
            late, self.late = self.late, []
        for event in held:
            event.set()
        for deliver in late:
            self.released.append(deliver())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between headers and body
    server: _Listener

    @property
    def proxy(self) -> FaultProxy:
        return self.server.proxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, http.client.HTTPException):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.headers.append({k.lower(): v for k, v in self.headers.items()})
        fault = self.proxy.next_fault(self.command, self.path)
        action = fault.action if fault else ""
        key, signed = self.proxy.valid_key, self.headers.get("Authorization", "")
        if key is not None and f"Credential={key}/" not in signed:
            action = "expired"
            self.proxy.happened[action] += 1
        then = fault.then if fault and fault.then else lambda: None
        if action in _ANSWERS:
            status, code = _ANSWERS[action]
            then()
            self._reply(status, [], f"<Error><Code>{code}</Code></Error>".encode())
        elif action == "hang":
            then()
            self.proxy.over.wait()
            self.close_connection = True
        elif action == "reset":
            then()
            self._reset()
        elif action == "late":
            with self.proxy.lock:
                self.proxy.late.append(lambda: self._send(action, body)[0].status)
            then()
            self._reset()
        else:
            self._pass_on(action, body, then)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def _send(self, action: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's answer to this request."""
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        dropped = {"whole": ("range",), "unconditional": ("if-none-match", "if-match")}
        if action in dropped or self.proxy.valid_key is not None:
            headers = self._signed_without(dropped.get(action, ()), headers, body)
        if action == "flip_sent":
            body = _flipped(body)
        to = http.client.HTTPConnection(self.proxy.server.endpoint_url.rpartition("/")[2])
        to.request(self.command, self.path, body, headers)
        response = to.getresponse()
        data = response.read()
        to.close()
        return response, data

    def _pass_on(self, action: str, body: bytes, then: Callable[[], object]) -> None:
        if action == "held":
            event = threading.Event()
            with self.proxy.lock:
                self.proxy.held.append(event)
            then()
            event.wait()
        response, data = self._send(action, body)
        if action == "twice":
            response, data = self._send(action, body)
        if action == "held":
            self.proxy.released.append(response.status)
        else:
            then()
        length = int(response.getheader("Content-Length") or len(data))
        hop = ("content-length", "transfer-encoding", "connection", "date")
        kept = [(k, v) for k, v in response.getheaders() if k.lower() not in hop]
        if action == "lost":
            self._reset()
        elif action == "cut":
            self._reply(response.status, kept, data[: len(data) // 2], length)
            self._reset()
        elif action == "short":
            self._reply(response.status, kept, data[: len(data) // 2])
        elif action == "long":
            self._reply(response.status, kept, data + bytes(100_000))
        elif action == "endless":
            self._stream(response.status, kept)
        else:
            data = _flipped(data) if action == "flip" else data
            self._reply(response.status, kept, data, length)

    def _signed_without(
        self, names: tuple[str, ...], headers: dict[str, str], body: bytes
    ) -> dict[str, str]:
        from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped]
        from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
        from botocore.credentials import Credentials  # type: ignore[import-untyped]

        server = self.proxy.server
        mine = (
            *names,
            "authorization",
            "host",
            "content-length",
            "x-amz-date",
            "x-amz-content-sha256",
            "x-amz-security-token",
        )
        kept = {k: v for k, v in headers.items() if k.lower() not in mine}
        request = AWSRequest(self.command, server.endpoint_url + self.path, kept, body)
        S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", REGION).add_auth(
            request
        )
        return dict(request.headers.items())

    def _reply(
        self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None
    ) -> None:
        with self.proxy.lock:
            self.proxy.seen.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self, status: int, headers: list[tuple[str, str]]) -> None:
        """Chunks of zeros until the client has had enough, or a gibibyte."""
        self.send_response(status)
        for name, value in [*headers, ("Transfer-Encoding", "chunked")]:
            self.send_header(name, value)
        self.end_headers()
        chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
        for _ in range(2**14):
            self.wfile.write(chunk)
            self.proxy.streamed_bytes += 2**16
        self.wfile.write(b"0\r\n\r\n")

    def _reset(self) -> None:
        with self.proxy.lock:
            self.proxy.seen.append((self.command, self.path, 0))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


_flips = count(1)


def _flipped(data: bytes) -> bytes:
    """With another bit somewhere, each time elsewhere; nothing stays nothing."""
    at = next(_flips) * 7919 % max(1, len(data))
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :] if data else data


class _Listener(ThreadingHTTPServer):
    """An address, kept for a whole session, so that clients need not be made anew for each test."""

    request_queue_size = 128
    proxy: FaultProxy


@contextmanager
def _listening(host: str = "127.0.0.1") -> Iterator[_Listener]:
    with _Listener((host, 0), _Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield listener
        finally:
            listener.shutdown()
            thread.join()


@contextmanager
def _proxy_at(listener: _Listener, server: Server) -> Iterator[FaultProxy]:
    url = f"http://{listener.server_address[0]!s}:{listener.server_port}"
    listener.proxy = FaultProxy(server, endpoint_url=url)
    try:
        yield listener.proxy
    finally:
        listener.proxy.over.set()
        for event in listener.proxy.held:
            event.set()


@contextmanager
def fault_proxy(server: Server, host: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """A proxy at an address of its own."""
    with _listening(host) as listener, _proxy_at(listener, server) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def s3_listener() -> Iterator[_Listener]:
    """The socket of the proxy."""
    with _listening() as listener:
        yield listener


@pytest.fixture
def s3_proxy(
    s3_server: Server, s3_bucket: str, s3_listener: _Listener, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A proxy before the session's server; the environment leads to it."""
    with _proxy_at(s3_listener, s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy
