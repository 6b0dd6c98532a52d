"""A made S3 endpoint that pages: an archive of as many keys as one likes, and a folder as a bucket.

    with serving(Made(videos=1_000_000), folder) as endpoint: …

It runs in a process of its own, so that the memory measured is the client's. `archive` is a bucket
whose listing is arithmetic; `tables` shows the files of a folder (read-only, listed once at the
first LIST). It answers LIST (1,000 keys a page), GET and HEAD, and `/requests` with what was asked
of it, by method and bucket.
"""

from __future__ import annotations

import bisect
import json
import multiprocessing
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE_KEYS = 1000
PER_CAMERA, PER_DAY = 10_000, 100
_STEP_S = 86_400 // PER_DAY


@dataclass(frozen=True)
class Made:
    """An archive that exists only as its listing: each camera has 100 videos a day for 100 days."""

    videos: int
    size_bytes: int = 60_000_000
    """Two minutes at 4 Mbit/s."""

    def key(self, i: int) -> str:
        """The i-th key in the order of their bytes."""
        camera, rest = divmod(i, PER_CAMERA)
        day, turn = divmod(rest, PER_DAY)
        minute, s = divmod(turn * _STEP_S, 60)
        when = date(2026, 1, 1) + timedelta(days=day)
        return f"cam-{camera:05d}/{when:%Y/%m/%d}/{minute // 60:02d}{minute % 60:02d}{s:02d}.mp4"

    @property
    def date_rule(self) -> dict[str, str]:
        """The `archive.date` block that reads these keys."""
        return {
            "from": "key",
            "pattern": r"(?P<source>cam-\d+)/(?P<date>\d{4}/\d{2}/\d{2})/(?P<time>\d{6})",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/requests":
            return self._reply(json.dumps(self.server.asked).encode())
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        self.server.asked[f"{'LIST' if 'list-type' in query else self.command} {bucket}"] += 1
        if "list-type" in query:
            return self._reply(self.server.page(bucket, query))
        path = self.server.folder / key
        if bucket != "tables" or not path.is_file():
            return self._reply(b"<Error><Code>NoSuchKey</Code></Error>", 404)
        return self._reply(path.read_bytes())

    do_HEAD = do_GET  # noqa: N815

    def _reply(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, made: Made, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made, self.folder = made, folder
        self.asked: Counter[str] = Counter()
        self._keys: list[str] | None = None

    def page(self, bucket: str, query: dict[str, str]) -> bytes:
        """One answer of list_objects_v2."""
        prefix, start = query.get("prefix", ""), int(query.get("continuation-token", 0))
        if bucket == "archive":
            total, size = self.made.videos, self.made.size_bytes
            keys = [self.made.key(i) for i in range(start, min(start + PAGE_KEYS, total))]
        else:
            if self._keys is None:
                self._keys = _files(self.folder)
            begin = bisect.bisect_left(self._keys, prefix)
            end = bisect.bisect_left(self._keys, prefix + "\U0010ffff")
            total, size = end - begin, 1
            keys = self._keys[begin + start : min(begin + start + PAGE_KEYS, end)]
        more = start + len(keys) < total
        items = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{key}&quot;</ETag><Size>{size}</Size></Contents>"
            for key in keys
        )
        token = f"<NextContinuationToken>{start + len(keys)}</NextContinuationToken>"
        return (
            '<?xml version="1.0"?><ListBucketResult><IsTruncated>'
            f"{str(more).lower()}</IsTruncated>{token if more else ''}{items}</ListBucketResult>"
        ).encode()


def _files(folder: Path) -> list[str]:
    return sorted(
        str(Path(root, name).relative_to(folder))
        for root, _, names in os.walk(folder)
        for name in names
    )


def _serve(made: Made, folder: Path, pipe: Any) -> None:
    server = _Server(made, folder)
    pipe.send(server.server_port)
    server.serve_forever()


def requests(endpoint: str) -> dict[str, int]:
    """What was asked so far: `LIST archive`, `GET tables`, … → times."""
    with urllib.request.urlopen(f"{endpoint}/requests") as answer:
        found: dict[str, int] = json.load(answer)
    return found


@contextmanager
def serving(made: Made, folder: Path) -> Iterator[str]:
    """The endpoint's URL while it is served; `folder` is the bucket `tables`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(made, folder, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(60):
            raise RuntimeError("the made endpoint does not start")
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()
