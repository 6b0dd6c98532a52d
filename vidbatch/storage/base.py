"""What every store promises, and how long it tries: `Store`, `Entry`, `StoreSettings`.

A store is rooted at a folder, a bucket or a prefix; keys are relative to that root, with `/`
between their parts. Stores are picklable, connect on first use and serve several threads.
"""

from __future__ import annotations

import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol, TypeVar

from vidbatch.errors import ForbiddenByStore, SourceChanged, StoreError

T = TypeVar("T")

ATTEMPTS = 7
"""Times a request is sent before its transient error is raised: rides out 8 to 16 s, which a
gateway's restart takes, and lets a wrong address be known soon enough."""
BACKOFF_S = 0.25
"""Wait before the second attempt; doubles each time, with up to half of it taken off at random."""
BACKOFF_CAP_S = 8.0
MAX_PUT_BYTES = 5 * 2**30
"""One PUT: more would need a multipart upload, which is not create-only on older stores."""
MAX_METADATA_BYTES = 2048
"""S3's bound for all names and values of one object."""

TRANSIENT_KINDS = frozenset(
    {"unreachable", "timeout", "reset", "busy", "server_error", "conflict", "short_body"}
    | {"damaged", "expired"}
)
"""Kinds of StoreError that the next attempt may cure."""

Oddity = Literal["", "not_regular", "broken_link", "link_loop", "unreadable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How to reach a store: names, never secrets (those come from the environment's own chain)."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    requester_pays: bool = False


DEFAULTS = StoreSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One object as a listing or a HEAD shows it."""

    key: str
    size_bytes: int
    etag: str | None
    """Without quotes; null where the store has none (local disk)."""
    modified_at: datetime
    """UTC."""
    mtime_ns: int
    """The same instant, since 1970, as finely as the store says it."""
    oddity: Oddity = ""
    """Why this is no object that can be read (local disk only); "" for all that can."""

    @property
    def version(self) -> str:
        """What pins a read to these bytes: the etag, else "<size>-<mtime in ns>"."""
        return self.etag or f"{self.size_bytes}-{self.mtime_ns}"


class Store(Protocol):
    """Objects under one root. The same contract on local disk, S3 and any fsspec URL.

    Methods raise StoreError or a subclass (NotFoundInStore, ForbiddenByStore, …); transient
    failures were then sent ATTEMPTS times. Where `key` is not there: NotFoundInStore.
    """

    uri: str
    """scheme://bucket/prefix or an absolute local path, unquoted, without a slash at the end."""
    settings: StoreSettings

    def uri_of(self, key: str) -> str:
        """The full name of a key."""
        return f"{self.uri.rstrip('/')}/{key}"

    def key_of(self, uri: str) -> str:
        """The inverse of `uri_of`.

        Raises:
            ValueError: `uri` does not lie under this store's root.
        """
        root = self.uri.rstrip("/") + "/"
        if not uri.startswith(root):
            raise ValueError(f"{shown(uri)} does not lie under {self.uri}")
        return uri[len(root) :]

    def list_keys(self, prefix: str = "") -> Iterator[str]:
        """The keys of all readable objects that begin with `prefix`, in order.

        Raises:
            ForbiddenByStore: a folder may not be read, so the keys would not be complete.
        """
        for entry in self.list(prefix):
            if entry.oddity == "unreadable":
                advice = "give this user the right to read it"
                raise ForbiddenByStore(
                    f"{shown(self.uri_of(entry.key))} may not be read, so what lies there is"
                    f" unknown — {advice}",
                    kind="access_denied",
                    advice=advice,
                )
            if not entry.oddity:
                yield entry.key

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose key begins with `prefix`, by key, page by page, never all in memory.

        A root that is not there yet has no objects (a missing bucket is NotFoundInStore).
        What is no object (sockets, broken links, …) comes with its `oddity` and is never opened.
        """
        ...

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object."""
        ...

    @abstractmethod
    def head(self, key: str) -> Entry | None:
        """What is known of an object, or None when it is not there."""
        ...

    @abstractmethod
    def metadata(self, key: str) -> dict[str, str]:
        """What `put_new` was given with the object; {} where the store keeps none."""
        ...

    @abstractmethod
    def read_at(self, key: str, offset: int, length: int, *, version: str | None = None) -> bytes:
        """Exactly the bytes [offset, min(offset + length, size of the object)).

        Args:
            version: of the `Entry` that was planned.

        Raises:
            SourceChanged: the object is not that version any more.
            StoreError: kind "short_body" (after retries), "no_range" (the server ignores Range).
        """
        ...

    @abstractmethod
    def put_new(self, key: str, data: bytes, metadata: Mapping[str, str] = {}) -> None:
        """Creates the object, whole or not at all; never touches one that is there.

        After an answer that was lost, the PUT is sent again and may meet its own object: the
        caller of a name that only it writes finds its own bytes there.

        Raises:
            ExistsInStore: the key is taken; nothing was written.
            StoreError: kind "disk_full" and others; nothing half-written is visible.
            ValueError: the metadata are not short ASCII.
        """
        ...

    @abstractmethod
    def remove(self, key: str) -> None:
        """Removes an object if it is there. For sweeping `_vidbatch/tmp`; no worker calls it."""
        ...


def persist(call: Callable[[], T]) -> T:
    """Calls until it answers, at most ATTEMPTS times, waiting between transient StoreErrors."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except StoreError as error:
            if error.kind not in TRANSIENT_KINDS:
                raise
            if attempt == ATTEMPTS:
                raise type(error)(
                    f"{error.message} (tried {ATTEMPTS} times)",
                    kind=error.kind,
                    advice=error.advice,
                ) from error
            wait_s = min(BACKOFF_S * 2 ** (attempt - 1), BACKOFF_CAP_S)
            time.sleep(wait_s * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable: the last attempt returns or raises")


def check_put(uri: str, data: bytes, metadata: Mapping[str, str]) -> None:
    """Refuses what some store could not keep, so that all stores take the same.

    Raises:
        ValueError: metadata that are not lower-case ASCII of at most MAX_METADATA_BYTES.
        StoreError: kind "too_big".
    """
    total = 0
    for name, value in metadata.items():
        total += len(name) + len(value)
        plain = name.isascii() and name.replace("-", "").isalnum() and name == name.lower()
        if not (plain and value.isascii() and value.isprintable() and value == value.strip()):
            raise ValueError(f"metadata {name!r} of {shown(uri)} is not plain ASCII on one line")
    if total > MAX_METADATA_BYTES:
        raise ValueError(f"metadata of {shown(uri)}: {total} bytes, at most {MAX_METADATA_BYTES}")
    if len(data) > MAX_PUT_BYTES:
        raise StoreError(
            f"{shown(uri)}: {len(data)} bytes are more than one PUT takes ({MAX_PUT_BYTES})",
            kind="too_big",
        )


def changed(uri: str) -> SourceChanged:
    """The error for an object that is not the version that was planned."""
    advice = "the next run plans the new version by itself"
    return SourceChanged(
        f"{shown(uri)} changed since it was listed; this run leaves it out — {advice}",
        kind="source_changed",
        advice=advice,
    )


def shown(name: str) -> str:
    """A uri or key for a message: names may hold line ends and what is no text."""
    return name if name.isprintable() else repr(name)[1:-1]


def utc(mtime_ns: int) -> datetime:
    """Nanoseconds since 1970 as a datetime (microseconds, floored)."""
    return datetime.fromtimestamp(mtime_ns // 10**9, UTC).replace(
        microsecond=mtime_ns % 10**9 // 1000
    )
