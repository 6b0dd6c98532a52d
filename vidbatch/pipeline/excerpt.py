"""The first items of a video as one model gets them, for looking at a model outside of a run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vidbatch.audio import decode_audio
from vidbatch.data import (
    Audio,
    Chunk,
    Clip,
    DecodeLimits,
    Frames,
    ModelSpec,
    Sample,
    Video,
    VideoInfo,
    Windows,
)
from vidbatch.decode import decode_clip
from vidbatch.errors import UsageError
from vidbatch.media import BytesSource


def first_items(spec: ModelSpec, path: Path, n: int, *, every: int = 5) -> Chunk:
    """Up to n frames (each `every`-th), windows of them, or windows of sound of a local file.

    Raises:
        UsageError: there is no such file, or nothing in it for the model.
        MediaError: it cannot be decoded.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such video file")
    data = path.read_bytes()
    now = datetime.now(UTC)
    clip = Clip(
        video=Video(
            uri=str(path.absolute()), version="", size_bytes=len(data), modified_at=now,
            listed_at=now, captured_at=None, captured_from="modified", dt=f"{now:%Y-%m-%d}",
            source="",
        )
    )  # fmt: skip
    if spec.audio is not None:
        return _sound(spec, data, clip, n, path)
    assert spec.geometry is not None
    span = spec.window.span if spec.window else 1
    step = min(spec.window.step, 4) if spec.window else 1
    wanted = span + (n - 1) * step
    parts: list[Frames] = []
    for event in decode_clip(
        BytesSource(data), clip, sample=Sample(kind="every", every=every),
        geometries=[spec.geometry], context=False, limits=DecodeLimits(),
    ):  # fmt: skip
        if isinstance(event, Frames):
            parts.append(event)
            if sum(len(part) for part in parts) >= wanted:
                break
    got = sum(len(part) for part in parts)
    if got < span:
        raise UsageError(f"{path}: {got} sampled frames, an item takes {span}; take a longer one")
    frames = Frames.join(parts).cut(min(got, wanted))
    if spec.window is None:
        return frames
    starts = np.arange(0, len(frames) - span + 1, step, dtype=np.int64)
    offsets = np.arange(spec.window.frames, dtype=np.int64) * spec.window.stride
    return Windows(frames=frames, items=starts[:, None] + offsets)


def _sound(spec: ModelSpec, data: bytes, clip: Clip, n: int, path: Path) -> Audio:
    assert spec.audio is not None
    start_s = 0.0
    for event in decode_clip(
        BytesSource(data), clip, sample=Sample(kind="every", every=1_000_000),
        geometries=[], context=False, limits=DecodeLimits(),
    ):  # fmt: skip
        if isinstance(event, VideoInfo):
            start_s = event.start_s or 0.0
            break
    heard = decode_audio(
        BytesSource(data), clip, grids=[spec.audio], start_s=start_s, limits=DecodeLimits()
    )
    parts = [event for event in heard if isinstance(event, Audio)]
    if not parts:
        raise UsageError(f"{path}: has no sound; take a video that has")
    return Audio(
        grid=spec.audio,
        keys=np.concatenate([part.keys for part in parts])[:n],
        samples=np.concatenate([part.samples for part in parts])[:n],
    )
