"""Random access to one pinned object, read ahead: few large GETs for many small reads.

pages of 256 KiB:  0 1 2 3 4 5 6 7 8 9 …
runs (one GET):   [1 MiB ][ 2 MiB         ][ 4 MiB …      a run that follows a held one is twice
                                                          as long, to 8 MiB, and the next is
                                                          fetched while it is read
a seek:           starts again with 1 MiB
`want(extents)`:  runs are the wanted extents, up to eight in flight
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from vidbatch.storage.base import Store, StoreSettings, changed
from vidbatch.storage.local import LocalStore, OpenFile
from vidbatch.storage.opening import open_store

PAGE_BYTES = 256 * 2**10
"""Runs are cut at multiples of it: no GET is smaller, but at the object's end."""
FIRST_PAGES = 4
RUN_PAGES = 32
"""8 MiB: at 100 MB/s to a store a GET's 30 ms of latency are then a quarter of its time."""
HELD_BYTES = 64 * 2**20
"""Most bytes kept of one object; the longest unused are forgotten first."""
AHEAD_BYTES = HELD_BYTES // 2
"""Most bytes fetched and not yet read."""
IN_FLIGHT = 8
GAP_BYTES = 2**20
"""Wanted extents that lie nearer together become one."""


class Source(Protocol):
    """A `data.ByteSource` that counts, takes hints and is closed by who opened it. Thread-safe."""

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
        """Says which half-open byte ranges will be read, in rising order: only they are fetched.

        Other reads still work. Replaces an earlier list; [] goes back to guessing.
        """
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
    """Pages [first, stop), fetched or being fetched by one GET."""

    first: int
    stop: int
    follows: bool
    """Whether the page before it was held: somebody reads in order."""
    future: Future[bytes]
    begun: bool = False
    """Whether a thread has taken it on: the pool's, or a reader's that came first."""
    read: bool = False


class ReadAhead:
    """An object of a store that costs a request per read."""

    def __init__(self, store: Store, key: str, size_bytes: int, version: str | None) -> None:
        self._store, self._key, self._version = store, key, version
        self.size_bytes = size_bytes
        self._end = -(-size_bytes // PAGE_BYTES)
        self._lock = threading.Lock()
        self._runs: OrderedDict[_Run, None] = OrderedDict()  # the longest unused first
        self._pages: dict[int, _Run] = {}
        self._wanted: list[tuple[int, int]] = []
        self.bytes_read = self.gets = 0

    def read_at(self, offset: int, length: int) -> bytes:
        """See `Source.read_at`."""
        end = min(offset + length, self.size_bytes)
        pieces: list[bytes] = []
        while offset < end:
            run = self._run_of(offset // PAGE_BYTES, -(-end // PAGE_BYTES))
            begin = run.first * PAGE_BYTES
            self._fetch(run)
            piece = run.future.result()[offset - begin : end - begin]
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
            self._wanted = [
                (a // PAGE_BYTES, min(self._end, -(-b // PAGE_BYTES))) for a, b in merged
            ]
            if self._wanted:
                self._fetch_ahead(self._wanted)

    def close(self) -> None:
        """Forgets what is held and what was to be fetched."""
        with self._lock:
            for run in self._runs:
                run.begun = run.begun or run.future.cancel()
            self._runs.clear()
            self._pages.clear()
            self._wanted = []

    def _run_of(self, page: int, stop: int) -> _Run:
        """The run that holds `page`, started if need be; `stop` is where the request ends."""
        with self._lock:
            run = self._pages.get(page)
            if run is None:
                run = self._new_run(page, page + self._length(page, stop))
            self._runs.move_to_end(run)
            if not run.read or stop > run.stop:
                run.read = True
                self._fetch_ahead(self._spans_after(run, stop))
        return run

    def _length(self, page: int, stop: int) -> int:
        """Pages of a run that begins at `page`, for a request that ends at page `stop`."""
        if self._end <= RUN_PAGES:
            return self._end - page
        wanted = self._extent(page)
        if self._wanted:
            least = (wanted[1] if wanted else 0) - page
        else:
            before = self._pages.get(page - 1)
            least = 2 * (before.stop - before.first) if before else FIRST_PAGES
        return min(max(least, stop - page), RUN_PAGES)

    def _extent(self, page: int) -> tuple[int, int] | None:
        i = bisect_right(self._wanted, (page, self._end)) - 1
        return self._wanted[i] if i >= 0 and page < self._wanted[i][1] else None

    def _spans_after(self, run: _Run, stop: int) -> Iterator[tuple[int, int]]:
        """Page ranges worth having next, the most urgent first."""
        if self._wanted:
            yield run.stop, stop
            i = bisect_right(self._wanted, (run.first, self._end))
            yield from ((max(a, run.stop), b) for a, b in self._wanted[max(0, i - 1) :])
        elif run.follows or stop > run.stop:
            yield run.stop, max(stop, run.stop + min(2 * (run.stop - run.first), RUN_PAGES))

    def _fetch_ahead(self, spans: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> None:
        ahead = [r for r in self._runs if not r.read]
        slots = IN_FLIGHT - sum(not r.future.done() for r in ahead)
        budget = AHEAD_BYTES // PAGE_BYTES - sum(r.stop - r.first for r in ahead)
        for first, stop in spans:
            while first < min(stop, self._end):
                if first in self._pages:
                    first = self._pages[first].stop
                    continue
                if slots <= 0 or budget <= 0:
                    return
                run = self._new_run(first, min(stop, first + RUN_PAGES))
                _pool().submit(self._fetch, run)
                slots, budget, first = slots - 1, budget - (run.stop - run.first), run.stop

    def _new_run(self, first: int, stop: int) -> _Run:
        """A run whose bytes are still to be fetched; makes room for it."""
        stop = min(stop, self._end)
        stop = next((p for p in range(first + 1, stop) if p in self._pages), stop)
        run = _Run(first, stop, first - 1 in self._pages, Future())
        self._runs[run] = None
        self._pages.update(dict.fromkeys(range(first, stop), run))
        excess = len(self._pages) - HELD_BYTES // PAGE_BYTES
        for old in [r for r in self._runs if r.read and r is not run]:
            if excess <= 0:
                break
            excess -= old.stop - old.first
            self._forget(old)
        return run

    def _forget(self, run: _Run) -> None:
        if self._runs.pop(run, run) is None:
            for page in range(run.first, run.stop):
                del self._pages[page]

    def _fetch(self, run: _Run) -> None:
        """Fills a run, unless another thread is at it."""
        with self._lock:
            if run.begun:
                return
            run.begun = True
        begin = run.first * PAGE_BYTES
        length = min(run.stop * PAGE_BYTES, self.size_bytes) - begin
        try:
            data = self._store.read_at(self._key, begin, length, version=self._version)
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


@cache
def _pool() -> ThreadPoolExecutor:
    """Shared by all sources of a process, which bounds its GETs in flight."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="read-ahead")
