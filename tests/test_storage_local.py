"""What is particular to local disk: special files, rights, full disks, a writer that dies."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vidbatch.errors import (
    ExistsInStore,
    ForbiddenByStore,
    NotFoundInStore,
    SourceChanged,
    StoreError,
)
from vidbatch.storage import open_source, open_store

MiB = 2**20


def test_what_is_no_file_is_listed_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.mp4"))
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.mp4").symlink_to(tmp_path / "itself.mp4")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    (tmp_path / "folder" / "a.mp4").write_bytes(b"a")
    (tmp_path / "to a.mp4").symlink_to(tmp_path / "folder" / "a.mp4")
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    store = open_store(str(tmp_path))
    seen = {e.key: e.oddity for e in store.list()}
    assert seen == {
        "fifo.mp4": "not_regular",
        "socket.mp4": "not_regular",
        "device.mp4": "not_regular",
        "broken.mp4": "broken_link",
        "itself.mp4": "link_loop",
        "folder/up/": "link_loop",
        "folder/a.mp4": "",
        "to a.mp4": "",
        "to folder/up/": "link_loop",
        "to folder/a.mp4": "",
    }
    assert list(store.list_keys()) == ["folder/a.mp4", "to a.mp4", "to folder/a.mp4"]
    for key in ("fifo.mp4", "device.mp4", "folder"):
        with pytest.raises(NotFoundInStore, match="is not a file"):
            store.get(key)


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Root may read everything, so root becomes somebody else."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_missing_rights() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        locked, readable = Path(folder) / "locked", Path(folder) / "readable.mp4"
        locked.mkdir()
        secret = locked / "secret.mp4"
        for file in (secret, readable):
            file.write_bytes(b"x")
        readable.chmod(0o000)
        locked.chmod(0o000)
        store = open_store(folder)
        with _as_nobody():
            assert {e.key: e.oddity for e in store.list()} == {
                "locked/": "unreadable",
                "readable.mp4": "",
            }
            with pytest.raises(ForbiddenByStore, match="locked"):
                list(store.list_keys())
            for key in ("readable.mp4", "locked/secret.mp4"):
                with pytest.raises(ForbiddenByStore) as caught:
                    store.get(key)
                assert caught.value.kind == "access_denied"
            with pytest.raises(ForbiddenByStore):
                store.put_new("new", b"x")
        locked.chmod(0o755)


def test_a_key_cannot_leave_the_root(tmp_path: Path) -> None:
    for key in ("../x", "a/../../x", "a\0b"):
        with pytest.raises(ValueError, match="is not a key"):
            open_store(str(tmp_path / "root")).put_new(key, b"x")


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_limit_on_file_size_leaves_nothing_half_written(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, hard))
    try:
        with pytest.raises(StoreError, match="was not written") as caught:
            store.put_new("part.parquet", b"x" * 3 * MiB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.kind == "disk_full" and caught.value.retryable
    assert _files(tmp_path) == []
    store.put_new("part.parquet", b"x" * 3 * MiB)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = open_store(str(tmp_path))
    store.put_new("before", b"x")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        store.put_new("part.parquet", b"x")
    assert caught.value.kind == "disk_full" and "free some room" in caught.value.advice
    assert _files(tmp_path) == ["before"]


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(src: Path, dst: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(src), None, dst)

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(StoreError, match="hard links") as caught:
        open_store(str(tmp_path)).put_new("k", b"x")
    assert caught.value.kind == "no_links"
    assert _files(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put_new("a", b"x")
    with pytest.raises(StoreError) as caught:
        store.put_new("a/b", b"y")
    assert not isinstance(caught.value, ExistsInStore)
    assert store.get("a") == b"x"


def test_a_writer_that_dies_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom vidbatch.storage import open_store\n"
        "os.link = lambda *a: os.kill(os.getpid(), 9)\n"
        "open_store(sys.argv[1]).put_new('v1/part', b'x' * 1000)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert died.returncode == -9
    store = open_store(str(tmp_path))
    (left,) = store.list_keys()
    assert left.startswith("_vidbatch/tmp/")
    store.put_new("v1/part", b"whole")
    store.remove(left)
    assert list(store.list_keys()) == ["v1/part"]


def test_an_open_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    file = tmp_path / "v.mp4"
    file.write_bytes(b"0123456789")
    store = open_store(str(tmp_path))
    entry = next(iter(store.list()))
    source = open_source(store, str(file), size_bytes=10, version=entry.version)
    assert source.read_at(0, 4) == b"0123"
    with file.open("ab") as writer:
        writer.write(b"more")
    with pytest.raises(SourceChanged):
        source.read_at(4, 4)
    source.close()
    source.close()
