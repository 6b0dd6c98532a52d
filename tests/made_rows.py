"""Videos, clips, frames and predictions made up in memory: one frame a second, no media."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from vidbatch.data import (
    BoxRows,
    Clip,
    Frames,
    Geometry,
    LabelRows,
    ModelSpec,
    Outcome,
    Output,
    Predictions,
    Sample,
    Task,
    Video,
    VideoInfo,
    digest,
)
from vidbatch.sampling import sampling_fingerprint
from vidbatch.tables import output_of, sampling_partition

NOW = datetime(2026, 3, 2, 1, 30, tzinfo=UTC)
SAMPLE = Sample(kind="fps", fps=Fraction(1))
SAMPLING = sampling_fingerprint(SAMPLE)
PARTITION = sampling_partition(SAMPLE)
VERSIONS = {"vidbatch": "0.1.0"}


def make_video(name: str = "a", version: str = "v1", dt: str = "2026-03-01") -> Video:
    """One object of camera `cam-1`."""
    return Video(
        uri=f"s3://archive/cam-1/{name}.mp4",
        version=version,
        size_bytes=1000,
        modified_at=NOW - timedelta(days=1),
        listed_at=NOW,
        captured_at=None,
        captured_from="modified",
        dt=dt,
        source="cam-1",
        key_fields='{"lane":"3"}',
    )


def make_clips(video: Video, frames: int, length: int | None = None) -> tuple[Clip, ...]:
    """Clips of `length` frames (every frame a keyframe); None: the whole video as one."""
    if length is None or length >= frames:
        return (Clip(video=video),)
    starts = range(0, frames, length)
    ends: list[int | None] = [*starts[1:], None]
    return tuple(
        Clip(
            video=video,
            first_keyframe=a,
            end_keyframe=b,
            start_s=float(a),
            end_s=None if b is None else float(b),
            start_frame=a,
            end_frame=b,
        )
        for a, b in zip(starts, ends, strict=True)
    )


def make_task(*clips: Clip, generation: int = 0, output: str | None = None) -> Task:
    return Task(clips=clips, sampling=SAMPLING, generation=generation, output=output, cost_s=12.5)


def make_frames(first: int, end: int, *, context: bool = False, has_pts: bool = True) -> Frames:
    """Frames [first, end) of a video; with `context` the one before `first` as item 0."""
    index = np.arange(first - int(context), end, dtype=np.int64)
    n = len(index)
    return Frames(
        frame_index=index,
        pts=index * 90_000,
        has_pts=np.full(n, has_pts),
        time_s=index.astype(np.float64),
        covers_s=np.ones(n),
        is_keyframe=index % 2 == 0,
        is_corrupt=np.zeros(n, np.bool_),
        source_px=np.full((n, 2), 64, np.int64),
        ordinal=index,
        pixels={},
        context=context,
    )


def make_spec(
    name: str = "scene",
    gives: Sequence[Any] = ("detections", "labels", "embeddings", "features"),
    **changes: Any,
) -> ModelSpec:
    facts: dict[str, Any] = {
        "version": "v1",
        "adapter": "builtin",
        "kind": "test",
        "geometry": Geometry(width_px=8, height_px=8),
        "gives": tuple(gives),
        "labels": ("bike", "car", "dog"),
        "features": ("sharpness", "brightness"),
        "dim": 4,
        "fingerprint": digest(["model", name]),
    }
    return ModelSpec(name=name, **(facts | changes))


def make_output(spec: ModelSpec | None = None) -> Output:
    return output_of(spec, SAMPLING)


def make_predictions(n: int, rng: np.random.Generator, boxes: int = 2) -> Predictions:
    """Two labels, one to some boxes, a vector and two features for each of n items."""
    item = np.repeat(np.arange(n), 2)
    found = np.repeat(np.arange(n), rng.integers(1, boxes + 1, n))
    corners = rng.random((len(found), 2, 2), dtype=np.float32)
    return Predictions(
        n=n,
        embeddings=rng.random((n, 4), dtype=np.float32),
        features=rng.random((n, 2), dtype=np.float32),
        labels=LabelRows(
            item=item,
            label_id=np.tile([0, 2], n),
            score=rng.random(2 * n, dtype=np.float32),
        ),
        boxes=BoxRows(
            item=found,
            label_id=rng.integers(0, 3, len(found)),
            score=rng.random(len(found), dtype=np.float32),
            xyxy=np.concatenate([corners.min(1), corners.max(1)], axis=1),
        ),
    )


def make_outcome(
    clip: Clip,
    frames: int,
    status: Literal["ok", "partial", "failed"] = "ok",
    **changes: Any,
) -> Outcome:
    """How a clip of `frames` frames ended."""
    facts: dict[str, Any] = {
        "start_s": clip.start_s,
        "end_s": clip.start_s + frames,
        "start_frame": clip.start_frame,
        "end_frame": clip.start_frame + frames,
        "frames": 0 if status == "failed" else frames,
        "frames_decoded": frames,
        "decode_errors": 0,
        "corrupt_frames": 0,
        "fallback": None,
        "device": "cpu",
    }
    if status != "ok":
        facts |= {"reason": "it broke", "stage": "decode", "kind": "truncated", "advice": "wait"}
    return Outcome(clip=clip, status=status, **(facts | changes))


def make_info() -> VideoInfo:
    return VideoInfo(
        container="mp4",
        codec="h264",
        width_px=1920,
        height_px=1080,
        rotation_deg=0,
        time_base=Fraction(1, 90_000),
        rate=Fraction(30_000, 1001),
        start_s=0.5,
        duration_s=10.0,
        frame_count=None,
        audio_codec=None,
        audio_rate_hz=None,
    )
