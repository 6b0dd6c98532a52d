"""A store as the file system DuckDB reads through: patterns, versions, errors of the store."""

from __future__ import annotations

import uuid

import pytest

from tests.made_output import begin
from vidbatch.errors import InfraError, NotFoundInStore
from vidbatch.query import sql
from vidbatch.storage import Store, open_store
from vidbatch.storage.filesystem import BLOCK_BYTES, StoreFileSystem

KEYS = ("v1/t/a=1/part-1.parquet", "v1/t/a=1/part-2.parquet", "v1/t/a=2/deep/part-3.parquet")


@pytest.fixture
def store() -> Store:
    store = open_store(f"memory://filesystem-{uuid.uuid4().hex}/tables")
    for key in KEYS:
        store.put_new(key, key.encode() * 1000)
    return store


def test_a_star_stays_within_its_level(store: Store) -> None:
    fs = StoreFileSystem(store)
    assert fs.glob("vidbatch://v1/t/a=*/*.parquet") == list(KEYS[:2])
    assert fs.glob("vidbatch://v1/t/**") == list(KEYS)
    assert fs.glob("vidbatch://v1/u/*") == []
    assert fs.ls("vidbatch://v1/t/a=2", detail=False) == [KEYS[2]]


def test_any_range_of_an_object_is_read(store: Store) -> None:
    fs = StoreFileSystem(store)
    data = KEYS[0].encode() * 1000
    assert fs.info(KEYS[0])["size"] == len(data) < BLOCK_BYTES
    with fs.open(f"vidbatch://{KEYS[0]}") as file:
        file.seek(len(data) - 8)
        assert file.read() == data[-8:]
        file.seek(5)
        assert file.read(100) == data[5:105]


def test_nothing_is_written_through_it(store: Store) -> None:
    with pytest.raises(PermissionError, match="only read"):
        StoreFileSystem(store).open("vidbatch://v1/new", "wb")


def test_the_first_error_of_the_store_is_kept(store: Store) -> None:
    fs = StoreFileSystem(store)
    fs.glob("vidbatch://v1/t/a=*/*.parquet")
    store.remove(KEYS[0])
    with fs.open(f"vidbatch://{KEYS[0]}") as file, pytest.raises(NotFoundInStore):
        file.read()
    assert isinstance(fs.failure, NotFoundInStore)
    with pytest.raises(FileNotFoundError):
        StoreFileSystem(store).info(KEYS[0])


def test_a_damaged_part_file_is_no_mistake_of_the_query(store: Store) -> None:
    begin(store.uri)
    store.put_new("v1/labels/sample=s.0/model=m-v1.0/dt=2026-03-01/part-x.parquet", b"damaged" * 9)
    with pytest.raises(InfraError, match=r"part-x\.parquet"):
        sql(store.uri, "SELECT label FROM labels_all")
