"""What a plain decode gives, and what rows a rule takes of it: written apart from the product."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Container
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np

from vidbatch.data import Sample


def hash_planes(frame: Any) -> bytes:
    """48 bytes that stand for format, size and every sample of a decoded frame."""
    digest = hashlib.blake2b(f"{frame.format.name} {frame.width}".encode(), digest_size=48)
    row_bytes = [0] * len(frame.planes)
    for part in frame.format.components:
        row_bytes[part.plane] += part.width * -(-part.bits // 8)
    for plane, wanted in zip(frame.planes, row_bytes, strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        digest.update(np.ascontiguousarray(rows[:, : wanted or plane.line_size]))
    return digest.digest()


@dataclass(frozen=True)
class PlainFrame:
    """One frame that came out."""

    pts: int | None
    planes: bytes


@dataclass(frozen=True)
class Plain:
    """A whole video, decoded from the first packet to the last by one thread."""

    frames: list[PlainFrame]
    errors: int
    time_base: Fraction
    rate: Fraction

    @property
    def joints(self) -> int:
        """How often pts step back by more than a second."""
        pts = [frame.pts for frame in self.frames if frame.pts is not None]
        return sum((a - b) * self.time_base > 1 for a, b in pairwise(pts))

    @property
    def times(self) -> list[Fraction]:
        """Seconds from frame 0. They never fall: a step back of more than a second moves the clock
        on by one frame, a smaller one holds it; a missing pts counts frames."""
        times: list[Fraction] = []
        origin: Fraction | None = None
        latest, step = Fraction(0), 1 / self.rate
        for i, frame in enumerate(self.frames):
            if frame.pts is None:
                time = i / self.rate
            else:
                if origin is None:
                    origin = frame.pts * self.time_base - i / self.rate
                time = frame.pts * self.time_base - origin
                if time < latest - 1:
                    origin += time - latest - step
                    time = latest + step
            if time > latest:
                step, latest = time - latest, time
            times.append(latest)
        return times

    def rows(self, sample: Sample) -> list[int]:
        """frame_index of the rows: for each target the last frame that is not after it."""
        if sample.kind != "fps" or sample.fps is None:
            return list(range(0, len(self.frames), sample.every or 1))
        times, rows, i = self.times, list[int](), 0
        if times[-1] > 3600:
            # A gap: only targets near frames can name another frame than the one before.
            near = {math.floor(t * sample.fps) + d for t in times for d in (0, 1)}
            targets = sorted(k for k in near if k <= sample.fps * times[-1])
        else:
            targets = list(range(math.floor(sample.fps * times[-1]) + 1))
        for k in targets:
            while i + 1 < len(times) and times[i + 1] * sample.fps <= k:
                i += 1
            if not rows or rows[-1] != i:
                rows.append(i)
        return rows


def decode_plainly(data: bytes, keep: Container[int] | None = None) -> Plain:
    """Demux, decode, next: nothing else; `keep` says of which frames the planes are wanted."""
    frames: list[PlainFrame] = []
    errors = 0
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        stream: Any = next(
            s
            for s in container.streams.video
            if not s.disposition & av.stream.Disposition.attached_pic
        )
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        rate = Fraction(stream.average_rate or 25)
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except (IndexError, av.FFmpegError) as error:
                # PyAV raises IndexError at the end where a stream turned up after opening.
                errors += not isinstance(error, IndexError)
                break
            if packet is None:
                break
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                errors += 1
                continue
            for frame in decoded:
                wanted = keep is None or len(frames) in keep
                frames.append(PlainFrame(frame.pts, hash_planes(frame) if wanted else b""))
        return Plain(frames, errors, Fraction(stream.time_base), rate)
