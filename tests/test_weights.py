"""Weights: hashed, staged once per node, never carried with the job."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest

from vidbatch.errors import ModelError, UsageError
from vidbatch.models import weights
from vidbatch.models.located import Located
from vidbatch.models.weights import WeightFile, WeightStore, stage_file, staged
from vidbatch.storage import StoreSettings, open_store

BODY = bytes(range(256)) * 8192 + b"end"
"""2 MiB and a bit: larger than what travels."""
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's cache, empty."""
    monkeypatch.setenv("VIDBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    (place / "model.safetensors").write_bytes(BODY)
    (place / "config.json").write_bytes(b"{}")
    return place


def put(uri: str, name: str = "model.safetensors", body: bytes = BODY) -> WeightFile:
    """A file in a store, as the planner knows it."""
    open_store(uri).put_new(name, body)
    return WeightFile(name=name, uri=uri, size_bytes=len(body), sha256=SHA256)


def find(uri: str | Path, **pinned: str) -> Located:
    store = WeightStore(str(uri), StoreSettings(), "model.what.source")
    small, large = store.find(store.entries, {k.replace("_", "."): v for k, v in pinned.items()})
    return Located(adapter="python", target="a:B", files=small, weights=large)


class TestFind:
    def test_large_files_do_not_travel(self, folder: Path) -> None:
        located = find(folder)
        assert located.files == (("config.json", b"{}"),)
        assert located.weights_sha256 == (
            ("config.json", hashlib.sha256(b"{}").hexdigest()),
            ("model.safetensors", SHA256),
        )
        assert len(pickle.dumps(located)) < 2000

    def test_a_file_on_disk_is_hashed_once(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find(folder)
        with monkeypatch.context() as patch:
            patch.setattr(WeightStore, "hash", lambda *_: pytest.fail("read again"))
            assert find(folder).weights[0].sha256 == SHA256
        (folder / "model.safetensors").write_bytes(b"x" + BODY)
        assert find(folder).weights[0].sha256 == hashlib.sha256(b"x" + BODY).hexdigest()

    def test_a_large_file_in_a_store_must_be_pinned(self, s3_bucket: str) -> None:
        uri = f"s3://{s3_bucket}/models/a"
        put(uri)
        with pytest.raises(UsageError, match=r"no entry under `sha256:`.*vidbatch models fetch"):
            find(uri)
        assert find(uri, model_safetensors=SHA256.upper()).weights[0].sha256 == SHA256

    @pytest.mark.parametrize("there", [True, False])
    def test_no_model_there(self, tmp_path: Path, there: bool) -> None:
        if there:
            (tmp_path / "none").mkdir()
        with pytest.raises(UsageError, match="holds no files; no model is there"):
            find(tmp_path / "none")

    def test_a_bucket_that_is_not_there(self, s3_bucket: str) -> None:
        with pytest.raises(UsageError, match=r"model\.what\.source: .*-not"):
            find(f"s3://{s3_bucket}-not/model")


class TestStage:
    def test_from_a_store_once(self, s3_bucket: str, cache: Path) -> None:
        weight = put(f"s3://{s3_bucket}/models/a")
        with staged([weight], {"config.json": b"{}"}) as place:
            assert (place / "model.safetensors").read_bytes() == BODY
            assert (place / "config.json").read_bytes() == b"{}"
        open_store(weight.uri).remove(weight.name)
        assert stage_file(weight).read_bytes() == BODY
        assert sorted(p.name for p in (cache / "files").iterdir()) == [SHA256, f"{SHA256}.lock"]

    def test_from_disk_it_is_used_where_it_lies(self, folder: Path, cache: Path) -> None:
        (weight,) = find(folder).weights
        assert stage_file(weight) == folder / "model.safetensors"
        assert not (cache / "files").exists()

    @pytest.mark.parametrize("place", ["disk", "store"])
    def test_another_file_than_planned(
        self, folder: Path, cache: Path, s3_bucket: str, place: str
    ) -> None:
        uri = str(folder) if place == "disk" else f"s3://{s3_bucket}/models/a"
        if place == "store":
            put(uri, body=BODY[:-1] + b"!")
        (folder / "model.safetensors").write_bytes(BODY[:-1] + b"!")
        weight = WeightFile(name="model.safetensors", uri=uri, size_bytes=len(BODY), sha256=SHA256)
        with pytest.raises(ModelError, match=f"its sha256 is .*, planned was {SHA256}") as caught:
            stage_file(weight)
        assert caught.value.kind == "weights_changed" and "\n" not in caught.value.message
        assert not (cache / "files" / SHA256).exists()
        left = list((cache / "files").glob(".new-*")) if (cache / "files").exists() else []
        assert not left

    def test_a_spoilt_cache_heals(self, s3_bucket: str, cache: Path) -> None:
        weight = put(f"s3://{s3_bucket}/models/a")
        stage_file(weight).write_bytes(b"spoilt")
        assert stage_file(weight).read_bytes() == BODY

    def test_what_cannot_be_read(self, folder: Path, s3_bucket: str) -> None:
        (weight,) = find(folder).weights
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="must be readable on every worker") as caught:
            stage_file(weight)
        assert caught.value.kind == "weights_unreadable"
        gone = WeightFile(name="a", uri=f"s3://{s3_bucket}/x", size_bytes=1, sha256=SHA256)
        with pytest.raises(ModelError, match=r"a cannot be staged: .* is not there"):
            stage_file(gone)

    def test_processes_of_a_node_fetch_it_once(
        self, s3_bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two at once: one fetches, the other waits and finds it."""
        weight = put(f"s3://{s3_bucket}/models/a")
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            found = pool.map(_stage_and_count, [weight] * 2, chunksize=1)
        assert sum(fetched for fetched, _ in found) == 1
        assert {content for _, content in found} == {SHA256}


def _stage_and_count(weight: WeightFile) -> tuple[int, str]:
    fetched = []
    fetch: Any = weights._fetch

    def counting(*args: Any) -> None:
        fetched.append(1)
        fetch(*args)

    weights._fetch = counting
    content = stage_file(weight).read_bytes()
    return len(fetched), hashlib.sha256(content).hexdigest()


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDBATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.cache_folder() == tmp_path / "xdg" / "vidbatch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert weights.cache_folder() == tmp_path / "home" / ".cache" / "vidbatch"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert weights.cache_folder().name.startswith("vidbatch-")
