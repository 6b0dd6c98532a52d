"""Runs decode_clip and, written apart from it, what its rows have to be."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from tests.clips import read_number
from vidbatch.data import (
    ByteSource,
    Clip,
    ClipEnd,
    ClipRange,
    DecodeLimits,
    Frames,
    Geometry,
    Pixels,
    Sample,
    Video,
    VideoInfo,
    chunk_rows,
)
from vidbatch.decode import decode_clip
from vidbatch.media import BytesSource

SMALL = Geometry(width_px=32, height_px=32)
ALL = Sample(kind="all")


def fps(rate: str | int, tolerance_s: str | int = 0) -> Sample:
    """The fps rule of texts as they stand in a job file."""
    return Sample(kind="fps", fps=Fraction(rate), tolerance_s=Fraction(tolerance_s))


def make_video(data: bytes) -> Video:
    """A Video whose version is its content."""
    now = datetime(2026, 3, 1, tzinfo=UTC)
    return Video(
        uri="s3://archive/clip",
        version=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        modified_at=now,
        listed_at=now,
        captured_at=None,
        captured_from="modified",
        dt="2026-03-01",
        source="",
    )


def to_clip(data: bytes, part: ClipRange) -> Clip:
    """The clip of a planned range."""
    names = ("first_keyframe", "end_keyframe", "start_s", "end_s", "start_frame", "end_frame")
    return Clip(video=make_video(data), **{name: getattr(part, name) for name in names})


@dataclass(frozen=True, slots=True)
class Row:
    """One row as plain values; equal rows are equal in every value and pixel."""

    index: int
    pts: int | None
    time_s: float
    covers_s: float
    key: bool
    corrupt: bool
    pixels: bytes


@dataclass(frozen=True)
class Decoded:
    """All that one decode gave."""

    info: VideoInfo
    chunks: list[Frames]
    end: ClipEnd
    rows: list[Row]

    @property
    def index(self) -> list[int]:
        """frame_index of the rows."""
        return [row.index for row in self.rows]

    @property
    def marks(self) -> list[tuple[int, int | None]]:
        """(frame_index, pts) of the rows."""
        return [(row.index, row.pts) for row in self.rows]

    def numbers(self, geometry: Geometry = SMALL) -> list[int]:
        """What the pictures of the rows say they are."""
        return [read_number(p) for c in self.chunks for p in c.pixels[geometry.key][chunk_rows(c)]]


def decode(
    data: bytes,
    sample: Sample,
    *,
    part: ClipRange | None = None,
    geometries: Sequence[Geometry] = (SMALL,),
    context: bool = False,
    source: ByteSource | None = None,
    **limits: int,
) -> Decoded:
    """Decodes a video or a part of it; checks the order of what is yielded."""
    clip = to_clip(data, part) if part else Clip(video=make_video(data))
    events = list(
        decode_clip(
            source or BytesSource(data),
            clip,
            sample=sample,
            geometries=geometries,
            context=context,
            limits=DecodeLimits(**limits),
        )
    )
    info, *chunks, end = events
    assert isinstance(info, VideoInfo) and isinstance(end, ClipEnd)
    frames = [c for c in chunks if isinstance(c, Frames)]
    assert len(frames) == len(chunks) and all(c.num_rows for c in frames)
    rows = [row for chunk in frames for row in _rows(chunk)]
    assert [r.index for r in rows] == sorted({r.index for r in rows})
    return Decoded(info, frames, end, rows)


def _rows(chunk: Frames) -> list[Row]:
    return [
        Row(
            int(chunk.frame_index[i]),
            int(chunk.pts[i]) if chunk.has_pts[i] else None,
            float(chunk.time_s[i]),
            float(chunk.covers_s[i]),
            bool(chunk.is_keyframe[i]),
            bool(chunk.is_corrupt[i]),
            b"".join(a[i].tobytes() for a in chunk.pixels.values()),
        )
        for i in range(*chunk_rows(chunk).indices(len(chunk)))
    ]


@dataclass(frozen=True)
class Reference:
    """A plain one-thread sequential decode with PyAV."""

    pts: list[int | None]
    errors: int
    time_base: Fraction
    pixels: dict[int, Pixels]

    @property
    def rises(self) -> bool:
        """Whether all pts are there and never fall."""
        pts = [p for p in self.pts if p is not None]
        return len(pts) == len(self.pts) and pts == sorted(pts)

    def fps_rows(self, rate: Fraction) -> list[int]:
        """The fps rule as it is written: for each target the last frame not after it."""
        first = self.pts[0]
        times = [((p or 0) - (first or 0)) * self.time_base for p in self.pts]
        rows, i = set[int](), 0
        for k in range(math.floor(rate * times[-1]) + 1):
            while i + 1 < len(times) and times[i + 1] * rate <= k:
                i += 1
            rows.add(i)
        return sorted(rows)


def decode_plainly(data: bytes, keep: Callable[[int], bool] = lambda i: True) -> Reference:
    """The reference; `keep` says of which frames the 32x32 pixels are wanted."""
    scaler = VideoReformatter()
    flags = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    pts: list[int | None] = []
    pixels: dict[int, Pixels] = {}
    errors = 0
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                errors += 1
                continue
            for frame in frames:
                if keep(len(pts)):
                    small = scaler.reformat(
                        frame, 32, 32, "rgb24", interpolation=flags, threads=1
                    ).to_ndarray()
                    turns = round(frame.rotation / 90) if abs(frame.rotation) <= 180 else 0
                    pixels[len(pts)] = np.ascontiguousarray(np.rot90(small, turns))
                pts.append(frame.pts)
        return Reference(pts, errors, Fraction(stream.time_base), pixels)
