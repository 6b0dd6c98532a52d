"""Stores: what is particular to S3, to local disk, and to reading ahead."""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.s3 import Gateway, Server, boto_client, make_bucket, use_server
from tests.s3_faults import Action, Fault, FaultProxy
from vidbatch.errors import (
    ExistsInStore,
    ForbiddenByStore,
    NotFoundInStore,
    RefusedError,
    SourceChanged,
    StoreError,
    UsageError,
    VidbatchError,
)
from vidbatch.storage import Store, StoreSettings, open_source, open_store, probe_create_only
from vidbatch.storage import base as storage_base
from vidbatch.storage import s3 as storage_s3
from vidbatch.storage import source as storage_source
from vidbatch.storage.anyfs import AnyStore
from vidbatch.storage.source import ReadAhead

MiB = 2**20
M = 2**16
PATIENCE_S = storage_base.BACKOFF_S


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_base, "BACKOFF_S", 0.001)


# names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_uri", "uri", "of_k"),
    [
        ("s3://b", "s3://b", "s3://b/k"),
        ("s3://b/", "s3://b", "s3://b/k"),
        ("s3://b/p q/%41/", "s3://b/p q/%41", "s3://b/p q/%41/k"),
        ("s3a://b/p", "s3://b/p", "s3://b/p/k"),
        ("/a/b/", "/a/b", "/a/b/k"),
        ("/", "/", "/k"),
        ("file:///a/b", "/a/b", "/a/b/k"),
        ("file://localhost/a%20b", "/a%20b", "/a%20b/k"),
        ("~/v", str(Path.home() / "v"), str(Path.home() / "v" / "k")),
        ("rel/../v", str(Path.cwd() / "v"), str(Path.cwd() / "v" / "k")),
        ("memory://x/y/", "memory://x/y", "memory://x/y/k"),
    ],
)
def test_uris(given_uri: str, uri: str, of_k: str) -> None:
    store = open_store(given_uri)
    assert store.uri == uri
    assert store.uri_of("k") == of_k
    assert store.key_of(of_k) == "k"


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///key", "s3://b cket/k", "nosuch://x/y"])
def test_what_is_no_store(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(uri).head("k")
    assert "\n" not in str(caught.value)


def test_a_store_whose_driver_is_missing_names_it() -> None:
    with pytest.raises(UsageError, match="gcsfs"):
        open_store("gs://bucket/x").head("k")


# S3: errors of the surroundings ---------------------------------------------------------------


def _impatient(monkeypatch: pytest.MonkeyPatch, timeout_s: float) -> None:
    monkeypatch.setattr(storage_s3, "READ_TIMEOUT_S", timeout_s)
    monkeypatch.setenv("AWS_SDK_UA_APP_ID", "impatient")  # so that the connection is a new one


def _fails(store: Store, cls: type[VidbatchError], kind: str, *, read: bool = True) -> str:
    """Every kind of request ends in the same error, on one line that names the store."""
    calls: list[Any] = [lambda: list(store.list()), lambda: store.put_new("k", b"x")]
    calls += [lambda: store.get("k"), lambda: store.read_at("k", 0, 1)] if read else []
    for call in calls:
        with pytest.raises(cls) as caught:
            call()
        assert caught.value.kind == kind
        assert "\n" not in str(caught.value)
        assert store.uri in str(caught.value)
    return str(caught.value)


def test_no_such_bucket(s3_bucket: str) -> None:
    said = _fails(open_store(f"s3://{s3_bucket}-not/x"), NotFoundInStore, "no_bucket")
    assert "no such bucket" in said and "endpoint_url" in said


def test_wrong_secret(real_s3: Gateway, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x" * 40)
    said = _fails(open_store(f"s3://{s3_bucket}"), ForbiddenByStore, "wrong_secret")
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "x" * 40 not in said


def test_unknown_key(real_s3: Gateway, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AAAAAAAAAAAAAAAAAAAA")
    _fails(open_store(f"s3://{s3_bucket}"), ForbiddenByStore, "wrong_key")


def test_no_credentials(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    said = _fails(open_store(f"s3://{s3_bucket}"), ForbiddenByStore, "no_credentials")
    assert "AWS_ACCESS_KEY_ID" in said


def test_a_profile(
    s3_server: Server, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials"
    file.write_text(
        f"[camera]\naws_access_key_id = {s3_server.access_key}\n"
        f"aws_secret_access_key = {s3_server.secret_key}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    where = StoreSettings(endpoint_url=s3_server.endpoint_url, region="us-east-1", profile="camera")
    store = open_store(f"s3://{s3_bucket}", where)
    store.put_new("k", b"x")
    assert store.get("k") == b"x"
    other = open_store(f"s3://{s3_bucket}", StoreSettings(profile="nobody"))
    _fails(other, ForbiddenByStore, "no_credentials")


def test_a_right_that_is_missing(real_s3: Gateway, s3_bucket: str) -> None:
    client = boto_client(real_s3.endpoint_url, real_s3.access_key, real_s3.secret_key)
    client.put_bucket_policy(
        Bucket=s3_bucket,
        Policy='{"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*",'
        f'"Action": "s3:PutObject", "Resource": "arn:aws:s3:::{s3_bucket}/*"}}]}}',
    )
    with pytest.raises(ForbiddenByStore, match="AccessDenied") as caught:
        open_store(f"s3://{s3_bucket}").put_new("k", b"x")
    assert caught.value.kind == "access_denied" and caught.value.advice


def test_nobody_listens(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        said = _fails(open_store(f"s3://{s3_bucket}"), StoreError, "unreachable")
    assert f"tried {storage_base.ATTEMPTS} times" in said and "endpoint_url" in said


def test_an_endpoint_that_is_no_url(s3_bucket: str) -> None:
    _fails(open_store(f"s3://{s3_bucket}", StoreSettings(endpoint_url="nonsense")), UsageError,
           "bad_request")  # fmt: skip


def test_requester_pays(s3_proxy: FaultProxy, s3_bucket: str) -> None:
    store = open_store(f"s3://{s3_bucket}", StoreSettings(requester_pays=True))
    assert list(store.list()) == []
    assert s3_proxy.headers[-1]["x-amz-request-payer"] == "requester"


# S3: faults on the way ------------------------------------------------------------------------


@pytest.fixture
def through(s3_proxy: FaultProxy, s3_bucket: str) -> Store:
    """A store behind the proxy."""
    return open_store(f"s3://{s3_bucket}/p")


@pytest.mark.parametrize("action", ["slow_down", "internal_error", "reset", "conflict", "cut"])
def test_a_passing_fault_is_waited_out(
    through: Store, s3_proxy: FaultProxy, action: Action
) -> None:
    if action != "cut":
        s3_proxy.faults = [Fault(action, "PUT", times=3)]
    through.put_new("k", b"0123456789", {"a": "b"})
    s3_proxy.faults = [Fault(action, "GET", times=3)]
    assert through.get("k") == b"0123456789"
    s3_proxy.faults = [Fault(action, "GET", times=3)]
    assert through.read_at("k", 2, 5) == b"23456"
    s3_proxy.faults = [Fault(action, "GET", times=3)]
    assert list(through.list_keys()) == ["k"]
    s3_proxy.faults = [Fault(action, "HEAD", times=0 if action == "cut" else 3)]
    assert through.metadata("k") == {"a": "b"}


@pytest.mark.parametrize(
    ("action", "kind"),
    [("slow_down", "busy"), ("internal_error", "server_error"), ("reset", "reset"),
     ("conflict", "conflict")],
)  # fmt: skip
def test_a_lasting_fault_ends(
    through: Store, s3_proxy: FaultProxy, action: Action, kind: str
) -> None:
    s3_proxy.faults = [Fault(action, "PUT", times=1000)]
    with pytest.raises(StoreError, match=f"tried {storage_base.ATTEMPTS} times") as caught:
        through.put_new("k", b"x")
    assert caught.value.kind == kind and caught.value.retryable
    twice = 2 if action == "reset" else 1  # that is aiohttp's own; s3fs and botocore add nothing
    assert len(s3_proxy.seen) == twice * storage_base.ATTEMPTS
    assert through.head("k") is None


def test_an_answer_that_was_lost(through: Store, s3_proxy: FaultProxy) -> None:
    """The PUT is done, its answer lost: sent again it meets its own object."""
    s3_proxy.faults = [Fault("lost", "PUT")]
    with pytest.raises(ExistsInStore):
        through.put_new("k", b"mine")
    assert through.get("k") == b"mine"


def test_a_silent_server(
    through: Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    _impatient(monkeypatch, 0.2)
    s3_proxy.faults = [Fault("hang", "PUT"), Fault("hang", "GET")]
    through.put_new("k", b"x")
    assert through.get("k") == b"x"
    s3_proxy.faults = [Fault("hang", "GET", times=1000)]
    with pytest.raises(StoreError, match="did not answer in time") as caught:
        through.get("k")
    assert caught.value.kind == "timeout"


def test_a_short_body_is_never_the_end(through: Store, s3_proxy: FaultProxy) -> None:
    through.put_new("k", b"0123456789")
    s3_proxy.faults = [Fault("short", "GET", times=2)]
    assert through.read_at("k", 2, 6) == b"234567"
    s3_proxy.faults = [Fault("short", "GET", times=1000)]
    with pytest.raises(StoreError, match="sent 3 of 6 bytes") as caught:
        through.read_at("k", 2, 6)
    assert caught.value.kind == "short_body"


def test_a_server_that_ignores_range(through: Store, s3_proxy: FaultProxy) -> None:
    through.put_new("k", b"0123456789")
    s3_proxy.faults = [Fault("whole", "GET", times=1000)]
    for offset, length in [(2, 5), (0, 5), (9, 1)]:
        with pytest.raises(StoreError, match="ignores Range") as caught:
            through.read_at("k", offset, length)
        assert caught.value.kind == "no_range"
    assert through.read_at("k", 0, 10) == b"0123456789", "all of it is what was asked for"


def test_a_server_that_ignores_if_match(through: Store, s3_proxy: FaultProxy) -> None:
    through.put_new("k", b"0123456789")
    s3_proxy.faults = [Fault("unconditional", "GET", times=1000)]
    with pytest.raises(SourceChanged):
        through.read_at("k", 2, 5, version="0" * 32)


def test_a_store_without_create_only_is_refused(through: Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = [Fault("unconditional", "PUT", times=1000)]
    with pytest.raises(RefusedError, match="second PUT") as caught:
        probe_create_only(through)
    assert through.uri in str(caught.value) and caught.value.exit_code == 2


def test_a_store_that_loses_races_is_refused(through: Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = [Fault("unconditional", "PUT", "-race-", times=1000)]
    with pytest.raises(RefusedError, match="16 of 16 writers"):
        probe_create_only(through)


def test_the_probe_withstands_lost_answers(through: Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults = [Fault("lost", "PUT", "-race-", times=8), Fault("lost", "PUT", "-twice")]
    assert probe_create_only(through)["create_only"] is True


def test_put_is_one_request_with_its_condition(through: Store, s3_proxy: FaultProxy) -> None:
    through.put_new("k", b"x" * 6 * MiB, {"task": "t"})
    assert [(m, s) for m, _, s in s3_proxy.seen] == [("PUT", 200)]
    sent = s3_proxy.headers[-1]
    assert sent["if-none-match"] == "*" and sent["content-md5"] and sent["x-amz-meta-task"] == "t"


def test_a_page_at_a_time(
    through: Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "PAGE_KEYS", 2)
    for i in range(5):
        through.put_new(f"k{i}", b"")
    keys = through.list_keys()
    s3_proxy.seen.clear()
    assert [next(keys), next(keys)] == ["k0", "k1"]
    assert len(s3_proxy.seen) == 1
    s3_proxy.faults = [Fault("slow_down", "GET", times=2)]
    assert list(keys) == ["k2", "k3", "k4"]


# S3: the server dies --------------------------------------------------------------------------


def test_a_gateway_that_is_killed_and_comes_back(
    durable_s3: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything acknowledged is there, whole and once; writers go on by themselves."""
    use_server(monkeypatch, durable_s3)
    monkeypatch.setattr(storage_base, "BACKOFF_S", PATIENCE_S)
    store = open_store(f"s3://{make_bucket(durable_s3)}")
    known: dict[str, bytes] = {}
    failures: list[VidbatchError] = []
    stop = threading.Event()

    def write(writer: int) -> None:
        i = 0
        while not stop.is_set() or i < 3:
            key, data = f"{writer}/{i:04}", random.Random(f"{writer}.{i}").randbytes(300_000)
            try:
                store.put_new(key, data)
            except ExistsInStore:
                pass  # the answer was lost with the gateway
            except VidbatchError as error:
                failures.append(error)
                return
            known[key] = data
            i += 1

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        stop.wait(0.15)
        durable_s3.kill_gateway()
        durable_s3.start_gateway()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(known) == list(store.list_keys())
    assert all(store.get(key) == data for key, data in known.items())


def test_a_paused_gateway(durable_s3: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    use_server(monkeypatch, durable_s3)
    _impatient(monkeypatch, 0.3)
    store = open_store(f"s3://{make_bucket(durable_s3)}", StoreSettings(region="us-east-1"))
    store.put_new("a", b"x")
    durable_s3.pause_gateway(True)
    threading.Timer(0.5, durable_s3.pause_gateway, [False]).start()
    assert store.get("a") == b"x"


# local disk -----------------------------------------------------------------------------------


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


# reading ahead --------------------------------------------------------------------------------


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
    for name in ("PAGE_BYTES", "HELD_BYTES", "AHEAD_BYTES", "GAP_BYTES"):
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
    assert max(n for _, n in counting.reads) == 8 * M


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
    for at in range(40 * M + 5, 0, -5 * M):
        assert source.read_at(at, 1000) == data[at : at + 1000]
    assert [n for _, n in counting.reads] == [M] * 9


def test_the_sizes_of_gets() -> None:
    page_bytes = storage_source.PAGE_BYTES
    assert page_bytes == 256 * 1024
    assert page_bytes * storage_source.FIRST_PAGES == MiB
    assert page_bytes * storage_source.RUN_PAGES == 8 * MiB


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
    assert counting.most_busy == 8
    assert len(counting.reads) == 20


def test_where_much_is_wanted_all_of_the_span_is(counting: Counting) -> None:
    source, data = _open(counting, 40 * M)
    source.want([(10 * M + i * 3 * M, 11 * M + i * 3 * M) for i in range(8)])
    for i in range(8):
        at = 10 * M + i * 3 * M
        assert source.read_at(at, M) == data[at : at + M]
    assert source.bytes_read == 22 * M
    assert len(counting.reads) == 3


def test_what_is_held_is_bounded(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_source, "HELD_BYTES", 4 * M)
    monkeypatch.setattr(storage_source, "AHEAD_BYTES", 2 * M)
    monkeypatch.setattr(storage_source, "RUN_PAGES", 4)
    source, data = _open(counting, 20 * M)
    assert source.read_at(0, 20 * M) == data
    before = len(counting.reads)
    assert source.read_at(17 * M, M) == data[17 * M : 18 * M]
    assert len(counting.reads) == before, "the last are held"
    assert source.read_at(0, 10) == data[:10]
    assert len(counting.reads) == before + 1, "the first are forgotten"


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
        for name, value in {"PAGE_BYTES": 16, "FIRST_PAGES": 2, "RUN_PAGES": 8, "GAP_BYTES": 20,
                            "HELD_BYTES": 320, "AHEAD_BYTES": 160}.items():  # fmt: skip
            patch.setattr(storage_source, name, value)
        store = Counting(f"memory://any-{uuid.uuid4().hex}", StoreSettings())
        source, data = _open(store, size)
        ends = sorted(set(wanted))
        source.want(list(zip(ends[::2], ends[1::2], strict=False)))
        for offset, length in reads:
            assert source.read_at(offset, length) == data[offset : offset + length]
        source.close()
        assert all(n >= 16 or at + n == size for at, n in store.reads)
