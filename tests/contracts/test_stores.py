"""What every store promises, run over local disk, S3 and a store of fsspec."""

from __future__ import annotations

import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vidbatch.errors import ExistsInStore, NotFoundInStore, SourceChanged, StoreError
from vidbatch.storage import Store, StoreSettings, open_source, open_store, probe_create_only
from vidbatch.storage.base import MAX_METADATA_BYTES

ODD_KEYS = [
    "-leading-dash",
    "a b  c.mp4",
    "a#b?c%d&e=f+g.mp4",
    "a%20b",
    "no suffix",
    "quote'\"`$(x);.mp4",
    "new\nline.mp4",
    "tab\there",
    "ünïcödé/日本語/🎬.mp4",
    "e\u0301 is not \u00e9",
    "deep/" * 20 + "x",
    "x" * 250,
    f"{'y' * 150}/{'z' * 149}",
    "back\\slash",
    "versionId?versionId=1",
    "**/[glob]*",
    "s3://looks/like/a/uri".replace("//", "/"),
]

ATOMIC = ["local", pytest.param("s3", marks=pytest.mark.s3)]
"""memory:// looks first and writes then."""


@pytest.fixture(params=[*ATOMIC, "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind, rooted below what it could be."""
    if request.param == "local":
        return open_store(str(tmp_path / "root" / "of it"))
    if request.param == "s3":
        return open_store(f"s3://{request.getfixturevalue('s3_bucket')}/root/of it/")
    return open_store(f"memory://test-{uuid.uuid4().hex}/root/of it")


def test_an_object_comes_back(store: Store) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    store.put_new("a/b.bin", b"\x00hello\xff")
    entry = store.head("a/b.bin")
    assert entry is not None
    assert store.get("a/b.bin") == b"\x00hello\xff"
    assert (entry.key, entry.size_bytes, entry.oddity) == ("a/b.bin", 7, "")
    assert entry.etag is None or '"' not in entry.etag
    assert entry.version == (entry.etag or f"7-{entry.mtime_ns}")
    assert before < entry.modified_at < datetime.now(UTC) + timedelta(seconds=2)
    assert entry.modified_at.utcoffset() == timedelta(0)
    assert abs(entry.modified_at.timestamp() - entry.mtime_ns / 1e9) < 1e-5
    assert list(store.list()) == [entry]


def test_nothing_is_there_at_first(store: Store) -> None:
    assert list(store.list()) == []
    assert list(store.list("no/such/")) == []
    assert store.head("x") is None
    for call in (store.get, store.metadata):
        with pytest.raises(NotFoundInStore, match="is not there") as caught:
            call("x")
        assert "\n" not in str(caught.value)
    with pytest.raises(NotFoundInStore):
        store.read_at("x", 0, 1)
    store.remove("x")


def test_a_folder_is_no_object(store: Store) -> None:
    store.put_new("a/b/c", b"1")
    assert store.head("a/b") is None
    with pytest.raises(StoreError):
        store.get("a/b")


def test_the_first_writer_wins(store: Store) -> None:
    store.put_new("k", b"first")
    for data in (b"second", b"first", b""):
        with pytest.raises(ExistsInStore, match="another attempt was first"):
            store.put_new("k", data)
    assert store.get("k") == b"first"


def test_an_empty_object_is_created_once(store: Store) -> None:
    store.put_new("empty", b"")
    with pytest.raises(ExistsInStore):
        store.put_new("empty", b"not empty")
    assert store.get("empty") == b""
    assert store.read_at("empty", 0, 10) == b""


def test_a_big_object_is_created_once(store: Store) -> None:
    data = bytes(range(256)) * (20 * 2**20 // 256)
    store.put_new("big", data)
    with pytest.raises(ExistsInStore):
        store.put_new("big", data)
    assert store.read_at("big", 17 * 2**20 + 3, 5) == data[17 * 2**20 + 3 :][:5]


@pytest.mark.parametrize("store", ATOMIC, indirect=True)
@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_one_of_sixteen_wins(store: Store, size: int) -> None:
    bodies = [bytes([i]) * size for i in range(16)]

    def create(data: bytes) -> bool:
        try:
            store.put_new("race", data)
        except ExistsInStore:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, bodies))
    assert sum(won) == 1
    assert store.get("race") == bodies[won.index(True)]
    assert list(store.list_keys()) == ["race"]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys(store: Store, key: str, request: pytest.FixtureRequest) -> None:
    on_s3 = store.uri.startswith("s3:")
    if "\n" in key and on_s3 and not request.getfixturevalue("s3_server").real:
        pytest.skip("moto has no keys with line ends")
    with pytest.raises(NotFoundInStore) as missing:
        store.get(key)
    assert "\n" not in str(missing.value), "every error is one line"
    store.put_new(key, b"odd")
    assert [e.key for e in store.list()] == [key]
    assert store.get(key) == b"odd"
    assert store.read_at(key, 1, 2) == b"dd"
    head = store.head(key)
    assert head is not None and head.size_bytes == 3
    assert store.uri_of(key) == f"{store.uri}/{key}"
    assert store.key_of(store.uri_of(key)) == key
    with pytest.raises(ExistsInStore):
        store.put_new(key, b"")
    store.remove(key)
    assert store.head(key) is None


def test_listing_goes_by_key_and_prefix(store: Store) -> None:
    keys = ["a", "a-b", "a.b", "a/b", "a/b/c", "a/é", "a0", "aa/b", "b/x"]
    keys = [k for k in keys if k not in ("a", "a/b")]  # no disk has both a and a/b
    for key in reversed(keys):
        store.put_new(key, b"")
    assert list(store.list_keys()) == sorted(keys, key=str.encode)
    for prefix in ("a", "a/", "a/b", "a/b/", "a/b/c", "a/é", "b", "c", "a/b/c/d", "a."):
        expected = [k for k in sorted(keys, key=str.encode) if k.startswith(prefix)]
        assert list(store.list_keys(prefix)) == expected, prefix


def test_a_store_sees_only_what_lies_under_its_root(store: Store) -> None:
    beside = open_store(store.uri + "-not", store.settings)
    beside.put_new("x", b"1")
    store.put_new("y", b"2")
    assert list(store.list_keys()) == ["y"]
    with pytest.raises(ValueError, match="does not lie under"):
        store.key_of(beside.uri_of("x"))


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 10, b"0123456789"), (3, 4, b"3456"), (8, 100, b"89"), (9, 1, b"9"), (10, 1, b""),
     (11, 5, b""), (0, 0, b""), (0, 100, b"0123456789")],
)  # fmt: skip
def test_ranges_are_exact(store: Store, offset: int, length: int, expected: bytes) -> None:
    store.put_new("k", b"0123456789")
    entry = store.head("k")
    assert entry is not None
    assert store.read_at("k", offset, length) == expected
    assert store.read_at("k", offset, length, version=entry.version) == expected


def test_a_read_is_pinned_to_its_version(store: Store) -> None:
    store.put_new("k", b"old bytes")
    entry = next(iter(store.list()))
    store.remove("k")
    with pytest.raises(NotFoundInStore):
        store.read_at("k", 0, 3, version=entry.version)
    store.put_new("k", b"new bytes")
    with pytest.raises(SourceChanged, match="changed since it was listed") as caught:
        store.read_at("k", 0, 3, version=entry.version)
    assert not caught.value.retryable
    assert store.read_at("k", 0, 3) == b"new"


def test_metadata(store: Store) -> None:
    given = {"task": "abc", "outcomes": '{"ok":3}'}
    store.put_new("k", b"x", given)
    assert store.metadata("k") == (given if store.uri.startswith("s3:") else {})


@pytest.mark.parametrize(
    "metadata", [{"Upper": "x"}, {"a": "é"}, {"a b": "x"}, {"a": "x\n"}, {"a": " x"},
                 {"a": "x" * MAX_METADATA_BYTES}],
)  # fmt: skip
def test_metadata_that_some_store_would_lose_are_refused(
    store: Store, metadata: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="metadata"):
        store.put_new("k", b"x", metadata)
    assert store.head("k") is None


def test_a_store_travels(store: Store) -> None:
    store.put_new("k", b"x")
    for other in (pickle.loads(pickle.dumps(store)), open_store(store.uri, store.settings)):
        assert (other.uri, other.settings) == (store.uri, store.settings)
        assert other.get("k") == b"x"


def test_threads_share_a_store(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put_new(f"k{i:02}", b"%d" % i), range(40)))
        got = list(pool.map(lambda i: store.get(f"k{i:02}"), range(40)))
    assert got == [b"%d" % i for i in range(40)]
    assert len(list(store.list_keys())) == 40


@pytest.mark.parametrize("store", ATOMIC, indirect=True)
def test_the_probe_finds_one_winner(store: Store) -> None:
    verdict = probe_create_only(store)
    assert verdict == {"create_only": True, "second_put": "refused", "writers": 16, "winners": 1}
    assert all(k.startswith("_vidbatch/probe/") for k in store.list_keys())
    assert probe_create_only(store) == verdict


@pytest.fixture
def source_bytes() -> bytes:
    return b"".join(i.to_bytes(4, "big") for i in range(3 * 2**20 // 4))


def test_a_source_reads_any_range(store: Store, source_bytes: bytes) -> None:
    store.put_new("v.mp4", source_bytes)
    entry = next(iter(store.list()))
    size = entry.size_bytes
    source = open_source(store, store.uri_of("v.mp4"), size_bytes=size, version=entry.version)
    for offset, length in [(0, 8), (size - 8, 8), (size - 8, 100), (5, 2**20), (0, size), (size, 4),
                           (size + 9, 4), (2**18 - 1, 2), (7, 0)]:  # fmt: skip
        assert source.read_at(offset, length) == source_bytes[offset:][:length], (offset, length)
    assert source.size_bytes == size
    assert source.gets > 0 and source.bytes_read > 0
    source.close()


def test_a_source_of_another_root(store: Store) -> None:
    """A job has several archive URIs and one store: the settings are what counts."""
    beside = open_store(store.uri + "-not", store.settings)
    beside.put_new("x y.mp4", b"beside")
    entry = next(iter(beside.list()))
    uri = beside.uri_of("x y.mp4")
    source = open_source(store, uri, size_bytes=6, version=entry.version)
    assert source.read_at(0, 6) == b"beside"
    source.close()


def test_a_source_of_a_changed_object(store: Store) -> None:
    store.put_new("k", b"old")
    entry = next(iter(store.list()))
    store.remove("k")
    store.put_new("k", b"new!")
    with pytest.raises(SourceChanged):
        open_source(
            store, store.uri_of("k"), size_bytes=entry.size_bytes, version=entry.version
        ).read_at(0, 3)


def test_settings_are_names_that_compare() -> None:
    assert StoreSettings() == StoreSettings(endpoint_url=None)
    assert hash(StoreSettings(region="eu")) == hash(StoreSettings(region="eu"))


def test_more_than_one_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidbatch.storage.s3.PAGE_KEYS", 10)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put_new(f"{i % 7}/{i:04}", b"x"), range(105)))
    assert len(list(store.list_keys())) == 105
    assert list(store.list_keys("3/")) == [f"3/{i:04}" for i in range(3, 105, 7)]
