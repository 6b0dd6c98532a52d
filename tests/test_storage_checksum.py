"""Whether bytes are those that were stored: a bit that changed on the way is found."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.s3_faults import Fault, FaultProxy
from vidbatch.errors import StoreError
from vidbatch.storage import checksum, open_store
from vidbatch.storage.checksum import is_damaged


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_is_md5", {})
    monkeypatch.setattr(checksum, "_seen_other", set())


def answer(data: bytes, **facts: Any) -> dict[str, Any]:
    return {"ETag": f'"{hashlib.md5(data).hexdigest()}"', **facts}


def test_a_flipped_bit() -> None:
    said = answer(b"whole")
    assert not is_damaged("b", b"whole", said)
    assert is_damaged("b", b"whore", said) and is_damaged("b", b"whale", said)
    assert not is_damaged("b", b"whole", said)


@pytest.mark.parametrize(
    "said",
    [
        {"ETag": f'"{"0" * 32}-3"'},  # put in three parts
        answer(b"other", ServerSideEncryption="aws:kms"),
        {"ETag": '"W/weak"'},
    ],
)
def test_etags_that_are_no_md5(said: dict[str, Any]) -> None:
    assert not is_damaged("b", b"whole", said)


def test_a_store_whose_etags_only_look_like_md5() -> None:
    """It costs one read more, once: the bytes come again as they came."""
    assert is_damaged("b", b"one", answer(b"x"))
    assert not is_damaged("b", b"one", answer(b"x"))
    assert not is_damaged("b", b"two", answer(b"y")), "known by now"
    assert is_damaged("c", b"two", answer(b"y")), "of another bucket nothing is known"


def test_one_object_that_lies_differs_from_a_store_that_does() -> None:
    """Damaged where it lies: nothing cures that, but the bucket's others are still looked at."""
    assert not is_damaged("b", b"whole", answer(b"whole"))
    assert is_damaged("b", b"one", answer(b"x"))
    assert not is_damaged("b", b"one", answer(b"x"))
    assert is_damaged("b", b"two", answer(b"y"))


def test_on_the_way(s3_proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidbatch.storage.base.BACKOFF_S", 0.001)
    store = open_store(f"s3://{s3_bucket}")
    s3_proxy.faults = [Fault("flip_sent", "PUT", times=2)]
    store.put_new("k", b"0123456789")
    s3_proxy.faults = [Fault("flip", "GET", times=1)]
    assert store.get("k") == b"0123456789"
    s3_proxy.faults = [Fault("flip", "GET", times=1)]
    assert store.read_at("k", 0, 100) == b"0123456789"
    s3_proxy.faults = []
    assert store.read_at("k", 2, 3) == b"234", "of a part nothing tells"


def test_credentials_that_are_renewed(
    s3_proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The chain is read again when the store says that they have expired."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))

    def renew(key: str) -> None:
        path.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key=x\n")
        s3_proxy.valid_key = key

    renew("AKIA1")
    store = open_store(f"s3://{s3_bucket}")
    store.put_new("k", b"x")
    for key in ("AKIA2", "AKIA3"):
        renew(key)
        assert store.get("k") == b"x"
    assert s3_proxy.happened["expired"] == 2
    monkeypatch.setattr("vidbatch.storage.base.BACKOFF_S", 0.001)
    monkeypatch.setattr("vidbatch.storage.base.ATTEMPTS", 3)
    s3_proxy.valid_key = "AKIA4"
    with pytest.raises(StoreError, match="have expired") as caught:
        store.get("k")
    assert caught.value.kind == "expired"
