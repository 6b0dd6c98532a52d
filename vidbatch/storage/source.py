"""Random access to one pinned object, read ahead: few large GETs for many small reads.

in order:         [1 MiB ][ 2 MiB         ][ 4 MiB …      a run (one GET) that follows a held one is
                                                          twice as long, to 16 MiB, and the next is
                                                          fetched while it is read
a jump:           starts again with 1 MiB; near the end it takes all that is left
`want(extents)`:  runs are the wanted extents, byte for byte, cut evenly into 8 to 16 MiB and up to
                  eight in flight; what is read beside them (the header) is kept till the end

No run is shorter than 256 KiB, nor is a hole that it leaves, but at the object's end.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from vidbatch.storage.base import Store, StoreSettings, changed
from vidbatch.storage.local import LocalStore, OpenFile
from vidbatch.storage.opening import open_store

LEAST_BYTES = 256 * 2**10
"""Of one GET: it takes hardly longer than one of a byte."""
FIRST_BYTES = 2**20
RUN_BYTES = 16 * 2**20
"""A minute of video at 4.5 Mbit/s is then three GETs. From 8 MiB on a GET's 30 ms of latency are
less than a quarter of its time, at 100 MB/s to a store."""
TAIL_BYTES = 8 * 2**20
"""A jump into the last of an object is to what stands there (an index, a `moov`), so all of it is
fetched; and a small object comes with one GET."""
HELD_BYTES = 64 * 2**20
"""Most bytes kept of one object; the longest unused are forgotten first."""
AHEAD_BYTES = HELD_BYTES // 2
"""Most bytes fetched and not yet read."""
IN_FLIGHT = 8
"""GETs ahead; a reader does not wait in their queue, but fetches what it needs next itself."""
GAP_BYTES = 2**20
"""Wanted extents that lie nearer together become one."""


class Source(Protocol):
    """A `data.ByteSource` that counts and is closed by who opened it. Thread-safe."""

    size_bytes: int
    bytes_read: int
    """Bytes that came from the store, read ahead included."""
    gets: int
    """Requests that brought them (retries not counted)."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly the bytes [offset, min(offset + length, size_bytes)).

        Raises:
            SourceChanged: the object is not the pinned version any more.
            StoreError: the bytes cannot be had.
        """
        ...

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """See `data.ByteSource.want`."""
        ...

    def close(self) -> None:
        """Lets go of the file or what is held in memory."""
        ...


def open_source(
    store: Store, uri: str, *, size_bytes: int, version: str | None
) -> FileSource | ReadAhead:
    """Opens one object for random reads, pinned to the version that was listed.

    Args:
        store: its settings are used; `uri` may also lie outside its root.

    Raises:
        SourceChanged, NotFoundInStore: a local file is gone or another one (S3 says so on reading).
    """
    try:
        key = store.key_of(uri)
    except ValueError:
        folder, _, key = uri.rpartition("/")
        store = _sibling(folder or "/", store.settings)
    if isinstance(store, LocalStore):
        return FileSource(OpenFile(store.path_of(key), version), size_bytes)
    return ReadAhead(store, key, size_bytes, version)


@cache
def _sibling(folder: str, settings: StoreSettings) -> Store:
    return open_store(folder, settings)


class FileSource:
    """A local file: the kernel reads ahead, so each read is one `pread`."""

    def __init__(self, file: OpenFile, size_bytes: int) -> None:
        self._file, self.size_bytes = file, size_bytes
        self._lock = threading.Lock()
        self.bytes_read = self.gets = 0

    def read_at(self, offset: int, length: int) -> bytes:
        """See `Source.read_at`."""
        data = self._file.read_at(offset, max(0, min(length, self.size_bytes - offset)))
        with self._lock:
            self.gets += 1
            self.bytes_read += len(data)
        return data

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: reads cost no request."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@dataclass(slots=True, eq=False)
class _Run:
    """Bytes [first, stop), fetched or being fetched by one GET."""

    first: int
    stop: int
    follows: bool
    """Whether the byte before it was held: somebody reads in order."""
    future: Future[bytes]
    begun: bool = False
    """Whether a thread has taken it on: the pool's, or a reader's that came first."""
    read: bool = False
    kept: bool = False
    """Whether it is the object's head, or was read beside what was wanted: the header, which each
    clip of a video begins with. It is forgotten last."""

    @property
    def size_bytes(self) -> int:
        return self.stop - self.first


class ReadAhead:
    """An object of a store that costs a request per read."""

    def __init__(self, store: Store, key: str, size_bytes: int, version: str | None) -> None:
        self._store, self._key, self._version = store, key, version
        self.size_bytes = size_bytes
        self._lock = threading.Lock()
        self._runs: OrderedDict[_Run, None] = OrderedDict()  # the longest unused first
        self._sorted: list[_Run] = []  # the same by `first`; they do not overlap
        self._wanted: list[tuple[int, int]] = []
        self.bytes_read = self.gets = 0

    def read_at(self, offset: int, length: int) -> bytes:
        """See `Source.read_at`."""
        end = min(offset + length, self.size_bytes)
        pieces: list[bytes] = []
        while offset < end:
            run = self._run_of(offset, end)
            self._fetch(run)
            piece = run.future.result()[offset - run.first : end - run.first]
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """See `Source.want`. Where a third or more of the whole span is wanted, all of it is."""
        merged: list[tuple[int, int]] = []
        for start, stop in extents:
            if merged and start - merged[-1][1] < GAP_BYTES:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        if merged and 3 * sum(b - a for a, b in merged) >= merged[-1][1] - merged[0][0]:
            merged = [(merged[0][0], merged[-1][1])]
        with self._lock:
            self._wanted = merged
            if merged:
                for run in [r for r in self._runs if not r.read]:
                    if not any(a < run.stop and run.first < b for a, b in merged):
                        self._drop(run)
                self._fetch_ahead(merged)

    def close(self) -> None:
        """Forgets what is held and what was to be fetched."""
        with self._lock:
            for run in list(self._runs):
                self._drop(run)
            self._wanted = []

    def _run_of(self, at: int, end: int) -> _Run:
        """The run that holds byte `at`, made if need be; `end` is where the request ends."""
        with self._lock:
            run = self._find(at) or self._new_run(at, at + self._length(at, end))
            self._runs.move_to_end(run)
            run.kept |= not run.first or bool(self._wanted and not self._extent(at))
            if not run.read or end > run.stop:
                run.read = True
                self._fetch_ahead(self._spans_after(run, end))
        return run

    def _length(self, at: int, end: int) -> int:
        """Bytes worth having from `at` on, for a request that ends at `end`."""
        wanted, before = self._extent(at), self._find(at - 1)
        left = self.size_bytes - at
        if wanted:
            least = wanted[1] - at
        elif left <= TAIL_BYTES and not before and not (self._wanted and self._wanted[-1][1] > at):
            least = left
        elif self._wanted:
            least = 0
        else:
            least = min(2 * before.size_bytes, RUN_BYTES) if before else FIRST_BYTES
        return max(least, end - at)

    def _extent(self, at: int) -> tuple[int, int] | None:
        i = bisect_right(self._wanted, (at, self.size_bytes)) - 1
        return self._wanted[i] if i >= 0 and at < self._wanted[i][1] else None

    def _spans_after(self, run: _Run, end: int) -> Iterator[tuple[int, int]]:
        """What is worth having next, the most urgent first."""
        if self._wanted:
            yield run.stop, end
            i = bisect_right(self._wanted, (run.first, self.size_bytes))
            yield from ((max(a, run.stop), b) for a, b in self._wanted[max(0, i - 1) :])
        elif run.follows or end > run.stop:
            yield run.stop, max(end, run.stop + min(2 * run.size_bytes, RUN_BYTES))

    def _fetch_ahead(self, spans: Iterable[tuple[int, int]]) -> None:
        ahead = [r for r in self._runs if not r.read]
        slots = IN_FLIGHT - sum(not r.future.done() for r in ahead)
        budget = AHEAD_BYTES - sum(r.size_bytes for r in ahead)
        for first, stop in spans:
            while first < min(stop, self.size_bytes):
                if (held := self._find(first)) is not None:
                    first = held.stop
                    continue
                if slots <= 0 or budget <= 0:
                    return
                run = self._new_run(first, stop)
                _pool().submit(self._fetch, run)
                slots, budget, first = slots - 1, budget - run.size_bytes, run.stop

    def _find(self, at: int) -> _Run | None:
        i = bisect_right(self._sorted, at, key=_first) - 1
        return self._sorted[i] if i >= 0 and at < self._sorted[i].stop else None

    def _new_run(self, first: int, stop: int) -> _Run:
        """The first of the fewest even runs from `first`, which is not held, up to `stop` or what
        is held; longer where a GET or a hole would be too small. Makes room for it."""
        i = bisect_right(self._sorted, first, key=_first)
        low = self._sorted[i - 1].stop if i else 0
        high = self._sorted[i].first if i < len(self._sorted) else self.size_bytes
        length = min(stop, high) - first
        stop = first + max(LEAST_BYTES, -(-length // -(-length // RUN_BYTES)))
        if high - stop < LEAST_BYTES:
            stop = high
        if stop < self.size_bytes:
            first = max(low, min(first, stop - LEAST_BYTES))
        if first - low < LEAST_BYTES:
            first = low
        run = _Run(first, stop, self._find(first - 1) is not None, Future())
        self._runs[run] = None
        self._sorted.insert(i, run)
        excess = sum(r.size_bytes for r in self._runs) - HELD_BYTES
        readable = [r for r in self._runs if r.read and r is not run]
        for old in sorted(readable, key=lambda r: r.kept):
            if excess <= 0:
                break
            excess -= old.size_bytes
            self._forget(old)
        return run

    def _drop(self, run: _Run) -> None:
        """Forgets a run that nobody waits for; it is not fetched if that has not begun."""
        run.begun = run.begun or run.future.cancel()
        self._forget(run)

    def _forget(self, run: _Run) -> None:
        if self._runs.pop(run, run) is None:
            self._sorted.remove(run)

    def _fetch(self, run: _Run) -> None:
        """Fills a run, unless another thread is at it."""
        with self._lock:
            if run.begun:
                return
            run.begun = True
        length = run.size_bytes
        try:
            data = self._store.read_at(self._key, run.first, length, version=self._version)
            if len(data) != length:
                raise changed(self._store.uri_of(self._key))
        except BaseException as error:  # raised to whoever waits for the run, in `read_at`
            with self._lock:
                self._forget(run)  # the next read asks again
            run.future.set_exception(error)
            return
        with self._lock:
            self.gets += 1
            self.bytes_read += length
        run.future.set_result(data)


def _first(run: _Run) -> int:
    return run.first


@cache
def _pool() -> ThreadPoolExecutor:
    """Shared by all sources of a process, which bounds its GETs in flight."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="read-ahead")
