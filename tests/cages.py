"""A sandbox whose child runs the decoders of tests/hostile.py, and what tests ask of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vidbatch.data import (
    Clip,
    ClipEnd,
    DecodeEvent,
    DecodeLimits,
    Frames,
    Geometry,
    Sample,
    Video,
    VideoInfo,
)
from vidbatch.sandbox import Sandbox

SMALL = (Geometry(width_px=16, height_px=12), Geometry(width_px=7, height_px=5, fit="crop"))
ALL = Sample(kind="all")
NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Cage(Sandbox):
    """A sandbox whose child runs the misbehaving decoders of tests/hostile.py."""

    MODULES = ("tests.hostile", "tests.hostile")


class Bytes:
    """A ByteSource over bytes in memory; `fail_at` makes the n-th read raise `error`."""

    def __init__(self, data: bytes, fail_at: int = -1, error: Exception | None = None) -> None:
        self.data, self.size_bytes = data, len(data)
        self.fail_at, self.error = fail_at, error
        self.reads: list[tuple[int, int]] = []
        self.wanted: list[list[tuple[int, int]]] = []

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        if self.error is not None and len(self.reads) > self.fail_at:
            raise self.error
        return self.data[offset : offset + length]

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        self.wanted.append(list(extents))


def make_clip(uri: str) -> Clip:
    """All of a video of that name."""
    video = Video(
        uri=uri,
        version="1",
        size_bytes=1,
        modified_at=NOW,
        listed_at=NOW,
        captured_at=None,
        captured_from="modified",
        dt="2026-01-02",
        source="",
    )
    return Clip(video=video)


def play(
    sandbox: Sandbox,
    deed: str,
    source: Bytes | None = None,
    geometries: tuple[Geometry, ...] = SMALL,
    **limits: int,
) -> Iterator[DecodeEvent]:
    """Lets a deed of tests/hostile.py happen."""
    return sandbox.decode(
        source or Bytes(b"\0" * 50_000),
        make_clip(f"s3://bucket/{deed}"),
        sample=ALL,
        geometries=geometries,
        context=True,
        limits=DecodeLimits(**limits),
    )


def assert_works(sandbox: Sandbox) -> None:
    """The next clip is decoded as if nothing had happened."""
    began_s = time.monotonic()
    assert [type(e) for e in play(sandbox, "frames-1")] == [VideoInfo, Frames, ClipEnd]
    print(f"the next clip took {time.monotonic() - began_s:.3f} s")


def assert_equal(ours: Frames, theirs: Frames) -> None:
    """Every column and every pixel, types included."""
    for column in fields(Frames):
        a, b = getattr(ours, column.name), getattr(theirs, column.name)
        if column.name in ("context", "halo"):
            assert a == b
        elif column.name == "pixels":
            assert a.keys() == b.keys()
            for key in b:
                np.testing.assert_array_equal(a[key], b[key])
                assert a[key].dtype == np.uint8 and a[key].flags.c_contiguous
        else:
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype, column.name


def wait_gone(pid: int) -> None:
    """Waits until there is no such process; the test's time limit is the bound."""
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
