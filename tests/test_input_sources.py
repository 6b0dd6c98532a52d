"""Inputs that are no files but stores, keys and readers: 13, 14 and 76 to 83 of the catalogue.

One job over an archive in a real S3 server, through a proxy that injects the faults. What a store
does to one object is a row for that object: of stage `read`, retryable where it may pass.
"""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bad_inputs import late, mp4
from tests.outputs import read_tables
from tests.s3 import boto_client
from tests.s3_faults import Action, Fault, FaultProxy
from tests.test_inputs import rows_of
from tests.test_run import make_job
from vidbatch.data import DecodeLimits
from vidbatch.errors import NotFoundInStore, StoreError
from vidbatch.media import BytesSource, SourceReader
from vidbatch.pipeline.run import run_job
from vidbatch.sandbox import Sandbox
from vidbatch.storage import Source, open_source, open_store


def wide() -> bytes:
    """10 MiB: a video whose header lies far behind its media, so that one GET is not enough."""
    data = late()
    at = data.index(b"moov") - 4
    return data[:at] + struct.pack(">I4s", 10 * 2**20, b"free") + bytes(10 * 2**20 - 8) + data[at:]


@dataclass(frozen=True)
class Case:
    """An object, what its store does, and what it comes to."""

    data: Callable[[], bytes]
    action: Action | None = None
    times: int = 1000
    stage: str | None = None
    kind: str | None = None
    retryable: bool = True


CASES: dict[str, Case] = {
    "13a body short once": Case(mp4, "short", 1),
    "13b body always short": Case(mp4, "short", stage="read", kind="short_body"),
    "14a reset twice": Case(mp4, "reset", 2),
    "14b always reset": Case(mp4, "reset", stage="read", kind="reset"),
    # a decoder never waits for a store: reads are its parent's, and have their own time limit
    "77a silent once": Case(mp4, "hang", 1),
    "77b always silent": Case(mp4, "hang", stage="read", kind="timeout"),
    # no crash to contain: a body of the wrong length never reaches the decoder
    "78a body too long once": Case(mp4, "long", 1),
    "78b body always too long": Case(mp4, "long", stage="read", kind="short_body"),
    "79 replaced in mid-read": Case(wide, stage="read", kind="source_changed", retryable=False),
    "80a deleted": Case(mp4, stage="read", kind="not_found", retryable=False),
    "80b forbidden": Case(mp4, "forbidden", stage="read", kind="access_denied"),
    "80c in an archive tier": Case(mp4, "archived", stage="read", kind="archived_object"),
    "81a range ignored, all in one": Case(mp4, "whole"),
    "81b range ignored": Case(wide, "whole", stage="read", kind="no_range"),
    "82 endless": Case(mp4, "endless", stage="read", kind="no_length"),
    "83a called gzip": Case(mp4),
    "83b is gzip": Case(lambda: gzip.compress(mp4()), stage="decode", kind="not_media",
                        retryable=False),
    "sound": Case(mp4),
}  # fmt: skip


@dataclass
class Ran:
    """What the job left of each object."""

    outcomes: dict[str, dict[str, Any]]
    frames: dict[str, int]


class Meddling:
    """A source whose object is changed under it after its first read."""

    def __init__(self, source: Source, meddle: Callable[[], None]) -> None:
        self._source, self._meddle = source, meddle
        self.size_bytes = source.size_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read_at(self, offset: int, length: int) -> bytes:
        data = self._source.read_at(offset, length)
        self._meddle()
        return data


@pytest.mark.s3
def test_what_stores_do_is_told_apart(
    s3_proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidbatch.storage.base.BACKOFF_S", 0.001)
    monkeypatch.setattr("vidbatch.storage.base.ATTEMPTS", 4)
    monkeypatch.setattr("vidbatch.storage.s3_connection.READ_TIMEOUT_S", 0.5)
    server = s3_proxy.server
    client = boto_client(server.endpoint_url, server.access_key, server.secret_key)
    for name, case in CASES.items():
        gzipped = {"ContentEncoding": "gzip"} if name.startswith("83") else {}
        client.put_object(Bucket=s3_bucket, Key=f"in/{name}.mp4", Body=case.data(), **gzipped)
    s3_proxy.faults = [
        Fault(case.action, "GET", f"in/{name[:3].strip()}", case.times)
        for name, case in CASES.items()
        if case.action
    ]

    def open_and_meddle(store: Any, uri: str, **pins: Any) -> Any:
        source = open_source(store, uri, **pins)
        key = uri.partition(f"{s3_bucket}/")[2]
        if "80a" in uri:
            client.delete_object(Bucket=s3_bucket, Key=key)
        if "79" in uri:
            return Meddling(
                source, lambda: client.put_object(Bucket=s3_bucket, Key=key, Body=wide() + b"\0")
            )
        return source

    monkeypatch.setattr("vidbatch.pipeline.reading.open_source", open_and_meddle)
    output = str(tmp_path / "tables")
    job = make_job(
        f"s3://{s3_bucket}/in",
        output,
        archive={"uri": f"s3://{s3_bucket}/in"},
        sample={"fps": 5},
        limits={"isolate": True, "max_failed_share": 1},
    )
    assert run_job(job).exit_code == 0
    tables = read_tables(open_store(output))
    outcomes = {Path(r["uri"]).stem: r for r in rows_of(tables, "coverage")}
    for row in rows_of(tables, "failures"):
        outcomes[Path(row["uri"]).stem].update(row)
    assert outcomes.keys() == CASES.keys()
    for name, case in CASES.items():
        row = outcomes[name]
        status = "failed" if case.kind else "ok"
        assert row["status"] == status, f"{name}: {row['reason']}"
        assert row["frames"] == (0 if case.kind else 12), name
        if case.kind:
            assert (row["stage"], row["kind"]) == (case.stage, case.kind), name
            assert row["retryable"] == case.retryable, name
    assert s3_proxy.streamed_bytes < 64 * 2**20


class Reader(BytesSource):
    """Gives `more` bytes than it is asked for, or fewer, from the second read on."""

    def __init__(self, more: int) -> None:
        super().__init__(mp4())
        self.more = more
        self.reads = 0

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads += 1
        data = super().read_at(offset, length)
        if self.reads > 1:
            data = data + bytes(self.more) if self.more > 0 else data[: len(data) + self.more]
        return data


@pytest.mark.parametrize("more", [4_000_000, -1, -(2**30)])
def test_a_reader_of_wrong_lengths_is_no_end_of_file_and_no_crash(more: int) -> None:
    """Inputs 13 and 78: PyAV copies whatever a reader returns, past the end of its buffer."""
    with Sandbox() as sandbox:
        with pytest.raises(StoreError) as caught:
            sandbox.probe(Reader(more), limits=DecodeLimits(), length_s=1)
        assert caught.value.kind == "short_body"
        assert sandbox.probe(Reader(0), limits=DecodeLimits(), length_s=1)[0].frame_count == 60
        assert sandbox.restarts == 0
    plain = SourceReader(Reader(more))
    assert len(plain.read(100)) == 100
    if more > 0:
        assert len(plain.read(100)) == 100
        return
    with pytest.raises(StoreError, match="short read") as caught:
        plain.read(100)
    assert caught.value.kind == "short_read"


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """Input 76: a FIFO without a writer would be waited for for ever."""
    folder = tmp_path / "in"
    (folder / "folder.mp4").mkdir(parents=True)
    os.mkfifo(folder / "fifo.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "gone.mp4").symlink_to("nowhere")
    (folder / "up.mp4").symlink_to("../in")
    (folder / "sound.mp4").write_bytes(mp4())
    done = run_job(make_job(folder, str(tmp_path / "tables"), archive={"uri": str(folder)}))
    assert done.exit_code == 0 and done.summary["counts"]["videos"] == 1
    assert done.summary["listing"]["left_out"] == {
        "not_regular": 2, "broken_link": 1, "link_loop": 1
    }  # fmt: skip
    store = open_store(str(folder))
    for name in ("fifo.mp4", "zero.mp4", "folder.mp4"):
        with pytest.raises(NotFoundInStore, match="is not a file"):
            open_source(store, f"{folder}/{name}", size_bytes=10, version=None)
    with pytest.raises(ValueError, match="not a key"):
        open_source(store, f"{folder}/../x.mp4", size_bytes=10, version=None)
