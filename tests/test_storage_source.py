"""Reading ahead: few GETs, each byte once, bounded memory, and always the object's bytes."""

from __future__ import annotations

import random
import threading
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidbatch.errors import SourceChanged, StoreError
from vidbatch.storage import StoreSettings, open_source
from vidbatch.storage import source as storage_source
from vidbatch.storage.anyfs import AnyStore
from vidbatch.storage.source import ReadAhead

MiB = 2**20
M = 2**16


class Counting(AnyStore):
    """A store in memory that remembers what was read of it."""

    def __init__(self, uri: str, settings: StoreSettings) -> None:
        super().__init__(uri, settings)
        self.reads: list[tuple[int, int]] = []
        self.fail = 0
        self.gate = threading.Event()
        self.gate.set()
        self.busy = self.most_busy = 0
        self.guard = threading.Lock()

    def read_at(self, key: str, offset: int, length: int, *, version: str | None = None) -> bytes:
        with self.guard:
            self.reads.append((offset, length))
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
        self.gate.wait(10)
        with self.guard:
            self.busy -= 1
            self.fail -= 1
            if self.fail >= 0:
                raise StoreError("injected", kind="busy")
        return super().read_at(key, offset, length, version=version)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """An empty store; reading ahead is scaled down, and M stands for 1 MiB."""
    for name in [n for n in vars(storage_source) if n.endswith("_BYTES")]:
        monkeypatch.setattr(storage_source, name, getattr(storage_source, name) * M // MiB)
    return Counting(f"memory://counting-{uuid.uuid4().hex}", StoreSettings())


def _open(store: Counting, size_bytes: int) -> tuple[ReadAhead, bytes]:
    data = random.Random(size_bytes).randbytes(size_bytes)
    store.put_new("v", data)
    entry = next(iter(store.list()))
    source = open_source(store, store.uri_of("v"), size_bytes=size_bytes, version=entry.version)
    assert isinstance(source, ReadAhead)
    return source, data


def test_a_small_object_is_one_get(counting: Counting) -> None:
    source, data = _open(counting, 7 * M)
    assert source.read_at(6 * M, 10) == data[6 * M :][:10]
    assert source.read_at(0, 7 * M) == data
    # the page that was wanted first decides; what lies before it comes with the next read
    assert sum(n for _, n in counting.reads) == source.bytes_read == 7 * M
    assert source.gets == len(counting.reads) <= 2


def test_reading_in_order_takes_few_gets_and_each_byte_once(counting: Counting) -> None:
    size = 45 * M + 345
    source, data = _open(counting, size)
    for offset in range(0, size, 6_000):
        assert source.read_at(offset, 6_000) == data[offset : offset + 6_000]
    assert source.bytes_read == size
    assert len(counting.reads) <= 9
    assert max(n for _, n in counting.reads) == 16 * M


def test_the_next_get_is_under_way_while_this_one_is_read(counting: Counting) -> None:
    source, _ = _open(counting, 45 * M)
    source.read_at(0, 10)
    assert counting.reads == [(0, M)], "the head alone says nothing about what comes next"
    source.read_at(M, 10)
    source.close()
    ahead = sorted(counting.reads)[1:]
    assert ahead[0] == (M, 2 * M)
    assert all(r == (3 * M, 4 * M) for r in ahead[1:])


def test_a_far_read_fetches_little(counting: Counting) -> None:
    source, data = _open(counting, 45 * M)
    for at in range(35 * M, -1, -5 * M):
        assert source.read_at(at, 1000) == data[at : at + 1000]
    assert [n for _, n in counting.reads] == [M] * 8


def test_a_jump_near_the_end_takes_all_that_is_left(counting: Counting) -> None:
    source, data = _open(counting, 45 * M + 7)
    source.want([(0, 100)])
    for at in (0, 39 * M, 44 * M, 45 * M):
        assert source.read_at(at, 50) == data[at : at + 50]
    assert counting.reads == [(0, M // 4), (39 * M, 6 * M + 7)]
    source.want([(30 * M, 44 * M)])  # what is wanted there says more than that
    assert source.read_at(38 * M - 5, 10) == data[38 * M - 5 :][:10]
    source.close()
    assert max(at + n for at, n in counting.reads[2:]) == 39 * M


def test_the_sizes_of_gets() -> None:
    found = [vars(storage_source)[f"{n}_BYTES"] for n in ("LEAST", "FIRST", "TAIL", "RUN", "GAP")]
    assert found == [256 * 1024, MiB, 8 * MiB, 16 * MiB, MiB]


def test_no_get_is_small_but_at_the_end(counting: Counting) -> None:
    size = 20 * M + 5
    source, _ = _open(counting, size)
    rng = random.Random(6)
    for _ in range(60):
        source.read_at(rng.randrange(size), rng.choice([1, 1000, 2 * M]))
    source.close()
    assert all(n >= M // 4 or at + n == size for at, n in counting.reads)


def test_a_long_read_goes_in_parallel(counting: Counting) -> None:
    source, data = _open(counting, 45 * M)
    counting.gate.clear()
    threading.Timer(0.3, counting.gate.set).start()
    assert source.read_at(0, 40 * M) == data[: 40 * M]
    assert 3 <= counting.most_busy <= 9
    assert source.bytes_read <= 45 * M


def test_only_what_is_wanted_is_fetched(counting: Counting) -> None:
    source, data = _open(counting, 60 * M)
    extents = [(i * 5 * M + 77, i * 5 * M + 4_000) for i in range(12)]
    extents.insert(1, (40_000, 40_100))
    source.want(extents)
    for start, stop in extents:
        assert source.read_at(start, stop - start) == data[start:stop]
    assert len(counting.reads) == 12, "the two that lie within 1 M are one"
    assert source.bytes_read <= 13 * M // 4 + M
    assert source.read_at(3 * M, 10) == data[3 * M :][:10], "other reads still work"
    assert counting.reads[-1] == (3 * M, M // 4)


def test_wanted_extents_are_fetched_eight_at_a_time(counting: Counting) -> None:
    source, _ = _open(counting, 60 * M)
    counting.gate.clear()
    source.want([(i * 3 * M, i * 3 * M + 1000) for i in range(20)])
    threading.Timer(0.3, counting.gate.set).start()
    for i in range(20):
        source.read_at(i * 3 * M, 1000)
    assert counting.most_busy in (8, 9), "the pool's, and the reader's own where it comes first"
    assert len(counting.reads) == 20


def test_where_much_is_wanted_all_of_the_span_is(counting: Counting) -> None:
    source, data = _open(counting, 40 * M)
    source.want([(10 * M + i * 3 * M, 11 * M + i * 3 * M) for i in range(8)])
    for i in range(8):
        at = 10 * M + i * 3 * M
        assert source.read_at(at, M) == data[at : at + M]
    assert source.bytes_read == 22 * M
    assert counting.reads == [(10 * M, 11 * M), (21 * M, 11 * M)], "two, and evenly"


def test_what_is_not_wanted_any_more_is_dropped(counting: Counting) -> None:
    source, data = _open(counting, 100 * M)
    source.want([(0, 40 * M)])
    source.want([(60 * M, 70 * M)])
    assert source.read_at(60 * M, 10 * M) == data[60 * M : 70 * M]
    assert source.read_at(0, 10) == data[:10]
    assert counting.reads.count((60 * M, 10 * M)) == 1
    source.want([])
    assert source.read_at(69 * M, 10) == data[69 * M :][:10], "what was read is held"
    assert counting.reads.count((60 * M, 10 * M)) == 1


def test_the_header_outlasts_the_clips(counting: Counting) -> None:
    """Two clips of 90 M each, which is more than is held, and a header that both begin with."""
    source, data = _open(counting, 200 * M)
    for first in (3 * M, 100 * M):
        source.want([(first, first + 90 * M)])
        for at in (0, M, 199 * M):
            assert source.read_at(at, 1000) == data[at : at + 1000]
        for at in range(first, first + 90 * M, M // 8):
            assert source.read_at(at, M // 8) == data[at : at + M // 8]
    assert sum(r.size_bytes for r in source._runs) <= 64 * M
    header = [r for r in counting.reads if r[1] < 8 * M]
    assert header == [(0, M // 4), (M, M // 4), (199 * M, M)]
    assert source.bytes_read == sum(n for _, n in counting.reads) < 182 * M


def test_what_is_held_is_bounded(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_source, "HELD_BYTES", 4 * M)
    monkeypatch.setattr(storage_source, "AHEAD_BYTES", 2 * M)
    monkeypatch.setattr(storage_source, "RUN_BYTES", M)
    source, data = _open(counting, 20 * M)
    assert source.read_at(0, 20 * M) == data
    before = len(counting.reads)
    assert source.read_at(17 * M, M) == data[17 * M : 18 * M]
    assert len(counting.reads) == before, "the last are held"
    assert source.read_at(0, 10) == data[:10]
    assert len(counting.reads) == before, "so is the head"
    assert source.read_at(2 * M, 10) == data[2 * M :][:10]
    assert len(counting.reads) == before + 1, "those between are forgotten"


def test_a_failed_read_is_raised_once_and_asked_again(counting: Counting) -> None:
    source, data = _open(counting, 3 * M)
    counting.fail = 1
    with pytest.raises(StoreError, match="injected"):
        source.read_at(0, 10)
    assert source.read_at(0, 10) == data[:10]
    assert source.gets == 1


def test_an_object_shorter_than_listed(counting: Counting) -> None:
    counting.put_new("v", b"short")
    source = open_source(counting, counting.uri_of("v"), size_bytes=100, version=None)
    with pytest.raises(SourceChanged):
        source.read_at(0, 100)


def test_threads_share_a_source(counting: Counting) -> None:
    source, data = _open(counting, 30 * M)
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            at, n = rng.randrange(30 * M), rng.choice([10, 6_000, 3 * M])
            if source.read_at(at, n) != data[at : at + n]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    source.close()


_AT = st.integers(0, 1100)
_READS = st.lists(st.tuples(_AT, st.integers(0, 400)), max_size=30)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(0, 1000), reads=_READS, wanted=st.lists(_AT, max_size=8))
def test_any_reads_give_the_objects_bytes(
    size: int, reads: list[tuple[int, int]], wanted: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LEAST": 16, "FIRST": 32, "RUN": 128, "GAP": 20, "TAIL": 64,
                            "HELD": 320, "AHEAD": 160}.items():  # fmt: skip
            patch.setattr(storage_source, f"{name}_BYTES", value)
        store = Counting(f"memory://any-{uuid.uuid4().hex}", StoreSettings())
        source, data = _open(store, size)
        ends = sorted(set(wanted))
        source.want(list(zip(ends[::2], ends[1::2], strict=False)))
        for offset, length in reads:
            assert source.read_at(offset, length) == data[offset : offset + length]
        source.close()
        assert all(n >= 16 or at + n == size for at, n in store.reads)
