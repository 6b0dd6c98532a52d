"""Jobs against a real S3 server: what wrong credentials, faults and a careless store come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.outputs import check_no_key_twice, check_same, outcome_counts, read_tables
from tests.s3 import Gateway
from tests.s3_faults import Fault, FaultProxy
from tests.test_run import make_job, run
from vidbatch.demo import make_archive
from vidbatch.errors import ForbiddenByStore, RefusedError, StoreError
from vidbatch.ledger import Ledger
from vidbatch.storage import open_store
from vidbatch.verify import verify

pytestmark = pytest.mark.s3

ODD_KEYS = (
    "with space.mp4", "ünï code ☃.mp4", "hash#and%25percent.mp4", "-dash.mp4", "question?.mp4",
    "no-suffix", "deep/" + "x" * 250 + ".mp4", "100% done & more=1;2.mp4",
)  # fmt: skip


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """One good drawn video of a second."""
    folder = tmp_path_factory.mktemp("one")
    make_archive(folder, seconds=1)
    return (folder / "cam-01/2026/03/01/080000.mp4").read_bytes()


@pytest.fixture
def archive(s3_bucket: str, video: bytes) -> str:
    uri = f"s3://{s3_bucket}/archive"
    for key in ODD_KEYS:
        open_store(uri).put_new(key, video)
    return uri


def anything(uri: str) -> dict[str, object]:
    return {"uri": uri, "include": ["**"]}


def test_odd_keys_are_videos_like_any_other(archive: str, s3_bucket: str) -> None:
    output = f"s3://{s3_bucket}/tables"
    done = run(make_job(archive, output, archive=anything(archive)))
    assert done.exit_code == 0
    store = open_store(output)
    uris = {r["uri"] for t in read_tables(store)["videos"].values() for r in t.to_pylist()}
    assert uris == {f"{archive}/{key}" for key in ODD_KEYS}
    assert outcome_counts(store)["frames"] == {"ok": len(ODD_KEYS)}


def test_wrong_credentials_are_one_line(
    archive: str, s3_bucket: str, real_s3: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    with pytest.raises(ForbiddenByStore) as caught:
        run(make_job(archive, str(tmp_path / "tables"), archive=anything(archive)))
    assert "\n" not in caught.value.message
    assert "wrongwrong" not in caught.value.message
    assert not (tmp_path / "tables").exists()


def test_a_server_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("vidbatch.storage.base.BACKOFF_S", 0.01)
    rule = {"uri": "s3://bucket/a", "store": {"endpoint_url": "http://127.0.0.1:9"}}
    with pytest.raises(StoreError) as caught:
        run(make_job("", str(tmp_path / "tables"), archive=rule))
    assert "127.0.0.1:9" in caught.value.message or "bucket" in caught.value.message
    assert not (tmp_path / "tables").exists()


def test_a_store_that_ignores_create_only_is_refused(
    archive: str, s3_bucket: str, s3_proxy: FaultProxy
) -> None:
    s3_proxy.faults = [Fault("unconditional", "PUT", times=10_000)]
    output = f"s3://{s3_bucket}/tables"
    with pytest.raises(RefusedError, match="If-None-Match"):
        run(make_job(archive, output, archive=anything(archive)))
    left = list(open_store(output).list_keys(""))
    assert all(key.startswith("_vidbatch/probe/") for key in left)


@pytest.mark.parametrize("action", ["lost", "reset", "conflict", "slow_down", "internal_error"])
def test_faults_of_the_store_change_no_row(
    archive: str, s3_bucket: str, s3_proxy: FaultProxy, action: str, tmp_path: Path
) -> None:
    """Every third PUT and GET of a run meets a fault; the tables are those of a quiet run."""
    want, got = str(tmp_path / "want"), f"s3://{s3_bucket}/tables"
    run(make_job(archive, want, archive=anything(archive)))
    s3_proxy.faults = [
        Fault(action, method, within=within)  # type: ignore[arg-type]
        for within in ("part-", "commits/", "plans/", "deep/", "dash")
        for method in ("PUT", "GET")
        for _ in range(2)
    ]
    done = run(make_job(archive, got, archive=anything(archive)))
    assert done.exit_code == 0
    assert any(not f.times for f in s3_proxy.faults), "no fault was met"
    tables = read_tables(open_store(got))
    check_no_key_twice(tables)
    check_same(tables, read_tables(open_store(want)))
    assert not verify(Ledger(open_store(got))).problems
