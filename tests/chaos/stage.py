"""Where chaos happens: a made archive, runs over it, a reader that polls, and the judgement.

Stage    an archive in an S3 server, the reference tables of an unbroken run
Reader   lists an output by glob all the while and reads whatever it finds
Tally    what was done to a scenario's runs, and what came of it
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tests.chaos.driver import NONE, Accidents, Driver
from tests.outputs import Partition, check_same, read_tables
from tests.s3 import REGION, Server, boto_client, make_bucket
from tests.s3_faults import FaultProxy, fault_proxy
from vidbatch.ledger import Ledger
from vidbatch.media.writing import write_video
from vidbatch.storage import Store, StoreSettings, open_store
from vidbatch.tables import SCHEMAS, UNIQUE_KEYS
from vidbatch.verify import verify

Tables = dict[str, dict[Partition, Any]]

PATTERN = r"(?P<source>cam-\d+)/(?P<date>\d{4}/\d{2}/\d{2})/(?P<time>\d{6})"
RATE_HZ = 10
POLL_S = 0.05
VIDEOS = 16
"""Of an archive that most scenarios share, and with it the reference."""


@dataclass
class Tally:
    """What one scenario came to."""

    name: str
    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    reads: int = 0
    """Objects that the reader read."""
    lost: int = 0
    doubled: int = 0
    """Rows against the reference."""
    changed: int = 0
    """Objects."""
    unreadable: int = 0
    wrong: list[str] = field(default_factory=list)
    """Whatever else is not as it should be."""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether anything at all is not as promised."""
        return bool(self.lost or self.doubled or self.changed or self.unreadable or self.wrong)


class Stage:
    """One archive in a bucket of its own.

    Args:
        server: taken by its address; faults are injected between it and the drivers.
        folder: for logs and marks.
    """

    def __init__(self, server: Server, folder: Path, seed: int) -> None:
        self.server, self.folder, self.rng = server, folder, Random(seed)
        self.bucket = make_bucket(server)
        self.client = boto_client(server.endpoint_url, server.access_key, server.secret_key)
        self._references: dict[str, Tables] = {}
        self._n = 0

    @property
    def env(self) -> dict[str, str]:
        """Leads to the server itself."""
        return {
            "AWS_ACCESS_KEY_ID": self.server.access_key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.server.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }

    def archive(self, videos: int) -> str:
        """The name of an archive of so many videos and two files that are broken, made once."""
        name = f"archive-{videos}"
        if self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{name}/").get("KeyCount"):
            return name
        whole = b""
        for i in range(videos):
            whole = self.put_video(name, i)
        self._put(name, videos, whole[: len(whole) * 2 // 3])
        self._put(name, videos + 1, b"no video\n" * 20)
        return name

    def put_video(self, archive: str, i: int, version: int = 0) -> bytes:
        """Draws the i-th video of an archive and puts it there, over what was there."""
        path = self.folder / "drawn.mp4"
        frames = 4 * RATE_HZ if i % 8 == 7 else RATE_HZ + i % 5
        write_video(path, _draw(frames, seed=1000 * version + i), rate=RATE_HZ)
        self._put(archive, i, path.read_bytes())
        return path.read_bytes()

    def _put(self, archive: str, i: int, data: bytes) -> None:
        key = f"{archive}/cam-{i % 2}/2026/03/{1 + i % 3:02d}/{i // 60:02d}{i % 60:02d}00.mp4"
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def tree(self, archive: str, output: str, **changes: Any) -> dict[str, Any]:
        """A job over an archive."""
        return {
            "archive": {
                "uri": f"s3://{self.bucket}/{archive}",
                "date": {"from": "key", "pattern": PATTERN, "tz": "UTC"},
            },
            "sample": {"fps": 5},
            "models": [{"builtin": "colour"}],
            "output": {"uri": f"s3://{self.bucket}/{output}"},
            "clips": {"length_s": 1, "split_above": "16KiB"},
            "engine": {"address": "none"},
            "limits": {"isolate": False, "task_minutes": 0.001, "max_failed_share": 1},
            **changes,
        }

    def output(self) -> str:
        """The name of a new output."""
        self._n += 1
        return f"output-{self._n}"

    def start(
        self,
        tree: Mapping[str, Any],
        env: Mapping[str, str] = {},
        accidents: Accidents = NONE,
        read_timeout_s: float | None = None,
    ) -> Driver:
        """A driver for a job; `env` goes over the usual one, and its credentials instead of it."""
        usual = self.env
        if "AWS_SHARED_CREDENTIALS_FILE" in env:
            del usual["AWS_ACCESS_KEY_ID"], usual["AWS_SECRET_ACCESS_KEY"]
        log = self.folder / f"{tree['output']['uri'].rpartition('/')[2]}.log"
        return Driver(tree, {**usual, **env}, log, accidents, read_timeout_s)

    def store(self, output: str) -> Store:
        """An output as this process reads it."""
        return open_store(f"s3://{self.bucket}/{output}")

    def through(self, proxy: FaultProxy, output: str) -> Ledger:
        """The ledger of an output behind a proxy."""
        settings = StoreSettings(endpoint_url=proxy.endpoint_url)
        return Ledger(open_store(f"s3://{self.bucket}/{output}", settings))

    def reference(self, archive: str) -> Tables:
        """What an unbroken run over an archive leaves; made once."""
        if archive not in self._references:
            output = self.output()
            driver = self.start(self.tree(archive, output))
            if driver.end():
                raise RuntimeError(driver.said())
            self._references[archive] = read_tables(self.store(output))
        return self._references[archive]

    def marks(self) -> str:
        """A new folder."""
        self._n += 1
        folder = self.folder / f"marks-{self._n}"
        folder.mkdir()
        return str(folder)

    @contextmanager
    def watched(self, output: str, tally: Tally) -> Iterator[Reader]:
        """A reader looks at an output from now on; at the end it is judged by what it saw."""
        reader = Reader(self.client, self.bucket, f"{output}/", Random(self.rng.random()))
        reader.start()
        try:
            yield reader
        finally:
            reader.finish(tally)

    @contextmanager
    def proxy(self, host: str = "127.0.0.1") -> Iterator[FaultProxy]:
        """A fault proxy before the server."""
        with fault_proxy(self.server, host) as proxy:
            yield proxy

    def judge(
        self,
        output: str,
        want: Tables,
        tally: Tally,
        chosen: Callable[[Tables], Tables] = lambda tables: tables,
    ) -> None:
        """Compares a finished output with a reference, row by row, and verifies it.

        Args:
            chosen: what of the output the reference speaks of.
        """
        store = self.store(output)
        got = read_tables(store)
        count_rows(got, chosen(got), want, tally)
        if not (tally.lost or tally.doubled):
            try:
                check_same(chosen(got), want)
            except AssertionError as error:
                tally.wrong.append(f"{output}: {str(error).strip()[:300]}")
        report = verify(Ledger(store))
        tally.wrong += [f"{output}: {problem}" for problem in report.problems]
        for count in report.outputs:
            if count.pending or count.planned != count.ok + count.partial + count.failed:
                tally.wrong.append(f"{output}: {count}")


def count_rows(whole: Tables, got: Tables, want: Tables, tally: Tally) -> None:
    """Rows that are missing, rows that stand twice, and rows that nobody expects."""
    for table, partitions in whole.items():
        for rows in partitions.values():
            tally.doubled += sum(n - 1 for n in Counter(_keys(table, rows)).values())
    for table in (want.keys() | got.keys()) - {"runs", "models"}:
        mine, theirs = got.get(table, {}), want.get(table, {})
        for partition in mine.keys() | theirs.keys():
            here = set(_keys(table, mine[partition])) if partition in mine else set()
            there = set(_keys(table, theirs[partition])) if partition in theirs else set()
            tally.lost += len(there - here)
            if here - there:
                tally.wrong.append(f"{table} {partition}: {len(here - there)} rows too many")
                if table == "failures":
                    tally.wrong += map(str, mine[partition].to_pylist()[:2])


def _keys(table: str, rows: Any) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[k].to_pylist() for k in UNIQUE_KEYS[table]), strict=True))


class Reader(threading.Thread):
    """Someone who polls an output by glob and knows nothing of commits."""

    def __init__(self, client: Any, bucket: str, prefix: str, rng: Random) -> None:
        super().__init__(daemon=True)
        self._client, self._bucket, self._prefix, self._rng = client, bucket, prefix, rng
        self._over = threading.Event()
        self._etags: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._keys: Counter[tuple[Any, ...]] = Counter()
        self._changed: set[str] = set()
        self._unreadable: set[str] = set()
        self._error: BaseException | None = None
        self.reads = self.looks = 0

    def run(self) -> None:
        """Until told to finish, and once more."""
        try:
            while not self._over.is_set():
                self._look()
                self._over.wait(POLL_S)
            self._look()
        except BaseException as error:  # told by `finish`: it would be lost here
            self._error = error

    def wait(self) -> None:
        """Until it has seen all that is there now."""
        seen = self.looks
        while self.is_alive() and self.looks < seen + 2:
            time.sleep(POLL_S)

    def finish(self, tally: Tally) -> None:
        """Looks a last time; adds what was seen to a tally."""
        self._over.set()
        self.join()
        tally.reads += self.reads
        tally.changed += len(self._changed)
        tally.unreadable += len(self._unreadable)
        tally.doubled += sum(n - 1 for n in self._keys.values())
        if self._error is not None:
            tally.wrong.append(f"the reader: {self._error!r}")

    def _look(self) -> None:
        from botocore.exceptions import (  # type: ignore[import-untyped]
            BotoCoreError,
            ClientError,
        )

        try:
            there = dict(self._list())
            self._changed |= {k for k, etag in self._etags.items() if there.get(k) != etag}
            new = [k for k in there if k not in self._etags]
            again = self._rng.sample(sorted(self._digests), min(2, len(self._digests)))
            for key in [*new, *again]:
                self._read(key)
                self._etags[key] = there[key]
            self.looks += 1
        except (BotoCoreError, ClientError) as error:
            if isinstance(error, ClientError) and error.response["Error"]["Code"] == "NoSuchKey":
                raise
            time.sleep(0.2)  # the server is down

    def _list(self) -> Iterator[tuple[str, str]]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
            for item in page.get("Contents", ()):
                if "/_vidbatch/probe/" not in item["Key"] and "/_vidbatch/tmp/" not in item["Key"]:
                    yield item["Key"], item["ETag"]

    def _read(self, key: str) -> None:
        data = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        self.reads += 1
        digest = hashlib.sha256(data).hexdigest()
        known = self._digests.setdefault(key, digest)
        if known != digest:
            self._changed.add(key)
        elif key not in self._etags and not self._is_whole(key, data):
            self._unreadable.add(key)

    def _is_whole(self, key: str, data: bytes) -> bool:
        """Whether an object can be read, with the right schema; counts its keys."""
        path = key.removeprefix(self._prefix)
        try:
            if path.startswith("_vidbatch/") and path.endswith(".json"):
                json.loads(data)
            if not path.endswith(".parquet"):
                return True
            rows = pq.read_table(io.BytesIO(data), partitioning=None)
        except (OSError, ValueError):
            return False
        if not path.startswith("v1/"):
            return True
        folder, table = path.rpartition("/")[0], path.split("/")[1]
        self._keys.update((folder, *row) for row in _keys(table, rows))
        return bool(rows.schema.remove_metadata().equals(SCHEMAS[table].remove_metadata()))


def _draw(frames: int, seed: int) -> Iterator[Any]:
    """A colour, some noise and a square that moves: every frame of every video is another."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 256, 3)
    for n in range(frames):
        frame = np.clip(ground + rng.normal(0, 6, (48, 64, 3)), 0, 255).astype(np.uint8)
        frame[8:24, 2 * n % 48 : 2 * n % 48 + 16] = 255 - ground
        yield frame
