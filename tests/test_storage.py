"""What is particular to S3: errors of the surroundings, faults on the way, a server that dies."""

from __future__ import annotations

import random
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

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
from vidbatch.storage import Store, StoreSettings, open_store, probe_create_only, s3_connection
from vidbatch.storage import base as storage_base
from vidbatch.storage import s3 as storage_s3

MiB = 2**20
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
    monkeypatch.setattr(s3_connection, "READ_TIMEOUT_S", timeout_s)
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


def test_a_certificate_that_is_not_trusted(s3_server: Server, s3_bucket: str) -> None:
    """Here: TLS spoken to a server that speaks none."""
    where = StoreSettings(endpoint_url=s3_server.endpoint_url.replace("http:", "https:"))
    with pytest.raises(StoreError, match="AWS_CA_BUNDLE") as caught:
        open_store(f"s3://{s3_bucket}", where).get("k")
    assert caught.value.kind == "tls"


@pytest.mark.parametrize("key", ["a/../b", "./x", "a//b", "/lead", "..", "z" * 1000, "\x01"])
def test_keys_that_are_no_paths(real_s3: Gateway, s3_bucket: str, key: str) -> None:
    store = open_store(f"s3://{s3_bucket}/root")
    store.put_new(key, b"x")
    assert store.get(key) == b"x"
    assert list(store.list_keys()) == [key]


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
