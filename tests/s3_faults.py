"""A proxy before the tests' S3 server that injects faults: answers lost, cut, refused, delayed."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest

from tests.s3 import REGION, Server

Action = Literal[
    "slow_down", "internal_error", "conflict", "forbidden", "archived",  # answered by the proxy
    "reset", "hang",  # never reaches the server
    "lost",  # done by the server, the answer is lost
    "cut", "short",  # half the body: cut off, or with headers that say it is all
    "long", "endless",  # more than was asked for: some bytes, or without an end and a length
    "whole", "unconditional",  # the server never sees Range, or If-None-Match and If-Match
]  # fmt: skip
_ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "conflict": (409, "ConditionalRequestConflict"),
    "forbidden": (403, "AccessDenied"),
    "archived": (403, "InvalidObjectState"),
}


@dataclass
class Fault:
    """Befalls the next `times` requests of a method whose path holds `within`."""

    action: Action
    method: str
    within: str = ""
    times: int = 1


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
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, method: str, path: str) -> str:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.within in path:
                    fault.times -= 1
                    return fault.action
        return ""


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
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.headers.append({k.lower(): v for k, v in self.headers.items()})
        action = self.proxy.next_fault(self.command, self.path)
        if action in _ANSWERS:
            status, code = _ANSWERS[action]
            self._reply(status, [], f"<Error><Code>{code}</Code></Error>".encode())
        elif action == "hang":
            self.proxy.over.wait()
            self.close_connection = True
        elif action == "reset":
            self._reset()
        else:
            self._pass_on(action, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def _pass_on(self, action: str, body: bytes) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        dropped = {"whole": ("range",), "unconditional": ("if-none-match", "if-match")}
        if action in dropped:
            headers = self._signed_without(dropped[action], headers, body)
        to = http.client.HTTPConnection(self.proxy.server.endpoint_url.rpartition("/")[2])
        to.request(self.command, self.path, body, headers)
        response = to.getresponse()
        data = response.read()
        length = int(response.getheader("Content-Length") or len(data))
        hop = ("content-length", "transfer-encoding", "connection", "date")
        kept = [(k, v) for k, v in response.getheaders() if k.lower() not in hop]
        to.close()
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


class _Listener(ThreadingHTTPServer):
    """One address for the whole session, so that clients need not be made anew for each test."""

    proxy: FaultProxy


@pytest.fixture(scope="session")
def s3_listener() -> Iterator[_Listener]:
    """The socket of the proxy."""
    with _Listener(("127.0.0.1", 0), _Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield listener
        listener.shutdown()
        thread.join()


@pytest.fixture
def s3_proxy(
    s3_server: Server, s3_bucket: str, s3_listener: _Listener, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A proxy before the session's server; the environment leads to it."""
    s3_listener.proxy = FaultProxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_listener.server_port}")
    yield s3_listener.proxy
    s3_listener.proxy.over.set()
