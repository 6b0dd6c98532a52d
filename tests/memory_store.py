"""A store in memory whose clients can be killed, delayed and lied to: for tests of the protocol.

One Bucket is the service; each MemoryStore is a client of it (a driver, a worker) with faults of
its own, counted in its PUTs: deterministic, so that a failing seed fails again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from vidbatch.errors import ExistsInStore, NotFoundInStore
from vidbatch.storage import Entry, Store, StoreSettings
from vidbatch.storage.base import check_put

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class Killed(BaseException):
    """The process ends here: no handler of the code under test may catch it."""


@dataclass(slots=True)
class Bucket:
    """Objects by key; creating is atomic, nothing is ever overwritten."""

    objects: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    late: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    """PUTs still under way in the network, for `deliver`."""
    removed: list[str] = field(default_factory=list)
    on_create: Callable[[str, bytes], None] = lambda key, data: None
    """Sees every object as it appears: a reader that never sleeps."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def create(self, key: str, data: bytes, metadata: Mapping[str, str]) -> bool:
        """Whether the object was created; False: there is one."""
        with self.lock:
            if key in self.objects:
                return False
            self.objects[key] = (bytes(data), dict(metadata))
        self.on_create(key, data)
        return True

    def deliver(self, number: int) -> None:
        """Lets that many delayed PUTs arrive, oldest first."""
        for _ in range(min(number, len(self.late))):
            self.create(*self.late.pop(0))

    def parts(self, table: str) -> dict[str, bytes]:
        """Key → bytes of a table's files, as a glob finds them."""
        prefix = f"v1/{table}/"
        return {k: v[0] for k, v in sorted(self.objects.items()) if k.startswith(prefix)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What happens to the n-th PUT (from 1) of one client."""

    kill_before: int | None = None
    kill_where: str = ""
    """Only PUTs whose key contains it count for `kill_before`."""
    kill_after: int | None = None
    answer_lost: frozenset[int] = frozenset()
    """Done, but the client sends it again and meets its own object."""
    twice: frozenset[int] = frozenset()
    """Delivered once more, at some later time."""


class MemoryStore(Store):
    """One client of a bucket."""

    def __init__(
        self,
        bucket: Bucket | None = None,
        faults: Faults = Faults(),
        on_request: Callable[[], None] = lambda: None,
    ) -> None:
        self.uri = "memory://bucket"
        self.settings = StoreSettings()
        self.bucket = bucket or Bucket()
        self.faults = faults
        self.on_request = on_request
        """Called before each LIST and PUT: another client may go first."""
        self.puts = 0
        self._near_death = 0
        self.gets: list[str] = []

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self.on_request()
        return iter([self._entry(k) for k in sorted(self.bucket.objects) if k.startswith(prefix)])

    def get(self, key: str) -> bytes:
        self.gets.append(key)
        try:
            return self.bucket.objects[key][0]
        except KeyError:
            raise NotFoundInStore(f"{key} is not there") from None

    def head(self, key: str) -> Entry | None:
        return self._entry(key) if key in self.bucket.objects else None

    def metadata(self, key: str) -> dict[str, str]:
        self.get(key)
        return self.bucket.objects[key][1]

    def read_at(self, key: str, offset: int, length: int, *, version: str | None = None) -> bytes:
        return self.get(key)[offset : offset + length]

    def put_new(self, key: str, data: bytes, metadata: Mapping[str, str] = {}) -> None:
        check_put(key, data, metadata)
        self.on_request()
        self.puts += 1
        self._near_death += self.faults.kill_where in key
        if self._near_death == self.faults.kill_before:
            raise Killed
        created = self.bucket.create(key, data, metadata)
        if self.puts in self.faults.twice:
            self.bucket.late.append((key, bytes(data), dict(metadata)))
        if self.puts == self.faults.kill_after:
            raise Killed
        if not created or self.puts in self.faults.answer_lost:
            raise ExistsInStore(f"{key} is there")

    def remove(self, key: str) -> None:
        if self.bucket.objects.pop(key, None) is not None:
            self.bucket.removed.append(key)

    def _entry(self, key: str) -> Entry:
        data = self.bucket.objects[key][0]
        return Entry(
            key=key,
            size_bytes=len(data),
            etag=hashlib.md5(data, usedforsecurity=False).hexdigest(),
            modified_at=_EPOCH,
            mtime_ns=int(_EPOCH.timestamp()) * 10**9,
        )
